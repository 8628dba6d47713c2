"""Typed settings of a job (one training run): keys, types, defaults, units and bounds.

The metadata of a field says whether the field identifies the job. Only this module states defaults;
the YAML files of conf/ state only what differs from them. This module does not import torch, so
that `--help` and the planning of a launcher stay fast.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

__all__ = ["Config"]


NO_TEACHER = "none"
M_CURE = (
    'give distinct positive integers, such as M=[1,2,4]; in a sweep, quote the lists: M="[1],[1,2]"'
)

# The papers' training on CIFAR-100. Each of these values is the default of several keys.
EPOCHS = 240
BATCH_SIZE = 64  # images
LR = 0.05  # peak learning rate of SGD
MILESTONES = (0.625, 0.75, 0.875)  # as fractions of the epochs: epochs 150, 180 and 210

# Upper bounds of numbers. They lie far above every value of use, and no computation overflows below
# them.
MOST_EPOCHS = 1_000_000
MOST_STEPS = 1_000_000_000
MOST_IMAGES = 1_000_000  # of a batch
MOST_PROCESSES = 10_000
MOST_LR = 1000
MOST_WEIGHT = 1_000_000  # of a loss
MOST_WEIGHT_DECAY = 1000
MOST_TEMPERATURE = 1000
MOST_SEED = 2**63 - 1  # torch holds a seed in 64 bits
# Bounds of standard deviations per channel, for pixels in 0..1. Models that expect pixels in 0..255
# have 1/255.
LEAST_STD, MOST_STD = 0.001, 1


def _plumbing(default: Any) -> Any:
    """Return a field that `config_hash` ignores, for how a job runs: paths, device, tracking."""
    return field(default=default, metadata={"identity": False})


def _later(default: Any) -> Any:
    """Return a field for a key that was added after jobs had been recorded.

    `config_hash` ignores the field while it has its default, so that recorded jobs keep their hash.
    """
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number in the configuration; None means that there is no such bound.

    Attributes:
        gt: The number must be greater than this.
        ge: The number must be at least this.
        lt: The number must be less than this.
        le: The number must be at most this.
        finite: Whether infinity is refused. NaN is always refused.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    finite: bool = True

    def in_a_record(self) -> "Bounds":
        """Return the wider bounds that hold for a number read from a run directory.

        An earlier version of this package, with wider bounds, may have written the number. The
        result has no upper bounds. A positive `ge` becomes gt=0; other lower bounds and `finite`
        are kept.
        """
        if self.ge is not None and self.ge > 0:
            return Bounds(gt=0, finite=self.finite)
        return Bounds(gt=self.gt, ge=self.ge, finite=self.finite)

    def fault(self, number: float) -> str:
        """Return why `number` is refused, such as "must be greater than 0"; "" if it is valid.

        If several bounds are violated, the text names one.
        """
        if isinstance(number, float) and math.isnan(number):
            return "is not a number"
        if self.finite and number in (math.inf, -math.inf):
            return "must be finite"
        if self.gt is not None and number <= self.gt:
            return f"must be greater than {self.gt}"
        if self.ge is not None and number < self.ge:
            return "must not be negative" if self.ge == 0 else f"must be at least {self.ge}"
        if self.lt is not None and number >= self.lt:
            return f"must be less than {self.lt}"
        if self.le is not None and number > self.le:
            return f"must be at most {self.le}"
        return ""


def bounded(
    default: Any,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    finite: bool = True,
    identity: bool = True,
    later: bool = False,
) -> Any:
    """Return a dataclass field for a number, or a list of numbers, with bounds.

    `normalise` checks the bounds when a job is resolved or loaded. NaN is always refused.

    Args:
        default: The default value: a number, a list of numbers, None for no value, or MISSING of
            OmegaConf for a required value. The bounds hold for each number of a list.
        gt: The number must be greater than this; None for no such bound.
        ge: The number must be at least this; None for no such bound.
        lt: The number must be less than this; None for no such bound.
        le: The number must be at most this; None for no such bound.
        finite: Whether infinity is refused.
        identity: Whether `config_hash` counts the field.
        later: Whether `config_hash` ignores the field while it has its default, so that a new key
            does not change the hashes of earlier jobs.

    Returns:
        The field, with `identity`, `later` and the bounds in its metadata.
    """
    bounds = Bounds(gt=gt, ge=ge, lt=lt, le=le, finite=finite)
    metadata = {"identity": identity, "later": later, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


# Bounds of arguments of the optimizer and of the loss, by their dotted key. All other arguments are
# finite and fit in 64 bits.
ARGUMENTS = {
    "optimizer.algorithm.momentum": Bounds(ge=0, lt=1),
    "optimizer.algorithm.weight_decay": Bounds(ge=0, le=MOST_WEIGHT_DECAY),
    "distiller.loss.temperature": Bounds(gt=0, le=MOST_TEMPERATURE),
    "distiller.loss.alpha": Bounds(ge=0, le=MOST_WEIGHT),
    "distiller.loss.beta": Bounds(ge=0, le=MOST_WEIGHT),
    "distiller.loss.gamma": Bounds(ge=0, le=MOST_WEIGHT),
}
ARGUMENT = Bounds(ge=-(2**63), le=2**63 - 1)

# Bounds of the launchers' options, hydra.launcher.<name>
LAUNCHER = {
    "max_group_size": Bounds(ge=1, le=MOST_PROCESSES),
    "timeout_min": Bounds(ge=1, le=1_000_000),
    "signal_delay_s": Bounds(ge=0, le=65_535),  # sbatch takes no more
    "cpus_per_task": Bounds(ge=1, le=MOST_PROCESSES),
    "gpus_per_node": Bounds(ge=0, le=MOST_PROCESSES),
    "mem_gb": Bounds(gt=0, le=1_000_000),
    "nodes": Bounds(ge=1, le=MOST_PROCESSES),
    "array_parallelism": Bounds(ge=1, le=1_000_000),
    "max_requeues": Bounds(ge=0, le=1_000_000),
}


class Precision(StrEnum):
    """Number format of the networks' forward pass: fp32, bf16 or fp16.

    Losses are always computed in float32.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Capture(StrEnum):
    """Choice whether training steps are captured, that is, recorded as a CUDA graph and replayed.

    - "auto" captures the steps on a GPU if a single process trains the job.
    - "on" tries it with several processes, too. On a CPU, "on" runs the same code with a plain
      function in place of the graph: for tests, with the same numbers and no gain.
    - "off" captures nothing.
    """

    auto = "auto"  # on CUDA
    on = "on"  # on every device; for tests
    off = "off"  # never


