"""Read the runs in the logs of other projects: worklog, CTKD's JSON, json_stats.

A log may hold several runs: epoch 1 starts another run. The metrics of a run have our names, such
as val/top1 for the accuracy (%) on the test set.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Log", "glued_json", "json_stats", "worklog"]

WORKLOG = {
    "lr": "lr",
    "train_acc": "train/top1",
    "train_loss": "train/loss",
    "test_acc": "val/top1",
    "test_acc_top5": "val/top5",
    "test_loss": "val/loss",
}


@dataclass
class Log:
    """Training run as read from a text log: its metrics by epoch, and what the log states of it."""

    # Metrics by name for each complete epoch, in ascending order of the epochs.
    epochs: dict[int, dict[str, float]] = field(default_factory=dict)
    # Best top-1 (%) that the log states. In a worklog, only if it is not that of the epochs.
    best: float | None = None
    lr: float | None = None  # learning rate of the first epoch, if a worklog states it
    planned: int = 0  # planned number of epochs; 0 if the log does not state it
    torn: bool = False  # whether the log ends in the middle of an epoch
    # Whether the last line, best_acc, was read. None if the format has no such line.
    closed: bool | None = None
    notes: list[str] = field(default_factory=list)  # sentences on what was left out

    @property
    def done(self) -> int:
        """Return the number (from 1) of the last complete epoch, or 0 if no epoch is complete."""
        return next(reversed(self.epochs), 0)

    def best_top1(self) -> float:
        """Return the highest test accuracy (val/top1, %) of all epochs; NaN if none is finite."""
        accuracies = (row["val/top1"] for row in self.epochs.values())
        return max(filter(math.isfinite, accuracies), default=math.nan)


@dataclass
class _Reader:
    """Collector of the runs of a log. The caller adds the epochs in the order of the file.

    A training that is resumed appends to the log of the training that was killed. So an incomplete
    epoch may stand in the middle of the log, and an epoch may be there twice.
    """

    logs: list[Log] = field(default_factory=list)
    # The incomplete epochs since the last complete epoch: the number of each (None if unknown), and
    # a message with its line and what is wrong.
    incomplete: list[tuple[int | None, str]] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Return the number of the current run's last complete epoch; 0 if there is none."""
        return self.logs[-1].done if self.logs else 0

    def add(self, epoch: int, metrics: dict[str, float]) -> Log:
        """Add a complete epoch, and return the run that the epoch belongs to.

        Epoch 1 starts a new run. If the current run has an epoch with this number, the new epoch
        replaces it and all later epochs, because the training was resumed before them.

        Raises:
            ValueError: If `epoch` is below 1, or if the log lacks an epoch before this one. After
                an incomplete epoch, one epoch may be lacking, but not the first of a run.
        """
        done = self.done
        # An incomplete epoch that does not come again is missing. The others are imported.
        expected = done + 2 if done and self.incomplete else done + 1
        if epoch < 1 or epoch > max(expected, 1):
            if self.incomplete:
                raise ValueError(self.incomplete[0][1])
            raise ValueError(
                f"epoch {epoch} follows epoch {done}; "
                "epochs must run 1, 2, 3, ..., and from 1 again for another run"
            )
        if epoch == 1:
            self.logs.append(Log())
        run = self.logs[-1]
        for number, _ in self.incomplete:
            which = "an incomplete epoch" if number is None else f"an incomplete epoch {number}"
            run.notes.append(f"{which} is left out")
        self.incomplete = []
        if 1 < epoch <= done:
            run.epochs = {kept: row for kept, row in run.epochs.items() if kept < epoch}
            earlier = "one is" if epoch == done else f"epochs {epoch} to {done} are"
            run.notes.append(f"epoch {epoch} comes again, and the earlier {earlier} left out")
        run.epochs[epoch] = metrics
        return run

    def add_incomplete(self, epoch: int | None, reason: str) -> None:
        """Note an incomplete epoch.

        Args:
            epoch: number of the epoch; None if it is unknown.
            reason: message with the line and what is wrong.

        Raises:
            ValueError: If the log lacks an epoch before this one. The message is the `reason` of
                the first incomplete epoch.
        """
        self.incomplete.append((epoch, reason))
        if epoch is not None and epoch > self.done + 1:
            raise ValueError(self.incomplete[0][1])

    def finish(self, torn: bool = False) -> list[Log]:
        """Return the runs of the log after all epochs are added.

        Args:
            torn: whether the log ends in the middle of an epoch of the last run.

        Returns:
            The runs in the order of the log. A log without epochs gives one run without epochs.

        Raises:
            ValueError: If an incomplete epoch was noted, and no epoch is complete.
        """
        if not self.logs:
            if self.incomplete:
                raise ValueError(self.incomplete[0][1])
            return [Log()]
        last = self.logs[-1]
        # Epoch 1 belongs to another run.
        if torn or any(epoch != 1 for epoch, _ in self.incomplete):
            last.torn = True
            # A training that was resumed after the incomplete epoch may have closed the run.
            if last.closed:
                last.closed = False
        return self.logs


