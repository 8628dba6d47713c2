"""Test the command line of the analysis on stores of synthetic runs."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis import __main__ as command_line
from analysis import figures, render, selection, stats, tables
from analysis.__main__ import main
from analysis.runs import load
from analysis.schema import read_frame
from analysis.store import count_runs
from tests.analysis.store import make_store

ROOT = Path(__file__).parents[2]
ROWS = [
    {"sweep": "study", "M": M, "seed": seed, "best": 70.0 + gain + seed / 10, "last": 69.0 + gain,
     "epoch_s": 10.0,
     "history": {"val/top1": [50.0 + gain, 69.0 + gain]}, "student": student}
    for student in ("shufflev1", "mobilev2")
    for M, gain in (("[1]", 0.0), ("[1,2]", 1.0), ("[1,2,4]", 2.0))
    for seed in range(3)
]  # fmt: skip
OPEN = [
    {
        "sweep": "study",
        "M": "[1,4]",
        "seed": 0,
        "status": "FAILED",
        "reason": "loss is nan",
        "name": "diverged",
    },
    {"sweep": "study", "M": "[1,4]", "seed": 1, "status": "MISSING", "run_dir": "/runs/not-run"},
    {"sweep": "study", "M": "[1,4]", "seed": 2, "status": "RUNNING", "name": "at-it"},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home with a sweep of 18 finished and three unfinished runs."""
    folder = tmp_path_factory.mktemp("home")
    make_store(folder / "mlflow.db", [*ROWS, *OPEN], command="python -m sddlskd.train -m -cn study")
    return folder


