"""Devices and number formats: what `trainer.device` and `trainer.precision` mean."""

import torch

__all__ = ["autocast", "check_places", "describe", "pick_device"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context for the networks' forward pass; losses leave it and are computed in float32."""
    dtype = _DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def describe(device: torch.device) -> str:
    """The device in words: its name, or how many CPU threads are used."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def pick_device(name: str, place: int = 0, places: int = 1) -> torch.device:
    """auto, cpu, cuda, cuda:<n> or mps as a device that is here. Raises ValueError naming the value and the cure.

    place: of this process among the `places` that share a batch on this machine; each takes a GPU of its own.
    """
    device = _device(name)
    if places == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(
            f"trainer.device={name} is one device for {places} processes; use cuda or cpu"
        )
    count = torch.cuda.device_count()
    if (
        count == 1
    ):  # a scheduler shows each process its own GPU; nccl refuses one that two processes share
        return torch.device("cuda", 0)
    if place >= count:
        raise ValueError(
            f"trainer.devices={places} asks for more GPUs than the {count} here; give 1..{count}"
        )
    return torch.device("cuda", place)


def check_places(name: str, places: int) -> None:
    """Raises ValueError unless `places` processes that are started here can share a batch on this device."""
    device = pick_device(name, 0, places)
    count = torch.cuda.device_count() if device.type == "cuda" else places
    if places > count:
        raise ValueError(
            f"trainer.devices={places} asks for more GPUs than the {count} here; give 1..{count}"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        best = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        return torch.device(best)
    valid = "auto, cpu, cuda, cuda:<number> or mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"trainer.device={name} is unknown; valid are {valid}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ValueError(
                f"trainer.device={name} needs CUDA, and none is available here; use trainer.device=cpu or auto"
            )
        if (device.index or 0) >= count:
            raise ValueError(
                f"trainer.device={name} is not here; this machine has cuda:0 to cuda:{count - 1}"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(
                "trainer.device=mps is not available here; use trainer.device=cpu or auto"
            )
    elif device.type != "cpu":
        raise ValueError(f"trainer.device={name} is unknown; valid are {valid}")
    return device
