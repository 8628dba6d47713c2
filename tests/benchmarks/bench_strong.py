"""Compare batches of two views with torchvision's PIL transforms in a DataLoader.

    python -m tests.benchmarks.bench_strong

Both make a weak and a strong view of each image. Ours has one CPU thread, torchvision's has one
worker, whose strong view is its RandAugment with 2 operations and RandomErasing in place of the
Cutout. The data are 5,000 random images of 32x32 pixels in batches of 64. Both make whole epochs in
turn, so that a busy machine slows them down alike. Medians are printed.
"""

import statistics
from collections.abc import Iterable
from itertools import islice

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sddlskd.data.device import Batch, DeviceData
from sddlskd.datasets.arrays import Images, fake
from tests.benchmarks.bench_data import BATCH_SIZE, MEAN, REPEATS, STD, images_per_second

IMAGES = 5_000


class PilViews(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """A data set that gives two views of each image, by torchvision's transforms."""

    def __init__(self, images: Images) -> None:
        self.images, self.labels = images.images_NHWC.numpy(), images.labels_N.tolist()
        crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        self.weak = transforms.Compose([*crop, *last])
        erase = transforms.RandomErasing(p=1.0, scale=(0.0025, 0.25), ratio=(1, 1))
        self.strong = transforms.Compose([*crop, transforms.RandAugment(2), *last, erase])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        image = Image.fromarray(self.images[index])
        return self.weak(image), self.strong(image), self.labels[index]


def main() -> None:
    torch.set_num_threads(1)
    splits = fake(train=IMAGES, test=1)
    data = DeviceData(
        splits,
        num_classes=100,
        batch_size=BATCH_SIZE,
        seed=0,
        device="cpu",
        mean=MEAN,
        std=STD,
        eval_batch_size=1,
        strong=True,
    )
    loader = DataLoader(
        PilViews(splits.train),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=1,
        persistent_workers=True,
    )

    def warm(batches: Iterable[Batch | list[torch.Tensor]]) -> None:
        images_per_second(islice(batches, 10))

    warm(loader), warm(data.batches(0))
    ours, theirs = [], []
    for epoch in range(1, REPEATS + 1):
        ours.append(images_per_second(data.batches(epoch)))
        theirs.append(images_per_second(loader))
    mine, pil = statistics.median(ours), statistics.median(theirs)
    print(
        f"weak and strong view: ours {mine:,.0f} images/s ({min(ours):,.0f} to {max(ours):,.0f}), "
        f"torchvision PIL + DataLoader(1 worker) {pil:,.0f} images/s "
        f"({min(theirs):,.0f} to {max(theirs):,.0f}), ratio {mine / pil:.1f}x"
    )


if __name__ == "__main__":
    main()
