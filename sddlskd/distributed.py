"""Ranks: processes that share each batch of a job, how they start, find each other, agree, and end together.

They are told of each other by torch's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); `start`
starts some on this machine, a scheduler may start them as well. Tensors of the training go through the default process
group (nccl for CUDA, gloo else); decisions through a group of gloo of their own, so that none waits for a GPU; and
what may take long, or must outlive a rank, through the store.

Shapes: R ranks.
"""

import faulthandler
import functools
import json
import logging
import multiprocessing.connection
import os
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

from sddlskd.precision import pick_device
from sddlskd.shared_norm import Sharing, share_norm

__all__ = ["Cause", "RankFailed", "Ranks", "hear_signals", "joined", "looked_after", "start"]

log = logging.getLogger(__name__)

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR2,
)  # what a person or a scheduler sends to stop
GRACE_S = 5.0  # seconds that ranks have to end by themselves once one of them has
WAITED_IN_VAIN = re.compile(
    "timed out|connection (closed|reset)", re.IGNORECASE
)  # as gloo and nccl word it
START_S = 300.0  # seconds that ranks may start apart: a first import from a slow disk
RAISED, STOPPED = 1, 130  # exit codes of ranks that said why
POLL_S = 0.02  # seconds between questions to the store


@dataclass
class Cause:
    """Why ranks ended: what the first of them raised."""

    rank: int
    error: str  # Type: message
    kinds: list[str]  # names of the error's class and of its bases
    trace: str = ""
    folder: str = ""  # of the run that raised, where one did

    @property
    def stopped(self) -> bool:
        """Whether it was asked to stop, before there was anything to save."""
        return KeyboardInterrupt.__name__ in self.kinds

    @classmethod
    def of(cls, rank: int, error: BaseException, folder: str = "") -> "Cause":
        kinds = [kind.__name__ for kind in type(error).__mro__]
        trace, said = "".join(traceback.format_exception(error)), f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and WAITED_IN_VAIN.search(said):
            said += "; another rank hangs or is gone (trainer.timeout_s: how long it is waited for)"
        return cls(rank, said, kinds, trace, folder)


class RankFailed(RuntimeError):
    """A rank ended before its work was done; `cause` says why."""

    def __init__(self, cause: Cause, ranks: int) -> None:
        super().__init__(f"rank {cause.rank} of {ranks}: {cause.error}")
        self.cause = cause


@dataclass
class Ranks:
    """This process among those that share each batch; as it stands, the only one.

    Every method but `blame` is called by all ranks at the same point, or they wait for each other until the timeout.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    store: Any = None  # torch.distributed.Store of this job
    control: Any = None  # process group of gloo
    told_so_far: int = 0

    def __post_init__(self) -> None:
        self.sharing = Sharing()

    @property
    def first(self) -> bool:
        """Whether this is the rank that keeps records, logs and checkpoints."""
        return self.rank == 0

    def told(self, value: Any = None) -> Any:
        """What rank 0 says: plain values. The others wait as long as rank 0 lives, so that it may take its time."""
        if self.count == 1:
            return value
        self.told_so_far += 1
        key = f"told {self.told_so_far}"
        if self.first:
            self.store.set(key, json.dumps(value))
        while not self.store.check([key]):
            if cause := self.cause():
                raise KeyboardInterrupt if cause.stopped else RankFailed(cause, self.count)
            time.sleep(POLL_S)
        return json.loads(self.store.get(key))

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Rank 0 goes through the block first: it fetches or writes what the others then find."""
        if not self.first:
            self.told()
        yield
        if self.first:
            self.told()

    def take(self, own: int, whole: int) -> float:
        """Go on to a batch of `whole` images, of which this rank has `own`: how many count as its own.

        Over the ranks they sum to `whole`, where each has all of a batch that is too small to divide, too.
        """
        self.sharing.divided = own < whole
        return own if own < whole else whole / self.count

    def gather(self, values: Tensor) -> Tensor:
        """values of all ranks, one more dimension in front (R, ...): on the device, in the order of the ranks."""
        if self.count == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(rows, values)
        return torch.stack(rows)

    def agree(self, wish: Callable[[], list[int]]) -> Callable[[], list[int]]:
        """Ask all ranks for what they wish, and get the answer, the largest of each number, when it is called.

        A rank is asked at once, so that the answer is on its way while a step is computed; alone it is asked when the
        answer is called for.
        """
        if self.count == 1:
            return wish
        wishes = torch.tensor(wish())
        work = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def answer() -> list[int]:
            work.wait()
            agreed: list[int] = wishes.tolist()
            return agreed

        return answer

    def as_first(self, value: Any) -> Any:
        """A copy of what rank 0 holds: containers of plain values and CPU tensors."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` for training: all ranks begin with rank 0's weights, and `backward` averages their gradients.

        The graph is static: the same parameters get a gradient in every step, and those that get none are left alone,
        as on one rank.
        """
        if self.count == 1:
            return model
        with warnings.catch_warnings(
            category=FutureWarning, action="ignore"
        ):  # its new name is not in torch 2.6
            return DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
            )  # buffers: BatchNorm's, which `with_shared_norm` keeps equal

    def with_shared_norm(self, model: nn.Module) -> nn.Module:
        """`model`, in place, with BatchNorm over the images of all ranks. ValueError for a kind that is not known."""
        if self.count == 1 or self.device is None:
            return model
        return share_norm(model, self.device, self.sharing)

    def blame(self, error: BaseException, folder: str = "") -> None:
        """Say why this rank ends, unless another said so before: the first one ended the others."""
        if self.count == 1:
            return
        with suppress(RuntimeError):  # the store went with rank 0
            _root_store().compare_set(
                "cause", "", json.dumps(asdict(Cause.of(self.rank, error, folder)))
            )

    def cause(self) -> Cause | None:
        """Why the first rank that ended did."""
        return _cause_in(_root_store()) if self.count > 1 else None


