"""Copy a run directory to TensorBoard event files in its folder `tensorboard`.

The run directory is the record. The event files hold the metrics, parameters, tags and outcome that
MLflow holds, under the same names. A writer first reads what the event files hold already, and then
writes what is missing. So nothing is lost if a writer is killed.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
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

__all__ = ["FOLDER", "EventFiles"]

FOLDER = "tensorboard"
NO_METRICS = ("epoch", "time")  # entries of a row of metrics.jsonl that are not metrics
TAGS = "tags"
STATUS = "status"
TEXT = "/text_summary"  # TensorBoard's suffix of the names of texts
PARAMS = "_hparams_/session_start_info"  # TensorBoard's name for the parameters of a run


class EventFiles:
    """Writer of the event files of one run. Between updates, the file that it writes stays open.

    Args:
        folder: The run directory, that is, the folder of one training run.
        again: Whether to remove the event files that are there, and write all of them anew.
    """

    def __init__(self, folder: Path, *, again: bool = False) -> None:
        self._folder = folder.absolute()
        self._writer: Any = None
        if again:
            shutil.rmtree(self._folder / FOLDER, ignore_errors=True)

    def update(self) -> None:
        """Write the metrics, parameters, tags and outcome that the event files lack.

        Nothing is done if the run has not started. Raise Damaged if the result or the metrics in
        the run directory are damaged, and OSError if the files cannot be written.
        """
        result = result_of(self._folder)
        if not result:
            return
        config = cfg.load(self._folder / "config.yaml")
        rows = record.read_rows(self._folder)
        if self._writer is None:
            self._open()
        self._write_rows(rows)
        if not self._holds(PARAMS, 0):
            self._write_params(params_of(config), [*_metrics_of(rows), *summary_of(result)])
        tags = tags_of(self._folder, config)
        status = result["status"]
        if status in OUTCOMES:
            step = result.get("epochs", 0)
            # The step is the last epoch. A run that was killed and resumed has its first outcome
            # at an earlier step, so no step is there twice.
            for row in rows:
                if row["epoch"] == step:
                    self._write_rows([{**summary_of(result), "epoch": step, "time": row["time"]}])
            tags |= final_tags_of(result)
        self._write_text(TAGS, json.dumps(tags, indent=1), len(rows))
        self._write_text(STATUS, status, len(rows))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file, if one is open."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> None:
        """Read what the event files hold, and open a new one beside them."""
        # torch is slow to import, and the process that launches a sweep does without it.
        from torch.utils.tensorboard import SummaryWriter

        place = self._folder / FOLDER
        self._points, self._texts = read(place)
        self._writer = SummaryWriter(str(place))

    def _holds(self, name: str, step: int) -> bool:
        return (name, step) in self._points

    def _write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            step = row["epoch"]
            for name, value in row.items():
                if name not in NO_METRICS and not self._holds(name, step):
                    self._writer.add_scalar(name, value, step, walltime=row["time"])
                    self._points[name, step] = value

    def _write_params(self, params: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Write the parameters, which TensorBoard shows in its table of runs (HPARAMS)."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in params.items()
        }
        # The third part says that the run has ended well; the text STATUS tells how it ended.
        experiment, start, _ = hparams(plain, dict.fromkeys(metrics))  # type: ignore[no-untyped-call]
        self._writer.file_writer.add_summary(experiment)
        self._writer.file_writer.add_summary(start)
        self._points[PARAMS, 0] = 0.0

    def _write_text(self, name: str, text: str, step: int) -> None:
        """Write a text unless it is the latest text of this name."""
        if self._texts.get(name) != text:
            self._writer.add_text(name, text, step)
            self._texts[name] = text


def _metrics_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the metrics in the rows, each once."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in NO_METRICS))


def read(place: Path) -> tuple[dict[tuple[str, int], float], dict[str, str]]:
    """Return what the event files in the folder `place` hold: the points, and the latest texts.

    A file that a killed writer left incomplete is read up to its last complete event. The points
    map (name, step) to a value, and the texts map a name to a text. Both are empty without files.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    points: dict[tuple[str, int], float] = {}
    texts: dict[str, str] = {}
    for path in sorted(place.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                content = tensor_util.make_ndarray(value.tensor).ravel()
                if value.tag.endswith(TEXT):
                    texts[value.tag.removesuffix(TEXT)] = content[0].decode()
                elif value.tag == PARAMS:
                    points[PARAMS, 0] = 0.0
                elif value.HasField("tensor") and content.size == 1:
                    points[value.tag, event.step] = float(content[0])
    return points, texts
