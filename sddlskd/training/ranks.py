"""Ranks: the processes that share each batch of a job (one training run).

This module starts ranks, connects them, lets them agree on decisions, and ends them together.
The environment variables of torch (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) tell
each rank how to find the others. `spawn` launches ranks on this machine; a scheduler may launch
ranks as well.

The ranks communicate in three ways:

- Training tensors use the default process group (nccl for CUDA, gloo otherwise).
- Decisions use a separate gloo process group, so that no decision waits for a GPU.
- Messages that may take long, or that must outlive a rank, use the store (torch's TCPStore).

Shapes: R ranks.
"""

import faulthandler
import functools
import json
import logging
import multiprocessing.connection
import os
import pickle
import re
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from sddlskd.processes.exit_codes import ExitCode
from sddlskd.processes.parent import run_pickled, save_and_end_with_parent
from sddlskd.training.batch_norm import Sharing, share_norm
from sddlskd.training.devices import device_failure, pick_device
from sddlskd.training.stop import ASKING

__all__ = [
    "Cause",
    "RankFailed",
    "Ranks",
    "has_launcher",
    "process_group",
    "spawn",
    "unblock_signals",
]

log = logging.getLogger(__name__)

# Seconds that the other ranks get to end by themselves after one rank has ended.
GRACE_S = 5.0
# The wording of gloo and nccl for a timeout or a lost connection.
WAITED_IN_VAIN = re.compile("timed out|connection (closed|reset)", re.IGNORECASE)
# Largest delay in seconds between the starts of two ranks: a first import from a slow disk is slow.
START_S = 300.0
RAISED = 1  # exit code of a rank that has recorded its cause
POLL_S = 0.02  # seconds between two polls of the store


@dataclass
class Cause:
    """Reason why the ranks of a job ended: the failure of the rank that failed first.

    The ranks of a job are the processes that share each batch.

    Attributes:
        rank: number of the rank that failed first.
        error: the error as "Type: message", or a description of how the process ended.
        kinds: names of the error's class and of its base classes; empty if nothing was raised.
        trace: traceback of the error; "" if there is none.
        folder: run directory of the run that raised the error; "" if no single run did.
        lost: what is wrong with the device of the rank; "" if the device has not failed.
    """

    rank: int
    error: str
    kinds: list[str]
    trace: str = ""
    folder: str = ""
    lost: str = ""

    @property
    def stopped(self) -> bool:
        """Return whether the error is a KeyboardInterrupt.

        A KeyboardInterrupt means that the rank was asked to stop before there was training progress
        to save.
        """
        return KeyboardInterrupt.__name__ in self.kinds

    @classmethod
    def of(cls, rank: int, error: BaseException, folder: str = "") -> "Cause":
        """Return the cause that describes an exception.

        Args:
            rank: number of the rank that raised the exception.
            error: the exception. If it is a RuntimeError that names a timeout or a lost connection,
                the text `Cause.error` adds that another rank hangs or has ended.
            folder: run directory of the run that raised the exception; "" if no single run did. It
                is ignored if the device has failed, because no run can cause that.

        Returns:
            The cause, with the traceback of the exception.
        """
        kinds = [kind.__name__ for kind in type(error).__mro__]
        trace, said = "".join(traceback.format_exception(error)), f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and WAITED_IN_VAIN.search(said):
            said += "; another rank hangs or has ended (trainer.timeout_s limits the wait for it)"
        if failure := device_failure(error):
            return cls(rank, said, kinds, trace, lost=str(failure))
        return cls(rank, said, kinds, trace, folder)


class RankFailed(RuntimeError):
    """Error for a job of which a rank, one of the processes that share each batch, ended too early.

    Args:
        cause: why the rank ended; kept as the attribute `cause`.
        ranks: number of ranks of the job.
    """

    def __init__(self, cause: Cause, ranks: int) -> None:
        super().__init__(f"rank {cause.rank} of {ranks}: {cause.error}")
        self.cause = cause


