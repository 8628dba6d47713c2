"""Contrastive representation distillation (CRD).

Source: Tian et al. 2020 (arXiv:1910.10699), as RepDistiller and mdistiller compute it.

Shapes: B batch, C channels of the pooled features, D channels of an embedding, K negatives of an
image (images of other classes), L = K + 1 candidates of an image (the image itself first), N
training images, A classes.
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
    """Linear layer with a bias that embeds pooled features as vectors of length 1.

    Args:
        channels: C, channels of the pooled features.
        dim: D, channels of the embedding.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, dim)

    def forward(self, pooled_BC: Tensor) -> Tensor:
        """Return the embeddings (B, D), of length 1, of pooled features (B, C)."""
        return F.normalize(self.linear(pooled_BC), dim=1)


class CRD(Method):
    """Loss of CRD: contrast between an image's embedding in one network and memories of the other.

    For each network, a linear layer embeds the pooled features (the input of the classifier), and a
    memory holds one vector for each training image. Both layers are trained. A memory starts with
    random vectors. A vector then becomes a moving average of the embeddings of its image, scaled to
    length 1.

    The student's embedding of an image is compared with the teacher's memory of the image itself
    (the positive) and of K images of other classes (the negatives). The teacher's embedding is
    compared with the student's memory in the same way. The negatives of an image depend on the
    seed, the epoch and the image alone.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        labels_N: Class of each training image, int64, (N,).
        num_classes: Number of classes.
        seed: Seed of the run.
        dim: D, channels of the embeddings.
        K: Number of negatives of each image, at least 1.
        temperature: Number by which the dot products of embeddings and memories are divided.
        momentum: Weight of the old vector when a vector in a memory is updated; the new embedding
            has weight 1 - `momentum`.
        replacement: Whether the negatives of an image are drawn with replacement, so that some may
            be equal.

    Raises:
        ValueError: If a network shows no pooled features, if all images are of one class, if `K` is
            not an integer of at least 1, or if fewer than K images are outside the largest class
            and `replacement` is false.
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
        # The normalisers of the scores come from the first batch; -1 before the first batch.
        self.z_s = nn.Buffer(torch.tensor(-1.0))
        self.z_t = nn.Buffer(torch.tensor(-1.0))
        # The images sorted by class, and the first position and the length of each class.
        order_N = torch.argsort(labels_N, stable=True)
        self.order_N = nn.Buffer(order_N, persistent=False)
        self.first_A = nn.Buffer(count_A.cumsum(0) - count_A, persistent=False)
        self.count_A = nn.Buffer(count_A, persistent=False)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the contrastive loss of a batch, and update both memories in place.

        The loss is the sum of two parts: the student's embeddings against the teacher's memory, and
        the teacher's embeddings against the student's memory. The first batch also sets the
        constants that normalise the scores of each part.

        Args:
            student: Maps of the student; `pooled`, (B, C), is read.
            teacher: Maps of the teacher, without gradients; `pooled` is read.
            batch: Labels and indices of the images, and the number of the epoch.

        Returns:
            A scalar. Each part is the sum of the negative log-probabilities over the positive and
            the K negatives of an image, averaged over the images of the batch.
        """
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
        """Return K negatives of each image of a batch, as indices of training images.

        The result is int64, (B, K). A negative is a training image of another class. Indices count
        the images that are trained on, as `batch.index` does. The negatives of an image differ
        unless `replacement` is true. They depend on the seed, `batch.epoch` and the image's entry
        in `batch.index` alone, not on the place of the image in the batch.
        """
        label_B = batch.labels
        count_B1 = self.count_A[label_B][:, None]
        size_B = len(self.order_N) - count_B1[:, 0]
        key_B = keys_of(self.seed, batch)
        draw = independent if self.replacement else distinct
        place_BK = draw(key_B, size_B, self.K)
        # A place counts the images of other classes in `order_N`. Step over the image's own class.
        place_BK = place_BK + count_B1 * (place_BK >= self.first_A[label_B][:, None])
        return self.order_N[place_BK]

    def _contrast(self, v_BD: Tensor, memory_ND: Tensor, index_BL: Tensor, z: Tensor) -> Tensor:
        """Return the loss of one network's embeddings against the other network's memory.

        `z` is the normaliser of the scores. A negative `z` is replaced in place, from this batch.
        """
        N = len(memory_ND)
        # Computing all N products is faster than gathering B * L rows of the memory. The memory is
        # cloned because it is updated in place before the backward pass.
        products_BN = v_BD @ memory_ND.clone().mT
        score_BL = (products_BN.gather(1, index_BL) / self.temperature).exp()
        with torch.no_grad():
            z.copy_(torch.where(z < 0, score_BL.mean() * N, z))
        q_BL = score_BL / z
        noise = self.K / N
        positive_B = (q_BL[:, 0] / (q_BL[:, 0] + noise + EPS)).log()
        negative_BK = (noise / (q_BL[:, 1:] + noise + EPS)).log()
        return -(positive_B.sum() + negative_BK.sum()) / len(v_BD)
