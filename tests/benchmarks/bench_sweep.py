"""Measure what sharing the teacher saves, and what planning a thousand jobs costs.

    python -m tests.benchmarks.bench_sweep

The teacher is resnet32x4; the students are shufflev1 and mobilev2, each at M=[1] and M=[1,2,4],
with batch 64. The ratios compare steps that run in turn in one process, on two CPU threads.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.data.device import Batch
from sddlskd.files.checkpoint import load_weights
from sddlskd.models import Taps
from sddlskd.record import Record, freeze, write_text
from sddlskd.training.build import build_data, build_network, build_run
from sddlskd.training.fit import fit
from sddlskd.training.run import Run
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache
from tests.benchmarks.bench_step import in_turn, ratio

BATCH_SIZE = 64
STUDENTS = [
    ("shufflev1", "[1]"),
    ("shufflev1", "[1,2,4]"),
    ("mobilev2", "[1]"),
    ("mobilev2", "[1,2,4]"),
]


def job_of(home: Path, student: str, M: str, seed: int) -> Config:
    """Return a job of the sweep."""
    overrides = [
        "dataset=fake",
        "tracking=none",
        f"home={home}",
        "trainer=cpu",
        f"student={student}",
        f"M={M}",
    ]
    return cfg.resolve(compose("config", [*overrides, f"seed={seed}", "trainer.data_seed=0"]))


def sharing() -> None:
    """Compare a group with its parts, and with its jobs one after another."""
    torch.set_num_threads(2)
    cfg.frame()
    device = torch.device("cpu")
    with (
        tempfile.TemporaryDirectory() as folder,
        initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"),
    ):
        jobs = [
            job_of(Path(folder), student, M, seed) for seed in range(4) for student, M in STUDENTS
        ]
        runs: list[Run] = []
        for job in jobs:
            network = build_network(job.student.model, 100, job.seed, device)
            runs.append(build_run(job, network, Record(job), device, steps=782, images=50_000))
        network = build_network(jobs[0].teacher.model, 100, 0, device)
        teacher = Teacher(
            network, None, name="resnet32x4", device=device, precision="fp32", compile=False
        )
        images = torch.randn(BATCH_SIZE, 3, 32, 32).to(memory_format=torch.channels_last)
        views = torch.arange(BATCH_SIZE) * 162
        batch = Batch(images, torch.randint(100, (BATCH_SIZE,)), torch.arange(BATCH_SIZE), views)

        def grouped(count: int) -> None:
            taps = Taps.of_map(teacher(images))
            for run in runs[:count]:
                run.train_step(batch, taps)

        def one_after_another(count: int) -> None:
            for run in runs[:count]:
                run.train_step(batch, Taps.of_map(teacher(images)))

        def parts(count: int) -> None:
            teacher(images)
            for run in runs[:count]:
                run.model.zero_grad(set_to_none=True)
                F.cross_entropy(run.model(images).mean((2, 3)), batch.labels).backward()

        grouped_s, parts_s = in_turn(lambda: grouped(4), lambda: parts(4), repeats=5)
        print(
            "4 jobs grouped / (one teacher forward + four students alone): "
            f"{ratio(grouped_s, parts_s)}"
        )
        cache = TeacherCache(
            teacher,
            Path(folder, "maps"),
            rows=BATCH_SIZE * 162,
            map_KHW=(100, 8, 8),
            dtype="float16",
        )
        cache(images, views)

        def cached() -> None:
            taps = Taps.of_map(cache(images, views))
            for run in runs[:4]:
                run.train_step(batch, taps)

        grouped_s, cached_s = in_turn(lambda: grouped(4), cached, repeats=5)
        print(
            f"4 jobs grouped / the same with a filled teacher cache: {ratio(grouped_s, cached_s)}"
        )
        for count in (1, 2, 4, 8, 16):
            apart, together = in_turn(
                lambda n=count: one_after_another(n), lambda n=count: grouped(n), repeats=3
            )  # type: ignore[misc]
            print(f"{count:>2} jobs one after another / grouped: {ratio(apart, together)}")


PLANNING = """
import json, sys, time, resource
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from sddlskd import config as cfg
from sddlskd.sweeps.grid import compose_grid
from sddlskd.sweeps.outcome import state_of
from sddlskd.sweeps import groups_of
from sddlskd.sweeps.plan import ask_precheck
from pathlib import Path
started = time.perf_counter()
cfg.frame()
loader = ConfigLoaderImpl(create_config_search_path(str(cfg.conf_folder())))
sweep = loader.load_configuration("config", ["dataset=fake"], RunMode.MULTIRUN)
students = ("shufflev1", "mobilev2")
grid = [["dataset=fake", f"home={sys.argv[1]}", f"student={s}", f"M={M}", f"seed={n}"]
        for s in students for M in ("[1]", "[1,2,4]") for n in range(250)]
