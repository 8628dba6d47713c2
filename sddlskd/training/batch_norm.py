"""BatchNorm whose statistics cover the images of all ranks (the processes that share a batch).

Shapes: B batch, C channels.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Sharing", "share_norm"]

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Sharing:
    """Mutable state from which BatchNorm layers learn whether the ranks hold different images.

    The ranks are the processes that share each batch. `Ranks.images_of_step` sets `divided` before
    each step, and layers of the class `SharedBatchNorm` read this attribute.

    Attributes:
        divided: whether the ranks hold different images of the current batch. False means that
            every rank holds the whole batch.
    """

    divided: bool = True


def share_norm(model: nn.Module, device: torch.device, sharing: Sharing) -> nn.Module:
    """Replace every BatchNorm of a network by one whose training statistics cover all ranks.

    The ranks are the processes that share each batch. The parameters and buffers of the network and
    their names stay the same. If `device` is CUDA, the new layers are torch's SyncBatchNorm, else
    `SharedBatchNorm`. SyncBatchNorm does not look at `sharing`: if every rank holds the whole
    batch, each image counts once per rank, and running_var becomes slightly smaller than with plain
    BatchNorm.

    Args:
        model: the network, which is changed in place.
        device: device that the network is trained on.
        sharing: state that tells `SharedBatchNorm` whether the ranks hold different images.

    Returns:
        The network with the new layers.

    Raises:
        ValueError: If a BatchNorm of the network is of another class than nn.BatchNorm1d,
            nn.BatchNorm2d and nn.BatchNorm3d. SyncBatchNorm and lazy layers are such classes.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and type(module) not in KINDS:
            raise ValueError(
                f"{name} is a {type(module).__name__}, which is not known to share its statistics "
                "over processes; use trainer.devices=1, or a network with "
                f"{', '.join(kind.__name__ for kind in KINDS)}"
            )
    if device.type == "cuda":
        shared: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return shared
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in KINDS:
                own = SharedBatchNorm(1)
                own.__dict__.update(child.__dict__, sharing=sharing)
                setattr(module, name, own)
    return model


class SharedBatchNorm(_BatchNorm):
    """BatchNorm layer whose training statistics cover the images of all ranks.

    The ranks are the processes that share each batch; they may hold different numbers of images. In
    eval mode, or if `sharing.divided` is False, the layer is plain BatchNorm. As in BatchNorm,
    running_var is updated with the unbiased variance. Gradients also flow through the statistics of
    all ranks. `share_norm` puts such layers into a network.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithms 1 and 2.

    Attributes:
        sharing: state that says whether the ranks hold different images of the current batch.
    """

    sharing: Sharing

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any shape; the replaced layer checks the shape if the network runs on one rank."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised `input` (B, C, ...), with its shape and dtype.

        In training mode, all ranks must call the layer together if they hold different images of a
        batch. The statistics are then computed in float32 if `input` is float16 or bfloat16. If
        every rank holds the whole batch, one value per channel raises ValueError in training mode,
        as in BatchNorm.
        """
        if not self.training or not self.sharing.divided:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        axes = [axis for axis in range(x.dim()) if axis != 1]
        sums = _over_ranks(torch.cat((x.sum(axes), x.new_tensor([x.numel() / x.shape[1]]))))
        count, mean_C = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred = x - _along(mean_C, x)
        variance_C = _over_ranks(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._remember(mean_C.detach(), variance_C.detach() * count / (count - 1))
        normal = centred * _along((variance_C + self.eps).rsqrt(), x)
        if self.affine:
            normal = normal * _along(self.weight, x) + _along(self.bias, x)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), factor)


def _along(values_C: Tensor, x: Tensor) -> Tensor:
    """Return values_C as a view that broadcasts over x, which has the shape (B, C, ...)."""
    return values_C.view(1, -1, *[1] * (x.dim() - 2))


class _Sum(Function):
    """Sum over all ranks.

    The gradient is summed over all ranks, too, because the loss is the sum of the ranks' losses.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        return _reduced(values)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _reduced(gradient)


def _reduced(values: Tensor) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _over_ranks(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)
    return total
