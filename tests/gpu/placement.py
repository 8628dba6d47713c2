"""Find, without a GPU, where a step would mix devices or wait for the GPU.

Tensors on torch's "meta" device stand for those on the GPU. They have shapes and no numbers, so
nothing is computed, and reading a value is impossible. Tensors of the host stay on the CPU.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
ROOT = Path(__file__).parents[2]
COPIES = ("aten::_to_copy", "aten::copy_")


class Placement(TorchDispatchMode):
    """Collects the operations that mix devices, wait for the GPU or read a value of it.

    Attributes:
        found: each as "file:line: what it does".
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.is_meta for tensor in given)
        # A number that is a tensor of the host travels with the kernel's arguments.
        on_host = any(not tensor.is_meta and tensor.dim() for tensor in given)
        if name == "aten::_local_scalar_dense" and on_gpu:
            self._note("reads a value of the GPU")
        elif name in COPIES:
            self._note_copy(name, given, args, kwargs)
        elif on_gpu and on_host:
            self._note(f"{name} mixes tensors of the GPU and of the host")
        return func(*args, **kwargs)

    def _note_copy(self, name: str, given: list[Tensor], args: Any, kwargs: Any) -> None:
        if name == "aten::_to_copy":
            source, to_gpu = given[0], kwargs.get("device") == META
            if kwargs.get("device") is None:
                return
            waits = not kwargs.get("non_blocking")
        else:
            source, to_gpu = given[-1], given[0].is_meta
            waits = not (len(args) > 2 and args[2])
        if source.is_meta and not to_gpu:
            self._note("copies from the GPU to the host")
        elif to_gpu and not source.is_meta and waits:
            self._note("copies from the host and waits for the GPU")

    def _note(self, what: str) -> None:
        note = f"{_place()}: {what}"
        if note not in self.found:
            self.found.append(note)


def _place() -> str:
    """Return the innermost line of the package on the stack, as file:line."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "sddlskd"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "a backward pass or the check itself"


@contextmanager
def meta_as_gpu() -> Iterator[None]:
    """Let autocast accept the meta device, for the block."""
    real = torch.autocast

    def autocast(device_type: str, **options: Any) -> Any:
        return real("cpu" if device_type == "meta" else device_type, **options)

    with mock.patch.object(torch, "autocast", autocast):
        yield
