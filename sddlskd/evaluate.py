"""Evaluate a network on a test split: `python -m sddlskd.evaluate RUN_DIR | FILE [key=value ...]`.

RUN_DIR: evaluate the best epoch of a run, on the run's data set unless dataset=... gives another.
dataset.root=FOLDER evaluates it on another folder of the same classes, with the run's settings.
FILE: evaluate a .safetensors file written by sddlskd.export, or a weights file of this package,
RepDistiller or mdistiller. A file in a run's folder is judged with the settings of this run, unless
student=NAME is given. Elsewhere an exported file tells its network and the size of its images, and
another weights file requires student=NAME dataset=NAME. The networks of runs and of exported files
keep the mean and std that they were trained with. The network is
compared with teacher=NAME; for a run the default is the run's own teacher. Several runs or files
give a table with a line each. --json prints plain numbers, without units.

The results are top-1 and top-5 (%), the mean cross-entropy (nats), the expected calibration error
(%, 15 bins, Guo et al. 2017), the parameters of the network and its operations for one image (a
multiplication and an addition are two), its throughput in images per second, and the milliseconds
for a single image; on a GPU also the memory in MiB that a batch takes. With a teacher, the results
also have the teacher's top-1 (%) and the percentage of images for which both networks predict the
same class (agreement).

Below them, the classes follow, worst first, each with its top-1 and the class that it is mistaken
for most often: at most 20 classes, with --json all.

With --probe dataset=NAME, the network itself stays as it is: a linear classifier (logistic
regression) is trained on the features of that data set's training images, and the result is its
top-1 (%) on the test images. --size 32 resizes the images to 32x32 pixels, as papers do for the
transfer from CIFAR-100 to STL-10 and Tiny ImageNet.
"""

import argparse
import json
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.config.schema import DatasetConfig, FeatureConfig, MoreTeacherConfig, TeacherConfig
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.record import check_has_best, read_result
from sddlskd.terminal.arguments import other_form
from sddlskd.terminal.console import explain, log_to_terminal, refuse_another_checkout, write_line
from sddlskd.terminal.words import counted

__all__ = ["main"]

# A name that `log_to_terminal` knows; __name__ is "__main__" under `python -m`.
log = logging.getLogger("sddlskd.evaluate")

# Errors that a user can fix.
ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError, RuntimeError)
# Config groups that are replaced as a whole if the command line chooses another option.
WHOLE = ("dataset", "teacher", "trainer")
SHOWN_CLASSES = 20  # classes in the printed text
LEAST_FOR_TOP5 = 6  # classes; with five or fewer, top-5 is always 100%
# Unit of a result in the printed text: the divisor of the number, and the unit. A result without a
# unit is printed as it is.
UNITS = {
    **dict.fromkeys(("top1", "top5", "mAP", "ece", "teacher_top1", "agreement"), (1, "%")),
    "probe_top1": (1, "%"),
    "loss": (1, "nats"),
    "parameters": (10**6, "M"),
    "flops": (10**6, "M"),
    "images_per_s": (1, "images/s"),
    "batch": (1, "images"),
    "ms_per_image": (1, "ms"),
    "memory_mib": (1, "MiB"),
}


def _compose_job(overrides: Sequence[str]) -> Config:
    with hydra.initialize_config_dir(str(cfg.conf_folder()), version_base="1.3"):
        words = cfg.with_each_teacher(["tracking=none", *overrides])
        return cfg.resolve(hydra.compose("config", overrides=words))


def _check_source(source: Path) -> None:
    """Raise ValueError if a path is neither a run directory nor a file that can be evaluated.

    PyTorch is not needed for this check, so that a mistyped path is refused at once.
    """
    if source.is_dir():
        check_has_best(source)
        return
    if not source.is_file():
        raise ValueError(
            f"{source} is neither a run directory nor a file; runs are in <home>/runs/<dataset>/"
        )
    if source.suffix == ".onnx":
        raise ValueError(
            f"{source} is an ONNX model, which cannot be evaluated here; "
            "evaluate its run directory, or the file that --to safetensors exports"
        )


