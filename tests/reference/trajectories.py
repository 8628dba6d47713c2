"""Loss curves of the released trainers of SDD and LSKD, from weights and batches of given seeds.

Run as a program, this file runs the programs that the authors released and writes their losses to
trajectories.json, which tests/test_trajectories.py follows. It needs both repositories at the
commits of SOURCES, and the packages yacs, tqdm and scipy:

    git clone https://github.com/shicaiwei123/SDD-CVPR2024 SDD
    git clone https://github.com/sunshangquan/logit-standardization-KD LSKD
    python -m tests.reference.trajectories SDD LSKD

Each training has up to 5 epochs of 3 batches, in float64 on the CPU. The authors' programs build
networks, loss, optimizer and learning rate from their own configuration files. Only the data, the
initial weights and the number format are not theirs, and no checkpoint is written.

Shapes: B batch, C channels, H W sides, K classes, N images, R regions.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import runpy
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".json")
SOURCES = {
    "sdd": "shicaiwei123/SDD-CVPR2024@e412036",
    "lskd": "sunshangquan/logit-standardization-KD@f6e5aa5",
}
Builder = Callable[..., nn.Module]

PROGRAMS = {"sdd": "train_origin.py", "lskd": "tools/train.py"}

CLASSES = 100
BATCHES = 3  # of an epoch


class Case(NamedTuple):
    """One training, in our words and in those of the authors' command line.

    Attributes:
        recipe: our recipe.
        pair: our pair of networks.
        source: a key of SOURCES.
        command: arguments of the authors' program.
        quick: number of the first steps that the everyday test follows.
        steps: number of steps of the training. After them, the last digits of the weights decide
            about the loss.
        batch: images of a batch. BatchNorm makes some networks chaotic in batches of 2.
        overrides: further overrides of our configuration.
    """

    recipe: str
    pair: str
    source: str
    command: str
    quick: int = 6
    steps: int = 15
    batch: int = 2
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the training in trajectories.json."""
        return f"{self.recipe} {self.pair}"

    @property
    def teacher(self) -> str:
        """Return our name of the teacher."""
        return next(name for name in TEACHERS if self.pair.startswith(f"{name}_"))

    @property
    def seed(self) -> int:
        """Return the seed of the student's initial weights."""
        return 100 + CASES.index(self)


class Curve(NamedTuple):
    """What a training did.

    Attributes:
        losses: loss of each step.
        labels: labels of the images of all batches.
        clipped: number of steps whose gradient was clipped.
    """

    losses: list[float]
    labels: list[int]
    clipped: int


# Our teachers, with the names that SDD gives them and the seeds of their weights
TEACHERS = {
    "resnet110": ("resnet110_sdd", 1),
    "resnet32x4": ("resnet32x4_sdd", 2),
    "resnet56": ("resnet56_sdd", 3),
    "wrn_40_2": ("wrn_40_2_sdd", 4),
}
# SDD's program runs only networks whose name ends in _sdd, so some files need other names.
SMALL_PAIR = "DISTILLER.TEACHER resnet56_sdd DISTILLER.STUDENT resnet20_sdd"
CASES = (
    Case("sd_kd", "resnet32x4_resnet8x4", "sdd", "sdd_kd/res32x4_res8x4.yaml --M [1,2]", quick=2),
    Case(
        "sd_kd", "wrn_40_2_mobilev2", "sdd", "sdd_kd/wrn40_2_mv2.yaml --M [1,2,4]", quick=3, batch=6
    ),
    Case("sd_dkd", "wrn_40_2_vgg8", "sdd", "sdd_dkd/wrn40_2_vgg8.yaml --M [1,2,4]", quick=3),
    Case("sd_dkd", "resnet56_resnet20", "sdd", f"sdd_dkd/res56_res20.yaml --M [1,2] {SMALL_PAIR}"),
    # In each step, ShuffleNetV1 magnifies a change of the weights about thirtyfold.
    Case(
        "sd_dkd",
        "wrn_40_2_shufflev1",
        "sdd",
        "sdd_dkd/wrn40_2_shuv1.yaml --M [1,2,4]",
        quick=3,
        steps=5,
        batch=6,
    ),
    Case("sd_nkd", "wrn_40_2_vgg8", "sdd", "sdd_nkd/wrn40_2_vgg8.yaml --M [1,2]", quick=3),
    Case("sd_nkd", "wrn_40_2_wrn_40_1", "sdd", "sdd_nkd/wrn40_2_wrn_40_1.yaml --M [1,2]"),
    # SDD released no file for NKD on CIFAR-100. Of DKD's block, its program reads CE_WEIGHT and
    # WARMUP, which this file does not set.
    Case(
        "nkd",
        "wrn_40_2_wrn_16_2",
        "sdd",
        "dkd/wrn40_2_wrn_16_2.yaml --M [1] DISTILLER.TYPE NKD "
        "DISTILLER.TEACHER wrn_40_2_sdd DISTILLER.STUDENT wrn_16_2_sdd",
    ),
    # LSKD's program refuses KD's weight 0.9, because its own is a whole number, so this is SDD's
    # program, which clips. The learning rate decays at all milestones.
    Case(
        "kd",
        "resnet56_resnet20",
        "sdd",
        f"kd.yaml --M [1] {SMALL_PAIR} SOLVER.LR_DECAY_STAGES [3,4,4]",
        quick=15,
        overrides=("optimizer.clip_norm=40", "trainer.epochs=5"),
    ),
    Case("dkd", "wrn_40_2_wrn_16_2", "lskd", "dkd/wrn_40_2_wrn_16_2.yaml"),
    Case(
        "kd_ls",
        "resnet110_resnet20",
        "lskd",
        "kd/resnet110_resnet20.yaml --logit-stand --base-temp 4 --kd-weight 12",
    ),
    Case(
        "dkd_ls",
        "resnet56_resnet20",
        "lskd",
        "dkd/resnet56_resnet20.yaml --logit-stand --base-temp 3 --kd-weight 18",
    ),
)


