"""Distillation of singular vectors (KDSVD).

Source: Lee et al. 2018 (arXiv:1807.06819), as mdistiller computes it: the singular vectors run
along the width of a map, while the paper's run along the channels.

Shapes: B batch, C channels, H W sides of a map, K vectors that are compared, N vectors of the
student that may match them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, pairs
from sddlskd.models import Taps

__all__ = ["KDSVD"]

# The student's first k + MORE vectors may match the teacher's first k vectors.
MORE = 3


class KDSVD(Method):
    """Loss of KDSVD: the difference between two networks' relations of successive stages.

    A stage is a group of layers after the stem (the first layers). Stages are paired from the
    first. If one network has more stages, its last stages do not count. The relations of an image
    are computed from singular vectors:
    - The image's map of a stage is a matrix (C * H, W). The teacher's first k right singular
      vectors, of W entries, describe the stage. The sign of each vector makes its entry of largest
      magnitude positive.
    - Each of these vectors is matched with one of the student's first k + 3 right singular vectors:
      the vector with the largest absolute cosine, multiplied by the sign of the cosine.
    - Both vectors of a match are multiplied by the teacher's singular value. Before that, the k
      singular values of an image are divided by their Euclidean length.
    - The relation of a stage to the stage before is exp(-(a - b)^2 / 8), for each n in 1..k, each
      entry a of vector n of the stage, and each entry b of vector n of the stage before.

    The loss is the sum of the squared differences between the student's and the teacher's
    relations, divided by the number of images.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        k: Number of singular vectors of the teacher that are compared.

    Raises:
        ValueError: If a network shows fewer than two stages after the stem, if the two maps of a
            stage differ in width, or if `k` is not in 1..width of the narrowest map.
    """

    needs = frozenset({"stages"})

    def __init__(self, student: Taps, teacher: Taps, *, k: int = 1) -> None:
        super().__init__(student, teacher)
        maps = pairs(student, teacher)
        if len(maps) < 2:
            raise ValueError("KDSVD compares successive stages and needs two after the stem")
        own_widths, other_widths = ([pair[i].shape[3] for pair in maps] for i in (0, 1))
        if own_widths != other_widths:
            raise ValueError(
                f"the student's maps have widths {own_widths} and the teacher's {other_widths}; "
                "KDSVD needs equal widths, such as those of two networks of one family"
            )
        narrowest = min(own_widths)
        if k not in range(1, narrowest + 1):
            raise ValueError(f"k={k} must be in 1..{narrowest}, the width of the narrowest map")
        self.k = k

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the squared difference of the relations, summed over pairs of successive stages.

        Args:
            student: Maps of the student; `stages` is read.
            teacher: Maps of the teacher, without gradients; `stages` is read.
            batch: The labels, of which only the number is read.

        Returns:
            A scalar: the sum over all entries of the relations, divided by the number of images.
        """
        relations = []
        before: tuple[Tensor, Tensor] | None = None
        for own_BCHW, other_BCHW in pairs(student, teacher):
            vectors = self._matched(own_BCHW, other_BCHW)
            if before is not None:
                own_BWWK, other_BWWK = map(_relation, vectors, before)
                relations.append((own_BWWK - other_BWWK).square().sum())
            before = vectors
        return sum(relations[1:], relations[0]) / len(batch.labels)

    def _matched(self, own_BCHW: Tensor, other_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matched vectors (B, W, K) of student and teacher, times the scaled values."""
        with torch.no_grad():
            other_BWW, value_BW = _decomposed(_matrix(other_BCHW))
            other_BWK = _with_sign(other_BWW[:, :, : self.k])
            value_B1K = F.normalize(value_BW[:, None, : self.k], dim=2)
        own_BWN = _right_vectors(_matrix(own_BCHW), self.k + MORE)
        with torch.no_grad():
            cosine_BNK = own_BWN.mT @ other_BWK
            best_B1K = cosine_BNK.abs().argmax(1, keepdim=True)
            sign_B1K = cosine_BNK.gather(1, best_B1K).sign()
        own_BWK = own_BWN.gather(2, best_B1K.expand_as(other_BWK)) * sign_B1K
        return own_BWK * value_B1K, other_BWK * value_B1K


def _matrix(map_BCHW: Tensor) -> Tensor:
    """Return each map as a matrix (C * H, W), with rows of zeros added up to W rows."""
    matrix_BMW = map_BCHW.flatten(1, 2)
    rows, width = matrix_BMW.shape[1:]
    return F.pad(matrix_BMW, (0, 0, 0, max(width - rows, 0)))


def _decomposed(matrix_BMW: Tensor) -> tuple[Tensor, Tensor]:
    """Return all right singular vectors, the columns of (B, W, W), and the values (B, W)."""
    _, value_BW, rows_BWW = torch.linalg.svd(matrix_BMW, full_matrices=False)
    return rows_BWW.mT, value_BW


def _with_sign(vector_BWK: Tensor) -> Tensor:
    """Return the vectors with the sign that makes their entry of largest magnitude positive."""
    largest_B1K = vector_BWK.abs().argmax(1, keepdim=True)
    return vector_BWK * vector_BWK.gather(1, largest_B1K).sign()


def _right_vectors(matrix_BMW: Tensor, count: int) -> Tensor:
    """Return the first `count` right singular vectors as columns, (B, W, N), with their gradient.

    The gradient comes from perturbation theory: vector v_j turns towards vector v_i by the change
    of (x v_i) . (x v_j), divided by the difference of the squared singular values. The gradient of
    torch.linalg.svd is the same, except that it is NaN if two singular values are equal, as for an
    image whose map is zero. Here, vectors whose values are equal up to rounding do not turn.
    """
    with torch.no_grad():
        vector_BWW, value_BW = _decomposed(matrix_BMW)
        square_BW = value_BW.square()
        gap_BWN = square_BW[:, None, :count] - square_BW[:, :, None]
        rounding_B11 = torch.finfo(matrix_BMW.dtype).eps * square_BW[:, :1, None]
        factor_BWN = torch.where(gap_BWN.abs() > rounding_B11, 1 / gap_BWN, 0)
    image_BMW = matrix_BMW @ vector_BWW
    product_BWN = image_BMW.mT @ image_BMW[:, :, :count]
    # The difference is exactly zero; only its gradient counts.
    turn_BWN = (product_BWN - product_BWN.detach()) * factor_BWN
    return vector_BWW[:, :, :count] + vector_BWW @ turn_BWN


def _relation(vector_BWK: Tensor, before_BVK: Tensor) -> Tensor:
    """Return exp(-(difference)^2 / 8) of all pairs of entries of two stages, (B, W, V, K)."""
    difference_BWVK = vector_BWK[:, :, None] - before_BVK[:, None]
    return (-difference_BWVK.square() / 8).exp()
