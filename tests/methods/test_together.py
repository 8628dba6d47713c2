"""Every method of conf/recipe in one group: equal to the same run alone, and after a stop."""

import signal
from pathlib import Path
from typing import Any

import pytest

from sddlskd import methods
from sddlskd.config import Config
from sddlskd.record import read_result
from sddlskd.sweeps.precheck import problems
from sddlskd.training.fit import fit
from sddlskd.training.run import Run
from sddlskd.training.teacher import Teacher
from tests.tiny import CONF, STEPS, same_outcome, tiny

# `mld` is for images with several labels; `none` is for a loss of one's own.
RECIPES = sorted(
    path.stem for path in (CONF / "recipe").glob("*.yaml") if path.stem not in ("none", "mld")
)
# What small images, few of them and two epochs need.
SMALL = {
    "crd": ("features.crd.method.K=16",),
    "sd_kd_crd": ("features.crd.method.K=16",),
    "ab": ("features.ab.method.stage_epochs=1",),
    "fsp": ("features.fsp.method.stage_epochs=1",),
    "ft": ("features.ft.method.stage_epochs=1",),
}
# Methods made of parts that other recipes have: the loss of one with the scales, the standardised
# logits or the learnt temperature of another, or a loss of single samples as kd. They train in the
# group, and are not run alone.
MADE_OF_OTHERS = ("kd_ls", "dkd_ls", "mlkd_ls", "ctkd_ls", "dkd_ctkd", "sd_kd", "sd_dkd",
                  "sd_dkd_ls", "sd_nkd", "normkd", "sd_kd_sp",
                  "ttm", "wttm", "rld", "gdkd", "abkd", "sld")  # fmt: skip
VIEWS = "dataset.views=weak_strong"  # for MLKD; the weak view stays the same


def job(folder: Path, recipe: str) -> Config:
    return tiny(folder, f"recipe={recipe}", VIEWS, "trainer.epochs=1", *SMALL.get(recipe, ()))


def test_every_method_has_a_choice_and_a_recipe() -> None:
    choices = {path.stem for path in (CONF / "features").glob("*.yaml")}
    assert choices == set(methods.names())
    assert choices < set(RECIPES)


@pytest.mark.slow
@pytest.mark.timeout(900)  # 50 runs
def test_a_run_beside_all_other_methods_equals_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = 0
    original = Teacher.taps

    def counted(self: Teacher, *arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        return original(self, *arguments)

    monkeypatch.setattr(Teacher, "taps", counted)
    with_teacher = [recipe for recipe in RECIPES if recipe != "vanilla"]
    together = [job(tmp_path / "together", recipe) for recipe in with_teacher]
    fit(together)
    # One epoch for all methods, and before it one for all those that have a first stage.
    assert batches == STEPS * 2
    monkeypatch.undo()
    different = []
    for recipe, grouped in zip(with_teacher, together, strict=True):
        result = read_result(Path(grouped.run_dir))
        assert result["status"] == "FINISHED", (recipe, result["reason"])
        if recipe in MADE_OF_OTHERS:
            continue
        alone = job(tmp_path / "alone", recipe)
        fit([alone])
        if not same_outcome(alone, grouped):
            different.append(recipe)
    assert not different


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ("crd", "ofd", "reviewkd", "simkd", "ab", "ft", "ctkd", "dot", "mlkd")
    undisturbed = [job(tmp_path / "undisturbed", recipe) for recipe in chosen]
    fit(undisturbed)
    stopped = [job(tmp_path / "stopped", recipe) for recipe in chosen]
    original, steps = Run.train_step, 0

    def interrupted(self: Run, *arguments: Any) -> None:
        nonlocal steps
        original(self, *arguments)
        steps += 1
        # In the first stage of two methods, and in the first epoch of all.
        if steps in (2, 2 * STEPS + 1):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "train_step", interrupted)
    for _ in range(2):
        assert "KILLED" in {result["status"] for result in fit(stopped)}
    monkeypatch.undo()
    fit(stopped)
    for a, b in zip(undisturbed, stopped, strict=True):
        assert read_result(Path(b.run_dir))["status"] == "FINISHED"
        assert same_outcome(a, b), b.run_dir


def test_the_check_of_a_sweep_counts_the_images_that_are_trained_on(tmp_path: Path) -> None:
    """96 of 192 images are held out, so an image has fewer than 100 negatives."""
    words = ("recipe=crd", "dataset.val_fraction=0.5", "trainer.epochs=1")
    few = tiny(tmp_path, *words, "features.crd.method.K=80")
    many = tiny(tmp_path, *words, "features.crd.method.K=100")
    ((refused, reason),) = problems([few, many])
    assert refused is many
    assert "K=100 is more than the" in reason
