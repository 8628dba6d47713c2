"""Deliver an exported model to MLflow."""

import logging
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from sddlskd import record
from sddlskd.tracking import uri as tracking_uri
from sddlskd.tracking.uri import first_line

__all__ = ["log_model", "save_model"]

log = logging.getLogger(__name__)


def save_model(
    onnx_file: Path, folder: Path, *, image_CHW: Sequence[int], num_classes: int
) -> None:
    """Write an ONNX model as an MLflow model; its signature gives the shapes of images and logits.

    Args:
        onnx_file: The ONNX model. It takes float32 images (B, C, H, W) with values in 0..1 and
            returns float32 logits (B, K).
        folder: The folder to write the MLflow model to, new or empty.
        image_CHW: The shape of one image: channels, height and width in pixels.
        num_classes: K, the number of classes.

    Raises:
        MlflowException: If `folder` exists and is not empty.
        ImportError: If mlflow, onnx or onnxruntime is not installed.
    """
    with warnings.catch_warnings():
        # The import of MLflow warns about MLflow's own type hints.
        warnings.simplefilter("ignore")
        import mlflow.onnx
        import numpy as np
        import onnx
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        number = np.dtype("float32")
        images = TensorSpec(number, (-1, *image_CHW), "images")
        logits = TensorSpec(number, (-1, num_classes), "logits")
        mlflow.onnx.save_model(
            onnx.load(str(onnx_file)),
            str(folder),
            signature=ModelSignature(Schema([images]), Schema([logits])),
            pip_requirements=[
                f"{name}=={version(name)}" for name in ("mlflow", "numpy", "onnx", "onnxruntime")
            ],
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )


def log_model(folder: Path, model: Path) -> str | None:
    """Upload an MLflow model to the MLflow run of a run directory, and return the model's URI.

    `folder` is the run directory, the folder of one training run. `model` is the folder that
    `save_model` wrote. The URI is runs:/RUN_ID/NAME, with the name of the folder `model`. The
    result is None if the run directory was never delivered to MLflow. If MLflow does not accept the
    model, a warning is logged, and the result is None.

    Raises:
        Damaged: If the mlflow.json of the run directory is damaged.
    """
    delivery = record.read_mirror(folder)
    if "run_id" not in delivery:
        return None
    uri = str(delivery["uri"])
    run_id = delivery["run_id"]
    try:
        tracking_uri.client(uri).log_artifacts(run_id, str(model), model.name)
    except Exception as error:  # a server may be unreachable, or accept metrics but no files
        log.warning("MLflow at %s did not accept the model: %s", uri, first_line(error))
        return None
    return f"runs:/{run_id}/{model.name}"
