"""Test checkpoints: full disks, damaged files, and files that come from strangers."""

import argparse
import errno
import gzip
import logging
import os
import pickle
import random
import re
import resource
import signal
import warnings
import zipfile
from collections import OrderedDict
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sddlskd.files.atomic import write_atomically
from sddlskd.files.checkpoint import (
    UnreadableFile,
    load_weights,
    read,
    read_latest,
    read_weights,
    write,
    write_latest,
)
from sddlskd.models import create
from sddlskd.training.fit import fit
from tests.tiny import final, processes, rows, same, tiny

STATE = {
    "model": {"w": torch.arange(2000.0), "b": torch.tensor([1, 2])},
    "epoch": 3,
    "row": {"top1": 0.5, "name": "é"},
}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Atomic writes


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.ckpt"
    write(path, STATE)
    assert same(read(path), STATE)
    assert files(path.parent) == ["x.ckpt"]


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = tmp_path / "x.ckpt"
    write(path, STATE)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if stage != "write":
        monkeypatch.setattr(os, stage, full)

    def half_written() -> None:
        with write_atomically(path) as file:
            file.write(b"half of ")
            full()

    with pytest.raises(
        OSError, match=rf"cannot save {path}: No space left on device .*\d+ free\); free some"
    ) as caught:
        half_written() if stage == "write" else write(path, {"epoch": 4})
    assert caught.value.errno == errno.ENOSPC
    assert files(tmp_path) == ["x.ckpt"]
    assert same(read(path), STATE)


def test_interrupt_inside_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    write(path, STATE)

    def interrupted() -> None:
        with write_atomically(path) as file:
            file.write(b"half of ")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files(tmp_path) == ["x.ckpt"]
    assert same(read(path), STATE)


def write_over_the_limit(folder: Path, queue: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        write_latest(folder, {"w": torch.zeros(100_000)})
    except OSError as error:
        queue.put(str(error))


def test_the_kernel_refuses_to_write_more(tmp_path: Path) -> None:
    """A write fails in the middle of the file, as on a full disk or beyond a quota."""
    write_latest(tmp_path, STATE)
    queue = processes.SimpleQueue()
    process = processes.Process(target=write_over_the_limit, args=(tmp_path, queue))
    process.start()
    assert re.search(r"cannot save .*last\.ckpt.*: File too large; free some space", queue.get())
    process.join()
    assert files(tmp_path) == ["last.ckpt"]
    assert same(read_latest(tmp_path), STATE)


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "x.ckpt", STATE)


# The newest checkpoint and its spare


def test_spare_is_the_checkpoint_before(tmp_path: Path) -> None:
    assert read_latest(tmp_path) is None
    for epoch in (1, 2, 3):
        write_latest(tmp_path, {"epoch": epoch})
    assert files(tmp_path) == ["last.ckpt", "last.previous.ckpt"]
    assert read_latest(tmp_path) == {"epoch": 3}
    assert read(tmp_path / "last.previous.ckpt") == {"epoch": 2}


@pytest.mark.parametrize("replaced", [0, 1])
def test_dead_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    for epoch in (1, 2):
        write_latest(tmp_path, {"epoch": epoch})
    # The first rename belongs to the write itself.
    real, left = os.replace, [None] * (1 + replaced)

    def dying(*paths: Any) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        real(*paths)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        write_latest(tmp_path, {"epoch": 3})
    monkeypatch.undo()
    assert read_latest(tmp_path) == {"epoch": 3}
    write_latest(tmp_path, {"epoch": 4})
    assert read_latest(tmp_path) == {"epoch": 4}
    assert files(tmp_path) == ["last.ckpt", "last.previous.ckpt"]