class CompileMode(StrEnum):
    """Mode of torch.compile: "default", or "max_autotune", which tries more kernels.

    Modes in which torch itself records CUDA graphs cannot be chosen; `Capture` is for that.
    """

    default = "default"
    max_autotune = "max_autotune"  # try more kernels, which takes longer


class Schedule(StrEnum):
    """Shape of the learning rate after the warm-up: steps, half a cosine or constant."""

    step = "step"  # times `decay` at each milestone
    cosine = "cosine"  # half a cosine down to zero
    constant = "constant"  # the peak


class Knowledge(StrEnum):
    """Kinds of regions whose loss counts: both kinds, only consistent, or only complementary ones.

    A region, a part of the logit map, is consistent if the teacher's predictions for the region and
    for the whole image are both right or both wrong. Any other region is complementary (SDD Table
    6).
    """

    fusion = "fusion"  # both kinds
    consistent = "consistent"
    complementary = "complementary"


class Reduction(StrEnum):
    """Way in which the losses of all regions in a batch become a scalar.

    "mean" is the mean over all regions of all images. "sum" is the sum over the regions of an
    image, averaged over the images.
    """

    mean = "mean"  # mean over all regions of all images
    sum = "sum"  # sum over the regions of an image, then mean over the images


class Pooling(StrEnum):
    """Way in which a logit map is average-pooled to the m x m regions of a scale m.

    "direct" pools the map itself. "nested" pools the map to 4x4 cells first, as SDD's code does.
    """

    direct = "direct"  # every scale from the map (SDD Eq. 3 to 5)
    nested = "nested"  # every scale from the map pooled to 4x4 (SDD's code)