def uniform(draws: np.random.RandomState, *shape: int) -> Tensor:
    """Return numbers from (-1, 1) in float64, the same on every machine.

    RandomState makes them from integers, and numpy has frozen how. The results of torch's
    generators depend on the processor.
    """
    return torch.from_numpy(2 * draws.random_sample(shape) - 1)


def draw_images(N: int) -> Tensor:
    """Return N images, N C 32 32: coarse patches and fine noise."""
    draws = np.random.RandomState(0)
    coarse_NCHW = uniform(draws, N, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return 1.5 * coarse_NCHW + 0.5 * uniform(draws, N, 3, 32, 32)


def draw_weights(network: nn.Module, seed: int) -> None:
    """Set the weights of a network, which becomes float64, to numbers of a seed.

    The numbers depend on the names and shapes of the weights alone.
    """
    draws = np.random.RandomState(seed)
    drawn = {}
    for name, value in sorted(network.state_dict().items()):
        kind = name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            drawn[name] = torch.zeros_like(value)
        elif kind in ("running_mean", "running_var"):
            drawn[name] = torch.full(value.shape, float(kind == "running_var")).double()
        elif value.ndim > 1:
            # Convolutions are four times as large as usual. The steps are then so small that the
            # last digits of the weights do not decide about the loss of the 15th step.
            size = (4 if value.ndim == 4 else 1) * math.sqrt(6 / math.prod(value.shape[1:]))
            drawn[name] = size * uniform(draws, *value.shape)
        else:
            drawn[name] = 0.1 * uniform(draws, *value.shape) + float(kind == "weight")
    network.double().load_state_dict(drawn)


def teach(network: nn.Module, seed: int, images_NCHW: Tensor) -> None:
    """Make a network a teacher: draw its weights, and fit the statistics of BatchNorm to images."""
    draw_weights(network, seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images_NCHW)
    network.eval()


def choose_labels(folder: Path, case: Case) -> list[int]:
    """Return the labels of the images, so that the teacher is right and wrong about regions.

    The teacher is globally right about every first image of a batch, and globally wrong about the
    other images, of which it gets a region right if the prediction of any region differs.

    Args:
        folder: checkout of SDD.
        case: the training.

    Returns:
        The labels of all images.

    Raises:
        RuntimeError: if no region is complementary, so that the training would test little.
    """
    images_NCHW = draw_images(BATCHES * case.batch)
    with imported(folder):
        theirs, seed = TEACHERS[case.teacher]
        build = importlib.import_module("mdistiller.models").cifar_model_dict[theirs][0]
        network = build(num_classes=CLASSES, M="[1,2]")
        teach(network, seed, images_NCHW[: case.batch])
        with torch.no_grad():
            class_NR = network(images_NCHW)[1].argmax(1)
    labels = []
    complementary = 0
    for i, predicted in enumerate(class_NR.tolist()):
        others = [other for other in predicted if other != predicted[0]]
        right = i % case.batch == 0
        labels.append(predicted[0] if right else [*others, (predicted[0] + 1) % CLASSES][0])
        complementary += sum((other == labels[-1]) != right for other in predicted)
    if not complementary:
        raise RuntimeError(f"no region of {case.teacher} is complementary")
    return labels


def run_program(folder: Path, case: Case, labels: list[int]) -> Curve:
    """Run the authors' program on one training.

    Args:
        folder: checkout of the authors' repository.
        case: the training.
        labels: labels of the images.

    Returns:
        What the training did.
    """
    images_NCHW = draw_images(BATCHES * case.batch)
    columns = (images_NCHW, torch.tensor(labels), torch.arange(len(labels)))
    batches = list(zip(*(column.split(case.batch) for column in columns), strict=True))
    loaders = (batches, [batch[:2] for batch in batches], len(labels), CLASSES)
    losses: list[float] = []
    excesses: list[float] = []
    program = folder / PROGRAMS[case.source]
    file, _, words = case.command.partition(" ")
    config = folder / "configs" / "cifar100" / file
    options, values = _split(words)
    if case.source == "sdd":
        options.append("--gpu=-1")
    values += ["SOLVER.EPOCHS", str(math.ceil(case.steps / BATCHES))]
    with imported(folder), tempfile.TemporaryDirectory() as scratch:
        values += ["LOG.PREFIX", scratch]
        trainer = importlib.import_module("mdistiller.engine.trainer")
        networks = importlib.import_module("mdistiller.models").cifar_model_dict
        teacher, student = _names(config, values)
        seed = TEACHERS[case.teacher][1]
        patches = {
            teacher: (_taught(networks[teacher][0], seed, batches[0][0]), "any path"),
            student: (_initialised(networks[student][0], case.seed), None),
        }
        train_iter = trainer.BaseTrainer.train_iter
        clip_grad_norm = nn.utils.clip_grad_norm_

        def step(self: Any, data: Any, epoch: int, meters: Any) -> Any:
            said = train_iter(self, data, epoch, meters)
            losses.append(float(meters["losses"].val))
            return said

        def clip(*args: Any, max_norm: float, **options: Any) -> Tensor:
            norm = clip_grad_norm(*args, max_norm=max_norm, **options)
            excesses.append(float(norm) / max_norm)
            return norm

        with (
            mock.patch.dict(networks, patches),
            mock.patch("mdistiller.dataset.get_dataset", return_value=loaders),
            mock.patch("mdistiller.engine.utils.load_checkpoint", return_value={"model": {}}),
            mock.patch.object(trainer, "save_checkpoint"),
            mock.patch.object(trainer.BaseTrainer, "train_iter", step),
            mock.patch.object(nn.utils, "clip_grad_norm_", clip),
            mock.patch.object(sys, "argv", [str(program), "--cfg", str(config), *options, *values]),
        ):
            runpy.run_path(str(program), run_name="__main__")
    return Curve(losses[: case.steps], labels, sum(excess > 1 for excess in excesses[: case.steps]))


def _split(words: str) -> tuple[list[str], list[str]]:
    """Return the options --name VALUE at the front of a command line, and the other words."""
    parts = words.split()
    options = []
    while parts and parts[0].startswith("--"):
        options.append(parts.pop(0))
        if parts and options[-1] != "--logit-stand":
            options.append(parts.pop(0))
    return options, parts


def _names(config: Path, opts: list[str]) -> tuple[str, str]:
    """Return the authors' names of teacher and student, from their file and the command line."""
    yacs = importlib.import_module("yacs.config")
    with config.open() as file:
        distiller = yacs.CfgNode.load_cfg(file).DISTILLER
    given = dict(zip(opts[::2], opts[1::2], strict=True))
    return (
        given.get("DISTILLER.TEACHER", distiller.TEACHER),
        given.get("DISTILLER.STUDENT", distiller.STUDENT),
    )


def _taught(build: Builder, seed: int, images_NCHW: Tensor) -> Builder:
    """Return a builder of a teacher that keeps the weights of a seed."""

    def built(**options: Any) -> nn.Module:
        network = build(**options)
        teach(network, seed, images_NCHW)
        # The program loads the weights of a file, of which there is none.
        network.load_state_dict = lambda state: None
        return network

    return built


def _initialised(build: Builder, seed: int) -> Builder:
    """Return a builder of a student that has the weights of a seed."""

    def built(**options: Any) -> nn.Module:
        network = build(**options)
        draw_weights(network, seed)
        return network

    return built


@contextlib.contextmanager
def imported(folder: Path) -> Iterator[None]:
    """Let `mdistiller` be the package of a checkout, in float64 on the CPU, without its prints."""

    def float64(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else to_float(x)

    to_float = Tensor.float
    for name in ("tensorboardX", "turtle"):
        if not _importable(name):
            sys.modules[name] = _Stub(name)
    with (
        mock.patch.object(sys, "path", [str(folder), *sys.path]),
        mock.patch.object(Tensor, "float", float64),
        mock.patch.object(Tensor, "cuda", lambda x, *args, **options: x),
        mock.patch.object(nn.Module, "cuda", lambda module, *args: module),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for name in [name for name in sys.modules if name.partition(".")[0] == "mdistiller"]:
            del sys.modules[name]
        yield


class _Stub(types.ModuleType):
    """A module that the programs import and that these trainings do not need."""

    def __getattr__(self, name: str) -> Any:
        return mock.MagicMock()


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def read() -> dict[str, Curve]:
    """Return the curves of the file, by the name of the training."""
    content: Mapping[str, Any] = json.loads(FILE.read_text())
    return {name: Curve(**curve) for name, curve in content["curves"].items()}


def main() -> None:
    """Run all trainings and write the file."""
    parser = argparse.ArgumentParser(description="Write trajectories.json.")
    for name, source in SOURCES.items():
        parser.add_argument(name, type=Path, help=f"checkout of {source}")
    folders = {name: path.resolve() for name, path in vars(parser.parse_args()).items()}
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    curves = {}
    for case in CASES:
        labels = choose_labels(folders["sdd"], case)
        curves[case.name] = run_program(folders[case.source], case, labels)._asdict()
    text = json.dumps({"sources": SOURCES, "curves": curves}, indent=1)
    FILE.write_text(re.sub(r"\s+(?=[-\d\]])", " ", text) + "\n")


if __name__ == "__main__":
    main()