def test_truncated_checkpoint_falls_back_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = tiny(tmp_path / "whole"), tiny(tmp_path / "cut")
    fit([whole])
    fit([cut])
    latest = Path(cut.run_dir, "last.ckpt")
    latest.write_bytes(latest.read_bytes()[: latest.stat().st_size // 2])
    Path(cut.run_dir, "result.json").unlink()  # as after a crash of the machine
    with caplog.at_level(logging.WARNING, logger="sddlskd"):
        fit([cut])
    assert f"{latest} is truncated, damaged or not a checkpoint" in caplog.text
    assert f"continuing from {latest.with_name('last.previous.ckpt')}" in caplog.text
    assert same(final(cut), final(whole))
    assert rows(cut) == rows(whole)
    for path in Path(cut.run_dir).glob("last*.ckpt"):
        path.write_bytes(b"nothing")
    Path(cut.run_dir, "result.json").unlink()
    with pytest.raises(
        UnreadableFile,
        match=rf"last.ckpt is truncated.*or delete {cut.run_dir} to start this run anew",
    ):
        fit([cut])


# Files from other programs


def saved(
    content: Any, *, legacy: bool = False, rename: tuple[bytes, bytes] | None = None
) -> bytes:
    """Return the bytes that torch.save writes.

    Args:
        content: the object to save.
        legacy: whether to use the format before torch 1.6.
        rename: (name, other name) of the module of NumPy's scalars, whose name depends on the
            version of NumPy; None to rename nothing.
    """

    def renamed(content: bytes) -> bytes:
        return content.replace(*rename) if rename else content

    buffer = BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    if not rename:
        return buffer.getvalue()
    if legacy:
        # Protocol 2 names globals in lines of text without lengths, so they can be replaced.
        return renamed(buffer.getvalue())
    reader = torch._C.PyTorchFileReader(BytesIO(buffer.getvalue()))
    out = BytesIO()
    writer = torch._C.PyTorchFileWriter(out)
    for name in reader.get_all_records():
        if name not in (
            "version",
            "byteorder",
            ".data/serialization_id",
            ".format_version",
            ".storage_alignment",
        ):
            record = renamed(reader.get_record(name))
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return out.getvalue()


NUMPY_NAMES = (b"numpy.core.multiarray\n", b"numpy._core.multiarray\n")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", NUMPY_NAMES)
def test_repdistillers_layout(tmp_path: Path, legacy: bool, name: bytes) -> None:
    path, model = tmp_path / "ckpt_epoch_240.pth", create("resnet8", num_classes=100)
    here = next(
        n for n in NUMPY_NAMES if n.startswith(np.float64(0).__reduce__()[0].__module__.encode())
    )
    content = {
        "epoch": 240,
        "model": model.state_dict(),
        "best_acc": np.float64(73.5),
        "accuracy": np.float32(73.25),
        "best": np.int64(7),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    data = saved(content, legacy=legacy, rename=(here, name))
    assert data.count(name) == 1
    path.write_bytes(data)
    loaded = read(path)
    assert (loaded["best_acc"], loaded["accuracy"], loaded["best"]) == (73.5, 73.25, 7)
    other = create("resnet8", num_classes=100)
    load_weights(other, path, "resnet8")
    assert same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap", [lambda w: w, lambda w: {"model": w}, lambda w: {"state_dict": w, "epoch": 1}]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_layouts_of_weights(tmp_path: Path, legacy: bool, wrap: Any, prefix: str) -> None:
    weights = OrderedDict(
        (prefix + name, value) for name, value in nn.Conv2d(3, 4, 1).state_dict().items()
    )
    path = tmp_path / "x.pth"
    path.write_bytes(saved(wrap(weights), legacy=legacy))
    got = read_weights(path)
    assert list(got) == ["weight", "bias"]
    assert torch.equal(got["bias"], weights[prefix + "bias"])


STRANGE = ({1: torch.ones(1)}, {"w": torch.ones(1, device="meta")})


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"epoch": 1}, [1, 2], 3, {"model": {"w": 1}}, *STRANGE]
)
def test_file_without_weights(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(saved(content))
    with pytest.raises(UnreadableFile, match=f"{path} holds no state dict; expected"):
        read_weights(path)


class Malicious:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("name", ["system", "exec", "getattr"])
def test_file_that_runs_code_is_refused_unrun(tmp_path: Path, form: str, name: str) -> None:
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    attack = {
        "system": Malicious(os.system, f"touch {proof}"),
        "exec": Malicious(exec, f"open({str(proof)!r}, 'w').close()"),
        "getattr": Malicious(getattr, Path(proof), "touch"),
    }[name]
    content = {"model": {"w": torch.zeros(3)}, "x": attack}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"x": attack}, protocol=2))
    else:
        path.write_bytes(saved(content, legacy=form == "legacy"))
    with pytest.raises(UnreadableFile) as caught:
        read(path)
    assert str(path) in str(caught.value)
    if form != "bare pickle":
        assert re.search(rf"is refused: it would run (\w+\.)?{name} while", str(caught.value))
        assert "Nothing was run. Save its state_dict alone" in str(caught.value)
    assert not proof.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_object_beside_the_weights_is_named_with_a_cure(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(saved({"model": {"w": torch.zeros(3)}, "x": Fraction(1, 2)}, legacy=legacy))
    with pytest.raises(
        UnreadableFile,
        match=r"refused: it would run fractions.Fraction .*Save its state_dict alone",
    ):
        read(path)
    # RepDistiller's <network>_last.pth holds its options.
    options = argparse.Namespace(lr=1, milestones=[150, 180])
    path.write_bytes(saved({"model": {"w": torch.zeros(3)}, "opt": options}, legacy=legacy))
    assert read(path)["opt"] == options


def test_namespace_with_more_than_attributes_is_refused(tmp_path: Path) -> None:
    path, proof = tmp_path / "x.pth", tmp_path / "proof"
    options = argparse.Namespace(x=Malicious(os.system, f"touch {proof}"))
    path.write_bytes(saved({"model": {"w": torch.zeros(3)}, "opt": options}))
    with pytest.raises(UnreadableFile, match="is refused: it would run"):
        read(path)
    assert not proof.exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.pth"):
        read(tmp_path / "x.pth")


# Damaged files


def outcome(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return read(path)
        except UnreadableFile as error:
            said = str(error)
    assert str(path) in said
    assert "\n" not in said
    return None


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_anywhere(tmp_path: Path, legacy: bool) -> None:
    path, data = tmp_path / "x.ckpt", saved(STATE, legacy=legacy)
    draw = random.Random(0)
    for length in [0, 1, 2, 10, len(data) - 1, *(draw.randrange(len(data)) for _ in range(40))]:
        path.write_bytes(data[:length])
        assert outcome(path) is None


@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_bits(tmp_path: Path, legacy: bool) -> None:
    path, data = tmp_path / "x.ckpt", saved(STATE, legacy=legacy)
    draw, noticed = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 20))):
            damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        got = outcome(path)
        noticed += got is None
        # The old format has no checksum, so its numbers may be wrong. Nothing else may happen.
        assert got is None or legacy or same(got, STATE)
    assert noticed > 20


