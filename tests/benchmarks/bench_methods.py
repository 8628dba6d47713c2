"""Measure what it costs to train twelve methods beside each other, from one teacher pass.

    python -m tests.benchmarks.bench_methods

The share of a step that each method's losses take follows, also for the newer logit methods at
M=[1] and M=[1,2,4]. The teacher is resnet32x4, the student of each method resnet8x4, with batch 64.
The ratios compare steps that run in turn in one process, on two CPU threads.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.data.device import Batch
from sddlskd.models import LogitMapModel, Taps
from sddlskd.record import Record
from sddlskd.training.build import build_network, build_run
from sddlskd.training.features import build_features
from sddlskd.training.inputs import ask
from sddlskd.training.run import Run
from sddlskd.training.teacher import Teacher
from tests.benchmarks.bench_step import in_turn, ratio

BATCH_SIZE = 64
RECIPES = (
    *("sd_kd_ls", "kd", "ctkd", "at", "fitnet", "rkd", "sp", "pkt", "vid", "nst", "crd"),
    "reviewkd",
)
NEWER = ("ttm", "wttm", "rld", "gdkd", "abkd", "dist", "sld", "skd", "luminet", "normkd")


def job_of(home: Path, recipe: str, *more: str) -> Config:
    """Return a job of the group."""
    overrides = ["dataset=fake", "tracking=none", f"home={home}", "trainer=cpu"]
    pair = ["teacher=resnet32x4", "student=resnet8x4"]
    return cfg.resolve(compose("config", [*overrides, *pair, f"recipe={recipe}", *more]))


def own_arithmetic(runs: list[Run], teacher_taps: Taps, batch: Batch) -> Callable[[], None]:
    """Return a function that computes the losses of all runs and their gradients to the taps."""
    seen = []
    for run in runs:
        assert isinstance(run.model, LogitMapModel)
        with torch.no_grad():
            taps = run.model.taps(batch.images)
        leaves = [tensor.clone().requires_grad_() for tensor in (taps.logit_map, taps.pooled)]
        maps = tuple(tensor.clone().requires_grad_() for tensor in taps.stages)
        preacts = tuple(tensor.clone().requires_grad_() for tensor in taps.preacts)
        seen.append((run, Taps(leaves[0], maps, preacts, leaves[1])))

    def compute() -> None:
        for run, taps in seen:
            run.objective.losses(taps, teacher_taps, batch)["loss"].backward()

    return compute


def print_share(name: str, run: Run, teacher: Teacher, batch: Batch) -> None:
    """Print which share of a step of `run`, trained alone, its losses and their gradients take."""
    losses = own_arithmetic([run], ask(teacher, batch, [run]), batch)

    def step() -> None:
        run.train_step(batch, ask(teacher, batch, [run]))

    loss_s, step_s = in_turn(losses, step, repeats=3)
    print(f"{name:>17}: its losses / its step alone: {ratio(loss_s, step_s)}")


def main() -> None:
    """Print the ratios and the share that each method's own arithmetic has in its step."""
    torch.set_num_threads(2)
    cfg.frame()
    device = torch.device("cpu")
    with (
        tempfile.TemporaryDirectory() as folder,
        initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"),
    ):
        jobs = [job_of(Path(folder), recipe) for recipe in RECIPES]
        network = build_network(jobs[0].teacher.model, 100, 0, device)
        labels_N = torch.arange(50_000) % 100

        def run_of(job: Config) -> Run:
            student = build_network(job.student.model, 100, job.seed, device)
            features = build_features(
                job, student, network, image_CHW=(3, 32, 32), labels_N=labels_N, device=device
            )
            return build_run(
                job, student, Record(job), device, steps=782, images=50_000, features=features
            )

        runs = [run_of(job) for job in jobs]
        teacher = Teacher(
            network, None, name="resnet32x4", device=device, precision="fp32", compile=False
        )
        images = torch.randn(BATCH_SIZE, 3, 32, 32).to(memory_format=torch.channels_last)
        index = torch.arange(BATCH_SIZE)
        batch = Batch(images, labels_N[:BATCH_SIZE], index, index * 162)

        def grouped() -> None:
            taps = ask(teacher, batch, runs)
            for run in runs:
                run.train_step(batch, taps)

        def one_after_another() -> None:
            for run in runs:
                run.train_step(batch, ask(teacher, batch, [run]))

        compute = own_arithmetic(runs, ask(teacher, batch, runs), batch)

        def parts() -> None:
            ask(teacher, batch, runs)
            for run in runs:
                run.optimisation.optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(run.model(images).mean((2, 3)), batch.labels).backward()
                run.optimisation.optimizer.step()
            compute()

        print(f"{len(runs)} methods: {', '.join(RECIPES)}")
        apart_s, grouped_s = in_turn(one_after_another, grouped, repeats=5)
        print(f"one after another / grouped: {ratio(apart_s, grouped_s)}")
        grouped_s, parts_s = in_turn(grouped, parts, repeats=5)
        print(
            "grouped / (one teacher pass with taps + the students alone + the losses alone): "
            f"{ratio(grouped_s, parts_s)}"
        )
        for run, recipe in zip(runs, RECIPES, strict=True):
            print_share(recipe, run, teacher, batch)
        for recipe in NEWER:
            for scales in ("[1]", "[1,2,4]"):
                job = job_of(Path(folder), recipe, f"M={scales}")
                print_share(f"{recipe} {scales}", run_of(job), teacher, batch)


if __name__ == "__main__":
    main()
