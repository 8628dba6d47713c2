"""Correlation congruence (CC).

Source: Peng et al. 2019 (arXiv:1904.01802), as RepDistiller computes it. The paper's correlations
are an option.

Shapes: B batch, C channels of the pooled features, D channels of an embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method
from sddlskd.models import Taps

__all__ = ["CC", "LinearEmbed"]

FORMS = ("neighbours", "gaussian")


class LinearEmbed(nn.Module):
    """A linear embedding.

    Args:
        channels: Channels of the pooled features.
        dim: Channels of the embedding.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, dim)

    def forward(self, pooled_BC: Tensor) -> Tensor:
        """Return the embeddings B D of pooled features."""
        embedding_BD: Tensor = self.linear(pooled_BC)
        return embedding_BD


class CC(Method):
    """The distance between the correlations of the images' embeddings in the two networks.

    Both embeddings are trained.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        dim: D.
        form: "neighbours" for the released form, which multiplies the differences of each image
            and of the next one in the batch; "gaussian" for the paper's form, which compares the
            Gaussian kernels of all pairs of images.
        gamma: The paper's gamma, of the Gaussian kernel.
        order: The order of the kernel's Taylor series.

    Raises:
        ValueError: If a network has no taps, or if the form is unknown.
    """

    needs = frozenset({"pooled"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        dim: int = 128,
        form: str = "neighbours",
        gamma: float = 0.4,
        order: int = 2,
    ) -> None:
        super().__init__(student, teacher)
        if form not in FORMS:
            raise ValueError(f"form={form!r} is unknown; choose one of: {', '.join(FORMS)}")
        self.form, self.gamma, self.order = form, gamma, order
        self.embed_s = LinearEmbed(student.pooled.shape[1], dim)
        self.embed_t = LinearEmbed(teacher.pooled.shape[1], dim)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the distance of the correlations; 0 for a batch of one image."""
        own_BD, other_BD = self.embed_s(student.pooled), self.embed_t(teacher.pooled)
        if self.form == "gaussian":
            return (self._kernel(own_BD) - self._kernel(other_BD)).square().mean()
        difference_BD = (own_BD - other_BD).abs()
        # One image has no neighbour: the sum is empty, and a mean would be NaN.
        pairs = max(len(difference_BD) - 1, 1)
        loss: Tensor = (difference_BD[:-1] * difference_BD[1:]).sum() / pairs
        return loss

    def _kernel(self, embedding_BD: Tensor) -> Tensor:
        """Return the Taylor series B B of exp(-gamma |x - y|^2) for unit vectors x and y."""
        unit_BD = F.normalize(embedding_BD, dim=1)
        product_BB = unit_BD @ unit_BD.mT
        terms = [
            (2 * self.gamma) ** p / math.factorial(p) * product_BB**p for p in range(self.order + 1)
        ]
        return math.exp(-2 * self.gamma) * torch.stack(terms).sum(0)
