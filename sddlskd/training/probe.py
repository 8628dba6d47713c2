"""Judge the features of a network on another data set by a linear probe."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.models.base import LogitMapModel
from sddlskd.training.devices import autocast

__all__ = ["features_of", "linear_probe"]


@torch.inference_mode()
def features_of(
    network: LogitMapModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str,
    side: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the features of images that the linear head of a network reads, and the labels.

    The features of an image are the mean of the last feature map over its height and width.

    Args:
        network: network in eval mode, on the device of the batches.
        batches: pairs of images (B, 3, H, W), normalised, and class ids (B,); at least one pair.
        precision: precision of the forward pass: "fp32", "bf16" or "fp16".
        side: height and width in pixels to which the images are resized; None to keep their size.

    Returns:
        The features (N, C), float32, and the class ids (N,), int64, both on the CPU.
    """
    features, targets = [], []
    for images_BCHW, target_B in batches:
        if side is not None:
            images_BCHW = F.interpolate(images_BCHW, (side, side), mode="bilinear", antialias=True)
        with autocast(images_BCHW.device, precision):
            pooled_BC = network.taps(images_BCHW).pooled
        features.append(pooled_BC.float().cpu())
        targets.append(target_B.cpu())
    return torch.cat(features), torch.cat(targets)


def linear_probe(
    train_NC: Tensor, train_target_N: Tensor, test_MC: Tensor, test_target_M: Tensor
) -> float:
    """Return the test accuracy in percent of a linear classifier of fixed features.

    The classifier is scikit-learn's logistic regression with its default L2 penalty (C=1), on
    features with mean 0 and standard deviation 1 over the training images.

    Args:
        train_NC: features of the training images, (N, C), on the CPU.
        train_target_N: class ids of the training images, (N,).
        test_MC: features of the test images, (M, C), on the CPU.
        test_target_M: class ids of the test images, (M,).

    Raises:
        ValueError: If the training images have a single class, or if a feature is not finite.
    """
    # Imported here, because scikit-learn takes as long to import as torch.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(train_NC.numpy(), train_target_N.numpy())
    return 100 * float(classifier.score(test_MC.numpy(), test_target_M.numpy()))
