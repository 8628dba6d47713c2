"""Test the search with Optuna: its proposals, its objective, and the command."""

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sddlskd.config import Config
from sddlskd.sweeps.search import DATABASE, Search, objective_of, split_words
from sddlskd.sweeps.status import status_of
from tests.test_halving import leave_rows
from tests.tiny import BASE, ForkedCommand, leave_teacher, tiny

REPO = Path(__file__).parents[1]
WORDS = ("student=resnet8", "x=interval(1.0,8.0)", "n=int(interval(1,9))", "M=[1],[1,2]")
LOG = "rate=tag(log, interval(1e-4,1e-1))"


def search(folder: Path | None, n_trials: int = 6, **options: Any) -> Search:
    words = options.pop("words", [*WORDS, LOG])
    fixed, varied = split_words(words)
    chosen = {"objective": "best/top1", "n_jobs": 2, "seed": 0, **options}
    found = Search(folder=folder, fixed=fixed, varied=varied, n_trials=n_trials, **chosen)
    found.open()
    return found


def judge(one: Search, number: int, words: list[str], status: str = "FINISHED") -> None:
    """Judge a trial by a number that its overrides determine."""
    x = float(words[0].removeprefix("x="))
    one.judge(number, Config(), {"status": status, "best_top1": 10 * x})


def finished(one: Search) -> list[list[str]]:
    while batch := one.next_batch():
        for number, words in batch:
            judge(one, number, words)
    return one.trials()


def test_the_overrides_of_all_jobs_and_those_that_vary() -> None:
    fixed, varied = split_words(["a=1", *WORDS, "a=2", "~dataset.load.size"])
    assert fixed == ["a=2", "student=resnet8", "~dataset.load.size"]
    assert list(varied) == ["x", "n", "M"]
    with pytest.raises(ValueError, match="has nothing to search; vary a key"):
        split_words(["a=1", "M=[1,2]"])


def test_proposals_lie_in_their_ranges(tmp_path: Path) -> None:
    drawn = [dict(word.split("=") for word in words) for words in finished(search(None, 12))]
    assert {one["M"] for one in drawn} == {"[1]", "[1,2]"}
    assert all(1 <= int(one["n"]) <= 9 for one in drawn)
    assert all(1 <= float(one["x"]) <= 8 for one in drawn)
    rates = [float(one["rate"]) for one in drawn]
    assert min(rates) < 0.003 < max(rates)  # far apart on a logarithmic scale alone
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)


@pytest.mark.parametrize("judged", [0, 1, 2, 3])
def test_an_interrupted_search_proposes_the_same(tmp_path: Path, judged: int) -> None:
    undisturbed = finished(search(None))
    first = search(tmp_path)
    left = judged
    while left:
        for number, words in first.next_batch()[:left]:
            judge(first, number, words)
            left -= 1
    again = search(tmp_path)
    assert again.has_begun == (judged > 0)
    assert finished(again) == undisturbed
    best = again.best()
    assert best is not None
    assert best[1] == max(10 * float(words[0].removeprefix("x=")) for words in undisturbed)
    # A larger number continues the search.
    assert finished(search(tmp_path, 8))[:6] == undisturbed


def test_failed_and_dropped_trials_have_no_value() -> None:
    one = search(None, 4)
    for number, words in one.next_batch():
        judge(one, number, words, ("FAILED", "PRUNED")[number])
    assert one.best() is None
    finished(one)
    best = one.best()
    assert best is not None
    assert best[0] in (2, 3)


def test_the_next_process_tries_a_failed_trial_again(tmp_path: Path) -> None:
    first = search(tmp_path, 4)
    for number, words in first.next_batch():
        judge(first, number, words, ("FAILED", "FINISHED")[number])
    assert [number for number, _ in first.next_batch()] == [2, 3]  # not the failed one at once
    again = search(tmp_path, 4)
    batch = again.next_batch()
    assert [number for number, _ in batch] == [0, 2, 3]
    for number, words in batch:
        judge(again, number, words, "FAILED" if number == 0 else "FINISHED")
    assert again.next_batch() == []
    assert [number for number, _ in search(tmp_path, 4).next_batch()] == [0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["student=resnet20", *WORDS[1:], LOG],
         r"student=resnet20 differs .* \(student=resnet8\); .* another sweep.name"),
        ([WORDS[0], "x=1.0,8.0", *WORDS[2:], LOG],
         r"x=1.0,8.0 differs .* \(x=interval\(1.0,8.0\)\)"),
        ([*WORDS, LOG, "seed=1"], r"seed=1 differs .* \(nothing\)"),
    ],
)  # fmt: skip
def test_another_search_needs_another_name(tmp_path: Path, words: list[str], said: str) -> None:
    search(tmp_path)
    unchanged = ["home=/there", "sweep.halving=[1]", "+tracking.x=1", LOG, *reversed(WORDS)]
    search(tmp_path, words=unchanged)
    with pytest.raises(ValueError, match=said):
        search(tmp_path, words=words)


