"""Check what stays the same if code moves: public names, hashes, and runs that began before."""

import importlib
import json
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.config.targets import instantiate
from sddlskd.terminal import console
from sddlskd.training.fit import fit
from tests.conftest import Compose
from tests.tiny import net, rows, tiny

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "sddlskd.losses": [
        *("kd", "dkd", "nkd", "ttm", "wttm", "rld", "gdkd", "abkd", "dist", "sld", "skd"),
    ],
    "sddlskd.distill": [
        "KNOWLEDGE",
        "REDUCTIONS",
        "PerSampleLoss",
        "ScaleDecoupled",
        "check_scales",
        "compares_images",
        "region_logits",
        "standardize",
    ],
    "sddlskd.models": [
        "LogitMapModel",
        "create",
        "from_network",
        "from_timm",
        "from_torchvision",
        "names",
    ],
    "sddlskd.data": [
        "DeviceData",
        "DownloadError",
        "Files",
        "Images",
        "Splits",
        "cifar100",
        "digits",
        "fake",
        "fashion_mnist",
    ],
    "sddlskd.datasets": [
        "Files",
        "Images",
        "Splits",
        "cifar10",
        "cifar100",
        "cub200",
        "digits",
        "fake",
        "fashion_mnist",
        "image_folder",
        "imagenet",
        "stl10",
        "tiny_imagenet",
    ],
    "sddlskd.record": ["Record", "read_result", "read_rows"],
    "sddlskd.tracking": ["Mirror", "register", "sync", "sync_sweep"],
    "sddlskd.train": ["main"],
    "sddlskd.teachers": ["main"],
    "sddlskd.sweeps.__main__": ["main"],
    "sddlskd.tracking.__main__": ["main"],
    "sddlskd.export": ["main"],
    "sddlskd.evaluate": ["main"],
    "sddlskd.worker": ["main"],
    "sddlskd.server": ["main"],
}

# (overrides, config_hash, settings_hash, run name) at the commit before modules moved into rooms
# Values of two recipes from before they clipped gradients and pooled as SDD's code does.
BEFORE = "optimizer.clip_norm=null distiller.pooling=direct"
# Values of CUB-200 from before its images, batches and networks were those of SDD's code.
BEFORE_CUB = "dataset.crop=area dataset.drop_last=false dataset.new_ends=false"
HASHES = [
    ("", "3755aa485b69", "3755aa485b69", "cifar100/resnet32x4-resnet8x4-kd-ls-M-1-2-4-s0"),
    (
        "student=shufflev1 M=[1,2,4]",
        "304b3db7c2d2",
        "304b3db7c2d2",
        "cifar100/resnet32x4-shufflev1-kd-ls-M-1-2-4-s0",
    ),
    (
        "recipe=kd_ls pair=resnet32x4_shufflev2",
        "bc3a5707cbbc",
        "bc3a5707cbbc",
        "cifar100/resnet32x4-shufflev2-kd-ls-M-1-s0",
    ),
    (
        "recipe=dkd pair=vgg13_vgg8",
        "572da99e98e1",
        "572da99e98e1",
        "cifar100/vgg13-vgg8-dkd-M-1-s0",
    ),
    (
        f"recipe=sd_nkd dataset=cub200 pair=vgg13_mobilev2 {BEFORE} {BEFORE_CUB}",
        "e267ec0a3eaf",
        "e267ec0a3eaf",
        "cub200/vgg13-mobilev2-nkd-M-1-2-4-s0",
    ),
    (
        f"dataset=imagenet recipe=sd_dkd pair=imagenet_resnet34_imagenet_resnet18 {BEFORE}",
        "27e59788735f",
        "27e59788735f",
        "imagenet/resnet34-resnet18-dkd-M-1-2-s0",
    ),
    (
        "dataset=tiny_imagenet student=wrn_16_2 teacher=wrn_40_2",
        "20ed9b578aea",
        "20ed9b578aea",
        "tiny_imagenet/wrn_40_2-wrn_16_2-kd-ls-M-1-2-4-s0",
    ),
    (
        "distiller=vanilla student=resnet8 dataset=digits",
        "f76733cd810e",
        "f76733cd810e",
        "digits/resnet8-vanilla-s0",
    ),
    (
        "dataset=image_folder dataset.num_classes=37 dataset.name=pets student=mobilev2",
        "d3abf66991b0",
        "d3abf66991b0",
        "pets/resnet32x4-mobilev2-kd-ls-M-1-2-4-s0",
    ),
    (
        "dataset=fashion_mnist optimizer=adamw trainer=debug seed=3",
        "57746f695c4b",
        "80a48786155b",
        "fashion_mnist/resnet32x4-resnet8x4-kd-ls-M-1-2-4-s3",
    ),
]


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_what_users_import_is_importable(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in PUBLIC[module] if not hasattr(found, name)] == []


def test_the_hashes_of_jobs_have_not_changed(compose: Compose) -> None:
    found = []
    for overrides, *_ in HASHES:
        job = compose(*overrides.split())
        name = cfg.run_name(job).removesuffix(f"-{cfg.config_hash(job)}")
        found.append((overrides, cfg.config_hash(job), cfg.settings_hash(job), name))
    assert found == HASHES


