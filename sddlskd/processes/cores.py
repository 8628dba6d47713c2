"""Count the CPU cores that this process may use, and check how many processes they can run."""

import os

__all__ = ["check_processes", "usable_cores"]

# A number that takes the place of the number of cores, for tests and for machines that hide cores.
OVERRIDE = "SDDLSKD_MOST_PROCESSES"


def check_processes(key: str, count: int, megabytes: int) -> None:
    """Raise ValueError if a setting asks for more processes than there are CPU cores to use.

    Args:
        key: name of the setting, for the message.
        count: number of processes that the setting asks for.
        megabytes: memory in MB that each of the processes needs at least, for the message.

    Raises:
        ValueError: If `count` is larger than the number of cores that this process may use. The
            environment variable SDDLSKD_MOST_PROCESSES, if set, replaces this number. Also if the
            variable is not a positive integer.
    """
    most = _most_processes()
    if count > most:
        raise ValueError(
            f"{key}={count} asks for more processes than the {most} cores here, and for at least "
            f"{count * megabytes} MB of memory; give at most {most} "
            f"(or set the environment variable {OVERRIDE}={count} if this machine can do it)"
        )


def _most_processes() -> int:
    told = os.environ.get(OVERRIDE)
    if told:
        if not told.isdecimal() or int(told) < 1:
            raise ValueError(f"{OVERRIDE}={told} is not valid; give a number of processes above 0")
        return int(told)
    return usable_cores()


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use; of all cores on macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
