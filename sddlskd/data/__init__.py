"""Make batches of a data set: of pixels held on the device, or of image files read when needed."""

from sddlskd.data.device import DeviceData
from sddlskd.data.streaming import StreamedData
from sddlskd.datasets import Files, Images, Splits, cifar100, digits, fake, fashion_mnist
from sddlskd.files.download import DownloadError

__all__ = [
    "DeviceData",
    "DownloadError",
    "Files",
    "Images",
    "Splits",
    "StreamedData",
    "cifar100",
    "digits",
    "fake",
    "fashion_mnist",
]