def worklog(text: str) -> list[Log]:
    """Return the runs in the text of a worklog.txt, the log file of mdistiller.

    A block of lines, ended by a dashed line, is an epoch. Epoch 1 starts another run. If a resumed
    training logs epochs again, the later ones count. A block is left out if it lacks the number of
    the epoch or one of the values lr, train_acc, train_loss, test_acc, test_acc_top5 and test_loss.
    A text without a finished block gives one run without epochs.

    Raises:
        ValueError: If the text cannot be read as a worklog: a line or number has another form, a
            block has a value twice, epochs are missing or out of order, every finished block lacks
            a value, or any other problem.
    """
    reader = _Reader()
    block: dict[str, str] = {}
    cut = False  # whether the block has a line that was cut off
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        # A resumed training continues the last line, whose end may be lost: `train_acc: 4-----`.
        # A computer that crashes may leave NULs instead of the end.
        *glued, piece = re.split(r"(?=best_acc\s)|(?<=[^-])(?=--+\s*$)", line.replace("\0", ""))
        for beginning in filter(str.strip, glued):
            if match := re.fullmatch(r"best_acc\s*(\S*)\s*", beginning):
                _close(reader, match[1], block, number)
                block, cut = {}, False
            else:
                cut = True
        if match := re.fullmatch(r"\s*(\w+):\s*(\S+)\s*", piece):
            if match[1] in block:
                raise ValueError(
                    f"line {number}: {match[1]} appears twice "
                    f"in the block of epoch {block.get('epoch')}"
                )
            block[match[1]] = match[2]
        elif match := re.fullmatch(r"best_acc\s*(\S*)\s*", piece):
            _close(reader, match[1], block, number)
            block, cut = {}, False
        elif re.fullmatch(r"-+\s*", piece):
            if block or cut:
                _take_block(reader, block, number)
            block, cut = {}, False
        elif piece.strip() and (number < len(lines) or text.endswith("\n")):
            # A last line without a line break may be cut off, and is not an error.
            if not block or block.keys() >= WORKLOG.keys():
                raise ValueError(f"line {number}: {piece[:60]!r} is not a line of a worklog")
            cut = True
    return reader.finish(torn=bool(block) and block.get("epoch") != "1")


def _take_block(reader: _Reader, block: Mapping[str, str], number: int) -> None:
    if not block.get("epoch", "0").isdecimal():
        raise ValueError(f"line {number}: epoch: {block['epoch']} is not a whole number")
    epoch = int(block["epoch"]) if "epoch" in block else None
    absent = [key for key in ("epoch", *WORKLOG) if key not in block]
    if epoch is None or absent:
        which = block.get("epoch", "?")
        reader.add_incomplete(
            epoch, f"line {number}: the block of epoch {which} lacks {', '.join(absent)}"
        )
        return
    metrics = {name: _number(block[key], number) for key, name in WORKLOG.items()}
    if metrics["lr"] == 0:  # rounded to two decimals, so not the true rate
        del metrics["lr"]
    run = reader.add(epoch, metrics)
    run.closed = False  # until best_acc is read
    if epoch == 1:
        run.lr = metrics.get("lr")


def _close(reader: _Reader, stated: str, block: Mapping[str, str], number: int) -> None:
    """Mark the current run of a worklog as ended by a line best_acc.

    Args:
        reader: the reader, which holds the run.
        stated: best top-1 (%) on the line, as text. Kept only if it is not that of the epochs.
        block: values of an epoch that the line ends; empty if the epoch was ended before.
        number: number of the line, for error messages.

    Raises:
        ValueError: If there is no complete epoch before the line, or if `stated` is no number.
    """
    if block:
        _take_block(reader, block, number)
    if not reader.logs:
        raise ValueError(f"line {number}: best_acc comes before the end of an epoch")
    run = reader.logs[-1]
    run.closed = True
    # A line that was cut off states the beginning of the number.
    if not f"{run.best_top1():.2f}".startswith(stated):
        run.best = _number(stated, number)


