"""Contrastive representation distillation (CRD).

Source: Tian et al. 2020 (arXiv:1910.10699), as RepDistiller and mdistiller compute it.

Shapes: B batch, C channels of the pooled features, D channels of an embedding, K negatives of an
image, L = K + 1 its candidates (itself first), N training images, A classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch, seed_of
from sddlskd.methods.base import Method
from sddlskd.methods.draws import distinct, independent, keys_of
from sddlskd.models import Taps

__all__ = ["CRD", "Embed"]

EPS = 1e-7


class Embed(nn.Module):
    """A linear embedding of length 1.

    Args:
        channels: Channels of the pooled features.
        dim: Channels of the embedding.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, dim)

    def forward(self, pooled_BC: Tensor) -> Tensor:
        """Return the embeddings B D of pooled features."""
        return F.normalize(self.linear(pooled_BC), dim=1)


class CRD(Method):
    """A loss that tells the other network's embedding of an image from those of other images.

    For each image, the student's embedding is compared with the teacher's memory of the image
    itself and of K images of other classes, and the teacher's embedding with the student's memory.
    A memory holds a moving average of one network's embeddings of all training images.

    The K images depend on (seed, epoch, image) alone.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        labels_N: Class of each training image.
        num_classes: Number of classes.
        seed: Seed of the run.
        dim: D.
        K: The number of images of other classes.
        temperature: The temperature that the products of embeddings are divided by.
        momentum: How much of a memory is kept when an image is seen again.
        replacement: Whether the K images are drawn independently, so that some may be equal. The
            released code does so on ImageNet, and for more images than the other classes have.

    Raises:
        ValueError: If a network has no taps, if all images are of one class, if `K` is less than 1,
            or if the other classes have fewer than K images and `replacement` is false.
    """

    needs = frozenset({"pooled"})
    facts = frozenset({"labels_N", "num_classes", "seed"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        labels_N: Tensor,
        num_classes: int,
        seed: int,
        dim: int = 128,
        K: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        replacement: bool = False,
    ) -> None:
        super().__init__(student, teacher)
        N = len(labels_N)
        count_A = torch.bincount(labels_N, minlength=num_classes)
        fewest = N - int(count_A.max())
        if fewest == 0:
            raise ValueError(
                "all training images are of one class, and CRD needs images of at least 2 classes"
            )
        if isinstance(K, bool) or not isinstance(K, int) or K < 1:
            raise ValueError(f"K={K} must be an integer of at least 1")
        if fewest < K and not replacement:
            raise ValueError(
                f"K={K} is more than the {fewest} training images of other classes than the "
                f"largest one; give K of at most {fewest}, or set replacement=true"
            )
        self.K, self.temperature, self.momentum = K, temperature, momentum
        self.replacement = replacement
        self.seed = seed_of("seed", seed, "negatives of CRD")
        self.embed_s = Embed(student.pooled.shape[1], dim)
        self.embed_t = Embed(teacher.pooled.shape[1], dim)
        bound = math.sqrt(3 / dim)
        self.memory_s = nn.Buffer(torch.empty(N, dim).uniform_(-bound, bound))
        self.memory_t = nn.Buffer(torch.empty(N, dim).uniform_(-bound, bound))
        # The normalisers of the scores, of the first batch; -1 before it.
        self.z_s = nn.Buffer(torch.tensor(-1.0))
        self.z_t = nn.Buffer(torch.tensor(-1.0))
        # The images in the order of their classes, and where each class begins and how long it is.
        order_N = torch.argsort(labels_N, stable=True)
        self.order_N = nn.Buffer(order_N, persistent=False)
        self.first_A = nn.Buffer(count_A.cumsum(0) - count_A, persistent=False)
        self.count_A = nn.Buffer(count_A, persistent=False)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the contrastive losses of both networks, then bring the memories up to date."""
        own_BD, other_BD = self.embed_s(student.pooled), self.embed_t(teacher.pooled)
        index_B = batch.index.to(own_BD.device)
        index_BL = torch.cat((index_B[:, None], self.negatives(batch)), dim=1)
        loss = self._contrast(own_BD, self.memory_t, index_BL, self.z_s)
        loss = loss + self._contrast(other_BD, self.memory_s, index_BL, self.z_t)
        with torch.no_grad():
            for memory_ND, new_BD in ((self.memory_s, own_BD), (self.memory_t, other_BD)):
                mixed_BD = self.momentum * memory_ND[index_B] + (1 - self.momentum) * new_BD
                memory_ND[index_B] = F.normalize(mixed_BD, dim=1)
        return loss

    def negatives(self, batch: Batch) -> Tensor:
        """Return the indices B K of the images that each image of a batch is compared with."""
        label_B = batch.labels
        count_B1 = self.count_A[label_B][:, None]
        size_B = len(self.order_N) - count_B1[:, 0]
        key_B = keys_of(self.seed, batch)
        draw = independent if self.replacement else distinct
        place_BK = draw(key_B, size_B, self.K)
        # Places count the images of other classes; step over those of the image's own class.
        place_BK = place_BK + count_B1 * (place_BK >= self.first_A[label_B][:, None])
        return self.order_N[place_BK]

    def _contrast(self, v_BD: Tensor, memory_ND: Tensor, index_BL: Tensor, z: Tensor) -> Tensor:
        """Return the loss of one network's embeddings against the other network's memory.

        `z` is the normaliser of the scores; it is set by the first batch.
        """
        N = len(memory_ND)
        # All N products, and then L of them: that is faster than gathering B * L rows of the
        # memory. The clone stays as it is until the backward pass.
        products_BN = v_BD @ memory_ND.clone().mT
        score_BL = (products_BN.gather(1, index_BL) / self.temperature).exp()
        with torch.no_grad():
            z.copy_(torch.where(z < 0, score_BL.mean() * N, z))
        q_BL = score_BL / z
        noise = self.K / N
        positive_B = (q_BL[:, 0] / (q_BL[:, 0] + noise + EPS)).log()
        negative_BK = (noise / (q_BL[:, 1:] + noise + EPS)).log()
        return -(positive_B.sum() + negative_BK.sum()) / len(v_BD)
