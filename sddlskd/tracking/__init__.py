"""Copy runs and sweeps to MLflow, and to files for TensorBoard and W&B.

The run directory is the record of a run; MLflow and these files hold copies of the record. The
files for TensorBoard and W&B lie in the run directory.
"""

from sddlskd.tracking.copies import Copies, check_packages, is_copied
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
    "Copies",
    "Mirror",
    "check_packages",
    "check_reachable",
    "check_shared",
    "finish_sweep",
    "is_copied",
    "log_model",
    "log_plan",
    "register",
    "save_model",
    "supersede",
    "sync",
    "sync_sweep",
]
