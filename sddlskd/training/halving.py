"""Successive halving: the worse half of a group's runs is dropped at the end of given epochs.

A group is a list of runs that are trained side by side.

Source: Jamieson and Talwalkar 2016 (arXiv:1502.07943). Hyperband (Li et al. 2018) repeats
successive halving with several schedules ("brackets"); a group has a single schedule.
"""

from collections.abc import Sequence
from pathlib import Path

from sddlskd.record import read_rows
from sddlskd.training.ranks import Ranks
from sddlskd.training.run import Run

__all__ = ["Halving"]


class Halving:
    """Rule that drops the worse half of a group's runs at the end of given epochs.

    At the end of each epoch in `epochs`, the runs in `rivals` that have ended this epoch are ranked
    by their val/top1 of the epoch (val/mAP if images have several labels). Runs with equal values
    are ranked by val/loss, then by run directory. The worse half is dropped; of an odd number, the
    run in the middle stays.

    The ranking depends only on the metrics in the run directories. A group that was killed and
    resumed thus drops the same runs as an undisturbed one.

    Args:
        epochs: numbers of the epochs, increasing; empty to drop no run.
        rivals: run directories of the runs that are compared, with those runs of the group that
            ended in an earlier process and that this process does not train.
    """

    def __init__(self, epochs: Sequence[int], rivals: Sequence[Path]) -> None:
        self._due = list(epochs)
        self._rivals = rivals

    def to_prune(self, epoch: int, runs: Sequence[Run], ranks: Ranks) -> dict[Run, str]:
        """Return the runs to drop now, before an epoch begins, each with the reason in one line.

        Args:
            epoch: number of the epoch that is about to begin. The runs are ranked for those epochs
                of the rule that have ended since the last call.
            runs: the runs of the group in this process. Only those that are alive are returned.
            ranks: the processes that share each batch; all of them must call this method.

        Returns:
            {run: reason}, {} if no run is dropped. A reason is, for example, "rank 5 of 8 at epoch
            3: val/top1 41.20".
        """
        due = [ended for ended in self._due if ended < epoch]
        self._due = self._due[len(due) :]
        if not due:
            return {}
        reasons: dict[str, str] = {}
        if ranks.is_rank_zero:  # only rank 0 may be able to read the run directories
            reasons = self._reasons(due)
        reasons = ranks.broadcast(reasons)
        alive = {str(run.record.folder): run for run in runs if run.alive}
        return {alive[folder]: reason for folder, reason in reasons.items() if folder in alive}

    def _reasons(self, epochs: Sequence[int]) -> dict[str, str]:
        """Return {run directory: reason} of all rivals that are dropped at one of the epochs."""
        rows = {
            str(folder): {row["epoch"]: row for row in read_rows(folder)} for folder in self._rivals
        }
        reasons: dict[str, str] = {}
        for epoch in epochs:
            ended = {folder: of_run[epoch] for folder, of_run in rows.items() if epoch in of_run}
            metric = "val/top1"
            if all("val/mAP" in row for row in ended.values()):
                metric = "val/mAP"
            ranked = sorted(
                (-row[metric], row["val/loss"], folder) for folder, row in ended.items()
            )
            kept = len(ranked) - len(ranked) // 2
            for rank, (minus_score, _, folder) in enumerate(ranked[kept:], start=kept + 1):
                reason = (
                    f"rank {rank} of {len(ranked)} at epoch {epoch}: {metric} {-minus_score:.2f}"
                )
                reasons.setdefault(folder, reason)
        return reasons
