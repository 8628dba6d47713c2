"""Mirror runs and sweeps to MLflow. The run directory is the record; MLflow holds a copy."""

from sddlskd.tracking.mirror import Mirror
from sddlskd.tracking.models import log_model, save_model
from sddlskd.tracking.runs import supersede, sync
from sddlskd.tracking.sweeps import (
    check_reachable,
    check_shared,
    finish_sweep,
    log_plan,
    register,
    sync_sweep,
)

__all__ = [
    "Mirror",
    "check_reachable",
    "check_shared",
    "finish_sweep",
    "log_model",
    "log_plan",
    "register",
    "save_model",
    "supersede",
    "sync",
    "sync_sweep",
]
