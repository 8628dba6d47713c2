"""Choose and check the device of a job, and set how it computes: seed, precision, compilation."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sddlskd.processes.cores import check_processes

__all__ = [
    "DeviceFailure",
    "autocast",
    "check_memory",
    "check_places",
    "compiled",
    "describe",
    "device_failure",
    "number_formats",
    "pick_device",
    "seeded",
]

RANK_MB = 200  # memory of a process that has imported torch, in megabytes
_COMPILE_MODES = {"max_autotune": "max-autotune-no-cudagraphs"}
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Errors of CUDA that no job can cause. A failed assertion of a kernel ("device-side assert") is not
# among them: a label that is out of range causes it, and every device would fail at that job.
_BROKEN = re.compile(
    r"No CUDA GPUs are available|Found no NVIDIA driver|CUDA driver initialization failed"
    r"|CUDA unknown error|GPU is lost"
    r"|CUDA error: (?:.*\bECC\b|no CUDA-capable device|CUDA-capable device\(s\) is/are busy"
    r"|.*no longer available|initialization error|driver shutting down|hardware stack error"
    r"|invalid device ordinal|system (?:not yet initialized|has unsupported|driver mismatch)"
    r"|unknown error|no kernel image is available|.*[Nn][Vv][Ll]ink)"
)


class DeviceFailure(ValueError):
    """Error for a device that is missing or broken, whatever the job; others may train the job.

    Args:
        message: what is wrong with the device.
        place: index of the device among those that share each batch; kept as the attribute `place`.
            None if the job has a single device.
    """

    def __init__(self, message: str, place: int | None = None) -> None:
        super().__init__(message)
        self.place = place


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random generators for a `with` block, and restore the CPU's generator after it.

    If `device` is CUDA, the generator of `device` is restored, too.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context for the networks' forward pass.

    `precision` is "fp32" (autocast is disabled), "bf16" or "fp16"; any other text raises KeyError.
    Compute losses outside of the context, in float32.
    """
    dtype = _DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Return a function or network with torch.compile applied.

    `mode` is the setting trainer.compile_mode: "default" or "max_autotune". torch's modes that
    record CUDA graphs themselves are not used, because whole training steps are recorded.
    """
    if mode == "default":
        return torch.compile(function)
    return torch.compile(function, mode=_COMPILE_MODES[mode])


@contextmanager
def number_formats(tf32: bool) -> Iterator[None]:
    """Choose for a `with` block how a GPU computes in float32, and let cuDNN pick fast algorithms.

    If `tf32` is true, convolutions round their float32 inputs to TF32, which keeps 10 bits of the
    mantissa. Matrix products, which the losses need, keep full float32. cuDNN times its algorithms
    and takes the fastest (cudnn.benchmark). The earlier settings of torch are restored at the end.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, tf32, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def describe(device: torch.device) -> str:
    """Return a short text about a device for records.

    For CUDA, the text is the name of the GPU and how it computes now, such as "NVIDIA H100, TF32
    convolutions, cudnn.benchmark". Otherwise it is the device type and the number of CPU threads,
    such as "cpu, 16 threads".
    """
    if device.type != "cuda":
        return f"{device.type}, {torch.get_num_threads()} threads"
    words = [torch.cuda.get_device_name(device)]
    if torch.backends.cudnn.allow_tf32:
        words.append("TF32 convolutions")
    if torch.backends.cudnn.benchmark:
        words.append("cudnn.benchmark")
    return ", ".join(words)