def _job_and_weights(source: Path, overrides: Sequence[str]) -> tuple[Config, Path, Config]:
    """Return the arguments of `training.measure.measure` for a run directory or a file.

    Args:
        source: run directory, .safetensors file or weights file.
        overrides: words of the command line of the form key=value.

    Returns:
        The job to evaluate, the file of the student's weights, and the job that trained the
        student.

    Raises:
        ValueError: If a file without metadata comes without student=NAME or dataset=NAME.
    """
    from sddlskd.export import TRUST, load_run

    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    if source.is_dir():
        trained = load_run(source, TRUST in overrides)
        return _override(trained, overrides), source / "best.ckpt", trained
    names_teacher = any(key.split(".")[0] in ("teacher", "pair") for key in given)
    folder = _run_folder(source)
    if folder and "student" not in given:
        trained = cfg.load(folder / "config.yaml", allow_foreign_targets=TRUST in overrides)
        job = _override(trained, overrides)
        if not names_teacher and (lost := _absent_teachers(job)):
            log.info("%s is judged without a teacher: no file %s", source, lost[0])
            job.distiller.loss, job.features = {}, {}
        return job, source, trained
    job, trained = _jobs_of_file(source, overrides, given)
    if not names_teacher:
        job.distiller.loss, job.features = {}, {}  # no teacher to compare with
    return job, source, trained


def _jobs_of_file(
    source: Path, overrides: Sequence[str], given: Collection[str]
) -> tuple[Config, Config]:
    """Return the job to evaluate and the job that trained the student, for a file without a run.

    Args:
        source: .safetensors file or weights file.
        overrides: words of the command line of the form key=value.
        given: keys of these words.

    Raises:
        ValueError: If a file without metadata comes without student=NAME or dataset=NAME.
    """
    from sddlskd.export import described

    facts = described(source)
    if facts is None:
        absent = [key for key in ("student", "dataset") if key not in given]
        if absent:
            words = " ".join(f"{key}=NAME" for key in absent)
            raise ValueError(f"{source} has no metadata that describes its network; add {words}")
        job = _compose_job(overrides)
    else:
        job = _compose_job([*_dataset_words(source, facts, given), *overrides])
        _prepare_as_trained(source, job.dataset, facts, given)
        job.student = replace(job.student, name=facts["network"], model=facts["model"])
        for key in ("mean", "std"):
            if f"dataset.{key}" not in given:
                setattr(job.dataset, key, facts[key])
    trained = replace(job, features={})
    if facts:
        size = facts["preparation"].get("size", job.dataset.size)
        load = {**job.dataset.load, "_target_": facts["loader"]}
        trained.dataset = replace(
            job.dataset, num_classes=facts["num_classes"], size=size, load=load
        )
    if facts and "methods" in facts:
        features = {name: FeatureConfig(method=method) for name, method in facts["methods"].items()}
        teacher = replace(job.teacher, model=facts["teacher"])
        trained = replace(trained, features=features, teacher=teacher)
    return job, trained


def _run_folder(source: Path) -> Path | None:
    """Return the run directory that a source of the command line is or lies in; None if neither."""
    folder = source if source.is_dir() else source.absolute().parent
    return folder if (folder / "config.yaml").is_file() else None


def _absent_teachers(job: Config) -> list[Path]:
    """Return the paths of the teacher files of a job that do not exist."""
    from sddlskd.training.checks import teacher_path

    paths = [teacher_path(one) for one in cfg.each_teacher(job)]
    return [path for path in paths if not path.exists()]