@pytest.fixture(scope="module")
def written(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run `python -m analysis study`, and return its folder and its output."""
    out = tmp_path_factory.mktemp("out") / "results"
    command = [sys.executable, "-m", "analysis", "study", "--home", str(home), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    told = done.stderr.splitlines()
    # One of the 21 jobs has no run, but the sweep itself is a run of MLflow.
    assert told == [
        f"loading MLflow, to search 21 runs at {uri_of(home)}",
        "computing the tables and their tests",
        "drawing the figures",
        "writing the report",
    ]
    return out, done.stdout


def uri_of(home: Path) -> str:
    return f"sqlite:///{home}/mlflow.db"


def test_every_table_in_every_format(home: Path, written: tuple[Path, str]) -> None:
    out, said = written
    built = tables.build(load("study", uri_of(home)).frame, metric="best", sweep="study")
    assert built
    for table in built:
        for suffix, text in (
            ("md", render.markdown(table)),
            ("tex", render.latex(table)),
            ("html", render.html(table)),
            ("csv", render.csv(table)),
        ):
            assert (out / "tables" / f"{table.name}.{suffix}").read_text() == text
        assert f"wrote {out}/tables/{table.name}.{{md,tex,html,csv}}: {table.title}" in said
        assert render.text(table, None) in said
    assert len(list((out / "tables").iterdir())) == 4 * len(built)


def test_the_frame_is_kept_and_read_back(home: Path, written: tuple[Path, str]) -> None:
    out, _ = written
    pd.testing.assert_frame_equal(read_frame(out / "runs.csv"), load("study", uri_of(home)).frame)


def test_figures_and_report(written: tuple[Path, str]) -> None:
    out, said = written
    drawn = {path.stem for path in (out / "figures").iterdir()}
    assert drawn
    for name in drawn:
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (out / "figures" / f"{name}.svg").read_text()
        assert f"wrote {out}/figures/{name}.{{png,svg}}: " in said
    report = (out / "report.html").read_text()
    assert "study" in report
    assert f"wrote {out}/report.html: " in said


def test_says_what_is_missing_and_what_fills_it(written: tuple[Path, str]) -> None:
    _, said = written
    assert "21 runs: 18 finished, 1 failed, 1 running, 1 missing" in said
    after = said[said.index("not finished: 3 of 21 runs:") :].splitlines()
    assert after[1:] == [
        "  failed: diverged (loss is nan)",
        "  running: at-it",
        "  missing: not-run",
        "to finish them: python -m sddlskd.train -m -cn study",
    ]


def test_long_lists_of_open_runs_are_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"sweep": "study", "status": "FAILED", "seed": seed, "name": f"run{seed}"}
        for seed in range(25)
    ]
    make_store(tmp_path / "mlflow.db", rows, plans=False)
    command_line._say_what_is_missing(load("study", uri_of(tmp_path)))
    said = capsys.readouterr().out
    assert said.count("  failed: run") == 20
    assert said.endswith("  and 5 more; report.html has them all\n")


def test_metric_and_format(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "build", lambda *_, **__: [])  # `written` draws them
    monkeypatch.setattr(command_line, "LONGEST", 50)
    chosen = [
        "study",
        "--home",
        str(home),
        "--out",
        str(tmp_path),
        "--metric",
        "last",
        "--format",
        "csv,md",
    ]
    assert main(chosen) == 0
    built = tables.build(load("study", uri_of(home)).frame, metric="last", sweep="study")
    said = capsys.readouterr().out
    assert f"not printed: {len(built) - 1} more tables; open {tmp_path}/report.html" in said
    assert [render.text(table, None) in said for table in built].count(True) == 1
    assert {path.suffix for path in (tmp_path / "tables").iterdir()} == {".csv", ".md"}
    for table in built:
        assert (tmp_path / "tables" / f"{table.name}.csv").read_text() == render.csv(table)
    assert built != tables.build(load("study", uri_of(home)).frame, metric="best", sweep="study")


def test_mixed_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "build", lambda *_, **__: [])
    rows = [{"sweep": "study", "seed": 0, "epochs": epochs, "best": 70.0} for epochs in (30, 240)]
    make_store(tmp_path / "mlflow.db", rows)
    chosen = ["study", "--home", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(chosen) == 1
    assert "1 of 30 epochs, 1 of 240 epochs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*chosen, "--mixed-epochs"]) == 0


def test_without_a_name_lists_what_there_is(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDDLSKD_HOME", str(home))
    assert main([]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^ *kind +name +runs +finished +running +pruned +failed +killed +missing$",
        said,
        re.MULTILINE,
    )
    assert re.search(r"^ *sweep +study +21 +18 +1 +0 +1 +0 +1$", said, re.MULTILINE)
    assert re.search(r"^ *experiment +sddlskd +21 +18 +1 +0 +1 +0 +1$", said, re.MULTILINE)


def test_which_store_is_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, nowhere = f"sqlite:///{home}/mlflow.db", f"sqlite:///{tmp_path}/none.db"
    for server, folder, words, found in (
        (here, tmp_path, [], True),
        (nowhere, home, [], False),
        (nowhere, tmp_path, ["--home", str(home)], True),
        (nowhere, tmp_path, ["--uri", here], True),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        monkeypatch.setenv("SDDLSKD_HOME", str(folder))
        assert main(words) == (0 if found else 1)
        assert ("study" in capsys.readouterr().out) is found


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["stuby"], "no sweep or experiment stuby at "),
        (["study", "--format", "pdf"], "--format pdf is not valid; choose from md,tex,html,csv"),
        (["study", "--out", "/proc/nowhere"], "/proc/nowhere"),
        (["import-logs", "/no/such/file"], "/no/such/file"),
        (["import-logs", "x", "--set", "seed"], "--set seed is not valid; give PARAM=VALUE"),
    ],
)
def test_errors_say_it_without_a_traceback(
    home: Path, capsys: pytest.CaptureFixture[str], chosen: list[str], said: str
) -> None:
    assert main([*chosen, "--home", str(home)]) == 1
    error = capsys.readouterr().err
    assert re.search("^error: ", error, re.MULTILINE)
    assert said in error
    assert "Traceback" not in error


def test_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(uri: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_list", interrupted)
    assert main(["--home", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_runs_without_the_params_of_a_method_are_marked(tmp_path: Path) -> None:
    lacking = [
        {"sweep": "study", "best": 60.0, "seed": 5 + i, "absent": absent}
        for i, absent in enumerate(
            (("distiller",), ("standardize",), ("M", "distiller", "teacher", "dataset", "seed"))
        )
    ]
    make_store(tmp_path / "mlflow.db", [*ROWS, *lacking])
    assert (
        main(["study", "--home", str(tmp_path), "--out", str(tmp_path / "out"), "--format", "md"])
        == 0
    )
    assert "method not known" in (tmp_path / "out/tables/overview_cifar100.md").read_text()


def test_the_runs_are_counted_at_once(home: Path, tmp_path: Path) -> None:
    assert count_runs(home / "mlflow.db") == 21
    assert count_runs(tmp_path / "no.db") is None
    (tmp_path / "text.db").write_text("no database" * 100)
    assert count_runs(tmp_path / "text.db") is None
    assert [path.name for path in tmp_path.iterdir()] == ["text.db"]


def test_no_database_is_an_error_and_none_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--home", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: there is no database {tmp_path}/mlflow.db; ")
    assert not list(tmp_path.iterdir())


def test_import_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "theirs.csv"
    with log.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["teacher", "student", "seed", "best", "last"],
                ["resnet32x4", "shufflev1", 3, 74.5, 74.0],
            ]
        )
    given = [
        "--set",
        "dataset.name=cifar100",
        "distiller.name=kd",
        "M=[1,2]",
        "standardize=True",
        "trainer.epochs=240",
    ]
    assert (
        main(["import-logs", str(log), "--home", str(tmp_path), "--experiment", "theirs", *given])
        == 0
    )
    assert f"1 new run in experiment theirs at {uri_of(tmp_path)}" in capsys.readouterr().out
    row = load("theirs", uri_of(tmp_path)).frame.iloc[0]
    expected = {
        "source": "imported",
        "pair": "resnet32x4_shufflev1",
        "method": "sd_kd_ls",
        "seed": 3,
        "epochs": 240,
    }
    assert row[[*expected, "best", "last", "dataset"]].to_dict() == {
        **expected, "best": 74.5, "last": 74.0, "dataset": "cifar100"
    }  # fmt: skip


def test_imported_numbers_stand_beside_those_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "build", lambda *_, **__: [])
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "student": "resnet8x4"} for row in ROWS[:9]]
    make_store(tmp_path / "mlflow.db", rows)
    page = (ROOT / "docs/tables.md").read_text()
    example = re.search(r"```\n(teacher,student,method,.*?)```", page, re.DOTALL)
    assert example
    (tmp_path / "theirs.csv").write_text(example[1])
    commands = re.findall(r"^python -m analysis (.*theirs.*|mine imported.*)$", page, re.MULTILINE)
    assert commands == ["import-logs theirs.csv", "mine imported"]
    assert main(shlex.split(commands[0])) == 0
    assert " NAME imported shows them beside the runs of the sweep NAME" in capsys.readouterr().out
    assert main([*shlex.split(commands[1].replace("mine", "study")), "--format", "md"]) == 0
    said = capsys.readouterr().out
    assert "reading study and imported from " in said
    table = (tmp_path / "results/tables/overview_cifar100.md").read_text()
    assert "| SD-KD \\[1,2\\] |" in table
    assert re.search(r"SD-their.*method \\\[1,2,4\\\], imported \| .*76\.21 \(1\)", table)
    assert "Runs of study and imported: " in table


def test_imported_runs_do_not_hide_under_the_name_of_a_sweep(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "theirs.csv"
    log.write_text("teacher,student,method,dataset,best\nresnet32x4,resnet8x4,kd,cifar100,73.3\n")
    words = ["import-logs", str(log), "--home", str(home), "--experiment", "study"]
    assert main(words) == 1
    assert capsys.readouterr().err == (
        "error: --experiment study is the name of a sweep; leave it out, and show the imported "
        "runs beside the sweep with python -m analysis study imported\n"
    )


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = {"mlflow", "pandas", "numpy", "matplotlib", "sklearn", "scipy"}
    code = (
        "import sys, analysis.__main__ as a\ntry: a.main(['--help'])\n"
        f"finally: assert not {heavy} & set(sys.modules)"
    )
    # Use the processor time, because the elapsed time is longer on a busy machine.
    started = os.times().children_user
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert os.times().children_user - started < 1
    words = " ".join(done.stdout.split())
    assert (
        "best: best epoch on the test set, as the papers report; last: last epoch; "
        "val: test accuracy" in words
    )
    assert "import-logs" in words


def test_the_options_and_defaults_of_the_command_are_those_of_the_modules() -> None:
    # They are stated twice, because the modules are slow to import.
    parser = command_line._parser()
    assert {option.dest: option.choices for option in parser._actions if option.choices} == {
        "metric": tuple(selection.METRICS),
        "test": stats.TESTS,
    }
    assert (parser.get_default("test"), parser.get_default("margin")) == (
        selection.GainOptions.test,
        selection.GainOptions.margin,
    )
    assert set(command_line.FORMATS) == set(render.FORMATS)


def test_tables_and_figures_get_the_same_options(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(figures, "build", lambda *_, **options: asked.append(options) or [])
    words = ["study", "--home", str(home), "--out", str(tmp_path), "--format", "md"]
    chosen = ["--metric", "last", "--test", "paired", "--baseline", "kd"]
    assert main([*words, *chosen]) == 0
    assert asked == [{"metric": "last", "test": "paired", "baseline": "kd"}]
    shown = "".join(path.read_text() for path in (tmp_path / "tables").iterdir())
    assert "| KD (baseline) |" in shown


def test_a_metric_that_no_run_logs_is_refused_with_those_that_they_log(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for metric, needs in (
        ("mAP", "runs have mAP if their images have several labels (dataset.multi_label=true)"),
        ("val", "runs have val if dataset.val_fraction is above 0"),
    ):
        words = ["study", "--home", str(home), "--out", str(tmp_path / "out"), "--metric", metric]
        assert main(words) == 1
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: --metric {metric} is logged by none of 18 finished runs; give --metric best; "
            f"the runs log best, last; {needs}"
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_below_that_has_the_runs_is_named(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.parent)
    for words in (["study"], ["sddlskd"], []):  # a sweep, an experiment, the list
        assert main(words) == 1
        wanted = "".join(f" of {name}" for name in words)
        assert capsys.readouterr().err == (
            f"error: {home.parent}/mlflow.db has no runs{wanted}, but the folder {home.name} has: "
            f"give --home {home.name}\n"
        )
    assert main(["other"]) == 1
    assert "there is no database" in capsys.readouterr().err