class Combine(StrEnum):
    """Way in which a student learns from several teachers.

    "logits" mixes the teachers' logits, and the loss compares the student with the mixture.
    "losses" mixes the losses with each teacher. "confidence" mixes the losses, too, with weights
    for each image that are larger for a teacher that predicts the image's label well (CA-MKD).
    """

    logits = "logits"  # weighted mean of the logits of each region
    losses = "losses"  # weighted mean of the losses
    confidence = "confidence"  # mean of the losses, with weights for each image (CA-MKD)


class TeacherView(StrEnum):
    """Version of each training image that the teacher sees.

    "augmented" is the student's own version. "plain" is the image without crop and mirroring: the
    image itself, or of an image file the centre crop of the evaluation.
    """

    augmented = "augmented"  # as the student sees the image
    plain = "plain"  # as the evaluation shows the image


class CacheDtype(StrEnum):
    """Number format of the teacher's logit maps in the cache on disk: float16 or float32."""

    # Half the disk space. Rounds a value by at most 2^-11 of its size, or 3e-8 if it is below 6e-5.
    float16 = "float16"
    float32 = "float32"  # the same numbers as without a cache


class BadImages(StrEnum):
    """What to do with an image file that cannot be read: stop with an error, or skip the image."""

    fail = "fail"  # stop, naming the file
    # Training uses the next image instead, evaluation leaves the image out
    skip = "skip"


class IrregularImages(StrEnum):
    """What to do with an unusual image: convert it to RGB, skip it, or stop with an error.

    An image is unusual if it is not stored as RGB (for example grey or with alpha), if its EXIF
    orientation is not upright, or if its file name belongs to another image format.
    """

    # Convert to RGB, in the stored orientation, like torchvision's ImageFolder
    convert = "convert"
    skip = "skip"  # as for BadImages
    fail = "fail"  # as for BadImages


class Views(StrEnum):
    """Augmented views of each training image: a weak one, or a weak and a strong one."""

    weak = "weak"  # one: crop and mirroring
    # two: the second one has a crop of its own, RandAugment and Cutout, as in MLKD
    weak_strong = "weak_strong"


class Crop(StrEnum):
    """Way to cut a square out of an image file: by area, or out of the image squeezed to a square.

    "area" cuts a random part of the image in training (`dataset.crop_area`), and the centre square
    in evaluation. Proportions are kept in evaluation. "squeezed" first resizes the whole image to a
    square, which does not keep its proportions, and cuts a square of `dataset.size` pixels out of
    it: at a random place in training, at the centre in evaluation.
    """

    area = "area"  # as most code for ImageNet
    squeezed = "squeezed"  # as SDD's code for CUB-200


# Ways to standardise the logits, by name, with the values that a job keeps. Before there was a
# choice, the values were true and false.
STANDARDIZE: dict[str, bool | str] = {
    "none": False,
    "class": True,
    "batch": "batch",
    "class_scaled": "class_scaled",
}


# Numbers that a job can return to a search, with the entry of result.json or the metric of the last
# epoch that holds the number, and whether a larger number is better.
OBJECTIVES: dict[str, tuple[str, bool]] = {
    "best/top1": ("best_top1", True),
    "last/top1": ("last_top1", True),
    "test/top1": ("test_top1", True),
    "val/top5": ("val/top5", True),
    "val/loss": ("val/loss", False),
    # With several labels per image
    "best/mAP": ("best_mAP", True),
    "last/mAP": ("last_mAP", True),
    "test/mAP": ("test_mAP", True),
}


class FileMirror(StrEnum):
    """Program for which the metrics of a run are copied into files in the run directory."""

    tensorboard = "tensorboard"  # event files, in the folder tensorboard
    wandb = "wandb"  # an offline run, in the folder wandb; `wandb sync` uploads it


class Rerun(StrEnum):
    """Choice of the jobs that run when a sweep is launched again.

    - "failed": new, killed and failed jobs.
    - "all": these and the finished jobs; every job starts anew, and its old record is set aside.
    - "none": new and killed jobs.

    Jobs that halving has dropped run again with "all", and with each choice if `sweep.halving` is
    empty now. Jobs that are running or in SLURM's queue are never started a second time.
    """

    failed = "failed"  # failed, killed and new jobs
    all = "all"  # every job from the start; the old records are set aside
    none = "none"  # only killed and new jobs