def _dataset_words(source: Path, facts: dict[str, Any], given: Collection[str]) -> list[str]:
    """Return the words that choose the data set which the metadata of a file name.

    Args:
        source: .safetensors file.
        facts: its metadata, as `export.described` returns them.
        given: keys of the overrides of the command line.

    Raises:
        ValueError: If the data set is a folder of the user's own, and dataset.root is not given.
    """
    if "dataset" in given:
        return []
    name, choices = facts["dataset"], cfg.conf_folder() / "dataset"
    if (choices / f"{name}.yaml").is_file():
        return [f"dataset={name}"]
    choice = facts["loader"].rpartition(".")[2]
    if not (choices / f"{choice}.yaml").is_file():
        choice = "image_folder"
    if "dataset.root" not in given:
        raise ValueError(
            f"{source} was trained on dataset.name={name}, and does not tell its folder; give "
            f"dataset={choice} dataset.root=FOLDER, or evaluate the run directory"
        )
    log.info("%s was trained on %s; dataset=%s is assumed", source, name, choice)
    own_name = [] if "dataset.name" in given else [f"dataset.name={name}"]
    return [f"dataset={choice}", *own_name]


def _prepare_as_trained(
    source: Path, dataset: DatasetConfig, facts: dict[str, Any], given: Collection[str]
) -> None:
    """Let `dataset` prepare image files as the metadata `facts` of a file say.

    Settings in `given`, the keys of the command line, stay. Log what is assumed if the metadata do
    not tell it, as those of earlier versions.
    """
    if not facts["preparation"]:
        if "dataset.size" not in given:
            log.warning(
                "%s does not tell the size of its images; for image files dataset.size=%d is "
                "assumed", source, dataset.size,
            )  # fmt: skip
    elif facts["loader"] == dataset.load.get("_target_"):
        for key, value in facts["preparation"].items():
            if f"dataset.{key}" not in given:
                setattr(dataset, key, value)


def _override(job: Config, overrides: Sequence[str]) -> Config:
    """Return a run's frozen configuration, changed by the overrides of the command line.

    A group of `WHOLE` that an override chooses is replaced as a whole. A new data set keeps the
    mean and std of the run, and the run's teachers unless an override chooses others.

    Raise ValueError if dataset.root is given and the run's loader takes no folder.
    """
    words = [word.lstrip("+") for word in overrides]
    chosen = [word.partition("=")[0] for word in words]
    plain = OmegaConf.structured(job)
    if chosen:
        composed = _compose_job(overrides)
        for group in WHOLE:
            if group in chosen:
                plain[group] = OmegaConf.structured(getattr(composed, group))
        if "teacher" in chosen:
            plain.more_teachers = composed.more_teachers
        if "dataset" in chosen:
            plain.dataset.mean = job.dataset.mean
            plain.dataset.std = job.dataset.std
        if "teacher" in chosen and not job.has_teacher:
            plain.distiller.loss = {"_target_": "sddlskd.losses.kd"}
        single = [word for word, key in zip(words, chosen, strict=True) if key not in WHOLE]
        plain = OmegaConf.merge(plain, OmegaConf.from_dotlist(single))
        if "dataset.root" in chosen and "dataset" not in chosen:
            _move_data(plain, job)
    changed = cfg.resolve(plain)
    if "teacher" not in chosen and changed.dataset.name != job.dataset.name:
        _keep_teachers(changed, job)
    return changed


def _move_data(plain: Any, job: Config) -> None:
    """Let the loader in `plain`, a changed configuration of the run `job`, read `dataset.root`.

    A frozen configuration holds the folder twice: as `dataset.root`, and as an argument of the
    loader.
    """
    if "root" not in job.dataset.load:
        raise ValueError(
            f"dataset.root has no effect here, because dataset={job.dataset.name} reads no folder; "
            "to judge the run on another folder give dataset=image_folder dataset.root=FOLDER"
        )
    if plain.dataset.load.root == job.dataset.load["root"]:
        plain.dataset.load.root = plain.dataset.root


