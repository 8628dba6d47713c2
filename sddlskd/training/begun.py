"""Check that a run goes on with the data, the teacher file and the own code that it began with.

Own code is code of the user that a job calls, such as a loss in a file beside the sweep.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.datasets.fingerprint import difference
from sddlskd.record import FINISHED, read_result
from sddlskd.training import teacher_files
from sddlskd.training.checks import teacher_path

__all__ = [
    "check_same_code",
    "check_same_data",
    "check_same_teacher",
    "data_changed",
    "teacher_changed",
]


def data_changed(result: Mapping[str, Any], now: Mapping[str, Any] | None) -> str:
    """Return in words how the data of an earlier run differ from those that its job would use now.

    Args:
        result: content of the run's result.json. Its entry "data" is the fingerprint of the data
            that the run was trained on.
        now: fingerprint of the data that the job would use now (`present_fingerprint`); None if it
            is unknown.

    Returns:
        A text for messages; "" if the data are the same or if a fingerprint is unknown.
    """
    earlier = result.get("data")
    return difference(earlier, now) if earlier and now else ""


def check_same_data(job: Config, now: Mapping[str, Any] | None) -> None:
    """Raise ValueError if the job's run directory holds a run that was trained on other data.

    `now` is the fingerprint of the present data (`present_fingerprint`), or None if it is unknown.
    The check passes if the run directory holds neither a finished run nor a checkpoint. It also
    passes if the fingerprint of either data is unknown. A damaged result.json raises ValueError,
    too.
    """
    folder = Path(job.run_dir)
    result = read_result(folder)
    if result.get("status") != FINISHED and not (folder / "last.ckpt").exists():
        return
    if differs := data_changed(result, now):
        raise ValueError(
            f"run_dir={folder} was trained on other data than dataset={job.dataset.name} has now "
            f"({differs}); choose another dataset.name or run_dir, or put the earlier data back"
        )


def teacher_changed(job: Config, result: Mapping[str, Any]) -> bool:
    """Return whether a run was trained with another teacher file than its job would use now.

    `result` is the content of the run's result.json; its entry "teacher_sha256" is the hash of the
    teacher file, or the hashes of several teacher files joined by "+". Return False if the job has
    no teacher, if a teacher file is missing now, or if `result` has no such entry.
    """
    earlier = result.get("teacher_sha256")
    paths = [teacher_path(one) for one in cfg.each_teacher(job)]
    if not paths or not all(path.exists() for path in paths):
        return False
    return earlier not in (None, "+".join(map(teacher_files.file_hash, paths)))


def check_same_teacher(folder: Path, facts: dict[str, Any]) -> None:
    """Raise ValueError if a run with a checkpoint was begun with another teacher file.

    `folder` is the run directory. `facts` are those of the present teacher for result.json; their
    entry "teacher_sha256" is the hash of its file.
    """
    earlier = read_result(folder).get("teacher_sha256")
    now = facts.get("teacher_sha256")
    if earlier and earlier != now and (folder / "last.ckpt").exists():
        raise ValueError(
            f"run_dir={folder} was begun with another teacher file "
            f"(sha256 {earlier!s:.12}, now {now!s:.12}); "
            "put that file back, or delete the folder to start anew"
        )


def check_same_code(job: Config, folder: Path, launched: bool) -> None:
    """Raise ValueError if the record of a run names other own code than this process imported.

    If the run has not begun and no launch has recorded its code, write the imported versions into
    its record instead.

    Args:
        job: configuration of the training run.
        folder: the run directory.
        launched: whether a launch has recorded the versions of the own code.
    """
    now = record.own_code_in_use(job)
    changed = record.changed_code(job, now)
    files = ", ".join(f"{module}.py" for module in changed)
    if record.has_begun(folder):
        if changed:
            raise ValueError(
                f"run_dir={folder} was begun with another version of {files}; put that version "
                "back, or delete the folder to start anew"
            )
        return
    if changed and launched:
        raise ValueError(
            f"the sweep was launched with another version of {files}; launch it again to train "
            "with the present one, or put that version back"
        )
    record.note_own_code(folder, now)