class Seeds(StrEnum):
    """Rule that chooses the seeds of a sweep; the only rule is "until_decided".

    Each job starts with 3 seeds. Seeds are added until a statistical test shows that the job's
    method and its baseline differ, up to `sweep.max_seeds` seeds.
    """

    until_decided = "until_decided"  # see sweeps/until_decided.py


class Progress(StrEnum):
    """Way in which training progress is shown.

    "auto" is a live table on a terminal, and log lines elsewhere. "plain" is log lines, one per
    epoch. "off" shows nothing.
    """

    auto = "auto"  # live table on a terminal, log lines elsewhere
    plain = "plain"  # a line per epoch
    off = "off"  # no display


@dataclass
class StudentConfig:
    """Settings of the student: its network and its peak learning rate."""

    name: str = MISSING  # name of the network in tables
    # _target_ and its arguments; num_classes is added
    model: dict[str, Any] = field(default_factory=dict)
    # Peak learning rate for the papers' SGD (optimizer=sgd); conf/rates.yaml sets it to dataset.lr
    # by default
    lr: float = bounded(LR, gt=0, le=MOST_LR)


@dataclass
class TeacherConfig(StudentConfig):
    """Settings of the teacher: network, weights file, cache of logit maps, and its own training."""

    checkpoint: str | None = None  # weights file; null: <home>/teachers/<dataset>/<name>.pt
    # Folder that keeps the teacher's maps for this and later sweeps; null: no cache
    cache: str | None = _plumbing(None)
    cache_dtype: CacheDtype = CacheDtype.float16  # number format of the cached maps
    train_if_missing: bool = _plumbing(False)  # train the teacher first if its file is missing
    # Epochs for which a missing teacher is trained
    train_epochs: int = bounded(EPOCHS, gt=0, le=MOST_EPOCHS, identity=False)
    # Seed with which a missing teacher is trained
    train_seed: int = bounded(0, ge=0, le=MOST_SEED, identity=False)
    # Side in pixels to which the images are resized for this teacher; null: as the student sees
    # them
    image_size: int | None = bounded(None, gt=0, le=100_000, later=True)
    # Version of the training images that the teacher sees, or that all teachers see
    view: TeacherView = _later(TeacherView.augmented)
    # How a student learns from several teachers
    combine: Combine = _later(Combine.logits)
    # Weight of each of several teachers, with the sum 1; []: equal weights
    weights: list[float] = bounded([], ge=0, le=1, later=True)


@dataclass
class MoreTeacherConfig:
    """Settings of each teacher but the first, in a job with several teachers.

    Settings of `TeacherConfig` that are missing here are those of the first teacher.
    """

    name: str = MISSING  # name of the network in tables
    # _target_ and its arguments; num_classes is added
    model: dict[str, Any] = field(default_factory=dict)
    # Peak learning rate with which this teacher is trained if its file is missing; null: dataset.lr
    # or, if that is null, the papers' rate for CIFAR-100
    lr: float | None = bounded(None, gt=0, le=MOST_LR, identity=False)
    checkpoint: str | None = None  # weights file; null: <home>/teachers/<dataset>/<name>.pt
    # As teacher.image_size, for this teacher
    image_size: int | None = bounded(None, gt=0, le=100_000, later=True)


@dataclass
class DistillerConfig:
    """Settings of the loss on logits, a weighted sum of cross-entropy and a distillation loss.

    Of scale decoupled distillation (SDD), the options `knowledge`, `reduction` and `pooling` are
    here; `M`, `standardize` and `complementary_weight` are in `Config`.
    """

    name: str = MISSING  # name of the loss in tables
    # _target_ and arguments of (s_NK, t_NK, y_N) -> (N,); {}: no distillation loss
    loss: dict[str, Any] = field(default_factory=dict)
    temperature: float = bounded(4.0, gt=0, le=MOST_TEMPERATURE)  # divides the logits
    # _target_ and arguments of a temperature that is learnt instead (CTKD); {}: the fixed one
    learned_temperature: dict[str, Any] = field(default_factory=dict, metadata={"later": True})
    # Weight of the cross-entropy with the labels
    ce_weight: float = bounded(1.0, ge=0, le=MOST_WEIGHT)
    kd_weight: float = bounded(1.0, ge=0, le=MOST_WEIGHT)  # weight of the distillation loss
    # Epochs over which kd_weight rises linearly; 1: full weight from the first epoch
    warmup_epochs: int = bounded(1, gt=0, le=MOST_EPOCHS)
    knowledge: Knowledge = Knowledge.fusion  # which regions teach (SDD Table 6)
    # Over regions: mean as in SDD's code, sum as in its Eq. 9
    reduction: Reduction = Reduction.mean
    # How regions are pooled; docs/methods.md says which numbers need `nested`
    pooling: Pooling = _later(Pooling.direct)


