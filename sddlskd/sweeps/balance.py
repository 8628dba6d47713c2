"""How the groups of a sweep spread over the devices of this machine, and which group size is best.

A group is a list of jobs that are trained together, with one teacher forward pass per batch.
"""

import heapq
from collections.abc import Sequence

__all__ = ["better_group_size", "jobs_of_devices", "split"]

# Cost of a group's teacher, in students. A rough value: it decides only whether a proposal is made.
TEACHER = 1


def split(sizes: Sequence[int], largest: int | None) -> list[int]:
    """Return the sizes of groups after groups above `largest` jobs are divided, as a sweep does."""
    if largest is None:
        return list(sizes)
    return [min(largest, size - first) for size in sizes for first in range(0, size, largest)]


def jobs_of_devices(sizes: Sequence[int], devices: int) -> list[int]:
    """Return the number of jobs that each device trains.

    A device takes the next group as soon as it is free.

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
    """Return a largest group size with which a sweep ends earlier; None if there is none.

    Args:
        together: numbers of jobs that can share a teacher, one number for each teacher.
        devices: number of devices, at least 1.
        largest: present largest size of a group; None for no limit.

    Returns:
        The size with which the device that has most to do has least. Of several such sizes, it is
        the largest, because a group shares the passes of its teacher.
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
