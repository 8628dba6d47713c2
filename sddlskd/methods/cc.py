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
    """Linear layer with a bias that embeds pooled features.

    Args:
        channels: C, channels of the pooled features.
        dim: D, channels of the embedding.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, dim)

    def forward(self, pooled_BC: Tensor) -> Tensor:
        """Return the embeddings (B, D) of pooled features (B, C)."""
        embedding_BD: Tensor = self.linear(pooled_BC)
        return embedding_BD


class CC(Method):
    """Loss of CC: the difference between the correlations of image embeddings in two networks.

    Two linear layers embed the pooled features (the input of the classifier), one for each network.
    Both layers are trained. The loss has one of two forms:
    - "neighbours" (released code): d_i is the absolute difference between the student's and the
      teacher's embedding of image i, a vector of D entries. The loss is the sum over i of the dot
      product of d_i and d_(i+1), divided by B - 1. Image i+1 is the next image of the batch.
    - "gaussian" (paper): the kernel of two images is exp(-gamma |x - y|^2). x and y are their
      embeddings in one network, scaled to length 1. The loss is the squared difference between the
      student's and the teacher's kernel, averaged over all B x B pairs of images. The kernel is
      computed as a Taylor series.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        dim: D, channels of the embeddings.
        form: "neighbours" or "gaussian".
        gamma: gamma of the Gaussian kernel; unused for "neighbours".
        order: Highest power in the Taylor series; unused for "neighbours".

    Raises:
        ValueError: If a network shows no pooled features, or if `form` is unknown.
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
        """Return the loss of a batch in the form that was chosen, a scalar.

        Args:
            student: Maps of the student; `pooled`, (B, C), is read.
            teacher: Maps of the teacher, without gradients; `pooled` is read.
            batch: Unused.

        Returns:
            The mean over pairs of images; 0 for a batch of one image.
        """
        own_BD, other_BD = self.embed_s(student.pooled), self.embed_t(teacher.pooled)
        if self.form == "gaussian":
            return (self._kernel(own_BD) - self._kernel(other_BD)).square().mean()
        difference_BD = (own_BD - other_BD).abs()
        # One image has no neighbour: the sum is empty, and dividing by 0 pairs would give NaN.
        pairs = max(len(difference_BD) - 1, 1)
        loss: Tensor = (difference_BD[:-1] * difference_BD[1:]).sum() / pairs
        return loss

    def _kernel(self, embedding_BD: Tensor) -> Tensor:
        """Return exp(-gamma |x - y|^2), as a Taylor series, for all pairs of images, (B, B).

        x and y are the embeddings, scaled to length 1.
        """
        unit_BD = F.normalize(embedding_BD, dim=1)
        product_BB = unit_BD @ unit_BD.mT
        terms = [
            (2 * self.gamma) ** p / math.factorial(p) * product_BB**p for p in range(self.order + 1)
        ]
        return math.exp(-2 * self.gamma) * torch.stack(terms).sum(0)