jobs = compose_grid(loader, sweep, grid)
hashes = {cfg.config_hash(job) for job in jobs}
states = {state_of(Path(job.run_dir)) for job in jobs}
groups = groups_of(jobs)
own = time.perf_counter() - started
assert len(hashes) == 1000 and not ask_precheck(jobs, [])["problems"]
# getrusage would return the peak of the parent process if that is larger.
status = Path("/proc/self/status").read_text()
peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
child_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([own, time.perf_counter() - started, peak, child_peak, len(groups)]))
"""


def planning() -> None:
    """Print what planning a thousand jobs costs."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", PLANNING, folder], capture_output=True, text=True, check=True
        )
        whole = time.perf_counter() - started
    own, checked, peak, child_peak, groups = json.loads(done.stdout)
    print(
        f"1,000 jobs composed, hashed and grouped ({groups} groups): {own:.1f} s; "
        f"checked too: {checked:.1f} s; with the imports: {whole:.1f} s; "
        f"peak of the launching process {peak:.0f} MiB, of the checking one, which "
        f"ends before the first job starts, {child_peak:.0f} MiB"
    )


RESTARTED = (
    "dataset=fake",
    "student=shufflev1,mobilev2",
    "M=[1],[1,2,4]",
    "seed=range(0,250)",
    "tracking=none",
)


def restart() -> None:
    """Print the time in which a sweep of a thousand finished jobs finds that nothing is to do."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sddlskd.train", "-m", *RESTARTED, f"home={folder}"]
        with initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"):
            for student in ("shufflev1", "mobilev2"):
                overrides = [
                    "dataset=fake",
                    "tracking=none",
                    f"home={folder}",
                    f"student={student}",
                ]
                job = cfg.resolve(compose("config", overrides))
                for M, seed in itertools.product(([1], [1, 2, 4]), range(250)):
                    one = cfg.normalise(replace(job, M=M, seed=seed))
                    one.run_dir = str(Path(folder, "runs", cfg.run_name(one)))
                    freeze(one)
                    done = {
                        "status": "FINISHED",
                        "reason": "",
                        "best_top1": 1.0,
                        "last_top1": 1.0,
                        "epochs": 240,
                    }
                    write_text(
                        Path(one.run_dir, "result.json"),
                        json.dumps({**done, "run_id": None, "seconds": 1.0}),
                    )
        started = time.perf_counter()
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
    assert "1000 jobs (1000 finished), 0 to do" in told.stderr + told.stdout
    print(f"a finished sweep of 1,000 jobs started again finds nothing to do in {seconds:.1f} s")


def rounding() -> None:
    """Print what float16 changes in the maps of a teacher.

    The teacher is trained on the digits for five epochs.
    """
    overrides = [
        "dataset=digits",
        "distiller=vanilla",
        "student=resnet8",
        "trainer=cpu",
        "trainer.epochs=5",
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"),
    ):
        job = cfg.resolve(
            compose(
                "config", [*overrides, "tracking=none", "trainer.progress=off", f"home={folder}"]
            )
        )
        fit([job])
        network = build_network(job.student.model, 10, 0, torch.device("cpu")).eval()
        load_weights(network, Path(folder, "teachers/digits/resnet8.pt"), "resnet8")
        with torch.inference_mode():
            exact = torch.cat(
                [
                    network(images)
                    for images, _ in build_data(job, torch.device("cpu")).test_batches()
                ]
            )
    rounded = exact.half().float()
    normal = exact.abs() >= torch.finfo(torch.float16).smallest_normal
    relative = ((rounded - exact).abs() / exact.abs())[normal].max().item()
    before, after = ((logit_map.mean((2, 3)) / 4).softmax(1) for logit_map in (exact, rounded))
    changed = int((before.argmax(1) != after.argmax(1)).sum())
    print(
        f"teacher cache in float16: {changed} of {len(exact)} predictions changed; "
        f"probabilities at temperature 4 by at most {(before - after).abs().max().item():.1e}; "
        f"values from 6e-5 on rounded by at most {relative:.2e}"
    )


def main() -> None:
    """Print all measurements."""
    sharing()
    rounding()
    planning()
    restart()


if __name__ == "__main__":
    main()
