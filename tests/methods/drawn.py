"""Taps and batches drawn under a seed, and the gradients of a loss with respect to the taps."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from sddlskd.data.device import Batch
from sddlskd.methods import Method, Taps

Shapes = Sequence[tuple[int, int]]

# Channels and side of the stem and of each stage. The two networks differ in both.
STUDENT: Shapes = ((3, 8), (4, 8), (6, 4), (5, 2))
TEACHER: Shapes = ((4, 16), (7, 16), (5, 8), (8, 4))
RESNET8X4 = RESNET32X4 = ((32, 32), (64, 32), (128, 16), (256, 8))


def taps(
    shapes: Shapes,
    pooled: int = 6,
    *,
    seed: int = 0,
    images: int = 5,
    classes: int = 3,
    signed: bool = True,
) -> Taps:
    """Return float64 taps, all leaves that require a gradient.

    Args:
        shapes: (channels, side) of the stem and of each stage.
        pooled: channels of the pooled features.
        seed: seed of the numbers.
        images: size of the batch.
        classes: channels of the logit map, which has the side of the last stage.
        signed: whether the stages have negative values, too.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(images, *size, generator=generator, dtype=torch.float64)

    stages = [draw(channels, side, side) for channels, side in shapes]
    preacts = [stages[0], *(draw(channels, side, side) for channels, side in shapes[1:])]
    if not signed:
        stages = [stage.abs() for stage in stages]
    side = shapes[-1][1]
    drawn = Taps(draw(classes, side, side), tuple(stages), tuple(preacts), draw(pooled))
    for tap in tensors(drawn):
        tap.requires_grad_()
    return drawn


def tensors(drawn: Taps) -> list[Tensor]:
    """Return the tensors of taps; the stem counts once."""
    return [drawn.logit_map, *drawn.stages, *drawn.preacts[1:], drawn.pooled]


def detached(drawn: Taps) -> Taps:
    """Return taps without gradients, as a method gets those of the teacher."""
    stages, preacts = (tuple(tap.detach() for tap in part) for part in drawn[1:3])
    return Taps(drawn.logit_map.detach(), stages, preacts, drawn.pooled.detach())


def batch(images: int = 5, *, classes: int = 3, epoch: int = 1) -> Batch:
    """Return a batch whose labels are 0, 1, ..., 0, 1, ... and whose pixels are zeros."""
    labels = torch.arange(images) % classes
    return Batch(torch.zeros(images, 3, 8, 8), labels, torch.arange(images), None, epoch)


def assert_same(
    method: Method, expected: Tensor, student: Taps, teacher: Taps, tolerance: float = 1e-6
) -> None:
    """Check the loss of a method, and its gradients in the student's taps and its own parameters.

    Args:
        method: the method, in float64.
        expected: the loss from an independent computation, with its graph.
        student: taps of the student.
        teacher: taps of the teacher.
        tolerance: largest difference, of a gradient in relation to its largest entry.
    """
    loss = method(student, detached(teacher), batch(len(student.pooled)))
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    wanted = [*tensors(student), *method.parameters()]
    pairs = zip(gradients(loss, wanted), gradients(expected, wanted), strict=True)
    flows = False
    for own, other in pairs:
        scale = float(other.abs().max())
        flows |= scale > 0
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance * max(scale, 1e-3))
    assert flows


def gradients(loss: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of a loss, zeros for what the loss does not depend on."""
    trained = [tensor for tensor in wanted if tensor.requires_grad]
    return list(torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True))


def on_meta(shapes: Shapes, pooled: int, *, images: int = 64) -> Taps:
    """Return float32 taps without numbers, whose operations cost nothing."""

    def empty(*size: int) -> Tensor:
        return torch.empty(images, *size, device="meta", requires_grad=True)

    stages = tuple(empty(channels, side, side) for channels, side in shapes)
    return Taps(empty(100, 8, 8), stages, stages, empty(pooled))


def peak_bytes(method: Method, student: Taps, teacher: Taps) -> int:
    """Return the most bytes that a forward and a backward pass hold beside the taps."""
    shown = batch(len(student.pooled))
    shown = shown._replace(labels=shown.labels.to("meta"))
    with Peak() as peak:
        method(student, detached(teacher), shown).backward()
    return peak.most


class Peak(TorchDispatchMode):
    """Counts the bytes of the results of operations, as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0
        self._alive = weakref.WeakSet[UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor) and not result._is_view():
                self._add(result.untyped_storage())
        return results

    def _add(self, storage: UntypedStorage) -> None:
        if storage not in self._alive:
            self._alive.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, count: int) -> None:
        self.now -= count