def _keep_teachers(changed: Config, job: Config) -> None:
    """Let `changed`, a run's configuration with another data set, name the teachers of the run.

    The place of a teacher without `checkpoint` follows from the name of the data set, so that the
    new name would stand for another file.
    """
    from sddlskd.training.checks import teacher_path

    for key, one in zip(cfg.teacher_keys(job), cfg.each_teacher(job), strict=True):
        place = str(teacher_path(replace(one, home=changed.home)))
        teacher: TeacherConfig | MoreTeacherConfig = changed.teacher
        if key != "teacher":
            teacher = changed.more_teachers[key.partition(".")[2]]
        teacher.checkpoint = teacher.checkpoint or place


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the networks that the command line names, and print the results.

    The results are those of `training.measure.measure` or, with --probe, of `probe` beside it.
    `arguments` are the words of the command line; None stands for those of this process. A word is
    a run directory, a weights file, an override key=value or an option, such as --probe.

    Raises:
        SystemExit: With code 1 after printing an error that a user can fix, 2 if the arguments
            cannot be parsed, or 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sddlskd.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="RUN_DIR | FILE | key=value")
    parser.add_argument("--probe", action="store_true", help="train a linear classifier instead")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="resize the images of --probe")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    given = sys.argv[1:] if arguments is None else arguments
    if wrong := other_form(parser, given):
        parser.error(wrong)
    chosen = parser.parse_intermixed_args(given)
    sources = [Path(word) for word in chosen.words if _is_source(word)]
    overrides = [word for word in chosen.words if not _is_source(word)]
    if not sources:
        parser.error("name a run directory or a weights file")
    refuse_another_checkout()
    cfg.frame()
    log_to_terminal()
    try:
        if chosen.size is not None and not chosen.probe:
            raise ValueError("--size resizes the images of --probe; add --probe")
        for source in sources:
            _check_source(source)
        from sddlskd.training.measure import measure, probe

        # All sources are read first, so that a wrong one costs no results.
        every = [_job_and_weights(source, overrides) for source in sources]
        rows = []
        for source, asked in zip(sources, every, strict=True):
            job, _, trained = asked
            log.info("evaluating %s on %s ...", source, job.dataset.name)
            if not chosen.probe:
                _check_classes(source, job, trained)
            found = probe(*asked, side=chosen.size) if chosen.probe else measure(*asked)
            if job.dataset.num_classes < LEAST_FOR_TOP5 and not chosen.json:
                found.pop("top5", None)
            # The run that a file lies in need not be that of a network named on the command line.
            if "classes" in found and not any(word.startswith("student=") for word in overrides):
                _name_classes(found["classes"], source)
            rows.append((str(source), found))
    except KeyboardInterrupt:
        sys.exit(ExitCode.STOPPED)
    except ERRORS as error:
        sys.stderr.write(f"error: {explain(error)}\n")
        sys.exit(1)
    _print_results(rows, as_json=chosen.json)


def _print_results(rows: Sequence[tuple[str, dict[str, Any]]], *, as_json: bool) -> None:
    """Print the results of one or several students; `rows` holds (source, results)."""
    if as_json:
        results = [{"source": source, **found} for source, found in rows]
        write_line(json.dumps(results if len(rows) > 1 else rows[0][1]))
        return
    by_class = [found.pop("classes", []) for _, found in rows]
    if len(rows) > 1:
        _print_table(rows)
        return
    for name, value in rows[0][1].items():
        write_line(f"{name:>14}  {_shown(name, value)}")
    _print_classes(by_class[0])


def _name_classes(classes: list[dict[str, Any]], source: Path) -> None:
    """Put the names of the classes that the network in `source` was trained on into `classes`.

    `classes` are those of `training.evaluation.class_scores`. Without names, the numbers stay.
    """
    from sddlskd.export import described

    names: list[str] | None = None
    if folder := _run_folder(source):
        names = (read_result(folder).get("data") or {}).get("class_names")
    elif facts := described(source):
        names = facts["class_names"]
    for row in classes:
        for key in ("class", "mistaken_for"):
            if names and row[key] is not None:
                row[key] = names[row[key]]


