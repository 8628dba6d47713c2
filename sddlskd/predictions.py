"""What figures need beyond metrics: logits, region predictions and features on the test split, in one small file.

Shapes: N test images, n the first of them, k examples, K classes, R = m*m regions of the finest scale m, C channels.
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sddlskd.distill import region_logits
from sddlskd.files import write_atomically

__all__ = ["EXAMPLES", "FEATURES", "collect", "write"]

FEATURES = 1000  # images whose features are kept
EXAMPLES = 24  # images kept where a region and the whole map disagree

Arrays = dict[str, np.ndarray]


@torch.inference_mode()
def collect(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    M: Sequence[int],
) -> Arrays:
    """target (N,); logits (N,K) and features (n,C) of the student, with teacher_ before them those of the teacher; with
    a teacher also scale (m), student_regions and regions (N,R), the classes that student and teacher predict for
    each region of the finest scale, row by row, and sample (k,), the first test images where a region of the teacher
    and its whole map disagree. Logits and features are spatial means, in float16; networks are left in eval mode.
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
    """Write the arrays as a compressed .npz, whole or not at all."""
    buffer = BytesIO()  # so that a full disk is met by one plain write, whose size is known
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    content = buffer.getbuffer()
    with write_atomically(path, content.nbytes) as file:
        file.write(content)
