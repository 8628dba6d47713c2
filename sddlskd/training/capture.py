"""Record the work that a function starts on the device, and repeat the recording with one call.

A training step of small networks is hundreds of short kernels (programs of the GPU), and starting
them one by one takes longer than computing them. A CUDA graph is a recording of kernels that is
started as a whole. It repeats the same kernels on the same memory, with the numbers that Python
gave them when they were recorded. So everything that changes between two calls must lie in tensors
that keep their place in memory.

On the CPU there are no CUDA graphs. A stand-in keeps the function and calls it again, so that the
code around it is the same on both devices.
"""

import logging
import random
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Captured", "Watch"]

# Operations whose result or whose success the host must know before it can go on.
READ_BY_HOST = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
        *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
        *("_linalg_svd", "_linalg_eigh", "linalg_eig", "_linalg_eigvals", "_linalg_check_errors"),
    )
)
# Graphs whose recording failed. The random generator of older versions of torch still uses them.
FAILED: list[torch.cuda.CUDAGraph] = []
INDEXED = frozenset(f"aten::{name}" for name in ("index", "index_put", "index_put_"))


class Captured:
    """Caller of a function that records the function's work as a CUDA graph, and replays the graph.

    A call names the function, the tensors that it reads and the Python values that its work depends
    on:

    - The first call with certain tensors (the same memory) and values runs the function, and checks
      whether the function can be recorded.
    - The second such call records the function. This call and all later ones replay the recording.
    - A call with tensors or values other than those of the recording drops the recording and begins
      anew.
    - If the function cannot be recorded, a message says so once, and from then on all calls just
      run the function.

    On the CPU, a replay calls the function that was recorded. On CUDA, all work runs on a stream of
    its own. This stream waits for the work that the current stream was given before the call, and
    `wait` makes the current stream wait for this stream.

    Args:
        what: what the function computes, in the plural, for messages, such as "steps".
        device: device that the function computes on.
        log: log for the message that says why nothing is recorded.
        watched: whether `Watch` checks in the first call for operations that cannot be recorded.
            Set it to false for functions with torch.compile, which cannot be checked; an error
            while such a function is recorded is noticed anyway.

    Attributes:
        reason: why the function is not recorded; "" if it can be.
        replays: number of calls that replayed a recording.
    """

    def __init__(
        self,
        what: str,
        device: torch.device,
        log: logging.Logger,
        *,
        watched: bool = True,
    ) -> None:
        self.reason = ""
        self.replays = 0
        self._what, self._device, self._log = what, device, log
        self._watched = watched
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._has_work = False
        self._graph: _Graph | _StandIn | None = None
        # Tensors and values of the recording, and those of the last call that was watched.
        self._key: Hashable = None
        self._seen: Hashable = None
        # As long as the recording exists, its memory must not be given to other tensors.
        self._kept: list[Tensor] = []

    def __call__(
        self, function: Callable[[], None], reads: Sequence[Tensor], baked: Hashable
    ) -> None:
        """Call a function, or replay its recording.

        Args:
            function: the function, which writes its results into tensors that exist already.
            reads: the tensors that the function reads, except those that are the same tensors in
                every call, such as weights.
            baked: the Python values that the function's work depends on. A recording keeps the
                values of the call that was recorded.

        Raises:
            torch.OutOfMemoryError: If the device is full.
            Exception: Any error that the function raises when it is called.
        """
        key = tuple(map(_place, reads)), baked
        with self._on_stream():
            if self._graph is not None and key == self._key:
                self._repeat()
            elif self.reason:
                function()
            elif key != self._seen:
                self.release()
                self._watch(function)
                self._seen = key
            elif self._record(function):
                self._key, self._kept = key, list(reads)
                self._repeat()
            else:
                function()

    def plainly(self, function: Callable[[], None]) -> None:
        """Call a function without recording it, on the stream on which recordings are replayed."""
        with self._on_stream():
            function()

    def wait(self) -> None:
        """Make the current CUDA stream wait for the work of all calls so far; the host goes on."""
        if self._has_work and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._has_work = False

    def release(self) -> None:
        """Drop the recording, if there is one, and free its memory."""
        if self._graph is not None and self._stream is not None:
            self._stream.synchronize()  # the memory may be in use
        self._graph, self._key, self._kept = None, None, []

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None or self.reason:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._has_work = True
        with torch.cuda.stream(self._stream):
            yield

    def _repeat(self) -> None:
        assert self._graph is not None
        self._graph.replay()
        self.replays += 1

    def _watch(self, function: Callable[[], None]) -> None:
        """Call a function and find out whether it can be recorded."""
        before = _random_state(self._device)
        if not self._watched:
            function()
            found = []
        else:
            with Watch(self._device) as watch:
                function()
            found = watch.found
        if found:
            self._refuse(found[0])
        elif _random_state(self._device) != before:
            self._refuse("random numbers are drawn")

    def _record(self, function: Callable[[], None]) -> bool:
        """Record a function, and return whether that went well."""
        try:
            if self._stream is None:
                self._graph = _StandIn(function)
            else:
                self._graph = _Graph(function, self._stream)
        # The work of any network may fail to be recorded, in any way. A full device is no error
        # either: without a recording, the function needs less memory.
        except Exception as error:
            self._refuse(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return False
        return True

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        self.release()
        self._log.info("%s are not captured, but started kernel by kernel: %s", self._what, reason)


class _Graph:
    """A CUDA graph of a function, with a pool of memory of its own.

    Graphs that run at the same time must not share a pool.
    """

    def __init__(self, function: Callable[[], None], stream: torch.cuda.Stream) -> None:
        try:
            self._graph = _recorded(function, stream)
        except Exception:
            # After a failure, the random generator and the allocator of older versions of torch
            # go on as if they were recorded, until a recording goes well.
            number = torch.zeros((), device=stream.device)
            _recorded(lambda: number.zero_(), stream)
            raise

    def replay(self) -> None:
        self._graph.replay()


def _recorded(function: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of a function; raise any error of the function or of the recording."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as those that send records to MLflow, do not concern the recording.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    except Exception:
        FAILED.append(graph)
        raise
    return graph


class _StandIn:
    """A substitute for a CUDA graph, which calls the function again."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.replay = function


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that lists the operations in its block that a CUDA graph cannot record.

    Such an operation hands a value or a size to the host, as `item()` does, or copies values from
    the host to the device. `torch.tensor` with a device is not noticed; on CUDA, recording this
    call raises an error. Operations inside torch.optim are never listed: the optimizers in
    `optimisation.CAPTURED_OPTIMIZERS` copy nothing between host and GPU.

    Args:
        device: the device of the operations to check.

    Attributes:
        found: the operations that cannot be recorded, each as "file:line: what it does"; [] if
            there are none.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self._type = device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in given if tensor.device.type == self._type]
        if ours and name in READ_BY_HOST:
            self._note(f"the host waits for {name.removeprefix('aten::')}")
        elif ours and name in INDEXED and any(tensor.dtype == torch.bool for tensor in given[1:]):
            self._note("a mask selects a number of values that the host must know")
        elif name in ("aten::_to_copy", "aten::copy_"):
            source = given[-1].device.type
            target = torch.device(kwargs.get("device") or given[0].device).type
            if source != target and self._type in (source, target):
                self._note("values are copied between the host and the device")
        return func(*args, **kwargs)

    def _note(self, what: str) -> None:
        frames = traceback.extract_stack()
        if any("torch/optim/" in frame.filename for frame in frames):
            return
        note = f"{_innermost(frames)}: {what}"
        if note not in self.found:
            self.found.append(note)


def _place(tensor: Tensor) -> Hashable:
    """Return what identifies the memory of a tensor and how the memory is read."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _random_state(device: torch.device) -> Hashable:
    """Return the state of all random generators that a network may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    of_numpy: Any = np.random.get_state()
    arrays = [np.asarray(part) for part in (*states, *of_numpy)]
    return random.getstate(), *(array.tobytes() for array in arrays)


def _innermost(frames: traceback.StackSummary) -> str:
    """Return the innermost line of the package on a stack, as file:line."""
    package = Path(__file__).parents[1]
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(package) and path != Path(__file__):
            return f"{path.relative_to(package.parent)}:{frame.lineno}"
    return "a backward pass"