def _print_classes(classes: Sequence[dict[str, Any]]) -> None:
    """Print the worst classes, a line each (see `training.evaluation.class_scores`)."""
    shown = classes[:SHOWN_CLASSES]
    width = max((len(str(row["class"])) for row in shown), default=0)
    for row in shown:
        line = f"class {row['class']!s:<{width}}  {row['top1']:6.2f} % of {row['images']}"
        if row["mistakes"]:
            line = f"{line}, mistaken for {row['mistaken_for']} {counted(row['mistakes'], 'time')}"
        write_line(line)
    if more := len(classes) - len(shown):
        write_line(f"and {counted(more, 'better class', 'better classes')}, which --json lists")


def _check_classes(source: Path, job: Config, trained: Config) -> None:
    """Check that the data of `job` have the classes that the network in `source` was trained on.

    Log a warning if the names of the classes differ, or if a run is judged on its own data set and
    this has other images now.

    Args:
        source: run directory, .safetensors file or weights file.
        job: job to evaluate.
        trained: job that trained the network.

    Raises:
        ValueError: If the number of classes differs.
    """
    from sddlskd.datasets.fingerprint import difference, differing_classes
    from sddlskd.export import described
    from sddlskd.training.build import present_fingerprint

    load = job.dataset.load
    classes = job.dataset.num_classes
    counts = "num_classes" in load and load.get("root") != trained.dataset.load.get("root")
    earlier: dict[str, Any] = {}
    if folder := _run_folder(source):
        earlier = read_result(folder).get("data") or {}
    elif facts := described(source):
        earlier = {"class_names": facts["class_names"], "classes": facts["num_classes"]}
    same_name = job.dataset.name == trained.dataset.name
    now = None
    if earlier and (same_name or earlier["class_names"]):
        asked = job
        if counts:  # another folder may have another number of classes, which is named below
            asked = replace(job, dataset=replace(job.dataset, load={**load, "num_classes": None}))
        now = present_fingerprint(asked)
    if now and counts:
        classes = now["classes"]
    if classes != trained.dataset.num_classes:
        place = f"dataset={job.dataset.name}"
        if "root" in load:
            place = f"dataset.root={job.dataset.root}"
        has = f"{place} has {counted(classes, 'class', 'classes')}"
        if now and (differs := differing_classes(earlier, now)):
            has = f"{has} ({differs})"
        raise ValueError(
            f"{source} tells {trained.dataset.num_classes} classes apart, but {has}; "
            "give data with the classes of the training"
        )
    if not now:
        return
    if differs := differing_classes(earlier, now):
        log.warning(
            "%s was trained on other classes than dataset=%s has now (%s); the n-th class now "
            "stands for the n-th one then",
            source, job.dataset.name, differs,
        )  # fmt: skip
    elif same_name and "sha256" in earlier and (differs := difference(earlier, now)):
        log.warning(
            "%s was trained on other data than dataset=%s has now (%s)",
            source, job.dataset.name, differs,
        )  # fmt: skip


def _is_source(word: str) -> bool:
    """Return whether a word of the command line names a run or a file, and not a setting."""
    return "=" not in word or Path(word).exists()


def _shown(name: str, value: Any) -> str:
    """Return the text of the result `name`, with its unit (see `UNITS`)."""
    if isinstance(value, str):
        return value
    divisor, unit = UNITS.get(name, (1, ""))
    number = value / divisor if divisor > 1 else value
    text = f"{number:.4g}" if isinstance(number, float) else str(number)
    return f"{text} {unit}".rstrip()


def _print_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Print the results of several students, a line each; `rows` holds (source, results).

    Lines are as long as they need to be. Results that all students have in common follow below.
    """
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    alike = [name for name in names if len({str(found.get(name)) for _, found in rows}) == 1]
    columns = [name for name in names if name not in alike]
    lines = [[*columns, "student"]]
    for source, found in rows:
        lines.append([*(_shown(name, found.get(name, "-")) for name in columns), source])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for *numbers, source in lines:
        shown = [text.rjust(width) for text, width in zip(numbers, widths[:-1], strict=True)]
        write_line("  ".join([*shown, source]))
    for name in alike:
        write_line(f"{name}: {_shown(name, rows[0][1].get(name, '-'))}")


if __name__ == "__main__":
    main()