def test_a_loader_under_its_first_name_is_the_same_job(compose: Compose) -> None:
    job = compose("dataset=tiny_imagenet")
    old = compose("dataset=tiny_imagenet", "dataset.load._target_=sddlskd.folders.tiny_imagenet")
    assert job.dataset.load["_target_"] == "sddlskd.datasets.tiny_imagenet"
    assert old == job
    assert cfg.config_hash(old) == cfg.config_hash(job)


def test_a_function_that_is_no_loader_is_refused() -> None:
    for target in ("sddlskd.datasets.folders.image_files", "sddlskd.files.download.download_file"):
        with pytest.raises(ValueError, match="is not allowed in a configuration"):
            instantiate({"_target_": target})


# A run that the commit before the rooms began, and stopped in the second epoch


@pytest.fixture
def begun(tmp_path: Path) -> Config:
    """Return the job of that run; its record, teacher and MLflow run lie below tmp_path."""
    home = tmp_path / "home"
    with zipfile.ZipFile(
        ROOT / "tests" / "reference" / "run_begun_before_the_rooms.zip"
    ) as archive:
        archive.extractall(home)
    first_home = "/home/of/the/first/launch"
    (config,) = home.glob("runs/fake/*/config.yaml")
    config.write_text(config.read_text().replace(first_home, str(home)))
    mirror = config.parent / "mlflow.json"
    content = json.loads(mirror.read_text().replace(first_home, str(home)))
    record.write_mirror(config.parent, {k: v for k, v in content.items() if k != "checksum"})
    database = sqlite3.connect(home / "mlflow.db")
    for table, column in (
        ("experiments", "artifact_location"),
        ("runs", "artifact_uri"),
        ("tags", "value"),
        ("params", "value"),
    ):
        database.execute(
            f"UPDATE {table} SET {column} = REPLACE({column}, ?, ?)", (first_home, str(home))
        )
    database.commit()
    database.close()
    return cfg.load(config, allow_foreign_targets=True)


def test_a_run_that_began_before_goes_on(begun: Config, tmp_path: Path) -> None:
    folder = Path(begun.run_dir)
    earlier = record.read_result(folder)
    assert (earlier["status"], earlier["epochs"]) == ("KILLED", 1)
    assert cfg.config_hash(begun) == earlier["config_hash"]
    (result,) = fit([begun])
    assert result["status"] == "FINISHED"
    assert result["run_id"] == earlier["run_id"]
    assert "continuing at epoch 2, step 1" in (folder / "train.log").read_text()

    undisturbed = tiny(
        tmp_path / "other",
        "M=[1,2]",
        "standardize=true",
        "trainer.epochs=3",
        model=net(dropout=0.0),
        teacher=False,
    )
    shutil.copytree(Path(begun.home, "teachers"), tmp_path / "other" / "teachers")
    fit([undisturbed])
    assert [row["epoch"] for row in rows(begun)] == [1, 2, 3]
    for row, expected in zip(rows(begun), rows(undisturbed), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(begun.tracking.uri)
    runs = client.search_runs(["1"], "tags.kind = 'job'")
    assert [run.info.run_id for run in runs] == [earlier["run_id"]]
    history = client.get_metric_history(earlier["run_id"], "val/top1")
    assert [point.step for point in history] == [1, 2, 3]
    assert runs[0].info.status == "FINISHED"


# Two checkouts and one environment


@pytest.fixture
def second_checkout(tmp_path: Path) -> Path:
    """Return a copy of the code and of `conf/` that the environment was not installed from."""
    for name in ("sddlskd", "conf"):
        shutil.copytree(ROOT / name, tmp_path / "second" / name)
    return tmp_path / "second"


def test_a_second_checkout_reads_its_own_conf(second_checkout: Path) -> None:
    code = "from sddlskd import config; print(config.conf_folder())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=second_checkout, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(second_checkout / "conf"), done.stderr


def test_a_second_checkout_is_refused_by_the_launchers_of_the_first(second_checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sddlskd.train", "--cfg", "job"],
        cwd=second_checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(second_checkout) in line
    assert "make setup" in line


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("sddlskd.train", ["--cfg", "job"]),
        ("sddlskd.worker", ["run"]),
        ("sddlskd.teachers", ["list"]),
        ("sddlskd.evaluate", ["run"]),
        ("sddlskd.export", ["run"]),
        ("sddlskd.tracking.__main__", ["sync", "runs"]),
        ("sddlskd.sweeps.__main__", ["status", "mine"]),
        ("sddlskd.sweeps.precheck", []),
    ],
)
def test_every_command_refuses_the_launchers_of_another_checkout(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    words: list[str],
) -> None:
    monkeypatch.setattr(console, "launchers_folder", lambda: tmp_path / "first" / "hydra_plugins")
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(module).main()
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the code is that of {ROOT / 'sddlskd'}, but this environment ")
    assert str(tmp_path / "first") in line
    assert list(tmp_path.iterdir()) == []
