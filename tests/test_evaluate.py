"""Test the command `evaluate`, and the calibration error against a slow implementation."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sddlskd import evaluate, export
from sddlskd.config import Config
from sddlskd.datasets import digits
from sddlskd.datasets.arrays import Images
from sddlskd.files import checkpoint
from sddlskd.models import create, from_timm
from sddlskd.models.base import LogitMapModel
from sddlskd.training import build, measure
from sddlskd.training.build import build_data
from sddlskd.training.checks import check_maps
from sddlskd.training.evaluation import answers, calibration_error, class_scores, scores
from sddlskd.training.evaluation import evaluate as stream
from sddlskd.training.fit import fit
from sddlskd.training.teacher_files import path_of
from tests.photographs import class_folders
from tests.tiny import composed, tiny

ASKED = ("dataset=fake", "dataset.num_classes=10", "+dataset.load.train=192",
         "+dataset.load.test=64", "+dataset.load.size=16", "trainer.device=cpu")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    job = tiny(tmp_path_factory.mktemp("home"), "trainer.epochs=1")
    fit([job])
    return job


def judged(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    evaluate.main(["--json", *map(str, words)])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def without_clock(found: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in found.items()
        if key not in ("classes", "images_per_s", "batch", "ms_per_image")
    }


def slow_ece(logits_NK: Tensor, target_N: Tensor, bins: int) -> float:
    """Return the ECE of Guo et al. 2017, section 2, computed image by image in plain Python."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for logits, target in zip(logits_NK.tolist(), target_N.tolist(), strict=True):
        largest = max(logits)
        confidence = 1 / sum(math.exp(z - largest) for z in logits)
        m = next(m for m in range(1, bins + 1) if confidence <= m / bins or m == bins)
        members.setdefault(m, []).append((confidence, logits.index(largest) == target))
    return 100 * sum(
        abs(sum(right for _, right in inside) / len(inside)
            - sum(c for c, _ in inside) / len(inside)) * len(inside)
        for inside in members.values()
    ) / len(target_N)  # fmt: skip


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_calibration_error_is_guos(bins: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NK, target_N = scale * torch.randn(400, 7, generator=generator), torch.arange(400) % 7
    assert calibration_error(logits_NK, target_N, bins) == pytest.approx(
        slow_ece(logits_NK, target_N, bins), abs=1e-9
    )


def test_calibration_error_at_its_ends() -> None:
    sure_NK, target_N = 1000 * torch.eye(4), torch.arange(4)
    assert calibration_error(sure_NK, target_N) == 0
    assert calibration_error(sure_NK, target_N.flip(0)) == 100
    assert calibration_error(torch.zeros(8, 4), torch.arange(8) % 4) == pytest.approx(0, abs=1e-12)


def test_the_worst_class_comes_first_with_its_most_frequent_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted_N, target_N = torch.tensor([0, 0, 2, 2, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1, 1, 3])
    rows = class_scores(torch.eye(4)[predicted_N], target_N)
    assert [tuple(row.values()) for row in rows] == [
        (3, 1, 0.0, 1, 1),
        (1, 4, 25.0, 2, 2),
        (0, 2, 100.0, None, 0),
    ]
    monkeypatch.setattr(evaluate, "SHOWN_CLASSES", 2)
    evaluate._print_classes(rows)
    assert capsys.readouterr().out.splitlines() == [
        "class 3    0.00 % of 1, mistaken for 1 1 time",
        "class 1   25.00 % of 4, mistaken for 2 2 times",
        "and 1 better class, which --json lists",
    ]


def test_scores_of_all_answers_are_those_of_batches(trained: Config) -> None:
    model, data = create("resnet8", 10).eval(), build_data(trained, torch.device("cpu"))
    whole, streamed = (
        scores(*answers(model, data.test_batches())),
        stream(model, data.test_batches()),
    )
    assert {key: whole[key] for key in streamed} == pytest.approx(streamed)


def test_a_run_is_judged_with_its_teacher_and_its_best_epoch(
    trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged(capsys, trained.run_dir)
    result = json.loads(Path(trained.run_dir, "result.json").read_text())
    assert found["top1"] == pytest.approx(result["best_top1"])
    assert found["teacher_top1"] == pytest.approx(result["teacher_top1"])
    assert found["images"] == 64
    assert found["images_per_s"] > 0
    student, teacher = create("resnet8", 10).eval(), create("resnet8", 10).eval()
    student.load_state_dict(
        torch.load(Path(trained.run_dir, "best.ckpt"), weights_only=True)["model"]
    )
    teacher.load_state_dict(
        torch.load(path_of(trained.home, "fake", "resnet8"), weights_only=True)["model"]
    )
    data = build_data(trained, torch.device("cpu"))
    s_NK, target_N = answers(student, data.test_batches())
    t_NK, _ = answers(teacher, data.test_batches())
    assert found["agreement"] == pytest.approx(
        100 * (s_NK.argmax(1) == t_NK.argmax(1)).double().mean().item()
    )
    assert found["ece"] == pytest.approx(slow_ece(s_NK, target_N, 15), abs=1e-3)


@pytest.mark.parametrize("tf32", [True, False])
def test_the_number_formats_are_those_of_the_job(
    trained: Config, monkeypatch: pytest.MonkeyPatch, tf32: bool
) -> None:
    seen = set()
    original = LogitMapModel.forward

    def noting(self: LogitMapModel, *arguments: Any) -> Any:
        seen.add(torch.backends.cudnn.allow_tf32)
        return original(self, *arguments)

    monkeypatch.setattr(LogitMapModel, "forward", noting)
    job = replace(trained, trainer=replace(trained.trainer, tf32=tf32))
    monkeypatch.setattr(measure, "check_maps", lambda *_: None)
    measure.measure(job, Path(trained.run_dir, "best.ckpt"))
    assert seen == {tf32}


def test_a_teacher_agrees_with_itself(trained: Config, capsys: pytest.CaptureFixture[str]) -> None:
    path = path_of(trained.home, "fake", "resnet8")
    found = judged(
        capsys, path, "student=resnet8", "teacher=resnet8", f"home={trained.home}", *ASKED
    )
    assert found["agreement"] == 100
    assert found["teacher_top1"] == found["top1"]


def test_an_exported_file_gives_what_its_run_gives(
    trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = judged(capsys, trained.run_dir)
    export.main([trained.run_dir])
    path = shutil.move(capsys.readouterr().out.strip(), trained.home)
    with_teacher = judged(capsys, path, "teacher=resnet8", f"home={trained.home}", *ASKED)
    assert without_clock(with_teacher) == pytest.approx(without_clock(expected))
    alone = judged(capsys, path, *ASKED)
    assert "agreement" not in alone
    assert alone["ece"] == pytest.approx(expected["ece"])


def test_a_run_on_other_data_keeps_its_normalisation(
    trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [word.replace("load.test=64", "load.test=32") for word in ASKED]
    assert judged(capsys, trained.run_dir, *more)["images"] == 32
    overrides = ["dataset=fashion_mnist", "dataset.root=/x"]
    job, _, _ = evaluate._job_and_weights(Path(trained.run_dir), overrides)
    assert (job.dataset.name, job.dataset.mean, job.dataset.root) == (
        "fashion_mnist",
        trained.dataset.mean,
        "/x",
    )
    assert job.dataset.load["root"] == "/x"
    assert job.student == trained.student
    # The teacher is that of the run, unless the command line names another.
    own = str(path_of(trained.home, "fake", "resnet8"))
    assert job.teacher.checkpoint == own
    job, _, _ = evaluate._job_and_weights(Path(trained.run_dir), [*overrides, "teacher=vgg8"])
    assert not job.teacher.checkpoint


@pytest.mark.parametrize("group", ["student", "teacher"])
def test_a_network_that_cannot_take_the_images_is_named_in_one_line(
    trained: Config, group: str
) -> None:
    class Narrow(torch.nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 10, 17)  # a kernel of 17 pixels, larger than the images of 16

    class Full(torch.nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    data, cpu = build_data(trained, torch.device("cpu")), torch.device("cpu")
    good = create("resnet8", 10)
    pair = (Narrow(), good) if group == "student" else (good, Narrow())
    with pytest.raises(
        ValueError, match=rf"^{group}=resnet8 cannot take images of 3x16x16 \(.*Kernel.*\)"
    ) as caught:
        check_maps(trained, *pair, data, cpu)
    assert "\n" not in str(caught.value)

    class Sized(torch.nn.Module):  # as timm's networks for images of one size
        def forward(self, _: Tensor) -> Tensor:
            raise AssertionError("Input height (16) doesn't match model (224).")

    pair = (Sized(), good) if group == "student" else (good, Sized())
    with pytest.raises(ValueError, match=rf"^{group}=resnet8 cannot take .*match model \(224\)"):
        check_maps(trained, *pair, data, cpu)
    # A network of timm names its cure.
    sized = from_timm("vit_tiny_patch16_224", 10, embed_dim=12, depth=1, num_heads=1)
    pair = (sized, good) if group == "student" else (good, sized)
    with pytest.raises(ValueError, match=rf"; .*, or set \+{group}\.model\.resize=224$"):
        check_maps(trained, *pair, data, cpu)
    # The error must come through unchanged: the caller then halves the group of jobs.
    with pytest.raises(torch.OutOfMemoryError):
        check_maps(trained, Full(), None, data, cpu)
    check_maps(trained, good, good, data, cpu)
    assert good.training


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nowhere"], "nowhere is neither a run directory nor a file"),
        (
            ["{folder}/../away.ckpt"],
            "has no metadata that describes its network; add student=NAME dataset=NAME",
        ),
        (["{folder}/best.ckpt", "student=resnet14", *ASKED], "does not hold weights of resnet14"),
        (
            ["{folder}/best.onnx"],
            "evaluate its run directory, or the file that --to safetensors exports",
        ),
        (["{folder}", "trainer.device=tpu"], "trainer.device=tpu is unknown"),
        (["{folder}", "teacher=vgg8"], "teacher=vgg8 for fake is missing"),
        (["{folder}", "datset=fake"], "datset is unknown"),
        (["{folder}", "dataset.root=x"], "dataset.root has no effect here"),
        (["{folder}", "dataset=fashion_mnist", "dataset.num_classes=9"], "tells 10 classes apart"),
    ],
)
def test_errors_take_one_line(
    trained: Config, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(trained.run_dir, "best.onnx").touch()
    shutil.copy(Path(trained.run_dir, "best.ckpt"), Path(trained.run_dir).parent / "away.ckpt")
    with pytest.raises(SystemExit, match="1"):
        evaluate.main([word.format(folder=trained.run_dir) for word in words])
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert why in err[-1]


def test_text_has_units_and_no_top5_of_few_classes(
    trained: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"images": 60, "top1": 25.0, "top5": 99.0, "flops": 90521600, "ms_per_image": 2.151}
    monkeypatch.setattr(measure, "measure", lambda *_: dict(found))
    evaluate.main([trained.run_dir])
    out, err = capsys.readouterr()
    assert [line.split(maxsplit=1) for line in out.splitlines()] == [
        ["images", "60"], ["top1", "25 %"], ["top5", "99 %"], ["flops", "90.52 M"],
        ["ms_per_image", "2.151 ms"],
    ]  # fmt: skip
    assert f"evaluating {trained.run_dir} on fake ..." in err
    monkeypatch.setattr(evaluate, "LEAST_FOR_TOP5", 11)
    evaluate.main([trained.run_dir])
    assert "top5" not in capsys.readouterr().out
    assert judged(capsys, trained.run_dir) == found


def test_several_runs_are_a_table(
    trained: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    export.main([trained.run_dir, "--to", "safetensors", "--out", str(tmp_path / "s.safetensors")])
    capsys.readouterr()
    sources = [trained.run_dir, str(tmp_path / "s.safetensors")]
    evaluate.main([*sources, *ASKED])
    header, *lines = capsys.readouterr().out.splitlines()
    assert {"images_per_s", "ms_per_image", "student"} <= set(header.split())
    assert [line.split()[-1] for line in lines[:2]] == sources
    # What all have in common stands below the table.
    assert "parameters: 0.07804 M" in lines
    assert "batch: 64 images" in lines
    evaluate.main([*sources, *ASKED, "--json"])
    both = json.loads(capsys.readouterr().out)
    assert [one["source"] for one in both] == sources
    assert both[0]["top1"] == both[1]["top1"]
    with pytest.raises(SystemExit, match="1"):
        evaluate.main([*sources, str(tmp_path / "missing")])
    assert capsys.readouterr().out == ""  # nothing is measured before all are found


# The linear probe


def test_a_probe_is_a_logistic_regression_of_the_pooled_features(
    trained: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = (f"home={trained.home}", "dataset=digits", "trainer.device=cpu")
    found = judged(capsys, trained.run_dir, "--probe", *words)
    assert (found["train_images"], found["images"], found["features"]) == (1437, 360, 64)
    network = create("resnet8", 10).eval()
    network.load_state_dict(checkpoint.read(Path(trained.run_dir, "best.ckpt"))["model"])
    numbers = []
    # The network keeps the mean and std that it was trained with.
    given = trained.dataset.mean, trained.dataset.std
    mean, std = (torch.tensor(values)[:, None, None] for values in given)
    for split in digits():
        assert isinstance(split, Images)
        pixels_BCHW = split.images_NHWC.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            map_BCHW = network.features((pixels_BCHW - mean) / std)
        numbers.append((map_BCHW.mean((2, 3)).numpy(), split.labels_N.numpy()))
    (train, train_y), (test, test_y) = numbers
    mean_C, std_C = train.mean(0), train.std(0)
    classifier = LogisticRegression(max_iter=2000).fit((train - mean_C) / std_C, train_y)
    expected = 100 * (classifier.predict((test - mean_C) / std_C) == test_y).mean()
    assert found["probe_top1"] == pytest.approx(expected, abs=0.6)  # two images


def test_a_probe_takes_exported_students_and_resizes(
    trained: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    export.main([trained.run_dir, "--to", "safetensors", "--out", str(tmp_path / "s.safetensors")])
    capsys.readouterr()
    words = ("--probe", "dataset=digits", "trainer.device=cpu")
    one = judged(capsys, tmp_path / "s.safetensors", *words)
    assert one == judged(capsys, trained.run_dir, *words, f"home={trained.home}")
    small = judged(capsys, tmp_path / "s.safetensors", *words, "--size", "8")
    assert small["probe_top1"] != one["probe_top1"]


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--size", "8"), "add --probe"), (("--probe", "--size", "0"), "--size 0 must be at least 1")],
)
def test_a_probe_that_cannot_be_made_is_one_line(
    trained: Config, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    with pytest.raises(SystemExit, match="1"):
        evaluate.main([trained.run_dir, *words])
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def of_files(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the job of a student that learnt from a folder of 2 classes at 32 pixels."""
    home = tmp_path_factory.mktemp("files")
    root = class_folders(home / "pets", 2, 4, test=2)
    job = composed(
        home, "student=resnet8", "tracking=none", "trainer=cpu", "dataset=image_folder",
        f"dataset.root={root}", "dataset.name=pets", "dataset.size=32", "dataset.stem=small",
        "dataset.workers=0", "recipe=vanilla", "trainer.epochs=1", "trainer.batch_size=4",
    )  # fmt: skip
    fit([job])
    return job


def test_a_file_of_a_run_stands_for_the_run(
    of_files: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(of_files.run_dir)
    export.main([str(run)])
    capsys.readouterr()
    for name in ("best.safetensors", "best.ckpt"):
        job, weights, trained = evaluate._job_and_weights(run / name, [])
        assert weights == run / name
        assert job == trained == evaluate._job_and_weights(run, [])[0]
    job, *_ = evaluate._job_and_weights(run / "best.safetensors", ["dataset.root=/x"])
    assert job.dataset.load["root"] == "/x"
    expected = judged(capsys, run, "trainer.device=cpu")
    # Away from its run, the file tells the size of the images and the number of classes.
    away = (run / "best.safetensors").rename(tmp_path / "away.safetensors")
    root = f"dataset.root={of_files.dataset.root}"
    for words in ([root], ["dataset=image_folder", root]):
        found = judged(capsys, away, *words, "dataset.workers=0", "trainer.device=cpu")
        assert without_clock(found) == pytest.approx(without_clock(expected))
        assert found["classes"] == expected["classes"]
        assert {row["class"] for row in found["classes"]} == {"class_0", "class_1"}
    with pytest.raises(ValueError, match=r"trained on dataset.name=pets.* give dataset=image_fol"):
        evaluate._job_and_weights(away, [])


def test_another_size_than_that_of_the_training_is_a_warning(
    of_files: Config, caplog: pytest.LogCaptureFixture
) -> None:
    job = replace(of_files, dataset=replace(of_files.dataset, size=48))
    data = build_data(job, torch.device("cpu"))
    measure._warn_of_size(of_files, of_files, data)
    assert not caplog.records
    measure._warn_of_size(job, of_files, data)
    assert "trained with dataset.size=32, and sees images of dataset.size=48" in caplog.text
    # A student's teacher says so, too: its own file tells the size, and its run tells that of a
    # checkpoint.
    for path in (
        path_of(of_files.home, "pets", "resnet8"),
        Path(of_files.run_dir, "best.ckpt"),
    ):
        caplog.clear()
        build._warn_of_size(of_files, path)
        assert not caplog.records
        build._warn_of_size(job, path)
        assert "trained with dataset.size=32, and sees images of 48 pixels now" in caplog.text


@pytest.mark.parametrize(
    "content",
    ["- a list", "model: [", "x: !!python/name:os.system", "dataset: {load: '${gone}'}", "\x00"],
)
def test_a_config_of_another_program_beside_a_teacher_tells_no_size(
    tmp_path: Path, of_files: Config, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    checkpoint = shutil.copy(Path(of_files.run_dir, "best.ckpt"), tmp_path)
    build._warn_of_size(of_files, Path(checkpoint))
    assert not caplog.records


def test_a_gpu_of_apple_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(1))
    for kind in ("cpu", "mps"):
        measure._wait_for(torch.device(kind))
    assert waited == [1]