# Weights of another network


def test_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write(path, {"model": create("resnet14", num_classes=10).state_dict()})
    with pytest.raises(
        ValueError,
        match=r"does not hold weights of wrn_16_1: .* is missing; .*; and \d+ more\. Give",
    ):
        load_weights(create("wrn_16_1", num_classes=10), path, "wrn_16_1")


@pytest.mark.parametrize(("theirs", "ours"), [("small", "large"), ("large", "small")])
def test_weights_with_another_stem(tmp_path: Path, theirs: str, ours: str) -> None:
    path = tmp_path / "x.pt"
    write(path, {"model": create("resnet8", num_classes=10, stem=theirs).state_dict()})
    with pytest.raises(ValueError, match=f"set dataset.stem={theirs}, the stem that the file"):
        load_weights(create("resnet8", num_classes=10, stem=ours), path, "resnet8")


def test_weights_of_another_class_count(tmp_path: Path) -> None:
    path, model = tmp_path / "x.pt", create("resnet8", num_classes=100)
    write(path, {"model": create("resnet8", num_classes=10).state_dict()})
    before: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"fc.weight is \(10, 64\) instead of \(100, 64\); fc.bias is \(10,\)"
    ):
        load_weights(model, path, "resnet8")
    assert same(dict(model.state_dict()), before)


def test_weights_of_another_kind(tmp_path: Path) -> None:
    path, model = tmp_path / "x.pt", create("resnet8", num_classes=10)
    weights = model.state_dict()
    write(path, {"model": weights | {"fc.bias": weights["fc.bias"].to(torch.complex64)}})
    with pytest.raises(ValueError, match=r"fc.bias is torch.complex64 instead of torch.float32"):
        load_weights(model, path, "resnet8")
    write(path, {"model": weights | {"\x1b[2J" + "x" * 500: torch.ones(1)}})
    with pytest.raises(ValueError, match=r": \\x1b\[2Jx{76} is not in resnet8\. Give"):
        load_weights(model, path, "resnet8")


def test_weights_from_before_batches_were_counted(tmp_path: Path) -> None:
    path, model = tmp_path / "x.pt", create("resnet8", num_classes=10)
    write(
        path,
        {
            "model": {
                k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")
            }
        },
    )
    other = create("resnet8", num_classes=10)
    load_weights(other, path, "resnet8")
    assert same(dict(other.state_dict()), dict(model.state_dict()))


# Layouts of other trainers

PREFIXES = (
    "module.",
    "module.student.",
    "_orig_mod.",
    "student.",
    "model.",
    "net.",
    "module._orig_mod.",
    "model.net._orig_mod.",
)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefix_that_all_keys_share(tmp_path: Path, prefix: str, legacy: bool) -> None:
    weights = create("resnet8", num_classes=10).state_dict()
    path = tmp_path / "x.pth"
    content = {"state_dict": {prefix + k: v for k, v in weights.items()}}
    path.write_bytes(saved(content, legacy=legacy))
    other = create("resnet8", num_classes=10)
    load_weights(other, path, "resnet8")
    assert same(dict(other.state_dict()), dict(weights))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"net": w, "acc": 91.5, "epoch": 3},
        lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}},
        lambda w: {"state_dict_ema": w},
        lambda w: {"model_ema": w},
        lambda w: {"state_dict": w, "hyper_parameters": {"lr": 0.1}, "loops": {"fit_loop": {}}},
        lambda w: {"model": {"state_dict": w}},
        lambda w: {"model": {"depth": 8}, "state_dict": w},
        lambda w: {"student": w, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 3},
        lambda w: {"model": {"network_weights": w}},
    ],
)
def test_key_that_holds_the_state_dict(tmp_path: Path, wrap: Any) -> None:
    weights = create("resnet8", num_classes=10).state_dict()
    path = tmp_path / "x.pth"
    path.write_bytes(saved(wrap(weights)))
    other = create("resnet8", num_classes=10)
    load_weights(other, path, "resnet8")
    assert same(dict(other.state_dict()), dict(weights))