def test_a_bad_objective_or_range_is_refused_by_its_key() -> None:
    with pytest.raises(
        ValueError,
        match="objective=foo is logged by no run; give objective=best/top1; runs log best/",
    ):
        search(None, objective="foo")
    for word, said in {
        "x=interval(8.0,-1.0)": "the interval ends before it begins; give interval(-1.0,8.0)",
        "n=int(interval(3,1))": "the interval ends before it begins; give interval(1,3)",
        "x=tag(log,interval(0,1))": "a logarithmic scale must begin above 0, not at 0.0; ",
        "x=tag(log,int(interval(-2,1)))": "a logarithmic scale must begin above 0, not at -2; ",
        "x=interval(0,inf)": "both ends of an interval must be finite numbers",
        "x=interval(nan,1)": "both ends of an interval must be finite numbers",
        "x=tag(lgo,interval(1,2))": "lgo is no tag of a search; give tag(log, interval(LOW,HIGH))",
        "x=tag(log,choice(1,2))": "a logarithmic scale needs tag(log, interval(LOW,HIGH))",
        "x=range(3,-2)": "it has no values",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(f'{word}: {said}')}") as caught:
            search(None, words=[word])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("interval", "low", "high"),
    [
        ("interval(-1,1)", -1, 1),
        ("interval(-2.5,-0.5)", -2.5, -0.5),
        ("int(interval(-3,2))", -3, 2),
    ],
)
def test_bounds_may_be_negative(interval: str, low: float, high: float) -> None:
    drawn = [
        float(word.removeprefix("x="))
        for (word,) in finished(search(None, 6, words=[f"x={interval}"]))
    ]
    assert all(low <= number <= high for number in drawn)
    assert min(drawn) < 0
    assert len(set(drawn)) > 1