@dataclass
class FeatureConfig:
    """Settings of a feature or relation method: weight and warm-up of its loss, and its options."""

    # Weight of the method's loss
    weight: float = bounded(1.0, ge=0, le=MOST_WEIGHT)
    # Epochs over which the weight rises linearly; 1: full weight from the first epoch
    warmup_epochs: int = bounded(1, gt=0, le=MOST_EPOCHS)
    # _target_ and options of a class of sddlskd.methods
    method: dict[str, Any] = field(default_factory=dict)


@dataclass
class DatasetConfig:
    """Settings of the data set and its preprocessing.

    Some fields are defaults for settings of other groups, such as `epochs` for `trainer.epochs`.
    """

    name: str = MISSING  # name of the data set in tables
    # _target_ and arguments of () -> Splits. The identity ignores the argument `root` if it equals
    # dataset.root.
    load: dict[str, Any] = field(
        default_factory=dict,
        metadata={"place": "root"},
    )
    root: str = _plumbing("data")  # folder of the files
    num_classes: int = bounded(MISSING, ge=2, le=1_000_000)  # number of classes
    mean: list[float] = bounded([], ge=0, le=1)  # per channel, for pixels in 0..1
    std: list[float] = bounded([], ge=LEAST_STD, le=MOST_STD)  # per channel, for pixels in 0..1
    # Pixels of zero padding before the random crop; 0: no crop
    padding: int = bounded(4, ge=0, le=1_000_000)
    flip: bool = True  # mirror half of the images
    # Several labels per image: the loader gives labels (N, num_classes) of zeros and ones, and a
    # binary cross-entropy replaces the cross-entropy
    multi_label: bool = _later(False)
    # Views of each training image; methods such as MLKD need two. Jobs with one view and jobs with
    # two can share their batches.
    views: Views = _later(Views.weak)
    # Fraction of the training split held out for validation; 0: validate on the test split, as in
    # the papers
    val_fraction: float = bounded(0.0, ge=0, lt=1)
    # Leave out the last training batch of an epoch if it is smaller than the others
    drop_last: bool = _later(False)
    # Fraction of each class of the remaining training images that students learn from; 1: all.
    # Teachers learn from all.
    train_fraction: float = bounded(1.0, gt=0, le=1, later=True)
    # Whether students also see the images that train_fraction leaves out, without their labels
    unlabelled: bool = _later(False)
    # The keys from here to pixel_limit apply only to data sets of image files
    # (sddlskd/data/streaming.py).
    # Side of the networks' input, in pixels
    size: int = bounded(224, gt=0, le=100_000, later=True)
    # How squares are cut out of the images; docs/methods.md says which numbers need `squeezed`
    crop: Crop = _later(Crop.area)
    # Least and largest fraction of the image area that a random crop covers; not read by
    # crop=squeezed
    crop_area: list[float] = bounded([0.08, 1.0], later=True)
    # Side of the centre square for evaluation, as a fraction of the shorter side; 1: the full side.
    # With crop=squeezed, `size` as a fraction of the squeezed image's side
    centre: float = bounded(0.875, ge=0.01, le=1, later=True)
    # Rotate images according to their EXIF orientation; false: keep the stored orientation
    upright: bool = _later(False)
    # Files that cannot be read
    bad_images: BadImages = _later(BadImages.fail)
    # Images that are not upright RGB as stored
    irregular_images: IrregularImages = _later(IrregularImages.convert)
    # Pixels above which an image counts as bad, according to its header
    pixel_limit: int = bounded(100_000_000, gt=0, le=10**12, later=True)
    # Worker processes that decode images; 0: decode in the training process; null: one per core
    # that this rank may use, at most 16 (decoding.default_workers)
    workers: int | None = bounded(None, ge=0, le=MOST_PROCESSES, identity=False)
    # Default of trainer.epochs and teacher.train_epochs
    epochs: int = bounded(EPOCHS, gt=0, le=MOST_EPOCHS)
    # Default of trainer.batch_size, in images
    batch_size: int = bounded(BATCH_SIZE, ge=2, le=MOST_IMAGES, identity=False)
    # Default of student.lr and teacher.lr; null: the value for CIFAR-100 (conf/rates.yaml)
    lr: float | None = bounded(None, gt=0, le=MOST_LR, identity=False)
    # Default weight decay of the papers' SGD
    weight_decay: float = bounded(5e-4, ge=0, le=MOST_WEIGHT_DECAY, identity=False)
    # Default milestones of the papers' SGD
    milestones: list[float] = bounded(list(MILESTONES), identity=False)
    # Stem of this package's CIFAR networks: small for images of 32 pixels, large for images of 224
    stem: str = _plumbing("small")
    # Initialise the student's large stem and classifier as layers that are put into a finished
    # network: with PyTorch's defaults (docs/methods.md). Only for this package's own networks.
    new_ends: bool = _later(False)
    train_teachers: bool = _plumbing(False)  # default of teacher.train_if_missing