@dataclass
class Ranks:
    """Position of this process among the ranks that share each batch, and their communication.

    A rank is one of the processes of a job. `Ranks()` is the only rank of a job, and its methods
    return at once. With several ranks, most methods wait for the other ranks, so all ranks must
    call them at the same point of the program. Only `is_rank_zero`, `report_failure` and
    `first_failure` may be used by one rank alone.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of ranks.
        device: device of this rank; None for a single rank.
        store: torch.distributed.Store of this job; None for a single rank.
        control: gloo process group for decisions; None for a single rank.
        broadcasts_so_far: number of values that `broadcast` has passed on so far.
        sharing: state that tells BatchNorm whether the ranks hold different images of a batch.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None
    store: Any = None
    control: Any = None
    broadcasts_so_far: int = 0

    def __post_init__(self) -> None:
        self.sharing = Sharing()

    @property
    def is_rank_zero(self) -> bool:
        """Return whether this is rank 0, which alone writes records, logs and checkpoints."""
        return self.rank == 0

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's `value` on every rank; the values of the other ranks are ignored.

        With several ranks, `value` passes through JSON, so tuples come back as lists. The other
        ranks wait without a time limit as long as no rank has failed, so rank 0 may take long.

        Raises:
            KeyboardInterrupt: On a waiting rank, if a rank was asked to stop before there was
                training progress to save.
            RankFailed: On a waiting rank, if a rank failed.
            TypeError: On rank 0, if JSON cannot hold `value`.
        """
        if self.world_size == 1:
            return value
        self.broadcasts_so_far += 1
        key = f"told {self.broadcasts_so_far}"
        if self.is_rank_zero:
            self.store.set(key, json.dumps(value))
        while not self.store.check([key]):
            if cause := self.first_failure():
                raise KeyboardInterrupt if cause.stopped else RankFailed(cause, self.world_size)
            time.sleep(POLL_S)
        return json.loads(self.store.get(key))

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Let rank 0 run the block first; the other ranks enter the block after rank 0 has left it.

        Rank 0 downloads or writes files in the block, and the other ranks then find the files.

        Raises:
            KeyboardInterrupt, RankFailed: As for `broadcast`, on a rank that waits.
        """
        if not self.is_rank_zero:
            self.broadcast()
        yield
        if self.is_rank_zero:
            self.broadcast()

    def images_of_step(self, own: int, whole: int) -> float:
        """Return how many images of a batch this rank counts for, and set `sharing.divided`.

        A batch that is too small to divide is held by every rank as a whole. BatchNorm layers read
        from `sharing` whether the batch is divided.

        Args:
            own: number of images of the batch that this rank holds.
            whole: number of images of the batch over all ranks.

        Returns:
            `own` for a divided batch, else whole / world_size. The sum over all ranks is `whole`.
        """
        self.sharing.divided = own < whole
        return own if own < whole else whole / self.world_size

    def all_gather(self, values: Tensor) -> Tensor:
        """Return the `values` of all R ranks, stacked to (R, ...) in the order of the ranks.

        `values` must have the same shape and dtype on every rank and lie on the rank's device. The
        result lies there, too.
        """
        if self.world_size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(rows, values)
        return torch.stack(rows)

    def all_reduce_max(self, wish: Callable[[], list[int]]) -> Callable[[], list[int]]:
        """Start an elementwise maximum over all ranks; return a function that waits for the result.

        Args:
            wish: function that returns a list of integers, of the same length on every rank. With
                several ranks, `wish` is called at once, and the reduction runs in the background
                while a step is computed. On a single rank, the returned function calls `wish`.

        Returns:
            A function without arguments. Element i of its result is the maximum over all ranks of
            element i of `wish()`.
        """
        if self.world_size == 1:
            return wish
        wishes = torch.tensor(wish())
        work = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def answer() -> list[int]:
            work.wait()
            agreed: list[int] = wishes.tolist()
            return agreed

        return answer

    def broadcast_tensors(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank; the values of the other ranks are ignored.

        `value` is None, or containers of plain values and CPU tensors. Unlike `broadcast`, this
        method pickles the values, and raises RuntimeError if a rank waits longer than the timeout
        of the process group.
        """
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model` in DistributedDataParallel, or `model` itself on a single rank.

        All ranks start with rank 0's weights, and `backward` averages the gradients over the ranks.
        The graph must be static: the same parameters get a gradient in every step. Parameters that
        never get a gradient stay unchanged. Buffers are not broadcast.
        """
        if self.world_size == 1:
            return model
        # Newer torch deprecates `broadcast_buffers`, but torch 2.6 does not have its new name yet.
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):
            # Buffers need no broadcast: `with_shared_norm` keeps those of BatchNorm equal.
            return DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
            )

    def with_shared_norm(self, model: nn.Module) -> nn.Module:
        """Replace the BatchNorm layers of `model` by layers that use the images of all ranks.

        Return the changed `model` (see `share_norm`). A single rank gets `model` unchanged.

        Raises:
            ValueError: If a BatchNorm of the model is not BatchNorm1d, BatchNorm2d or BatchNorm3d.
        """
        if self.world_size == 1 or self.device is None:
            return model
        return share_norm(model, self.device, self.sharing)

    def report_failure(self, error: BaseException, folder: str = "") -> None:
        """Record `error` as the reason why the ranks end, unless a rank has recorded one before.

        Only the first reason counts, because the first failure makes the other ranks fail. A single
        rank does nothing, and an unreachable store is ignored.

        Args:
            error: the exception that this rank raised.
            folder: run directory of the run that raised the error; "" if no single run did.
        """
        if self.world_size == 1:
            return
        # The store is unreachable if rank 0 held it and has ended.
        with suppress(RuntimeError):
            _root_store().compare_set(
                "cause", "", json.dumps(asdict(Cause.of(self.rank, error, folder)))
            )

    def first_failure(self) -> Cause | None:
        """Return the first failure that a rank has recorded (`report_failure`), or None.

        The result is None if no rank has recorded a failure, for a single rank, and if the store of
        the ranks is unreachable because the rank that held it has ended. A rank that was killed has
        recorded nothing.
        """
        if self.world_size == 1:
            return None
        try:
            return _cause_in(_root_store())
        except RuntimeError:
            return None


def _cause_in(store: Any) -> Cause | None:
    return Cause(**json.loads(store.get("cause"))) if store.check(["cause"]) else None


@functools.cache
def _root_store() -> Any:
    """Return the store through which the ranks find each other.

    The store lives as long as the process that holds it: `spawn`, torchrun or rank 0.
    """
    # True if `spawn` or torchrun holds the store; otherwise rank 0 holds it.
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and not held,
        wait_for_workers=False,
        timeout=timedelta(seconds=START_S),
    )
    # The prefix keeps out ranks of another SLURM job that connect to this port by mistake.
    return store if held else PrefixStore(f"job {os.environ.get('SLURM_JOB_ID')}", store)


def has_launcher() -> bool:
    """Return whether this process is a rank that `spawn` launched.

    In this case the launching process records the outcome of the job.
    """
    return "SDDLSKD_STARTED_BY" in os.environ


def _told_by_environment() -> tuple[int, int]:
    """Return (number of this rank, number of ranks); (0, 1) if WORLD_SIZE is missing or 1.

    Raise ValueError if WORLD_SIZE is another text, and a variable that ranks need is not valid.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 0, 1
    numbers = ("WORLD_SIZE", "RANK", "MASTER_PORT")
    wrong = [name for name in numbers if not os.environ.get(name, "").isdecimal()]
    if not os.environ.get("MASTER_ADDR"):
        wrong.append("MASTER_ADDR")
    if wrong:
        raise ValueError(
            f"WORLD_SIZE={size} stands for processes that share each batch, but the environment "
            f"has no valid {', '.join(wrong)}; start them with torchrun, or unset WORLD_SIZE"
        )
    return int(os.environ["RANK"]), int(size)


def _local_place() -> tuple[int, int]:
    """Return (index of this process on its machine, number of ranks on this machine).

    If the environment does not tell the number, index + 1 is returned as a lower bound.
    """
    place = int(os.environ.get("LOCAL_RANK", 0))
    return place, int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))


# Number of times that this process has joined ranks. The number prefixes the keys of the store, so
# that a later join cannot read the messages of an earlier one.
joins = 0


@contextmanager
def process_group(device_name: str, timeout_s: float) -> Iterator[Ranks]:
    """Join the ranks that the environment variables name, for the duration of the block.

    The ranks are the processes that share each batch; `WORLD_SIZE` is their number. If this
    variable is missing or 1, a single rank without a device is yielded. Otherwise RANK, MASTER_ADDR
    and MASTER_PORT must be set, too. An exception that is raised in the block is recorded for the
    other ranks, and raised again.

    Args:
        device_name: name of the device, as `pick_device` accepts it.
        timeout_s: seconds after which a rank that waits for another rank gives up. For the start of
            the other ranks, a rank waits at least 300 seconds (START_S) before it gives up.

    Yields:
        The position of this process among the ranks.

    Raises:
        ValueError: If the device is not available, or if WORLD_SIZE, RANK or MASTER_PORT is not a
            number, or if RANK, MASTER_ADDR or MASTER_PORT is missing.
        RuntimeError: If another rank does not join in time.
        KeyboardInterrupt: If the ranks end because one of them was asked to stop.
    """
    global joins
    rank, count = _told_by_environment()
    if count == 1:
        yield Ranks()
        return
    ranks = Ranks(rank, count)
    if ranks.rank:
        logging.getLogger("sddlskd").setLevel(logging.ERROR)  # rank 0 logs everything else
    joins += 1
    try:
        ranks.store = PrefixStore(f"join {joins}", _root_store())
        device = pick_device(device_name, *_local_place())
        ranks.device = device = (
            torch.device(device.type, device.index or 0) if device.type == "cuda" else device
        )
        ranks.store.set(f"here {ranks.rank}", "")
        everybody = [f"here {rank}" for rank in range(count)]
        ranks.store.wait(everybody, timedelta(seconds=max(timeout_s, START_S)))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("groups", ranks.store),
            rank=ranks.rank,
            world_size=count,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        ranks.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        yield ranks
        # Rank 0 must stay until no other rank needs anything from it.
        dist.barrier(ranks.control)
    except (Exception, KeyboardInterrupt) as error:
        ranks.report_failure(error)
        if isinstance(error, Exception) and (cause := ranks.first_failure()) and cause.stopped:
            raise KeyboardInterrupt from error
        raise
    dist.destroy_process_group()


def unblock_signals() -> None:
    """Let this process receive the signals that `spawn` blocks in its ranks.

    These are the signals of `stop.ASKING`. Call this function once their handlers are installed.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)


def spawn(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    count: int,
    *,
    threads: int,
    stop: Callable[[], int],
) -> None:
    """Run work(*arguments) in `count` processes on this machine and wait until all have ended.

    The processes are the ranks of one job, which share each batch. If one rank fails, the other
    ranks are ended. All ranks end if this process ends.

    Args:
        work: function that every rank calls; it must be picklable.
        arguments: arguments of `work`; they must be picklable.
        count: number of ranks.
        threads: CPU threads of each rank.
        stop: function that returns the number of a signal to send to all ranks, or 0 for none. The
            function is called about every 0.1 seconds. Only the first signal is sent.

    Raises:
        RankFailed: If a rank failed. The error's `cause` holds the error of the first rank that
            raised, or the signal or exit code with which a rank ended.
        KeyboardInterrupt: If the ranks were asked to stop before there was training progress to
            save, or if this process was interrupted.
        Exception: Any error of starting a process or of pickling its arguments.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    parent, processes = os.getpid(), []
    # The ranks inherit the blocked signals. Each rank unblocks them once it has signal handlers.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        for rank in range(count):
            rest = (work, arguments, count, store.port, threads, parent)
            pickled = pickle.dumps(functools.partial(_be_a_rank, rank, *rest))
            process = multiprocessing.get_context("spawn").Process(
                target=run_pickled, args=(pickled, parent)
            )
            process.start()
            processes.append(process)
    except BaseException:  # for example, if the machine cannot hold more processes
        _send(processes, signal.SIGKILL)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sent = 0
    try:
        while running := [process for process in processes if process.exitcode is None]:
            if any(process.exitcode for process in processes):
                break
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=0.1)
            if stop() and not sent:
                sent = stop()
                _send(running, sent)
    except KeyboardInterrupt:
        # After a second signal the ranks end at once and report that they were stopped.
        _send(processes, sent or signal.SIGINT)
        raise
    finally:
        codes = [process.exitcode for process in processes]
        _end(processes)
    if any(code not in (0, ExitCode.STOPPED) for code in codes if code is not None):
        raise RankFailed(_why(codes, store), count)
    if any(codes):
        raise KeyboardInterrupt


def _send(processes: Sequence[Any], number: int) -> None:
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, number)


def _end(processes: Sequence[Any]) -> None:
    """Wait GRACE_S seconds for the processes to end, then print their stacks and kill them."""
    end = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    if any(process.exitcode is None for process in processes):
        # faulthandler prints the stack of each thread on this signal.
        _send(processes, signal.SIGUSR1)
        time.sleep(0.2)
        _send(processes, signal.SIGKILL)
    for process in processes:
        process.join()


def _why(codes: Sequence[int | None], store: Any) -> Cause:
    """Return the cause for which `spawn` raises RankFailed.

    A rank that a signal killed, or that has an unexpected exit code, comes before the recorded
    cause in the store.
    """
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return Cause(
                rank, f"killed by {name}" + ("; out of memory?" if name == "SIGKILL" else ""), []
            )
        if code not in (None, 0, RAISED, ExitCode.STOPPED):
            return Cause(rank, f"ended with exit code {code}", [])
    return _cause_in(store) or Cause(codes.index(RAISED), f"ended with exit code {RAISED}", [])


def _be_a_rank(
    rank: int,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    count: int,
    port: int,
    threads: int,
    parent: int,
) -> None:
    """Run `work` as one rank in a process that `spawn` has launched."""
    # In a session of its own, the rank receives Ctrl-C once, through its parent.
    os.setsid()
    save_and_end_with_parent(parent, signal.SIGINT)
    faulthandler.register(signal.SIGUSR1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    told = {**here, **there, "SDDLSKD_STARTED_BY": parent}
    os.environ.update({key: str(value) for key, value in told.items()})
    if loopback := next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None):
        # Without this, gloo looks up the address of the machine's host name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    torch.set_num_threads(threads)
    try:
        work(*arguments)
        return
    except KeyboardInterrupt:
        code: int = ExitCode.STOPPED
    except BaseException as error:
        Ranks(rank, count).report_failure(error)
        code = RAISED
    logging.shutdown()
    sys.stdout.flush()
    # End at once: threads of a process group may still wait for other ranks.
    os._exit(code)
