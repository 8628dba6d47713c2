"""Run a SLURM cluster of one node on loopback.

munged, slurmctld and slurmd are started as root and stopped by their process ids.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations
"""
SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""
COMMANDS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "scancel",
    "sinfo",
)
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credentials are over: 6 s instead of 121 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=10
KillWait=10
# Two of these clusters may run at once on a slow machine: a late answer is no lost task.
TCPTimeout=20
MessageTimeout=30
BatchStartTimeout=60
MaxArraySize={max_array_size}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# More CPUs than the machine may have: jobs that sleep or start up need none of their own.
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
# A second node that is not there.
NodeName=node2 NodeHostname=elsewhere NodeAddr=127.0.0.2 Port=9 CPUs=1 State=DOWN
PartitionName=main Nodes=node1 Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=60
PartitionName=spot Nodes=node1 PriorityTier=1 GraceTime=40 MaxTime=60
PartitionName=wide Nodes=node1,node2 PreemptMode=OFF MaxTime=60
"""


def missing(accounting: bool = False) -> list[str]:
    """Return the programs and permissions that are missing for running a cluster."""
    commands = (
        *COMMANDS,
        *(("slurmdbd", "sacct", "mariadbd", "mariadb-install-db") if accounting else ()),
    )
    lacking = [
        command
        for command in commands
        if shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait_for(condition: Callable[[], object], seconds: float = 300, every: float = 0.2) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(every)


class Cluster:
    """A cluster of one node.

    Attributes:
        folder: folder of the cluster's files, which every user can read.
        conf: the file slurm.conf, which the commands find by SLURM_CONF.
        accounting: whether slurmdbd and MariaDB keep accounts; `lab` is the only account.
        ctld_port: port of slurmctld.
        sql_port: port of MariaDB.
    """

    def __init__(
        self, folder: Path, *, cpus: int, max_array_size: int = 1001, accounting: bool = False
    ) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "spool"):
            (folder / name).mkdir()
        ctld_port, d_port, dbd_port, sql_port = free_ports(4)
        host = socket.gethostname().split(".")[0]
        self.conf.write_text((CONF + (ACCOUNTING if accounting else "")).format_map(locals()))
        self.accounting, self.ctld_port, self.sql_port = accounting, ctld_port, sql_port
        (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format_map(locals()))
        (folder / "slurmdbd.conf").chmod(0o600)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)

    def start(self) -> None:
        munge = {
            name: f"{self.folder}/munge.{name}" for name in ("socket", "key", "pid", "log", "seed")
        }
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={munge['socket']}",
            f"--key-file={munge['key']}",
            f"--pid-file={munge['pid']}", f"--log-file={munge['log']}",
            f"--seed-file={munge['seed']}",
        )  # fmt: skip
        wait_for(lambda: Path(munge["socket"]).exists(), 60)
        if self.accounting:
            self._start_accounting()
        self.start_slurmctld()
        self.start_slurmd()
        wait_for(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), 180)

    def _start_accounting(self) -> None:
        database = ["--no-defaults", "--user=root", f"--datadir={self.folder}/db"]
        users = "--auth-root-authentication-method=normal"
        subprocess.run(
            ["mariadb-install-db", *database, users, "--skip-test-db"],
            check=True,
            capture_output=True,
        )
        (self.folder / "users.sql").write_text(
            "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
            "GRANT ALL ON *.* TO slurm@'127.0.0.1';\n"
        )
        self._daemon(
            "mariadbd", *database, "--bind-address=127.0.0.1", f"--port={self.sql_port}",
            "--skip-name-resolve",
            f"--socket={self.folder}/db.socket", f"--init-file={self.folder}/users.sql",
        )  # fmt: skip
        wait_for(lambda: answers(self.sql_port), 180)
        self._daemon("slurmdbd", "-D")
        wait_for(
            lambda: "loopback" in self.ask("sacctmgr", "-in", "add", "cluster", "loopback"), 180
        )
        self.ask("sacctmgr", "-i", "add", "account", "lab")
        self.ask("sacctmgr", "-i", "add", "user", "root", "account=lab")

    def start_slurmctld(self) -> None:
        self._daemon("slurmctld", "-D", "-f", str(self.conf))

    def start_slurmd(self) -> None:
        self._daemon("slurmd", "-D", "-N", "node1", "-f", str(self.conf))

    def _daemon(self, name: str, *options: str) -> None:
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
        assert program
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [program, *options],
                stdout=out,
                stderr=out,
                env=os.environ | {"SLURM_CONF": str(self.conf)},
            )

    def end(self, name: str, by: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a daemon and wait for its end."""
        self.daemons[name].send_signal(by)
        self.daemons.pop(name).wait()

    def crash_node(self) -> None:
        """Kill the node's daemon and every process of every job at once, as a power cut does."""
        self.end("slurmd")
        for pid in self.job_processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def job_processes(self) -> list[int]:
        """Return the ids of slurmstepd and of the processes of this cluster's jobs."""
        ours, found = f"SLURM_CONF={self.conf}".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process may have ended
                environment = (path / "environ").read_bytes().split(b"\0")
                in_job = any(value.startswith(b"SLURM_JOB_ID=") for value in environment)
                if ours in environment and (
                    in_job or (path / "cmdline").read_bytes().startswith(b"slurmstepd")
                ):
                    found.append(int(path.name))
        return found

    def restore(self) -> None:
        """Start every missing daemon and empty the queue, for the next test."""
        if "slurmctld" not in self.daemons:
            self.start_slurmctld()
        if "slurmd" not in self.daemons:
            self.start_slurmd()
        wait_for(lambda: self.ask("scontrol", "ping"), 180)
        self.ask("scancel", "--user=root")
        wait_for(
            lambda: (
                not self.queue() and "idle" in self.ask("sinfo", "-h", "-p", "main", "-o", "%T")
            ),
            300,
        )

    def stop(self) -> None:
        for name in ("slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged"):
            if daemon := self.daemons.pop(name, None):
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for pid in self.job_processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ask(self, *command: str) -> str:
        """Return the output of a SLURM command, or "" if slurmctld does not answer."""
        environment = os.environ | {"SLURM_CONF": str(self.conf)}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        ).stdout

    def queue(self) -> dict[str, str]:
        """Return {job: state} of the jobs in the queue."""
        lines = self.ask("squeue", "-h", "-r", "-o", "%i|%T").split()
        return dict(line.split("|") for line in lines)