@dataclass
class OptimizerConfig:
    """Settings of the optimizer and of the learning-rate schedule."""

    name: str = MISSING
    # _target_ and its arguments, without params and lr
    algorithm: dict[str, Any] = field(default_factory=dict)
    lr: float = bounded(LR, gt=0, le=MOST_LR)  # peak learning rate
    schedule: Schedule = Schedule.step  # how the learning rate falls
    # As fractions of trainer.epochs
    milestones: list[float] = bounded(list(MILESTONES))
    decay: float = bounded(0.1, gt=0, le=1)  # factor at each milestone
    # Epochs over which the learning rate rises linearly from zero
    warmup_epochs: float = bounded(0.0, ge=0, le=MOST_EPOCHS)
    # Largest gradient norm; null: no clipping
    clip_norm: float | None = bounded(None, gt=0, le=1_000_000)


@dataclass
class TrainerConfig:
    """Settings of the training loop: length, batches, device, number of processes, precision."""

    epochs: int = bounded(EPOCHS, gt=0, le=MOST_EPOCHS)  # passes over the training images
    batch_size: int = bounded(BATCH_SIZE, ge=2, le=MOST_IMAGES)  # images
    eval_batch_size: int = bounded(500, gt=0, le=MOST_IMAGES)  # images
    # Batches per epoch, for quick trials; null: all
    max_steps: int | None = bounded(None, gt=0, le=MOST_STEPS)
    # Seed of batches and augmentation; null: `seed`. Jobs with the same data_seed see the same
    # batches and share the teacher, so they differ only in their initialisation.
    data_seed: int | None = bounded(None, ge=0, le=MOST_SEED)
    device: str = _plumbing("auto")  # auto, cpu, cuda, cuda:1, mps
    # Processes (one per GPU) that share each batch
    devices: int = bounded(1, gt=0, le=MOST_PROCESSES, identity=False)
    # Seconds after which a process that waits for another one gives up
    timeout_s: float = bounded(600.0, ge=1, le=7 * 24 * 3600, identity=False)
    # Number format of the networks' forward pass; losses are always float32
    precision: Precision = Precision.fp32
    compile: bool = False  # torch.compile the networks
    # Mode of torch.compile
    compile_mode: CompileMode = _later(CompileMode.default)
    # Whether convolutions on a GPU round their float32 inputs to TF32 (10 bits), as torch does by
    # default; products of matrices, and so the losses, stay float32
    tf32: bool = _later(True)
    # Whether steps are captured in CUDA graphs
    capture: Capture = _plumbing(Capture.auto)
    # Steps between two readings of the training loss from the device
    log_every: int = bounded(50, gt=0, le=MOST_STEPS, identity=False)
    progress: Progress = _plumbing(Progress.auto)  # how progress is shown


@dataclass
class CheckpointConfig:
    """Settings of the checkpoints: how often they are written."""

    # Minutes between checkpoints within an epoch; inf: only at the end of each epoch
    every_minutes: float = bounded(10.0, gt=0, finite=False, identity=False)