def pick_device(name: str, place: int = 0, places: int = 1) -> torch.device:
    """Return the torch device of this process, after checking that the device is available.

    Args:
        name: the setting trainer.device: "auto", "cpu", "cuda", "cuda:<n>" or "mps". "auto" prefers
            CUDA, then MPS, then the CPU.
        place: index of this process among those on this machine that share a batch (local rank).
        places: number of processes on this machine that share a batch. With CUDA, each process
            needs a GPU of its own.

    Returns:
        The device. For several processes on CUDA it is GPU number `place`, or GPU 0 if this process
        sees only one GPU.

    Raises:
        ValueError: If the device is unknown or unavailable. For several processes also if the
            device is MPS or one numbered GPU ("cuda:<n>"), or if there is no GPU number `place`.
    """
    device = _device(name)
    if places == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(
            f"trainer.device={name} is one device for {places} processes; use cuda or cpu"
        )
    count = torch.cuda.device_count()
    # A scheduler may show each process only its own GPU, as cuda:0. If two processes share one GPU,
    # nccl raises an error later.
    if count == 1:
        return torch.device("cuda", 0)
    if place >= count:
        raise ValueError(
            f"trainer.devices={places} asks for more GPUs than the {count} here; give 1..{count}"
        )
    return torch.device("cuda", place)


def check_places(name: str, places: int) -> None:
    """Raise ValueError unless `places` processes on this machine can share a batch.

    `name` is the setting trainer.device, as for `pick_device`. Several processes need CUDA, with
    one GPU each, or the CPU, with one core each. The environment variable SDDLSKD_MOST_PROCESSES,
    if set, replaces the number of cores. An unknown or unavailable device raises ValueError, too.
    Raise DeviceFailure if CUDA finds fewer GPUs than the variable CUDA_VISIBLE_DEVICES names for
    these processes: CUDA hides the first missing GPU and all that are named after it.
    """
    if name == "cuda":
        _check_named_gpus(places)
    device = pick_device(name, 0, places)
    if device.type == "cpu":
        check_processes("trainer.devices", places, RANK_MB)
    elif device.type == "cuda" and places > (count := torch.cuda.device_count()):
        raise ValueError(
            f"trainer.devices={places} asks for more GPUs than the {count} here; give 1..{count}"
        )


def _check_named_gpus(places: int) -> None:
    """Raise DeviceFailure if CUDA does not find the first `places` GPUs that a variable names."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    found = torch.cuda.device_count()
    if found < places <= len(named):
        raise DeviceFailure(
            f"CUDA does not find GPU {named[found]}, which CUDA_VISIBLE_DEVICES names; name GPUs "
            "of this machine there, or use trainer.device=cpu",
            found,
        )


def device_failure(error: BaseException) -> DeviceFailure | None:
    """Return the failure of a device that caused an error, or None if no device has failed.

    Errors count that no job can cause, such as a GPU that is missing, lost or has broken memory.
    Neither running out of memory counts nor a failed assertion of a kernel.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, DeviceFailure):
            return link
        if isinstance(link, RuntimeError) and not isinstance(link, torch.OutOfMemoryError):
            said = str(link).partition("\n")[0]
            if _BROKEN.search(said):
                return DeviceFailure(said)
        link = link.__cause__ or link.__context__
    return None


def check_memory(setting: str, needed: float, device: torch.device) -> None:
    """Raise ValueError if a device has less free memory than a setting needs.

    Args:
        setting: key and value of the setting, such as "dataset.size=224", for the message.
        needed: number of bytes that the setting needs at least.
        device: the device. If its free memory is unknown, the check passes. The free memory is
            known for CUDA, and on Linux for the CPU.

    Raises:
        ValueError: If fewer than `needed` bytes are free.
    """
    free = _free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{setting} needs {needed / 1e9:.1f} GB of memory, and {device} has {free / 1e9:.1f} "
            "GB free; lower it, or use a smaller data set or another device"
        )


def _free_memory(device: torch.device) -> int | None:
    """Return the number of free bytes on a device, or None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = Path("/proc/meminfo")
    if device.type == "cpu" and facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


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
            raise DeviceFailure(
                f"trainer.device={name} needs CUDA, and none is available here; "
                "use trainer.device=cpu or auto"
            )
        if (device.index or 0) >= count:
            raise DeviceFailure(
                f"trainer.device={name} does not exist; this machine has cuda:0 to cuda:{count - 1}"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceFailure(
                "trainer.device=mps is not available here; use trainer.device=cpu or auto"
            )
    elif device.type != "cpu":
        raise ValueError(f"trainer.device={name} is unknown; valid are {valid}")
    return device