def test_weights_beside_their_averages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, model = tmp_path / "x.pth", create("resnet8", num_classes=10)
    weights = model.state_dict()
    averages = {k: torch.zeros_like(v) for k, v in weights.items()}
    path.write_bytes(saved({"state_dict_ema": averages, "state_dict": weights}))
    other = create("resnet8", num_classes=10)
    load_weights(other, path, "resnet8")
    assert same(dict(other.state_dict()), dict(weights))
    (message,) = caplog.messages
    assert message.startswith(f"{path} holds averaged weights (state_dict_ema), which are not used")


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_counters_are_ignored(tmp_path: Path, prefix: str) -> None:
    weights = create("resnet8", num_classes=10).state_dict()
    counters = {
        "n_averaged": torch.tensor(3),
        f"{prefix}conv1.total_ops": torch.zeros(1, dtype=torch.float64),
        f"{prefix}total_params": torch.zeros(1, dtype=torch.float64),
    }
    path = tmp_path / "x.pth"
    path.write_bytes(saved({**counters, **{prefix + k: v for k, v in weights.items()}}))
    other = create("resnet8", num_classes=10)
    load_weights(other, path, "resnet8")
    assert same(dict(other.state_dict()), dict(weights))


def test_counter_of_the_network_itself_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    model = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 3))
    model.update_parameters(nn.Linear(2, 3))
    write(path, {"model": model.state_dict()})
    other = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 3))
    load_weights(other, path, "linear")
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert other.n_averaged == 1


def test_prefix_that_some_keys_lack_is_shown_beside_what_is_expected(tmp_path: Path) -> None:
    path, model = tmp_path / "x.pth", create("resnet8", num_classes=10)
    weights = {f"student.{k}": v for k, v in model.state_dict().items()}
    path.write_bytes(saved({"model": {**weights, "teacher.conv1.weight": torch.ones(1)}}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not hold weights of resnet8") as caught:
        load_weights(model, path, "resnet8")
    assert str(caught.value).endswith(
        "(the first keys of the file alone are student.conv1.weight, student.bn1.weight, "
        "student.bn1.bias, ...; those of resnet8 alone are conv1.weight, bn1.weight, bn1.bias, ...)"
    )
    assert "\n" not in str(caught.value)
    assert same(dict(model.state_dict()), before)


def test_several_state_dicts_under_unknown_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    weights = create("resnet8", num_classes=10).state_dict()
    path.write_bytes(saved({"student": weights, "teacher": weights, "epoch": 1}))
    says = (
        "the first keys of the file are student, teacher, epoch; "
        "save one of student, teacher alone: torch.save({'model': ...}, FILE)"
    )
    with pytest.raises(UnreadableFile, match=re.escape(says)):
        read_weights(path)


def test_the_content_decides_whether_a_file_is_safetensors(tmp_path: Path) -> None:
    weights = {"w": torch.arange(3.0)}
    save_file(weights, tmp_path / "x.pth")
    write(tmp_path / "x.safetensors", {"model": weights})
    for path in tmp_path.iterdir():
        assert same(read_weights(path), weights)
    (tmp_path / "damaged.safetensors").write_bytes(b"123")
    with pytest.raises(UnreadableFile, match="not a safetensors file"):
        read_weights(tmp_path / "damaged.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "run: git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not a checkpoint; download the"),
        (gzip.compress(b"weights", mtime=0), "is compressed; unpack it with gunzip"),
        (b"\x89PNG\r\n\x1a\n", "bytes: torch.save did not write it); get it again"),
        (b"hello\n", "6 bytes: its bytes are not those of torch.save); get it again"),
        (b"epoch,loss\n1,2\n", "its bytes are not those of torch.save"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match=re.escape(says)) as caught:
        read_weights(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_torchscript_program_is_refused_unrun(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    # torch writes this file into such an archive, and recognises the archive by it.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/constants.pkl", pickle.dumps(()))
        archive.writestr("x/data.pkl", pickle.dumps({}))
        archive.writestr("x/version", "3")
    with pytest.raises(UnreadableFile, match=r"TorchScript program.*torch\.jit\.load"):
        read_weights(path)


def test_file_that_contains_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    content: dict[str, Any] = {}
    content["model"] = content
    path.write_bytes(saved(content))
    with pytest.raises(UnreadableFile, match="holds no state dict"):
        read_weights(path)