@dataclass
class TrackingConfig:
    """Settings of the copies of runs (settings, metrics, files), in MLflow and elsewhere."""

    enabled: bool = _plumbing(True)  # mirror runs to MLflow
    uri: str | None = _plumbing(None)  # MLflow server or sqlite:////absolute/path
    experiment: str = _plumbing("sddlskd")  # MLflow experiment
    # Continue without MLflow if it is unreachable; `sync` delivers the runs later
    offline: bool = _plumbing(False)
    # Copies in each run directory, for TensorBoard and W&B (offline); [] for none
    mirrors: list[FileMirror] = field(default_factory=list, metadata={"identity": False})
    # Keep logits, region predictions and features on the test split, for figures
    predictions: bool = _plumbing(False)
    experiment_id: str | None = _plumbing(None)  # set by the launching process
    parent_run_id: str | None = _plumbing(None)  # run id of the sweep, set by the launching process


@dataclass
class SweepConfig:
    """Settings of a sweep: its name, its jobs and their seeds, and which jobs run again."""

    # Tag `sweep` of every run; null: named after the swept overrides
    name: str | None = _plumbing(None)
    # Jobs that do not form a grid: one entry per job with its overrides, such as
    # "pair=vgg13_vgg8 scales=two". They are crossed with the swept overrides.
    jobs: list[str] = field(default_factory=list, metadata={"identity": False})
    plan: bool = _plumbing(False)  # print what the sweep would do, and do nothing
    # Which jobs of an earlier launch run again
    rerun: Rerun = _plumbing(Rerun.failed)
    # until_decided: start with 3 seeds, and add seeds to the jobs whose gain is not decided yet.
    # null: the seeds that `seed` names
    seeds: Seeds | None = _plumbing(None)
    # Largest number of seeds of a job under until_decided
    max_seeds: int = bounded(10, ge=3, le=1000, identity=False)
    # Method that until_decided compares every job with, such as "KD+LS" or "SD-KD [1,2,4]"; null:
    # the method without its last part that the sweep has, else the student alone, else KD
    baseline: str | None = _plumbing(None)
    # Epochs at whose end the worse half of the runs of a group is dropped, such as [30,60,120];
    # []: no run is dropped
    halving: list[int] = field(
        default_factory=list, metadata={"identity": False, "bounds": Bounds(ge=1, le=MOST_EPOCHS)}
    )


@dataclass
class Config:
    """All settings of a job, which is one training run."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    # Further teachers by name, in the order in which teacher=[a,b] lists them
    more_teachers: dict[str, MoreTeacherConfig] = field(
        default_factory=dict, metadata={"later": True}
    )
    student: StudentConfig = field(default_factory=StudentConfig)
    distiller: DistillerConfig = field(default_factory=DistillerConfig)
    # Feature and relation methods by name; their losses are added to the distiller's
    features: dict[str, FeatureConfig] = field(default_factory=dict, metadata={"later": True})
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    # Scales: each m in M divides the logit maps into m x m regions
    M: list[int] = bounded([1], ge=1, le=1000)
    # How the logits of each region are standardised: none (or false), class (or true: over the
    # classes, LSKD), batch (over the images, LumiNet), class_scaled (as class, and the loss is
    # multiplied by the variance of the teacher's logits, NormKD)
    standardize: bool | str = False
    # Weight of complementary regions (SDD's beta)
    complementary_weight: float = bounded(2.0, ge=0, le=MOST_WEIGHT)
    # Seed of the initialisation, and of the batches unless trainer.data_seed is given
    seed: int = bounded(0, ge=0, le=MOST_SEED)
    # Number that a search compares its jobs by, one of OBJECTIVES
    objective: str = _plumbing("best/top1")
    # Name of the choice recipe=..., which the recipe's file states; "" without one
    recipe: str = _plumbing("")
    # Whether _target_ may name code outside of targets.PACKAGES (this package, torch, torchvision
    # and timm)
    allow_foreign_targets: bool = _plumbing(False)
    home: str = _plumbing(".")  # folder of data/, teachers/, runs/ and mlflow.db
    run_dir: str = _plumbing("")  # folder of this run's record

    @property
    def has_teacher(self) -> bool:
        """Return whether the student learns from a teacher, by a logit loss or a feature method."""
        return bool(self.distiller.loss or self.features)
