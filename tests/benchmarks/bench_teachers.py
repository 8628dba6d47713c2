"""Compare a step of a group with two teachers with its parts.

    python -m tests.benchmarks.bench_teachers [DEVICE]

The teachers are resnet32x4 and wrn_40_2, whose maps have the sides 8. Three students resnet8x4
learn with M=[1,2,4] and batch 64, one for each way to combine the teachers. The parts are the
forward pass of each teacher, and the steps of three students with one teacher whose logit map is
there. All run in turn in one process; on a CPU on two threads.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from sddlskd import config as cfg
from sddlskd.config import Combine, Config
from sddlskd.data.device import Batch
from sddlskd.models import Taps
from sddlskd.record import Record
from sddlskd.training.build import build_network, build_run
from sddlskd.training.run import Run
from sddlskd.training.several import Teachers
from sddlskd.training.teacher import Teacher
from tests.benchmarks.bench_step import BATCH_SIZE, in_turn, ratio


def jobs_of(folder: Path, teacher: str) -> list[Config]:
    """Return a job for each way to combine teachers; with one teacher they are all the same."""
    cfg.frame()
    jobs = []
    with initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"):
        for combine in Combine:
            overrides = ["dataset=fake", "tracking=none", f"home={folder}", "trainer=cpu"]
            words = [*overrides, f"teacher={teacher}", f"teacher.combine={combine}"]
            words.append(f"run_dir={folder}/{len(teacher)}-{combine}")
            jobs.append(cfg.resolve(compose("config", cfg.with_each_teacher(words))))
    return jobs


def runs_of(jobs: Sequence[Config], device: torch.device) -> list[Run]:
    """Return a run of each job."""
    return [
        build_run(
            job,
            build_network(job.student.model, 100, 0, device),
            Record(job),
            device,
            steps=782,
            images=50_000,
        )
        for job in jobs
    ]


def main(device: str = "cpu") -> None:
    """Print the ratio."""
    place = torch.device(device)
    torch.set_num_threads(2)
    torch.backends.cudnn.benchmark = True
    images = torch.randn(BATCH_SIZE, 3, 32, 32).to(place, memory_format=torch.channels_last)
    labels = torch.randint(100, (BATCH_SIZE,)).to(place)
    batch = Batch(images, labels, index=torch.arange(BATCH_SIZE), views=None)
    with tempfile.TemporaryDirectory() as folder:
        together = jobs_of(Path(folder), "[resnet32x4,wrn_40_2]")
        made = [
            Teacher(
                build_network(one.teacher.model, 100, 0, place),
                None,
                name=one.teacher.name,
                device=place,
                precision="fp32",
                compile=False,
            )
            for one in cfg.each_teacher(together[0])
        ]
        teachers, several = Teachers(made), runs_of(together, place)
        single = runs_of(jobs_of(Path(folder), "resnet32x4"), place)
        shown = Taps.of_map(made[0](images))

        def whole() -> None:
            taps = teachers.taps(batch.images)
            for run in several:
                run.train_step(batch, taps)
            waited()

        def parts() -> None:
            for teacher in made:
                teacher(batch.images)
            for run in single:
                run.train_step(batch, shown)
            waited()

        def waited() -> None:
            if place.type == "cuda":
                torch.cuda.synchronize(place)

        whole_s, parts_s = in_turn(whole, parts, repeats=5)
        print(
            "step of three students with two teachers / (both teachers' forward passes + three "
            f"students' steps with one teacher), {device}: {ratio(whole_s, parts_s)}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