def _cause_in(store: Any) -> Cause | None:
    return Cause(**json.loads(store.get("cause"))) if store.check(["cause"]) else None


@functools.cache
def _root_store() -> Any:
    """The store that the ranks find each other by; it lives as long as the process that holds it."""
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by `start`, or by torchrun
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and not held,
        wait_for_workers=False,
        timeout=timedelta(seconds=START_S),
    )
    # The ranks of another job of SLURM, that came to this port by mistake, are not taken for ours.
    return store if held else PrefixStore(f"job {os.environ.get('SLURM_JOB_ID')}", store)


def looked_after() -> bool:
    """Whether this is a rank that `start` started, in a process that marks what becomes of the job."""
    return "SDDLSKD_STARTED_BY" in os.environ


def _local_place() -> tuple[int, int]:
    """This process among those of its machine, and how many these are, at least."""
    place = int(os.environ.get("LOCAL_RANK", 0))
    return place, int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))


joins = 0  # of this process; a later one must not find what was told in an earlier one


@contextmanager
def joined(device_name: str, timeout_s: float) -> Iterator[Ranks]:
    """Join the ranks that the environment names; alone, and with no device yet, where it names none.

    device_name: as `pick_device` takes it; timeout_s: seconds after which a rank that waits for another gives up. What
    is raised inside is told to the others.
    """
    global joins
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield Ranks()
        return
    ranks = Ranks(int(os.environ["RANK"]), count)
    if ranks.rank:
        logging.getLogger("sddlskd").setLevel(logging.ERROR)  # rank 0 says the rest
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
        dist.barrier(ranks.control)  # nobody asks rank 0 for anything any more
    except (Exception, KeyboardInterrupt) as error:
        ranks.blame(error)
        if isinstance(error, Exception) and (cause := ranks.cause()) and cause.stopped:
            raise KeyboardInterrupt from error
        raise
    dist.destroy_process_group()


def hear_signals() -> None:
    """From here on a rank hears what `start` held back while it had no handler for it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def start(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    count: int,
    *,
    threads: int,
    stop: Callable[[], int],
) -> None:
    """Run work(*arguments) in `count` processes on this machine, as ranks of one job; wait until all have ended.

    threads: CPU threads of each; stop: the number of a signal to send to all of them, 0 for none, asked now and then.
    work and its arguments can be pickled. Raises RankFailed with what the first rank that ended raised, or the signal
    that killed it; the others are then ended. They end with this process too.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, SIGNALS
    )  # inherited; each hears them when it can handle them
    try:
        processes = torch.multiprocessing.start_processes(  # type: ignore[attr-defined, no-untyped-call]
            _be_a_rank,
            (work, arguments, count, store.port, threads, os.getpid()),
            count,
            join=False,
        ).processes
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
        _send(
            processes, sent or signal.SIGINT
        )  # a second one: they end at once, and say that they were stopped
        raise
    finally:
        codes = [process.exitcode for process in processes]
        _end(processes)
    if any(code not in (0, STOPPED) for code in codes if code is not None):
        raise RankFailed(_why(codes, store), count)
    if any(codes):
        raise KeyboardInterrupt


def _send(processes: Sequence[Any], number: int) -> None:
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, number)


def _end(processes: Sequence[Any]) -> None:
    """Let them end; those that do not are made to, and show where they hang."""
    end = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    if any(process.exitcode is None for process in processes):
        _send(processes, signal.SIGUSR1)  # faulthandler's: the stack of each thread
        time.sleep(0.2)
        _send(processes, signal.SIGKILL)
    for process in processes:
        process.join()


def _why(codes: Sequence[int | None], store: Any) -> Cause:
    """The rank that ended without a word, or else the first that raised."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return Cause(
                rank, f"killed by {name}" + ("; out of memory?" if name == "SIGKILL" else ""), []
            )
        if code not in (None, 0, RAISED, STOPPED):
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
    """What a started process does. torch has told it to end (SIGINT) when its parent does."""
    os.setsid()  # Ctrl-C reaches it through its parent, once
    if os.getppid() != parent:
        os._exit(143)
    faulthandler.register(signal.SIGUSR1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    told = {**here, **there, "SDDLSKD_STARTED_BY": parent}
    os.environ.update({key: str(value) for key, value in told.items()})
    if loopback := next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None):
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", loopback
        )  # else gloo asks what address the machine's name has
    torch.set_num_threads(threads)
    try:
        work(*arguments)
        return
    except KeyboardInterrupt:
        code = STOPPED
    except BaseException as error:
        Ranks(rank, count).blame(error)
        code = RAISED
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # at once: threads of a process group may wait for the others
