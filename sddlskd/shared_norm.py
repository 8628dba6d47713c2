"""BatchNorm over the images of all ranks.

Shapes: B batch, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["SharedBatchNorm", "Sharing"]

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Sharing:
    """Whether the ranks hold different images of a batch, and how many ranks there are."""

    ranks: int
    divided: bool = True


class SharedBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm, on the CPU too, which it refuses; where a batch is not divided, plain BatchNorm.

    Mean and variance over the values of all ranks, whose counts may differ; running_var takes the unbiased variance,
    as BatchNorm's does (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2).
    """

    sharing: Sharing

    @classmethod
    def into(cls, model: nn.Module, sharing: Sharing) -> nn.Module:
        """Put one in the place of each BatchNorm of `model`: the same parameters, buffers and names.

        ValueError for a kind of BatchNorm that does something else beside.
        """
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and type(module) not in KINDS:
                raise ValueError(
                    f"{name} is a {type(module).__name__}, which is not known to share its statistics over ranks; "
                    f"use trainer.devices=1, or a network with {', '.join(kind.__name__ for kind in KINDS)}"
                )
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) in KINDS:
                    own = cls(1)
                    own.__dict__.update(child.__dict__, sharing=sharing)
                    setattr(module, name, own)
        return model

    def forward(self, input: Tensor) -> Tensor:
        if self.training and not self.sharing.divided:
            return _BatchNorm.forward(self, input)
        if not self.training or input.device.type == "cuda":
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        axes = [axis for axis in range(x.dim()) if axis != 1]
        sums: Tensor = all_reduce(torch.cat((x.sum(axes), x.new_tensor([x.numel() / x.shape[1]]))))  # type: ignore[no-untyped-call]
        count, mean_C = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred = x - _along(mean_C, x)
        variance_C = all_reduce(centred.square().sum(axes)) / count  # type: ignore[no-untyped-call]
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
    """values_C for the channels of x, (B, C, ...)."""
    return values_C.view(1, -1, *[1] * (x.dim() - 2))
