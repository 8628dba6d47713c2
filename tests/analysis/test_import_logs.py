"""Test the import of other projects' logs.

They become runs in the same frame as ours. A bad file is named, and the others are imported.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis import import_logs as module
from analysis import log_formats, log_params
from analysis.import_logs import import_logs, remove_imports
from analysis.runs import load
from analysis.schema import METRICS, PARAMS
from tests.analysis.store import empty_store

DASHES = "-" * 25


def block(epoch: int, top1: float = 50.0, **others: str) -> str:
    """Return the lines that mdistiller writes for an epoch."""
    fields = {
        **{
            "epoch": str(epoch),
            "lr": "0.05",
            "train_acc": "40.25",
            "train_loss": "3.10",
            "test_acc": f"{top1:.2f}",
        },
        **{"test_acc_top5": "80.50", "test_loss": "2.20"},
        **others,
    }
    return "\n".join([DASHES, *(f"{key}: {text}" for key, text in fields.items()), DASHES, ""])


def worklog(accuracies: Sequence[float], end: str | None = None) -> str:
    end = f"best_acc\t{max(accuracies):.2f}" if end is None else end
    return "".join(block(epoch, top1) for epoch, top1 in enumerate(accuracies, 1)) + end


def ctkd(*runs: Sequence[float]) -> str:
    """Return the epochs of several runs, one after the other as CTKD appends them."""
    return "".join(
        json.dumps(
            {
                **{
                    "test_acc": top1,
                    "test_acc_top5": 90.0,
                    "best_acc": max(run[:epoch]),
                    "epoch": epoch,
                },
                **{"temp": "2.0076141357421875", "decay_value": -1.0},
            },
            indent=4,
        )
        for run in runs
        for epoch, top1 in enumerate(run, 1)
    )


def json_stats(errors: Sequence[float], planned: int, prefix: str = "") -> str:
    lines = []
    for epoch, error in enumerate(errors, 1):
        at = {"epoch": f"{epoch}/{planned}", "mem": 5497, "time_avg": 0.19}
        lowest = min(errors[:epoch])
        lines += [
            {
                "_type": "train_iter",
                **at,
                "loss": 9.1,
                "top1_err": 97.5,
                "top5_err": 80.0,
                "lr": 0.0,
            },
            {
                "_type": "train_epoch",
                **at,
                "loss": 8.5,
                "lr": 0.0004,
                "top1_err": 97.5,
                "top5_err": 89.25,
            },
            {"_type": "test_iter", **at, "top1_err": 96.5, "top5_err": 83.0},
            {
                "_type": "test_epoch",
                **at,
                "min_top1_err": lowest,
                "top1_err": error,
                "top5_err": 10.25,
            },
        ]
    return "".join(f"{prefix}json_stats: {json.dumps(line, sort_keys=True)}\n" for line in lines)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    shutil.copy(empty_store(), tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def client_of(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_of(uri: str, experiment: str = "imported") -> dict[str, Any]:
    """Return {name: run} of the runs in MLflow."""
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    return (
        {run.info.run_name: run for run in client.search_runs([found.experiment_id])}
        if found
        else {}
    )


def only(uri: str, paths: Iterable[Path], given: Mapping[str, str] | None = None) -> Any:
    """Import files that hold one run, and return the run."""
    (run_id,) = import_logs(list(paths), uri, given=given)
    return client_of(uri).get_run(run_id)


def history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [
        (point.step, point.value) for point in client_of(uri).get_metric_history(run_id, metric)
    ]


def refusal(path: Path, given: Mapping[str, str] | None = None) -> str:
    """Return why a file is refused, and check that MLflow has nothing of it."""
    database = path.parent / "none.db"
    with pytest.raises(ValueError, match=r"^1 not imported, 0 imported:\n") as caught:
        import_logs([path], f"sqlite:///{database}", given=given)
    assert not database.exists()
    _, line = str(caught.value).splitlines()
    assert line.startswith(str(path))
    return line.removeprefix(str(path))


# Formats of logs


def test_worklog_has_every_metric_by_epoch_and_the_params_of_its_name(uri: str, logs: Path) -> None:
    path = written(
        logs / "KD/kd,ResNet50,MobileNetV2,3,1.txt",
        worklog([40.0, 52.25, 51.5], "best_acc    52.25"),
    )
    run = only(uri, [path])
    assert run.data.params == {
        "dataset.name": "cifar100",
        "teacher.name": "resnet50",
        "student.name": "mobilev2",
        "distiller.name": "kd",
        "M": "[1]",
        "standardize": "True",
        "distiller.temperature": "3.0",
        "distiller.kd_weight": "1.0",
        "optimizer.lr": "0.05",
        "trainer.epochs": "3",
    }
    assert run.data.metrics == {
        **{
            "val/top1": 51.5,
            "val/top5": 80.5,
            "val/loss": 2.2,
            "train/top1": 40.25,
            "train/loss": 3.1,
            "lr": 0.05,
        },
        **{"best/top1": 52.25, "last/top1": 51.5},
    }
    assert history(uri, run.info.run_id, "val/top1") == [(1, 40.0), (2, 52.25), (3, 51.5)]
    assert history(uri, run.info.run_id, "best/top1") == [(3, 52.25)]
    tags = run.data.tags
    assert (tags["source"], tags["kind"], tags["status_reason"]) == ("imported", "job", "")
    assert tags["run_dir"] == str(path)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "kd,ResNet50,MobileNetV2,3,1")


def test_learning_rates_that_two_decimals_hide_are_left_out(uri: str, logs: Path) -> None:
    path = written(
        logs / "kd,vgg13,vgg8,3,9.txt", block(1) + block(2, lr="0.00") + "best_acc\t50.00"
    )
    run = only(uri, [path])
    assert history(uri, run.info.run_id, "lr") == [(1, 0.05)]


def test_mdistiller_names_the_folder(uri: str, logs: Path) -> None:
    path = written(logs / "cub200_baselines/dkd,res32x4,shuv1/worklog.txt", worklog([50.0]))
    run = only(uri, [path])
    expected = {
        "dataset.name": "cub200",
        "teacher.name": "resnet32x4",
        "student.name": "shufflev1",
        "M": "[1]",
    }
    assert expected.items() <= run.data.params.items()
    assert run.data.params["standardize"] == "False"
    assert "distiller.temperature" not in run.data.params
    assert run.info.run_name == "dkd,res32x4,shuv1"


def test_mdistiller_appends_a_second_run_to_the_line_of_the_first_ones_footer(
    uri: str, logs: Path
) -> None:
    text = worklog([40.0, 50.0, 60.0]) + worklog([41.0, 51.0], "")
    written(logs / "cifar100_baselines/kd,res32x4,res8x4/worklog.txt", text)
    import_logs([logs], uri)
    runs = runs_of(uri)
    assert runs.keys() == {"kd,res32x4,res8x4 #1", "kd,res32x4,res8x4 #2"}
    first, second = runs["kd,res32x4,res8x4 #1"], runs["kd,res32x4,res8x4 #2"]
    assert (first.info.status, first.data.metrics["best/top1"]) == ("FINISHED", 60.0)
    assert (second.info.status, second.data.metrics["best/top1"]) == ("KILLED", 51.0)
    assert second.data.tags["status_reason"] == "log ends after epoch 2 of 3"


def test_glued_json_of_two_runs_is_two_runs(uri: str, logs: Path) -> None:
    path = written(
        logs / "ctkd,resnet32x4,ShuffleV2,2,9.txt", ctkd([70.0, 76.47, 76.0], [71.0, 75.0, 76.65])
    )
    first_id, second_id = import_logs([path], uri)
    first, second = (client_of(uri).get_run(run_id) for run_id in (first_id, second_id))
    assert (first.data.metrics["best/top1"], first.data.metrics["last/top1"]) == (76.47, 76.0)
    assert (second.data.metrics["best/top1"], second.data.metrics["last/top1"]) == (76.65, 76.65)
    assert history(uri, second_id, "val/top5") == [(1, 90.0), (2, 90.0), (3, 90.0)]
    assert first.data.params == second.data.params
    # A method that this project does not have keeps its name.
    assert first.data.params["distiller.name"] == "ctkd"
    assert first.data.params["trainer.epochs"] == "3"
    assert {first.info.status, second.info.status} == {"FINISHED"}


@pytest.mark.parametrize("prefix", ["", "[meters.py: 123]: "])
def test_json_stats_errors_are_accuracies(uri: str, logs: Path, prefix: str) -> None:
    path = written(
        logs / "deit-ti_c100_KD_ours_3_10.txt", json_stats([95.94, 21.27, 21.54], 3, prefix)
    )
    run = only(uri, [path], {"teacher.name": "ResNet56"})
    assert history(uri, run.info.run_id, "val/top1") == [(1, 4.06), (2, 78.73), (3, 78.46)]
    assert history(uri, run.info.run_id, "train/top1") == [(1, 2.5), (2, 2.5), (3, 2.5)]
    assert (
        run.data.metrics.items()
        >= {"best/top1": 78.73, "last/top1": 78.46, "val/top5": 89.75}.items()
    )
    assert run.data.params == {
        **{"dataset.name": "cifar100", "teacher.name": "resnet56", "student.name": "deit_tiny"},
        **{"distiller.name": "kd", "M": "[1]", "standardize": "True", "trainer.epochs": "3"},
        **{"distiller.temperature": "3.0", "distiller.kd_weight": "10.0"},
    }


def test_csv_rows_are_runs(uri: str, logs: Path) -> None:
    path = written(
        logs / "table.csv",
        "teacher,student,method,M,seed,dataset,epochs,best,last,comment\n"
        'ResNet32x4,ShuffleV1,sd_kd_ls,"[1, 2,4]",3,cifar100,240,76.30,75.9,"two, words"\n'
        "wrn-40-2,mv2,crd,,1.0,cifar100,240,69.11,,\n"
        "resnet32x4,vgg8,vanilla,,,cifar100,240,,70.36,\n",
    )
    ids = import_logs([path], uri)
    first, second, third = (client_of(uri).get_run(run_id) for run_id in ids)
    assert first.data.params == {
        **{
            "teacher.name": "resnet32x4",
            "student.name": "shufflev1",
            "distiller.name": "kd",
            "standardize": "True",
        },
        **{"M": "[1,2,4]", "seed": "3", "dataset.name": "cifar100", "trainer.epochs": "240"},
    }
    assert first.data.metrics == {"best/top1": 76.3, "last/top1": 75.9}
    assert (
        second.data.params.items()
        >= {"teacher.name": "wrn_40_2", "student.name": "mobilev2", "seed": "1"}.items()
    )
    assert "seed" not in third.data.params
    assert third.data.params["teacher.name"] == "none"
    assert [run.info.run_name for run in (first, second, third)] == [
        "table:2",
        "table:3",
        "table:4",
    ]


def test_an_import_is_taken_back(uri: str, logs: Path) -> None:
    said: list[str] = []
    head = "teacher,student,method,dataset,M,top1"
    wrong = "resnet32x4,resnet88,sd_kd,cifar100,"
    path = written(logs / "theirs.csv", f'{head}\n{wrong}"[1,2]",73.3\n')
    other = written(logs / "other.csv", f"{head}\nresnet32x4,resnet8x4,kd,cifar100,[1],73.3\n")
    import_logs([path, other], uri, say=said.append)
    assert said[-1].startswith("warning: resnet88 is no network of sddlskd; did you mean resnet8?")
    written(path, f'{head}\n{wrong.replace("88", "8")}"[1,2]",73.3\n{wrong}[1,2],73.3\n')
    with pytest.raises(ValueError, match=r'7 cells for 6 columns; put .* quotes: "\[1,2\]"'):
        import_logs([path], uri, say=said.append)
    assert "the tables also have 1 run of an earlier import that this file no longer" in said[-1]
    assert len(load("imported", uri).frame) == 3
    with pytest.raises(ValueError, match=r"has no run that was imported from none\.csv"):
        remove_imports([path, Path("none.csv")], uri)
    assert len(remove_imports([path], uri)) == 2
    assert load("imported", uri).frame["student"].tolist() == ["resnet8x4"]


def test_csv_takes_columns_by_the_names_of_others(uri: str, logs: Path) -> None:
    path = written(
        logs / "history.csv",
        "file,distiller,dataset,teacher,student,M,epochs_configured,epochs_logged,best_top1,"
        "last_top1,status\n"
        "a.log,SDD_KD_LSKD,cifar100,resnet32x4,resnet8x4,[1],240,229,76.31,76.12,partial\n"
        'b.log,SDD_KD_LSKD,cifar100,resnet32x4,shufflenetv1,"[1,4]",240,0,,,crashed\n',
    )
    first, second = (client_of(uri).get_run(run_id) for run_id in import_logs([path], uri))
    assert (first.info.status, first.data.tags["status_reason"]) == ("KILLED", "229 of 240 epochs")
    assert first.data.params["distiller.name"] == "kd"
    assert (second.info.status, second.data.metrics) == ("FAILED", {})
    assert second.data.params["student.name"] == "shufflev1"


def test_a_row_that_halving_dropped_is_pruned_in_the_frame(uri: str, logs: Path) -> None:
    head = "dataset,teacher,student,method,epochs,epochs_done,top1,status\n"
    rows = "cifar100,vgg13,vgg8,kd,240,30,41.2,PRUNED\ncifar100,vgg13,vgg8,dkd,240,240,74.0,\n"
    import_logs([written(logs / "runs.csv", head + rows)], uri)
    frame = load("imported", uri).frame.set_index("method")
    assert frame["status"].to_dict() == {"kd": "PRUNED", "dkd": "FINISHED"}
    assert frame.loc["kd", "reason"].startswith("30 of 240 epochs")


def test_imported_runs_stand_in_the_frame(uri: str, logs: Path) -> None:
    written(logs / "dkd,vgg13,MobileNetV2,3,9,2.0.txt", worklog([60.0, 70.12]))
    written(logs / "ctkd,vgg13,vgg8,2,9.txt", ctkd([74.64, 74.5]))
    import_logs([logs], uri)
    frame = load("imported", uri).frame.set_index("method")
    assert set(frame["source"]) == {"imported"}
    assert set(frame["status"]) == {"FINISHED"}
    assert frame.loc["dkd_ls", "pair"] == "vgg13_mobilev2"
    assert frame.loc["dkd_ls", ["best", "last", "kd_weight", "temperature", "epochs"]].tolist() == [
        70.12,
        70.12,
        9,
        3,
        2,
    ]
    assert frame.loc["ctkd_ls", ["best", "last", "epochs_done"]].tolist() == [74.64, 74.5, 2]
    assert frame["seed"].isna().all()


# Names of files


@pytest.mark.parametrize(
    ("name", "method", "teacher", "student", "rest"),
    [
        ("mlkd,res110,res20,2,9", "mlkd", "resnet110", "resnet20", ("2.0", "9.0", None)),
        ("mlkd,res50,mv2,2,9", "mlkd", "resnet50", "mobilev2", ("2.0", "9.0", None)),
        ("dkd,wrn_40_2,wrn_40_1,2,12,2.0", "dkd", "wrn_40_2", "wrn_40_1", ("2.0", "12.0", "2.0")),
        ("kd,resnet32x4,ShuffleV2,2,9", "kd", "resnet32x4", "shufflev2", ("2.0", "9.0", None)),
        ("kd,resnet32x4,wrn_16_2,3,9", "kd", "resnet32x4", "wrn_16_2", ("3.0", "9.0", None)),
        ("r34_r18_kd_ours", "kd", "resnet34", "resnet18", (None, None, None)),
        ("r34_r18_kd_ours_2_6", "kd", "resnet34", "resnet18", ("2.0", "6.0", None)),
        ("deit-ti_c100_KD_ours_3_10", "kd", "resnet56", "deit_tiny", ("3.0", "10.0", None)),
        ("pit-ti_c100_KD_ours", "kd", "resnet56", "pit_tiny", (None, None, None)),
        ("pvt-ti_c100_KD_ours", "kd", "resnet56", "pvt_tiny", (None, None, None)),
        ("t2t-7_c100_KD_ours_3_6", "kd", "resnet56", "t2t_vit_7", ("3.0", "6.0", None)),
        ("reviewkd,wrn40_2,shuv1", "reviewkd", "wrn_40_2", "shufflev1", (None, None, None)),
        ("SDD_KD,res32x4_sdd,shuv1_sdd", "kd", "resnet32x4", "shufflev1", (None, None, None)),
        ("vanilla,res32x4,res8x4", "vanilla", "none", "resnet8x4", (None, None, None)),
    ],
)
def test_names_that_people_give(
    uri: str,
    logs: Path,
    name: str,
    method: str,
    teacher: str,
    student: str,
    rest: Sequence[str | None],
) -> None:
    given = {"dataset.name": "cifar100", "M": "[1]"}
    params = only(uri, [written(logs / f"{name}.txt", worklog([50.0]))], given).data.params
    assert params["distiller.name"] == method
    assert params["teacher.name"] == teacher
    assert params["student.name"] == student
    keys = ("distiller.temperature", "distiller.kd_weight", "distiller.loss.beta")
    assert tuple(params.get(key) for key in keys) == tuple(rest)
    assert params["standardize"] == str("ours" in name or name.count(",") > 2)


@pytest.mark.parametrize(
    ("method", "distiller", "standardize"),
    [
        ("DKD", "dkd", "False"),
        ("DKD-LS", "dkd", "True"),
        ("SD_KD_LSKD", "kd", "True"),
        ("MyCompetitor", "MyCompetitor", "False"),
        ("sd_MyCompetitor_ls", "MyCompetitor", "True"),
    ],
)
def test_a_loss_of_others_keeps_its_spelling(
    uri: str, logs: Path, method: str, distiller: str, standardize: str
) -> None:
    table = f"teacher,student,method,seed,best\nresnet32x4,shufflev1,{method},0,75.1\n"
    given = {"dataset.name": "cifar100", "M": "[1,2]", "trainer.epochs": "240"}
    params = only(uri, [written(logs / "theirs.csv", table)], given).data.params
    assert params["distiller.name"] == distiller
    assert params["standardize"] == standardize


def test_a_loss_that_is_given_keeps_its_spelling(uri: str, logs: Path) -> None:
    table = "teacher,student,seed,best\nresnet32x4,shufflev1,0,75.1\n"
    given = {"dataset.name": "cifar100", "M": "[1]", "standardize": "false"}
    for number, (name, expected) in enumerate((("MyCompetitor", "MyCompetitor"), ("KD", "kd"))):
        log = written(logs / f"theirs{number}.csv", table.replace("75.1", f"75.{number}"))
        params = only(uri, [log], given | {"distiller.name": name}).data.params
        assert params["distiller.name"] == expected


def test_networks_are_named_as_the_choices_of_conf_student() -> None:
    choices = {path.stem for path in Path("conf/student").glob("*.yaml")}
    assert choices
    spellings = {
        **{
            "ResNet32x4": "resnet32x4",
            "res8x4": "resnet8x4",
            "ResNet110": "resnet110",
            "MobileNetV2": "mobilev2",
        },
        **{
            "mv2": "mobilev2",
            "ShuffleNetV1": "shufflev1",
            "shufflenet_v2": "shufflev2",
            "ShuffleV1": "shufflev1",
        },
        **{
            "WRN-40-2": "wrn_40_2",
            "wrn40_1": "wrn_40_1",
            "VGG13": "vgg13",
            **{choice: choice for choice in choices},
        },
    }
    for spelling, choice in spellings.items():
        assert log_params.network(spelling) == choice
        assert choice in choices


def test_what_is_given_goes_before_what_the_name_says(uri: str, logs: Path) -> None:
    path = written(logs / "cifar100_baselines/kd,res32x4,res8x4/worklog.txt", worklog([50.0]))
    given = {
        "standardize": "true",
        "seed": "2",
        "M": "[1, 2]",
        "dataset.name": "CUB200",
        "student.name": "ShuffleV1",
    }
    params = only(uri, [path], given).data.params
    expected = {
        "standardize": "True",
        "seed": "2",
        "M": "[1,2]",
        "dataset.name": "cub200",
        "student.name": "shufflev1",
    }
    assert params.items() >= expected.items()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "SDD_KD,res32x4_sdd,shuv1_sddM:[1,2,4]",
            {
                "distiller.name": "kd",
                "M": "[1,2,4]",
                "standardize": "False",
                "optimizer.lr": "0.05",
            },
        ),
        ("SDD_KD,vgg13_sdd,vgg8_sddM:[1, 2]", {"teacher.name": "vgg13", "M": "[1,2]"}),
        (
            "sdd_dkd,res50_sdd,shv1_sddM:[1]",
            {"distiller.name": "dkd", "student.name": "shufflev1", "M": "[1]"},
        ),
        (
            "SDD_NKD,wrn_40_2_sdd,wrn_16_2_sddSOLVER.LR:0.01,M:[1,2,4],SOLVER.BATCH_SIZE:128,"
            "SOLVER.EPOCHS:240,DKD.T:2.0,LOG.WANDB:False",
            {
                "student.name": "wrn_16_2",
                "M": "[1,2,4]",
                "optimizer.lr": "0.01",
                "trainer.batch_size": "128",
                "trainer.epochs": "240",
                "distiller.temperature": "2.0",
            },
        ),
        ("kd,res32x4,res8x4SOLVER.LR:0.01", {"M": "[1]", "optimizer.lr": "0.01"}),
        (
            "kd,vgg13,MobileNetV2KD.TEMPERATURE:2,KD.LOSS.KD_WEIGHT:9.0,KD.LOSS.CE_WEIGHT:1e-1",
            {
                "student.name": "mobilev2",
                "distiller.temperature": "2.0",
                "distiller.kd_weight": "9.0",
                "distiller.ce_weight": "0.1",
            },
        ),
        (
            "kd,ResNet50,ShuffleV1,2,9SOLVER.LR:0.02,DATASET.TYPE:imagenet",
            {
                "standardize": "True",
                "student.name": "shufflev1",
                "dataset.name": "imagenet",
                "distiller.kd_weight": "9.0",
            },
        ),
        (
            "kd,vgg13,vgg8DISTILLER.TYPE:DKD,DISTILLER.STUDENT:ShuffleV2,DKD.BETA:2",
            {
                "distiller.name": "dkd",
                "student.name": "shufflev2",
                "distiller.loss.beta": "2.0",
            },
        ),
        (
            "kd,vgg13,vgg8EXPERIMENT.TAG:kd,vgg13,vgg8,SOLVER.LR:0.1",
            {"student.name": "vgg8", "optimizer.lr": "0.1"},
        ),
    ],
)
def test_options_that_the_authors_trainers_append_to_the_name_are_read(
    logs: Path, name: str, expected: Mapping[str, str]
) -> None:
    (run,) = module._read(
        written(logs / f"cifar100_baselines/{name}/worklog.txt", worklog([50.0])), {}, []
    )
    assert run.params.items() >= {"dataset.name": "cifar100", **expected}.items()
    assert "name" not in run.reason


@pytest.mark.parametrize("end", [",gpu:0", "gpu:0", ",--gpu:0", " gpu:0"])
def test_an_unknown_option_after_the_scales_is_noted(logs: Path, end: str) -> None:
    name = f"SDD_KD,res32x4_sdd,shuv1_sddM:[1,2,4]{end}"
    path = written(logs / f"cifar100_baselines/{name}/worklog.txt", worklog([50.0]))
    (run,) = module._read(path, {}, [])
    assert (run.params["M"], run.params["student.name"]) == ("[1,2,4]", "shufflev1")
    assert "gpu:0 in the name is not imported" in run.reason


@pytest.mark.parametrize(
    ("option", "note"),
    [
        ("SOLVER.WEIGHT_DECAY:0.001", "SOLVER.WEIGHT_DECAY:0.001 in the name is not imported"),
        ("DKD.T:2", "DKD.T:2 in the name is not imported"),  # kd does not read it
    ],
)
def test_options_that_no_param_shows_are_noted(logs: Path, option: str, note: str) -> None:
    path = written(logs / f"cifar100/kd,vgg13,vgg8{option}/worklog.txt", worklog([50.0]))
    (run,) = module._read(path, {}, [])
    assert (run.status, run.reason) == ("FINISHED", note)
    assert "distiller.temperature" not in run.params


ALL_GIVEN = {
    "dataset.name": "cifar100",
    "teacher.name": "resnet32x4",
    "student.name": "shufflev1",
    "distiller.name": "kd",
    "M": "[1,2]",
    "standardize": "False",
}


@pytest.mark.parametrize(
    "name",
    [
        "SDD_KD,res32x4_sdd,shuv1_sddM:[1,2,4]",
        "SDD_KD,res32x4_sdd,shuv1_sddM:124",
        "kd,res32x4,res 8x4!SOLVER.LR:fast",
        "kd,dot,res32x4,res8x4",
        "kd,vgg13,vgg8,2,nine",
        "a_b__ours",
        "a_b_kd_ours_x_y",
        ",,",
        "SOLVER.LR:0.01",
        "run 7",
    ],
)
def test_what_is_given_goes_before_a_name_that_cannot_be_read(logs: Path, name: str) -> None:
    path = written(logs / f"runs/{name}/worklog.txt", worklog([50.0]))
    (run,) = module._read(path, ALL_GIVEN, [])
    assert run.params.items() >= ALL_GIVEN.items()
    assert run.status == "FINISHED"


def test_an_option_that_is_not_valid_is_named(logs: Path) -> None:
    path = written(
        logs / "cifar100/kd,vgg13,vgg8SOLVER.LR:0.01_new,SOLVER.EPOCHS:2/worklog.txt",
        worklog([50.0, 51.0]),
    )
    assert refusal(path) == (
        ": SOLVER.LR in the name: optimizer.lr=0.01_new is not a number; "
        "give --set optimizer.lr=..."
    )
    (run,) = module._read(path, {"optimizer.lr": "0.01"}, [])
    assert (run.params["optimizer.lr"], run.reason) == ("0.01", "")
    (run,) = module._read(path, ALL_GIVEN, [])
    assert run.reason == "SOLVER.LR:0.01_new in the name is not valid and not imported"


def test_epochs_of_the_name_are_planned(logs: Path) -> None:
    path = written(logs / "cifar100/kd,vgg13,vgg8SOLVER.EPOCHS:3/worklog.txt", worklog([50.0], ""))
    (run,) = module._read(path, {}, [])
    assert (run.status, run.reason) == ("KILLED", "log ends after epoch 1 of 3")


def test_scales_of_an_sdd_log_are_not_guessed(uri: str, logs: Path) -> None:
    path = written(logs / "cifar100/SDD_KD,res32x4_sdd,shuv1_sdd/worklog.txt", worklog([50.0]))
    assert refusal(path) == ": does not state M; give --set M=..."
    assert only(uri, [path], {"M": "[1,2,4]"}).data.params["M"] == "[1,2,4]"


def test_a_name_that_says_nothing_names_what_to_give(logs: Path) -> None:
    path = written(logs / "run7.log", worklog([50.0]))
    assert refusal(path) == (
        ": does not state dataset.name, teacher.name, student.name, distiller.name, M, standardize;"
        " give --set dataset.name=... teacher.name=... student.name=... distiller.name=... M=..."
        " standardize=..."
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"teacher": "vgg13"},
            "teacher is not a param that a table uses; choose from dataset.name, teacher.name",
        ),
        ({"seed": "one"}, "seed=one is not a number"),
        ({"seed": "1.5"}, "seed=1.5 is not a whole number"),
        ({"M": "1,2"}, r"M=1,2 is not a list of scales; give a list such as \[1,2,4\]"),
        ({"M": "[0]"}, "not a list of scales"),
        ({"standardize": "yes"}, "standardize=yes is not valid; give true or false"),
        ({"student.name": "../x"}, "'../x' is not a network name"),
    ],
)
def test_wrong_params_are_refused_before_anything_is_read(
    tmp_path: Path, given: Mapping[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        import_logs([tmp_path / "none.txt"], f"sqlite:///{tmp_path}/mlflow.db", given=given)
    assert not (tmp_path / "mlflow.db").exists()


# Files that are imported twice


def test_the_same_content_is_imported_once(uri: str, logs: Path) -> None:
    path = written(logs / "kd,vgg13,vgg8,3,9.txt", worklog([50.0]))
    copy = written(logs / "copy/kd,vgg13,vgg8,3,9.txt", worklog([50.0]))
    said: list[str] = []
    (run_id,) = import_logs([path, copy, path], uri, say=said.append)
    assert import_logs([logs], uri, say=said.append) == []
    assert len(runs_of(uri)) == 1
    assert [f"imported as run {run_id}" in line for line in said] == [False, True, True, True]
    assert said[0] == f"{path}: kd,vgg13,vgg8,3,9 is run {run_id}, FINISHED"


def test_a_deleted_run_can_be_imported_anew(uri: str, logs: Path) -> None:
    path = written(logs / "kd,vgg13,vgg8,3,9.txt", worklog([50.0]))
    client_of(uri).delete_run(only(uri, [path]).info.run_id)
    assert only(uri, [path], {"seed": "1"}).data.params["seed"] == "1"


def test_an_import_that_was_interrupted_is_done_again(
    uri: str, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    path = written(logs / "kd,vgg13,vgg8,3,9.txt", worklog([50.0]))
    with monkeypatch.context() as patch:
        patch.setattr(
            MlflowClient, "set_terminated", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            import_logs([path], uri)
    assert [run.info.status for run in runs_of(uri).values()] == ["RUNNING"]
    run_id = only(uri, [path]).info.run_id
    assert [(run.info.run_id, run.info.status) for run in runs_of(uri).values()] == [
        (run_id, "FINISHED")
    ]


def test_a_table_that_grew_brings_only_what_is_new(uri: str, logs: Path) -> None:
    rows = ["dataset,teacher,student,method,best", *["cifar100,vgg13,vgg8,kd,72.98"] * 2]
    path = written(logs / "table.csv", "\n".join(rows))
    assert len(import_logs([path], uri)) == 2
    written(path, "\n".join([*rows, "cifar100,vgg13,vgg8,kd,73.1", rows[1]]))
    assert len(import_logs([path], uri)) == 2
    assert sorted(run.data.metrics["best/top1"] for run in runs_of(uri).values()) == [
        72.98,
        72.98,
        72.98,
        73.1,
    ]


def test_an_experiment_and_a_database_are_made(
    tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(logs / "kd,vgg13,vgg8,3,9.txt", worklog([50.0]))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    uri = f"sqlite:///{tmp_path / 'new/home/mlflow.db'}"
    import_logs([logs], uri, "others")
    assert len(runs_of(uri, "others")) == 1
    assert list(here.iterdir()) == []  # the current folder gets no mlruns/


def test_nothing_to_import_makes_no_database(tmp_path: Path, logs: Path) -> None:
    path = written(logs / "notes.txt", "no log at all")
    with pytest.raises(ValueError, match="has an unknown format"):
        import_logs([path], f"sqlite:///{tmp_path / 'new.db'}")
    assert not (tmp_path / "new.db").exists()


# Bad files


def test_a_log_that_ends_in_an_epoch_keeps_the_whole_ones(uri: str, logs: Path) -> None:
    whole = worklog([40.0, 50.0], "")
    for cut in range(len(block(3)) - len(DASHES)):
        found = log_formats.worklog(whole + block(3)[:cut])
        assert [len(each.epochs) for each in found] == [2]
        assert found[0].torn == (cut >= len(DASHES) + len("\nepoch: 3"))
    run = only(uri, [written(logs / "kd,vgg13,vgg8,3,9.txt", whole + block(3)[:100])])
    assert (run.info.status, run.data.metrics["last/top1"]) == ("KILLED", 50.0)
    assert run.data.tags["status_reason"] == "log ends in the middle of epoch 3"
    assert "trainer.epochs" not in run.data.params


def resumed(text: str) -> Any:
    """Return the one run of a worklog that a resumed training wrote."""
    (run,) = log_formats.worklog(text)
    return run


def test_of_an_epoch_that_comes_again_the_later_one_is_imported(uri: str, logs: Path) -> None:
    text = block(1, 40.0) + block(2, 70.0) + block(2, 50.0) + block(3, 51.0) + "best_acc\t51.00"
    run = only(uri, [written(logs / "kd,vgg13,vgg8,3,9.txt", text)])
    assert history(uri, run.info.run_id, "val/top1") == [(1, 40.0), (2, 50.0), (3, 51.0)]
    assert run.data.metrics["best/top1"] == 51.0
    assert (run.info.status, run.data.tags["status_reason"]) == (
        "FINISHED",
        "epoch 2 comes again, and the earlier one is left out",
    )


def test_a_training_that_is_resumed_further_back_replaces_all_that_followed() -> None:
    run = resumed("".join(block(epoch, 40.0 + epoch) for epoch in (1, 2, 3, 4)) + block(3, 60.0))
    assert {epoch: row["val/top1"] for epoch, row in run.epochs.items()} == {
        **{1: 41.0, 2: 42.0, 3: 60.0}
    }
    assert run.notes == ["epoch 3 comes again, and the earlier epochs 3 to 4 are left out"]


def test_half_a_block_is_left_out_wherever_it_was_cut() -> None:
    before, after = block(1, 40.0) + block(2, 50.0), block(4, 60.0) + "best_acc\t60.00"
    for line_break in ("\n", "\r\n", "\r\r\n"):  # Windows writes the last one
        for cut in range(1, len(block(3))):
            text = before + block(3, 99.0)[:cut] + block(3, 55.0) + after
            run = resumed(text.replace("\n", line_break))
            assert {epoch: row["val/top1"] for epoch, row in run.epochs.items()} == {
                **{1: 40.0, 2: 50.0, 3: 55.0, 4: 60.0}
            }
            assert (run.torn, run.closed) == (False, True)
            assert bool(run.notes) == (cut > len(DASHES) + 1)
    nuls = resumed(before + block(3)[:70] + "\0" * 500 + block(3) + after)
    assert (list(nuls.epochs), nuls.notes) == (
        [1, 2, 3, 4],
        ["an incomplete epoch 3 is left out"],
    )


def test_the_rest_is_imported_if_half_a_block_does_not_come_again(uri: str, logs: Path) -> None:
    text = block(1, 40.0) + block(2)[:100] + block(3, 60.0) + "best_acc\t60.00"
    run = only(uri, [written(logs / "kd,vgg13,vgg8,3,9.txt", text)])
    assert history(uri, run.info.run_id, "val/top1") == [(1, 40.0), (3, 60.0)]
    assert history(uri, run.info.run_id, "last/top1") == [(3, 60.0)]
    assert run.data.params["trainer.epochs"] == "3"
    assert (run.info.status, run.data.tags["status_reason"]) == (
        "FINISHED",
        "an incomplete epoch 2 is left out; epoch 2 is missing",
    )


def test_many_resumptions_have_a_short_reason(logs: Path) -> None:
    text = "".join(block(epoch) * 2 for epoch in range(2, 100))
    path = written(logs / "kd,vgg13,vgg8,3,9.txt", block(1) + text + "best_acc\t50.00")
    (run,) = module._read(path, {}, [])
    assert run.status == "FINISHED"
    assert run.reason.startswith("epoch 2 comes again, and the earlier one is left out; epoch 3")
    assert run.reason.endswith("; and 92 more notes")


@pytest.mark.parametrize(
    ("end", "torn", "closed", "best"),
    [
        ("best_acc\t51.0", False, True, None),
        ("best_acc\t5", False, True, None),
        ("best_acc", False, True, None),
        ("best_acc\t", False, True, None),
        ("best_acc\t52.00", False, True, 52.0),
        ("best_acc\t51.00best_acc\t51.00", False, True, None),  # resumed after its end
        (block(3)[:80] + "best_acc\t51.00", True, False, None),
        (block(3)[:80] + "\n", True, False, None),
        (block(3)[:80] + "\n" + DASHES, True, False, None),
    ],
)
def test_ends_that_are_cut_off(end: str, torn: bool, closed: bool, best: float | None) -> None:
    run = resumed(block(1, 50.0) + block(2, 51.0) + end)
    assert (list(run.epochs), run.torn, run.closed, run.best) == ([1, 2], torn, closed, best)


def test_a_value_that_is_no_number_is_named_with_its_line() -> None:
    for old, new in (('"epoch": 1', '"epoch": Infinity'), ("70.0", "[]")):
        text = ctkd([70.0]).replace(old, new)
        assert new in text
        with pytest.raises(ValueError, match=r"the object at line 1 is not a CTKD epoch"):
            log_formats.glued_json(text)


@pytest.mark.parametrize("name", ["SD-KD", "sd_kd", "SDD_KD"])
def test_the_papers_spelling_of_a_method_is_read(name: str) -> None:
    assert log_params.params_of_method(name) == {"distiller.name": "kd", "standardize": "False"}


def test_the_folder_of_a_cache_keeps_its_capitals() -> None:
    assert log_params.param("teacher.cache", " /Data/Maps ") == "/Data/Maps"


def test_glued_json_and_json_stats_may_be_resumed() -> None:
    before = ctkd([70.0, 71.0])
    third = ctkd([70.0, 71.0, 72.0])[len(before) :]
    for cut in range(1, len(third) + 1):
        (run,) = log_formats.glued_json(before + third[:cut] + third)
        assert (list(run.epochs), len(run.notes), run.torn) == ([1, 2, 3], 1, False)
    stats, more = json_stats([30.0, 29.0], 3), json_stats([30.0, 29.0, 28.0], 3)
    more = more[len(stats) :]
    for cut in range(1, len(more) + 1):
        (run,) = log_formats.json_stats(stats + more[:cut] + more)
        assert (list(run.epochs), run.best, run.torn) == ([1, 2, 3], 72.0, False)


def test_thousands_of_epochs(uri: str, logs: Path) -> None:
    accuracies = [50.0 + epoch % 7 for epoch in range(1, 2501)]
    run = only(uri, [written(logs / "kd,vgg13,vgg8,3,9.txt", worklog(accuracies))])
    found = history(uri, run.info.run_id, "val/top1")
    assert sorted(found) == list(enumerate(accuracies, 1))
    assert (run.info.status, run.data.params["trainer.epochs"]) == ("FINISHED", "2500")


def test_thousands_may_be_separated(logs: Path) -> None:
    path = written(
        logs / "table.csv",
        'teacher,student,method,dataset,epochs,best\nvgg13,vgg8,kd,cifar100,"1,200",74.0\n',
    )
    (run,) = module._read(path, {}, [])
    assert run.params["trainer.epochs"] == "1200"


def test_glued_json_and_json_stats_that_end_in_an_epoch(uri: str, logs: Path) -> None:
    one = written(logs / "ctkd,vgg13,vgg8,2,9.txt", ctkd([70.0, 71.0, 72.0])[:-30])
    stats = json_stats([30.0, 29.0, 28.0], 300)
    two = written(logs / "pit-ti_c100_KD_ours.txt", stats[:-30])
    three = written(logs / "pvt-ti_c100_KD_ours.txt", stats[: stats.rindex("json_stats: ")])
    ids = import_logs(
        [one, two, three], uri, given={"teacher.name": "resnet56", "student.name": "vgg8"}
    )
    for run in map(client_of(uri).get_run, ids):
        assert (run.info.status, run.data.tags["status_reason"]) == (
            "KILLED",
            "log ends in the middle of epoch 3",
        )
        assert len(history(uri, run.info.run_id, "val/top1")) == 2


def test_fewer_epochs_than_planned_is_killed(uri: str, logs: Path) -> None:
    written(logs / "pit-ti_c100_KD_ours.txt", json_stats([30.0, 29.0], 300))
    written(logs / "kd,vgg13,vgg8,3,9.txt", worklog([50.0], ""))
    written(logs / "ctkd,vgg13,vgg8,2,9.txt", ctkd([70.0], [71.0, 72.0]))
    import_logs([logs], uri, given={"teacher.name": "vgg13"})
    reasons = {
        name: (run.info.status, run.data.tags["status_reason"])
        for name, run in runs_of(uri).items()
    }
    assert reasons == {
        "pit-ti_c100_KD_ours": ("KILLED", "log ends after epoch 2 of 300"),
        "kd,vgg13,vgg8,3,9": ("KILLED", "log ends after epoch 1 without a line best_acc"),
        "ctkd,vgg13,vgg8,2,9 #1": ("KILLED", "log ends after epoch 1 of 2"),
        "ctkd,vgg13,vgg8,2,9 #2": ("FINISHED", ""),
    }


def test_given_epochs_say_what_was_planned(uri: str, logs: Path) -> None:
    path = written(logs / "ctkd,vgg13,vgg8,2,9.txt", ctkd([70.0, 71.0]))
    assert "the log has 2 epochs, more than the 1 planned" in refusal(path, {"trainer.epochs": "1"})
    run = only(uri, [path], {"trainer.epochs": "240"})
    assert (run.info.status, run.data.params["trainer.epochs"]) == ("KILLED", "240")


def test_a_stated_best_that_is_not_the_best_is_marked(uri: str, logs: Path) -> None:
    run = only(
        uri, [written(logs / "kd,vgg13,vgg8,3,9.txt", worklog([50.0, 49.0], "best_acc\t50.40"))]
    )
    assert (run.info.status, run.data.metrics["best/top1"]) == ("FINISHED", 50.0)
    assert (
        run.data.tags["status_reason"]
        == "log states best top-1 50.40, and its epochs' best is 50.00"
    )


def test_a_loss_that_is_nan_is_a_failure(uri: str, logs: Path) -> None:
    text = block(1) + block(2, 1.0, train_loss="nan") + "best_acc\t50.00"
    run = only(uri, [written(logs / "kd,vgg13,vgg8,3,9.txt", text)])
    assert (run.info.status, run.data.tags["status_reason"]) == (
        "FAILED",
        "train/loss is nan in epoch 2",
    )
    assert run.data.metrics["best/top1"] == 50.0
    assert math.isnan(run.data.metrics["train/loss"])


KNOWN = r"has an unknown format; known formats are worklog\.txt of mdistiller.*CSV with the columns"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("a note", KNOWN),
        ('{"test": 1}', KNOWN),
        ("name,value\na,1\n", KNOWN),
        ("x" * 200_000, KNOWN),
        ("\x00" * 50, KNOWN),
        (b"epoch: 1\n\xff\xfe", "byte 9 is not UTF-8"),
        (block(2) + "best_acc\t50.00", "epoch 2 follows epoch 0; epochs must run 1, 2, 3"),
        (block(1) + block(3), "epoch 3 follows epoch 1"),
        (block(1) + block(2) + block(4), "epoch 4 follows epoch 2"),
        (block(1) + block(2)[:80] + block(4), "line 1[0-9]: the block of epoch 2 lacks test_acc"),
        (block(1)[:80] + block(2), "line [0-9]: the block of epoch 1 lacks test_acc"),
        ("best_acc\t50.00" + block(1), "line 1: best_acc comes before the end of an epoch"),
        (
            ctkd([70.0]) + ctkd([70.0, 71.0, 72.0])[len(ctkd([70.0, 71.0])) :],
            "epoch 3 follows epoch 1",
        ),
        (
            block(1).replace("test_loss: 2.20\n", "") + block(2),
            "line 8: the block of epoch 1 lacks test_loss",
        ),
        (block(1).replace("epoch: 1", "epoch: one"), "line 9: epoch: one is not a whole number"),
        (block(1, test_acc="high"), "line 9: 'high' is not a number"),
        (
            block(1) + "Traceback (most recent call last):\n" + block(2),
            "line 10: 'Traceback .* is not a line of a worklog",
        ),
        (
            block(1).replace(f"2.20\n{DASHES}\n", "2.20\n") + block(2)[26:],
            "line 9: epoch appears twice in the block of epoch 1",
        ),
        (block(1)[:90], "has no complete epoch"),
        (block(1, 101.0) + "best_acc\t101.00", r"val/top1 101\.0 is not a percentage"),
        (
            ctkd([70.0]).replace('"epoch"', '"era"'),
            r"the object at line 1 is not a CTKD epoch \(KeyError\('epoch'\)\)",
        ),
        (ctkd([70.0])[:-1] + "]" + ctkd([71.0]), "line 8: "),
        (ctkd([70.0])[:20], "has an unknown format|line "),
        (
            json_stats([30.0, 29.0], 2).replace('"epoch": "1/2"', '"epoch": "1"'),
            "line 2 is not a tiny-transformers epoch",
        ),
        ('json_stats: {"_type": "train_iter"}\n', "has no complete epoch"),
    ],
)
def test_what_cannot_be_read_is_refused(logs: Path, content: str | bytes, message: str) -> None:
    line = refusal(written(logs / "kd,vgg13,vgg8,3,9.txt", content))
    assert re.match(f": ({message})", line), line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("cifar100,vgg13,vgg8,kd,one,72.0,", "seed=one is not a number"),
        ('cifar100,vgg13,vgg8,kd,1,"72,5",', "best/top1=72,5 is not a number"),
        ("cifar100,vgg13,vgg8,kd,1,0.7298,", r"top-1 0\.7298 looks like a fraction; give percent"),
        ("cifar100,vgg13,vgg8,kd,1,-3,", "best/top1 -3.0 is not a percentage"),
        (
            "cifar100,vgg13,vgg8,kd,1,,",
            "a finished run needs an accuracy in a column best, top1 or last",
        ),
        (
            "cifar100,vgg13,vgg8,kd,1,nan,finished",
            "a finished run needs an accuracy in a column best, top1 or last",
        ),
        ("cifar100,vgg13,vgg8,kd,1,72.0,odd", "status odd is not one of finished"),
        ("cifar100,vgg13,,kd,1,72.0,", r"does not state student\.name"),
        ("cifar100,vgg13,vgg8,sd_kd,1,72.0,", "does not state M"),
        ("cifar100,vgg13,vgg8,kd,1", "5 cells for 7 columns"),
    ],
)
def test_a_row_that_is_wrong_is_refused_and_the_others_are_taken(
    uri: str, logs: Path, row: str, message: str
) -> None:
    path = written(
        logs / "table.csv",
        f"dataset,teacher,student,method,seed,best,status\ncifar100,vgg13,vgg8,kd,0,73.0,\n{row}\n",
    )
    with pytest.raises(
        ValueError, match=f"^1 not imported, 1 imported:\n{re.escape(str(path))} line 3: {message}"
    ):
        import_logs([path], uri)
    assert [run.data.metrics["best/top1"] for run in runs_of(uri).values()] == [73.0]


def test_a_header_with_a_wrong_quote_is_refused_and_other_files_are_taken(
    uri: str, logs: Path
) -> None:
    rows = "teacher,student,method,dataset,{}\nvgg13,vgg8,kd,cifar100,73.0\n"
    wrong = written(logs / "a.csv", rows.format('"best"x'))
    written(logs / "b.csv", rows.format("best"))
    said = f"^1 not imported, 1 imported:\n{re.escape(str(wrong))} line 1: ',' expected after"
    with pytest.raises(ValueError, match=said):
        import_logs([logs], uri)
    assert len(runs_of(uri)) == 1


def test_what_is_good_is_imported_and_each_refused_file_has_its_line(uri: str, logs: Path) -> None:
    written(logs / "KD/kd,vgg13,vgg8,3,9.txt", worklog([50.0]))
    broken = written(logs / "KD/kd,vgg13,vgg8,2,9.txt", block(2))
    # A checkpoint does not have the name of a log, so it is not read.
    written(logs / "KD/student_best", b"\x80\x02}")
    empty = logs / "empty"
    empty.mkdir()
    absent = logs / "absent.txt"
    with pytest.raises(ValueError, match=r"^3 not imported, 1 imported:") as caught:
        import_logs([logs / "KD", empty, absent], uri)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[1:]] == [
        str(empty),
        str(absent),
        str(broken),
    ]
    assert runs_of(uri).keys() == {"kd,vgg13,vgg8,3,9"}


def test_a_huge_file_is_refused_unread(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = logs / "kd,vgg13,vgg8,3,9.txt"
    with path.open("wb") as file:
        file.truncate(module.MAX_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("was read"))
    assert (
        refusal(path)
        == ": 64 MiB exceed the limit of 64 MiB; keep only the lines of complete epochs"
    )


@pytest.mark.parametrize(
    "change", [lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text]
)
def test_windows_files_are_read(uri: str, logs: Path, change: Any) -> None:
    run = only(uri, [written(logs / "kd,vgg13,vgg8,3,9.txt", change(worklog([50.0, 51.0])))])
    assert run.data.metrics["best/top1"] == 51.0


# Runs in MLflow


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path, logs: Path) -> None:
    path = written(logs / "kd,vgg13,vgg8,3,9.txt", worklog([50.0]))
    other = written(
        tmp_path / "other.db", "not a database, but long enough to be taken for one" * 50
    )
    for uri, message in (
        ("mysql://host/db", "mysql://host/db is not valid; give http"),
        (f"sqlite:///{other}", "is not an MLflow database"),
        (f"sqlite:///{path}/mlflow.db", "cannot be created"),
        ("http://127.0.0.1:9", "does not answer"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            import_logs([path], uri)
        assert "\n" not in str(caught.value)


def test_a_deleted_experiment_is_named(uri: str, logs: Path) -> None:
    path = written(logs / "kd,vgg13,vgg8,3,9.txt", worklog([50.0]))
    client = client_of(uri)
    client.delete_experiment(client.create_experiment("imported"))
    with pytest.raises(ValueError, match="experiment imported was deleted in MLflow; restore it"):
        import_logs([path], uri)


# Tables of others


def test_a_column_top1_is_the_best_epoch(uri: str, logs: Path) -> None:
    path = written(
        logs / "a.csv", "dataset,teacher,student,method,top1\ncifar100,vgg13,vgg8,my_loss,73.5\n"
    )
    (run_id,) = import_logs([path], uri)
    assert client_of(uri).get_run(run_id).data.metrics == {"best/top1": 73.5}


def test_all_that_is_missing_in_a_table_is_said_once(logs: Path) -> None:
    rows = "".join(f"vgg13,vgg8,{number}\n" for number in range(6))
    path = written(logs / "a.csv", f"teacher,student,seed\n{rows}")
    said = refusal(path)
    assert "lines 2, 3, 4 and 3 more: does not state dataset.name, distiller.name" in said
    assert said.count("does not state") == 1
    assert "a finished run needs an accuracy in a column best, top1 or last" in said


def test_the_page_on_tables_lists_every_column() -> None:
    page = (Path(__file__).parents[2] / "docs" / "import.md").read_text()
    lacking = [
        column
        for column in (*PARAMS, *METRICS, "top1", "status", "name", "method", "epochs_done")
        if f"`{column}`" not in page and column not in ("distiller", "compile", "teacher_cache")
    ]
    assert lacking == []
