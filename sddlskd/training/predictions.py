"""Collect and store a run's test-split logits, region predictions and features, for figures.

Shapes: N test images, n the first of them, k examples, K classes, R = m*m regions of the finest
scale m, C channels.
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sddlskd.distill import region_logits
from sddlskd.files.atomic import write_atomically

__all__ = ["EXAMPLES", "FEATURES", "collect", "write"]

FEATURES = 1000  # number of images whose features are kept

# Largest number of example images. On each, the teacher's predictions for some region and for the
# whole map differ.
EXAMPLES = 24

Arrays = dict[str, np.ndarray]


@torch.inference_mode()
def collect(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    M: Sequence[int],
) -> Arrays:
    """Run the networks on the test batches and return the arrays that figures need.

    Logits and features are spatial means, in float16. Both networks are left in eval mode.

    Args:
        student: network from images_BCHW to a logit map (B, K, H, W).
        teacher: network of the same form, or None for a student trained without a teacher.
        batches: (images_BCHW, target_B) of the test split, with targets as int64 class ids.
        M: the scales; a scale m divides a logit map into m x m regions. Only the finest scale, m =
            max(M), is used, and only with a teacher.

    Returns:
        The arrays by name, for N test images:

        - target: class ids, (N,).
        - logits: logits of the student, (N, K).
        - features: features of the student for the first n images, (n, C), with n at most 1000
          (`FEATURES`). Missing if the network has no method `features`.

        With a teacher also:

        - teacher_logits, teacher_features: the same for the teacher.
        - scale: m, an array without dimensions.
        - student_regions, regions: classes that the student and the teacher predict for the R = m *
          m regions, row by row, (N, R).
        - sample: indices of images for which the teacher predicts another class in some region than
          for the whole image, (k,). They are the first such images, at most 24 (`EXAMPLES`).

    Raises:
        ValueError, RuntimeError: If there is no batch; the type depends on the version of torch.
    """
    networks = {"": student} if teacher is None else {"": student, "teacher_": teacher}
    parts: dict[str, list[Tensor]] = {"target": []}
    seen = 0
    for images_BCHW, target_B in batches:
        parts["target"].append(target_B)
        for name, network in networks.items():
            map_BKHW = network.eval()(images_BCHW).float()
            parts.setdefault(f"{name}logits", []).append(map_BKHW.mean((2, 3)).half())
            if teacher is not None:
                classes_BR = region_logits(map_BKHW, [max(M)]).argmax(2).short()
                parts.setdefault("regions" if name else "student_regions", []).append(classes_BR)
            if seen < FEATURES and hasattr(network, "features"):
                features_BC = network.features(images_BCHW[: FEATURES - seen]).float().mean((2, 3))  # type: ignore[operator]
                parts.setdefault(f"{name}features", []).append(features_BC.half())
        seen += len(target_B)
    arrays = {name: torch.cat(tensors).cpu().numpy() for name, tensors in parts.items()}
    if teacher is not None:
        arrays["scale"] = np.array(max(M))
        differs_N = (arrays["regions"] != arrays["teacher_logits"].argmax(1)[:, None]).any(1)
        arrays["sample"] = np.flatnonzero(differs_N)[:EXAMPLES]
    return arrays


def write(path: Path, arrays: Arrays) -> None:
    """Write arrays to a compressed .npz file, completely or not at all.

    An existing file is replaced, and a missing folder is made. Raise OSError if the disk is full or
    not writable; `path` is then unchanged.
    """
    # Compress in memory first, so that only one plain write of known size can meet a full disk.
    buffer = BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    content = buffer.getbuffer()
    with write_atomically(path, content.nbytes) as file:
        file.write(content)