def glued_json(text: str) -> list[Log]:
    """Return the runs in the text of a CTKD log, which has one JSON object per epoch: `{...}{...}`.

    An object holds the numbers epoch, test_acc (%), test_acc_top5 (%) and best_acc (%). Epoch 1
    starts another run. If a resumed training logs epochs again, the later ones count. An object
    that was cut off, by the end of the log or by a resumed training, is left out. A blank text
    gives one run without epochs.

    Raises:
        ValueError: If the text cannot be read as a CTKD log: it holds something else, a number is
            missing, epochs are missing or out of order, no object is complete, or any other
            problem.
    """
    reader = _Reader()
    decoder, at = json.JSONDecoder(), 0
    while rest := text[at : at + 1]:
        end = at + 1
        if not rest.isspace():
            try:
                entry, end = decoder.raw_decode(text, at)
                accuracy = float(entry["test_acc"])
                metrics = {"val/top1": accuracy, "val/top5": float(entry["test_acc_top5"])}
                reader.add(int(entry["epoch"]), metrics).best = float(entry["best_acc"])
            except json.JSONDecodeError as error:
                message = f"line {text.count(chr(10), 0, error.pos) + 1}: {error.msg}"
                following = text.find("{", at + 1)
                # A resumed training continues the object, whose last number may be cut off.
                if following > 0 and re.fullmatch(r"[\w.+-]*", text[error.pos : following]):
                    reader.add_incomplete(None, message)
                    end = following
                elif "}" in text[at:] or not reader.logs:
                    raise ValueError(message) from None
                else:
                    return reader.finish(torn=True)
            except (KeyError, TypeError, OverflowError, RecursionError) as error:
                number = text.count("\n", 0, at) + 1
                raise ValueError(
                    f"the object at line {number} is not a CTKD epoch ({error!r})"
                ) from None
        at = end
    return reader.finish()


def json_stats(text: str) -> list[Log]:
    """Return the runs in the lines `json_stats: {...}` of a tiny-transformers log.

    Other lines are ignored. Top-1 and top-5 accuracies (%) are 100 - top1_err and 100 - top5_err.
    Epoch 1 starts another run. If a resumed training logs epochs again, the later ones count. An
    epoch whose line was cut off is left out. If the last line has any fault, that line is left out.
    A text without lines `json_stats` gives one run without epochs.

    Raises:
        ValueError: If the lines cannot be read: a value in a line before the last is missing or of
            the wrong type, epochs are missing or out of order, or any other problem.
    """
    reader = _Reader()
    trained: dict[str, float] = {}
    whole = True  # whether the latest line ends an epoch
    lines = [
        (number, line) for number, line in enumerate(text.splitlines(), 1) if "json_stats: " in line
    ]
    for number, line in lines:
        stats = line.rpartition("json_stats: ")[2]  # a resumed training continues the last line
        kind = re.search(r'"_type": "(\w+)"', stats)
        whole = kind is not None and kind[1] == "test_epoch"
        if kind is None or kind[1] not in ("train_epoch", "test_epoch"):
            continue  # an iteration, as are 78 of the 80 lines of an epoch
        try:
            entry = json.loads(stats)
            epoch, planned = map(int, entry["epoch"].split("/"))
            top1, top5 = (round(100 - float(entry[name]), 4) for name in ("top1_err", "top5_err"))
            if kind[1] == "train_epoch":
                trained = {"train/top1": top1, "train/loss": float(entry["loss"])}
                if lr := float(entry["lr"]):  # 0.0000 is rounded, so not the true rate
                    trained["lr"] = lr
                continue
            stated = round(100 - float(entry["min_top1_err"]), 4)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == lines[-1][0]:
                whole = False
                break
            message = f"line {number} is not a tiny-transformers epoch ({error!r})"
            if not isinstance(error, json.JSONDecodeError):
                raise ValueError(message) from None
            reader.add_incomplete(None, message)
            continue
        run = reader.add(epoch, {**trained, "val/top1": top1, "val/top5": top5})
        run.best, run.planned, trained = stated, planned, {}
    return reader.finish(torn=not whole)


def _number(text: str, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"line {line}: {text!r} is not a number") from None
