"""Compare the batches of `DeviceData` with torchvision's PIL transforms in a DataLoader.

    python -m tests.benchmarks.bench_data

The target is 15 times as many images per second. Ours has two CPU threads, torchvision's has two
workers. The data are 50,000 random images of 32x32 pixels in batches of 64. Both make whole epochs
in turn, so that a busy machine slows them down alike. Medians are printed. The workers are warm
before the measurement starts.
"""

import statistics
import time
from collections.abc import Iterable

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sddlskd.data.device import Batch, DeviceData
from sddlskd.datasets.arrays import Images, fake

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
REPEATS = 5
BATCH_SIZE = 64


class PilImages(Dataset[tuple[torch.Tensor, int]]):
    """A data set that treats each image as torchvision.datasets.CIFAR100 does."""

    def __init__(self, images: Images) -> None:
        self.images, self.labels = images.images_NHWC.numpy(), images.labels_N.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def images_per_second(batches: Iterable[Batch | list[torch.Tensor]]) -> float:
    begin, count = time.perf_counter(), 0
    for x, *_ in batches:
        count += len(x)
    return count / (time.perf_counter() - begin)


def main() -> None:
    torch.set_num_threads(2)
    splits = fake(test=1)
    data = DeviceData(
        splits,
        num_classes=100,
        batch_size=BATCH_SIZE,
        seed=0,
        device="cpu",
        mean=MEAN,
        std=STD,
        eval_batch_size=1,
    )
    loader = DataLoader(
        PilImages(splits.train),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
    )
    images_per_second(loader), images_per_second(data.batches(0))
    ours, theirs = [], []
    for epoch in range(1, REPEATS + 1):
        ours.append(images_per_second(data.batches(epoch)))
        theirs.append(images_per_second(loader))
    mine, pil = statistics.median(ours), statistics.median(theirs)
    print(
        f"input pipeline: ours {mine:,.0f} images/s ({min(ours):,.0f} to {max(ours):,.0f}), "
        f"torchvision PIL + DataLoader(2 workers) {pil:,.0f} images/s "
        f"({min(theirs):,.0f} to {max(theirs):,.0f}), ratio {mine / pil:.1f}x"
    )


if __name__ == "__main__":
    main()
