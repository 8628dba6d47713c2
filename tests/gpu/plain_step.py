"""A training step as scripts for one student write it, to compare ours with.

One job trains one student. Both networks run in float32 and in NCHW. The teacher answers for each
job anew. A DataLoader makes the batches from single images in worker processes, and two values are
read back in every step for the progress display.

Shapes: B batch, C channels, H W sides, K classes, R regions.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sddlskd.datasets.arrays import Images

TEMPERATURE, CE_WEIGHT, KD_WEIGHT = 2.0, 1.0, 9.0
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class SingleImages(Dataset[tuple[Tensor, int]]):
    """Images that are cropped, mirrored and normalised one by one.

    Args:
        images: the images.
    """

    def __init__(self, images: Images) -> None:
        self.images_NCHW = images.images_NHWC.permute(0, 3, 1, 2)
        self.labels = images.labels_N.tolist()
        self.mean_C11, self.std_C11 = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x_CHW = F.pad(self.images_NCHW[index], (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        x_CHW = x_CHW[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            x_CHW = x_CHW.flip(2)
        return (x_CHW / 255 - self.mean_C11) / self.std_C11, self.labels[index]


def endless(images: Images, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches on the CPU without end.

    Args:
        images: the images.
        batch_size: images per batch.
        workers: number of worker processes.
    """
    loader = DataLoader(
        SingleImages(images),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


class PlainJob:
    """One student with its teacher and optimizer.

    Args:
        student: network of the student.
        teacher: network of the teacher.
        scales: M.
        device: device of both.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, scales: list[int], device: torch.device
    ) -> None:
        self.student = student.to(device, memory_format=torch.contiguous_format).train()
        self.teacher = teacher.to(device, memory_format=torch.contiguous_format).eval()
        self.scales, self.device = scales, device
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4
        )
        self.seen = self.loss = self.right = 0.0

    def step(self, images_BCHW: Tensor, labels_B: Tensor) -> None:
        """Train the student for one step on a batch of the CPU."""
        images_BCHW = images_BCHW.to(self.device)
        labels_B = labels_B.to(self.device)
        map_BKHW = self.student(images_BCHW)
        with torch.no_grad():
            teacher_BKHW = self.teacher(images_BCHW)
        logits_BK = map_BKHW.mean((2, 3))
        loss = CE_WEIGHT * F.cross_entropy(logits_BK, labels_B)
        loss = loss + KD_WEIGHT * self._distillation(map_BKHW, teacher_BKHW, labels_B)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seen += len(labels_B)
        self.loss += loss.item() * len(labels_B)
        self.right += (logits_BK.argmax(1) == labels_B).sum().item()

    def _distillation(self, own_BKHW: Tensor, other_BKHW: Tensor, labels_B: Tensor) -> Tensor:
        own_BRK, other_BRK = (self._regions(each) for each in (own_BKHW, other_BKHW))
        is_right_B1 = (other_BKHW.mean((2, 3)).argmax(1) == labels_B)[:, None]
        is_complementary_BR = (other_BRK.argmax(2) == labels_B[:, None]) != is_right_B1
        p_BRK = F.softmax(_standardised(other_BRK) / TEMPERATURE, 2)
        log_q_BRK = F.log_softmax(_standardised(own_BRK) / TEMPERATURE, 2)
        kl_BR = F.kl_div(log_q_BRK, p_BRK, reduction="none").sum(2) * TEMPERATURE**2
        return torch.where(is_complementary_BR, 2 * kl_BR, kl_BR).mean()

    def _regions(self, map_BKHW: Tensor) -> Tensor:
        pooled = [F.adaptive_avg_pool2d(map_BKHW, m).flatten(2) for m in self.scales]
        return torch.cat(pooled, 2).transpose(1, 2)


def _standardised(logits_BRK: Tensor) -> Tensor:
    mean_BR1 = logits_BRK.mean(2, keepdim=True)
    return (logits_BRK - mean_BR1) / (logits_BRK.std(2, keepdim=True) + 1e-7)
