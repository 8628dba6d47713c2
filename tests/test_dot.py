"""DOT against its update rule written out, and in a run."""

from pathlib import Path

import pytest
import torch

from sddlskd.record import read_result
from sddlskd.training.dot import DOT
from sddlskd.training.fit import fit
from tests.tiny import tiny

LR, MOMENTUM, DELTA, DECAY = 0.1, 0.9, 0.075, 0.01


def test_three_steps_follow_the_update_rule() -> None:
    torch.manual_seed(0)
    shared, of_task, of_kd, unused = (torch.randn(3, dtype=torch.float64) for _ in range(4))
    parameters = [torch.nn.Parameter(p.clone()) for p in (shared, of_task, of_kd, unused)]
    optimizer = DOT(parameters, lr=LR, momentum=MOMENTUM, delta=DELTA, weight_decay=DECAY)
    velocity: dict[str, torch.Tensor] = {}
    for step in range(3):
        g_kd, g_task, g_alone, g_connector = torch.randn(4, 3, dtype=torch.float64)
        optimizer.zero_grad()
        (parameters[0] @ g_kd + parameters[2] @ g_connector).backward()
        optimizer.keep_distillation()
        (parameters[0] @ g_task + parameters[1] @ g_alone).backward()
        optimizer.step()

        def moved(name: str, momentum: float, gradient: torch.Tensor) -> torch.Tensor:
            velocity[name] = momentum * velocity.get(name, torch.zeros(())) + gradient
            return LR * velocity[name]

        # The first velocity is the first gradient, whatever the momentum is.
        shared = (
            shared
            - moved("task", MOMENTUM - DELTA, g_task + DECAY * shared)
            - moved("kd", MOMENTUM + DELTA, g_kd)
        )
        of_task = of_task - moved("alone", MOMENTUM, g_alone + DECAY * of_task)
        decay = 0.0 if step == 0 else DECAY
        of_kd = of_kd - moved("connector", MOMENTUM, g_connector + decay * of_kd)
    for parameter, expected in zip(parameters, (shared, of_task, of_kd, unused), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


def test_momenta_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"momenta 0\.9 and 1\b"):
        DOT([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.95, delta=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recipe=dot", "optimizer=adamw"), "recipe=dot needs optimizer=dot"),
        (("optimizer=dot", "optimizer.clip_norm=1"), "which of two gradients"),
        (("optimizer=dot", "trainer.precision=fp16"), "set trainer.precision=bf16"),
        (("optimizer=dot", "trainer.devices=2"), "set trainer.devices=1"),
        (("recipe=ctkd", "trainer.devices=2"), "would learn a temperature in each process"),
    ],
)
def test_what_dot_cannot_serve_is_refused(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, *words)


@pytest.mark.parametrize("name", ["dot", "mine"])
def test_a_method_with_a_first_stage_is_refused(tmp_path: Path, name: str) -> None:
    job = tiny(tmp_path, "features=fsp", "optimizer=dot", f"optimizer.name={name}")
    with pytest.raises(ValueError, match="features=fsp has a first stage without a task loss"):
        fit([job])


def test_runs_with_dot_and_with_a_learnt_temperature_finish(tmp_path: Path) -> None:
    jobs = [
        tiny(tmp_path, "recipe=dot", "M=[1]"),
        tiny(tmp_path, "recipe=ctkd", "M=[1,2]"),
        tiny(tmp_path, "recipe=vanilla", "optimizer=dot"),
    ]
    fit(jobs[:2])
    fit(jobs[2:])
    assert [read_result(Path(job.run_dir))["status"] for job in jobs] == ["FINISHED"] * 3
