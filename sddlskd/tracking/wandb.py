"""Copy a run directory to an offline run of Weights & Biases in its folder `wandb`.

The run directory is the record. The copy holds the metrics, parameters, tags and outcome that
MLflow holds, under the same names. An offline run cannot be continued. So the copy is written when
the run has ended, and written anew if the run is resumed and ends again. `wandb sync` uploads it.
"""

import shutil
from pathlib import Path
from typing import Any

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.tracking.runs import (
    OUTCOMES,
    final_tags_of,
    params_of,
    result_of,
    summary_of,
    tags_of,
)

__all__ = ["FOLDER", "OfflineRun"]

FOLDER = "wandb"


class OfflineRun:
    """Writer of the offline run of W&B that copies one training run.

    Args:
        folder: The run directory, that is, the folder of one training run.
        again: Whether to write the offline run anew even if it is complete.
    """

    def __init__(self, folder: Path, *, again: bool = False) -> None:
        self._folder = folder.absolute()
        self._again = again

    def update(self) -> None:
        """Write the offline run if the run has ended and the offline run lacks its outcome.

        Raise Damaged if the result or the metrics in the run directory are damaged. Errors of wandb
        propagate.
        """
        result = result_of(self._folder)
        if result.get("status") not in OUTCOMES:
            return
        done = self._folder / FOLDER / "complete"
        state = f"{result['status']} {result['time']}"
        if not self._again and done.exists() and done.read_text() == state:
            return
        shutil.rmtree(self._folder / FOLDER, ignore_errors=True)
        self._write(result)
        record.write_text(done, state)
        self._again = False

    def close(self) -> None:
        """Do nothing: the offline run is closed once it is written."""

    def _write(self, result: dict[str, Any]) -> None:
        import wandb

        config = cfg.load(self._folder / "config.yaml")
        copy = wandb.init(
            mode="offline",
            project=config.tracking.experiment,
            group=config.sweep.name,
            # A run that is written anew keeps its id.
            id=f"{cfg.config_hash(config)}-{self._folder.name}"[:64],
            name=cfg.title(config),
            dir=str(self._folder),
            config=params_of(config),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        # W&B's steps start at 0 and grow, while the epochs of a first stage are below 1.
        for step, row in enumerate(record.read_rows(self._folder)):
            copy.log({name: row[name] for name in row if name != "time"}, step=step)
        tags = tags_of(self._folder, config) | final_tags_of(result)
        copy.summary.update({**summary_of(result), **tags, "status": result["status"]})
        copy.finish(exit_code=int(result["status"] != record.FINISHED))
