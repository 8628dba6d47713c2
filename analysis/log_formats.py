"""Read the runs in the logs of other projects: worklog, CTKD's JSON, json_stats."""

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
    """One run as read from a log."""

    epochs: dict[int, dict[str, float]] = field(default_factory=dict)  # metrics by epoch, ascending
    best: float | None = None  # best top-1 (%) that the log states
    lr: float | None = None  # learning rate of the first epoch
    planned: int = 0  # planned number of epochs; 0 if the log does not state it
    torn: bool = False  # whether the log ends in the middle of an epoch
    closed: bool | None = None  # whether the log has its last line; None: the format has none
    notes: list[str] = field(default_factory=list)  # what was left out

    @property
    def done(self) -> int:
        """Return the last complete epoch, or 0 if there is none."""
        return next(reversed(self.epochs), 0)

    def best_top1(self) -> float:
        """Return the highest top-1 (%) of the epochs, or NaN if none is finite."""
        accuracies = (row["val/top1"] for row in self.epochs.values())
        return max(filter(math.isfinite, accuracies), default=math.nan)


@dataclass
class _Reader:
    """The runs of a log. Its epochs are added in the order of the file.

    A training that is resumed appends to the log of the training that was killed. So an epoch may
    come again, and an epoch whose lines are incomplete may stand before it.
    """

    logs: list[Log] = field(default_factory=list)
    # The incomplete epochs since the last complete one: number (None if it is unknown), and the
    # line with the reason why it is incomplete.
    incomplete: list[tuple[int | None, str]] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Return the last complete epoch of the current run, or 0 if there is none."""
        return self.logs[-1].done if self.logs else 0

    def add(self, epoch: int, metrics: dict[str, float]) -> Log:
        """Add an epoch, and return its run.

        Epoch 1 starts a new run. An epoch that the run has already replaces that epoch and all
        that follow it, because the training was resumed before them.

        Raises:
            ValueError: if epochs before this one are absent from the log.
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
        """Note an incomplete epoch; raise ValueError if it does not follow the epochs before it."""
        self.incomplete.append((epoch, reason))
        if epoch is not None and epoch > self.done + 1:
            raise ValueError(self.incomplete[0][1])

    def finish(self, torn: bool = False) -> list[Log]:
        """Return the runs; raise ValueError if the log has incomplete epochs only.

        Args:
            torn: whether the log ends in the middle of an epoch of the last run.

        Returns:
            The runs, or a run without epochs if the log has none.

        Raises:
            ValueError: if no epoch is complete, and one is known to be incomplete.
        """
        if not self.logs:
            if self.incomplete:
                raise ValueError(self.incomplete[0][1])
            return [Log()]
        last = self.logs[-1]
        # Epoch 1 belongs to another run.
        if torn or any(epoch != 1 for epoch, _ in self.incomplete):
            last.torn = True
            if last.closed:  # by a training that was resumed after the incomplete epoch
                last.closed = False
        return self.logs


def worklog(text: str) -> list[Log]:
    """Return the runs in a worklog.txt of mdistiller; raise ValueError if it is not one."""
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
    """End a run of a worklog, whose line best_acc states `stated`."""
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
    """Return the runs in CTKD's objects; raise ValueError if one is not an epoch."""
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
            except (KeyError, TypeError, RecursionError) as error:
                number = text.count("\n", 0, at) + 1
                raise ValueError(
                    f"the object at line {number} is not a CTKD epoch ({error!r})"
                ) from None
        at = end
    return reader.finish()


def json_stats(text: str) -> list[Log]:
    """Return the runs in json_stats lines; raise ValueError if one is not an epoch."""
    reader = _Reader()
    trained: dict[str, float] = {}
    whole = True
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
