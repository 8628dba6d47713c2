"""Estimate how a sweep's groups spread over this machine's devices, and which group size is best.

A group is a list of jobs that are trained together, with one teacher forward pass per batch.
"""

import heapq
from collections.abc import Sequence

__all__ = ["better_group_size", "jobs_of_devices", "split"]

# Rough cost of a group's teacher, in students. It decides only whether a group size is proposed.
TEACHER = 1


def split(sizes: Sequence[int], largest: int | None) -> list[int]:
    """Return the sizes of the groups that a sweep forms if none may have more than `largest` jobs.

    Args:
        sizes: numbers of jobs that could be trained together, one number for each group.
        largest: largest number of jobs in a group; a larger group is divided into groups of this
            size and, if jobs remain, a smaller one. None for no limit.
    """
    if largest is None:
        return list(sizes)
    return [min(largest, size - first) for size in sizes for first in range(0, size, largest)]


def jobs_of_devices(sizes: Sequence[int], devices: int) -> list[int]:
    """Return the estimated number of jobs that each device trains, in the order of the devices.

    As soon as a device is free, the next group starts on this device. The time of a group is
    estimated as its number of jobs plus 1, for the teacher.

    Args:
        sizes: number of jobs of each group, in the order in which the groups start.
        devices: number of devices, at least 1.
    """
    free = [(0, device) for device in range(devices)]
    jobs = [0] * devices
    for size in sizes:
        time, device = heapq.heappop(free)
        jobs[device] += size
        heapq.heappush(free, (time + size + TEACHER, device))
    return jobs


def better_group_size(together: Sequence[int], devices: int, largest: int | None) -> int | None:
    """Return the limit on the group size with which a sweep is estimated to end earliest.

    Args:
        together: numbers of jobs that can be trained together, one number for each group without a
            limit.
        devices: number of devices, at least 1.
        largest: present limit on the number of jobs in a group; None for no limit.

    Returns:
        The limit for which the busiest device has the least work. Of several such limits, the
        largest, because the jobs of a group share the passes of the teacher. None if no limit is
        better than the present one.
    """
    if not together:
        return None

    def most_work(size: int | None) -> int:
        free = [0] * devices
        for jobs in split(together, size):
            heapq.heapreplace(free, free[0] + jobs + TEACHER)
        return max(free)

    best = min(range(max(together), 0, -1), key=most_work)
    return best if most_work(best) < most_work(largest) else None
