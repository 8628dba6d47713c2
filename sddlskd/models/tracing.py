"""Record every function call of a network's forward pass, and repeat recorded calls."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

__all__ = [
    "TOLERANCE",
    "Step",
    "Trace",
    "again",
    "dropout_probability",
    "emptied",
    "equal",
    "listening",
    "same_values",
]

TOLERANCE = 1e-4  # relative to the largest absolute logit or to 1, whichever is larger


class Step(NamedTuple):
    """A recorded function call inside the module named `owner`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    owner: str

    @property
    def name(self) -> str:
        """Return the name of the function without its module, such as "dropout"."""
        full = resolve_name(self.function) or repr(self.function)
        return full.removesuffix(".__get__").rpartition(".")[2]

    @property
    def sources(self) -> list[Tensor]:
        """Return the arguments that are tensors."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    def __str__(self) -> str:
        owner = f"`{self.owner}`" if self.owner else "the forward of the network itself"
        return f"{self.name} in {owner}"


class Trace(TorchFunctionMode):
    """Recorder of the function that made each tensor, and of the input and output of each module.

    For a module that runs more than once, the record keeps the last input and the last output.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in network.named_modules()}
        self.inside: list[str] = []
        self.made: dict[int, Step] = {}  # the call that made each tensor, by id
        self.kept: list[Tensor] = []  # keeps ids unique: a freed tensor's id could be used again
        # By id of the tensor: the calls that changed the tensor in place, and dropout calls, which
        # return their input in eval mode.
        self.touched: dict[int, list[Step]] = {}
        self.took: dict[str, Tensor] = {}  # each module's input, by module name
        self.gave: dict[str, Tensor] = {}  # each module's output, by module name
        # The version of each module's output when the module ended, by module name. A later change
        # of the output in place raises the version of the tensor.
        self.given: dict[str, int] = {}
        self.runs: Counter[str] = Counter()  # how often each module ran, by module name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = self.inside[-1] if self.inside else ""
        step = Step(func, tuple(args), dict(kwargs or {}), owner)
        versions = [source._version for source in step.sources]
        result = func(*args, **step.kwargs)
        if not isinstance(result, Tensor):
            return result
        for source, version in zip(step.sources, versions, strict=True):
            if result is source:
                if step.name == "dropout" or result._version != version:
                    self.touched.setdefault(id(result), []).append(step)
                return result
        self.kept.append(result)
        self.made[id(result)] = step
        return result

    def enter(self, module: nn.Module, args: Any) -> None:
        """Record the input of a module that starts, if its only positional argument is a tensor."""
        self.inside.append(self.names[module])
        if len(args) == 1 and isinstance(args[0], Tensor):
            self.took[self.names[module]] = args[0]

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        """Record the output of a module that ends, if the output is a tensor.

        Args:
            module: Module that ends.
            args: Unused.
            result: Output of the module.
        """
        name = self.inside.pop()
        self.runs[name] += 1
        if isinstance(result, Tensor):
            self.gave.pop(name, None)  # keeps `gave` in the order of the last outputs
            self.gave[name] = result
            self.given[name] = result._version


@contextmanager
def listening(network: nn.Module, trace: Trace) -> Iterator[None]:
    """Let a trace record the modules of a network for the duration of a `with` block."""
    with ExitStack() as stack:
        for module in network.modules():
            stack.callback(module.register_forward_pre_hook(trace.enter).remove)
            stack.callback(module.register_forward_hook(trace.leave).remove)
        yield


def again(step: Step, value: Tensor) -> Tensor:
    """Return the result of a recorded function for another tensor than the recorded one."""
    step = _with_tensor(step, value)
    result: Tensor = step.function(*step.args, **step.kwargs)
    return result


def _with_tensor(step: Step, tensor: Tensor) -> Step:
    """Return the step with each of its tensors replaced by `tensor`."""
    args = list(step.args)
    for index, argument in enumerate(args):
        if isinstance(argument, Tensor):
            args[index] = tensor
    kwargs = dict(step.kwargs)
    for name, argument in kwargs.items():
        if isinstance(argument, Tensor):
            kwargs[name] = tensor
    return step._replace(args=tuple(args), kwargs=kwargs)


def emptied(step: Step) -> Step:
    """Return the step with empty tensors, since its own tensors would stay in memory."""
    return _with_tensor(step, torch.empty(0))


def same_values(step: Step, value: Tensor) -> Tensor | None:
    """Return the step's input tensor if the step only reshaped it or left it unchanged, else None.

    Dropout in eval mode leaves its input unchanged.
    """
    sources = step.sources
    if len(sources) != 1 or sources[0].numel() != value.numel() or len(sources[0]) != len(value):
        return None
    return sources[0] if equal(sources[0].flatten(1), value.flatten(1)) else None


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors agree up to TOLERANCE; on the meta device only shapes count."""
    return a.shape == b.shape and (
        a.is_meta or torch.allclose(a.float(), b.float(), TOLERANCE, TOLERANCE)
    )


def dropout_probability(step: Step) -> float:
    """Return the probability p of a recorded call of F.dropout."""
    return float(
        inspect.signature(F.dropout).bind(*step.args, **step.kwargs).arguments.get("p", 0.5)
    )