def test_a_search_that_may_propose_an_invalid_job_starts_none() -> None:
    composed: list[list[str]] = []

    def compose(words: list[list[str]]) -> list[Config]:
        composed.extend(words)
        if any("x=-1.0" in job for job in words):
            raise ValueError("x=-1.0 must be greater than 0")
        return [Config() for _ in words]

    def launch(words: list[list[str]]) -> None:
        raise AssertionError("a job was started")

    one = search(None, words=["a=1", "x=interval(2.0,8.0)", "M=[1],[1,2]", "y=int(interval(0,1))"])
    with pytest.raises(AssertionError, match="started"):
        one.run(compose, launch)
    assert [" ".join(words) for words in composed[:4]] == [
        "a=1 x=2.0 M=[1] y=0", "a=1 x=8.0 M=[1] y=0", "a=1 x=2.0 M=[1,2] y=0",
        "a=1 x=2.0 M=[1] y=1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"x=-1\.0 must be"):
        search(None, words=["x=interval(-1.0,8.0)"]).run(compose, launch)


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_text("no database" * 100)
    with pytest.raises(ValueError, match=rf"{DATABASE} cannot be used \(.*not a database\); .*del"):
        search(tmp_path)


def test_a_loss_is_minimised(tmp_path: Path) -> None:
    one = search(tmp_path, 2, objective="val/loss")
    job = Config(objective="val/loss")
    for number, _ in one.next_batch():
        folder = leave_rows(tmp_path / str(number), (50.0, 9.0), (50.0, 2.0 - number))
        one.judge(number, replace(job, run_dir=str(folder)), {"status": "FINISHED"})
    best = one.best()
    assert best is not None
    assert best[:2] == (1, 1.0)
    with pytest.raises(ValueError, match=r"differs from the objective .* \(val/loss\)"):
        search(tmp_path, 2)


def test_the_objective_of_a_job() -> None:
    job, result = Config(), {"status": "FINISHED", "best_top1": 70.0, "last_top1": 69.0}
    assert objective_of(job, result) == 70.0
    assert objective_of(replace(job, objective="last/top1"), result) == 69.0
    assert objective_of(job, {**result, "status": "PRUNED"}) is None


def test_without_optuna_one_line_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'sddlskd\[search\]'"):
        search(None)


@pytest.mark.parametrize("held_out", [0.25, 0.0])
def test_the_report_names_the_command_of_the_final_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: float
) -> None:
    given = ["student=resnet8", f"dataset.val_fraction={held_out}", "objective=last/top1"]
    given += [
        "sweep.name=s",
        "home=a b",
        "distiller.temperature=interval(1.0,8.0)",
        "seed=3,5",
        "M=[1],[1,2]",
    ]
    one = search(None, 2, words=given)
    job = replace(tiny(tmp_path, f"dataset.val_fraction={held_out}"), seed=5)

    def jobs_of(words: list[list[str]]) -> list[Config]:
        return [
            replace(
                job,
                run_dir=str(tmp_path / str(n)),
                seed=5 - n,  # no trial has the name of another
                distiller=replace(job.distiller, temperature=2.5 + n),
            )
            for n in range(len(words))
        ]

    def finish(words: list[list[str]]) -> None:
        for number in range(len(words)):
            result = {"status": "FINISHED", "best_top1": 50.0 + number, "reason": "", "seconds": 1}
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "result.json").write_text(json.dumps(result))

    one.run(jobs_of, finish)
    out = capsys.readouterr().out
    assert "temperature=2.5" in out
    assert "temperature=3.5" in out
    *_, again, final = out.splitlines()
    if not held_out:
        assert final.startswith("to run it again: ")
        return
    best = one.best()
    assert best is not None
    assert again.startswith("to run it again: python -m sddlskd.train student=resnet8 ")
    said, _, command = final.partition(": ")
    assert said == "to train it on all training images, with new seeds"
    assert shlex.split(command) == [
        *("python", "-m", "sddlskd.train", "-m", "student=resnet8", "home=a b"),
        *(word for word in best[2] if not word.startswith("seed=")),
        "seed=6,7,8",
    ]


def test_a_plan_says_that_it_is_that_of_the_first_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(words: list[list[str]]) -> None:
        raise SystemExit(0)

    job = tiny(tmp_path, "sweep.plan=true", teacher=False)
    with pytest.raises(SystemExit, match="0"):
        search(None, 20, n_jobs=4).run(lambda words: [job for _ in words], stop)
    assert capsys.readouterr().out == (
        "search: 20 trials in all, 4 at a time; the plan is that of the first batch of 4, and "
        "others follow from its results\n"
    )


@pytest.mark.slow
def test_the_command_ends_with_the_best_trial(tmp_path: Path) -> None:
    leave_teacher(tmp_path)
    words = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=6")
    words += (*BASE, f"home={tmp_path}", "sweep.name=test", "recipe=kd", "sweep.halving=[1]")
    words += ("distiller.temperature=interval(1.0,8.0)", "optimizer.lr=0.01,0.1")
    code, out, err = ForkedCommand(tmp_path, "sddlskd.train", *words, cwd=REPO).end()
    assert code == 0, out + err
    assert "objective=best/top1 is measured on the test split; dataset.val_fraction=0.1" in err
    assert out.count("PRUNED") == 3
    best, again = out.splitlines()[-2:]
    assert best.startswith("best of 6 trials: trial ")
    assert again.startswith("to run it again: python -m sddlskd.train dataset=fake ")
    assert best.partition("distiller.temperature=")[2].split()[0] in again
    folder = tmp_path / "runs/sweeps/test"
    assert (folder / DATABASE).exists()
    assert "hydra/sweeper=optuna" in status_of(folder).command
    # The same command trains nothing, and prints the same.
    code, out, err = ForkedCommand(tmp_path, "sddlskd.train", *words, cwd=REPO).end()
    assert (code, out.splitlines()[-2:]) == (0, [best, again]), out + err
    assert ": running" not in err
