"""A real Slurm on this machine: its daemons, with private keys and state in a temporary directory; virtual nodes.

Nothing of it is installed as a service, and all of it ends by process id.
"""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATIENCE_S = 60
TRIES = 5
"""Of a question to a controller that is too busy to answer."""
CPUS, GPUS = 4, 8
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
MinJobAge=7200
SlurmdTimeout=20
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} Sockets=1 \
CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=batch Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=n[1-{nodes}] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def install():
    """Debian's Slurm where this user may install it; returns why there is none, or None."""
    if os.geteuid() != 0:
        return "Slurm's daemons of several nodes on one machine need root"
    with open(Path(tempfile.gettempdir()) / "megatron-opd-apt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if missing() and shutil.which("apt-get"):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            for command in ("update -qq", "install -y -qq --no-install-recommends slurm-wlm munge"):
                subprocess.run(["apt-get", *command.split()], env=environment, capture_output=True, timeout=600)
    return f"there is no {', '.join(missing())}, and apt-get could not install it" if missing() else None


def missing():
    return [program for program in PROGRAMS if shutil.which(program) is None]


class Cluster:
    """Starts with the object, ends with `close`."""

    def __init__(self, directory, nodes, number):
        """`number` keeps the ports of clusters on one machine apart, and those of their jobs, which follow job ids."""
        self.dir, self.nodes = Path(directory), nodes
        for name in ("state", "munge", "spool"):
            (self.dir / name).mkdir()
        (self.dir / "munge").chmod(0o755)
        self.environment = {**_without_slurm(), "SLURM_CONF": str(self.dir / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        for i in range(GPUS):
            os.mknod(self.dir / f"gpu{i}", 0o20666, os.makedev(1, 3))  # what Slurm counts must be a device
        (self.dir / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-{nodes}] Name=gpu File={self.dir}/gpu[0-{GPUS - 1}]\n"
        )
        port = _free_ports(17000 + 1000 * number, nodes + 1)
        place = {"host": socket.gethostname(), "dir": self.dir, "port": port, "first": port + 1, "last": port + nodes}
        place["first_job"] = 1 + 300 * number
        (self.dir / "slurm.conf").write_text(_CONF.format(nodes=nodes, cpus=CPUS, gpus=GPUS, **place))
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self):
        munge = self.dir / "munge"
        key = munge / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = {name: munge / name for name in ("key-file", "socket", "log-file", "seed-file")}
        files = {**files, "key-file": key, "pid-file": self.dir / "munged.pid"}
        self._run("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        self._run("slurmctld", "-c")
        for i in range(1, self.nodes + 1):
            self._run("slurmd", "-N", f"n{i}")
        self.until(lambda: self.idle() == self.nodes, "all nodes are idle")

    def close(self):
        """Ends all jobs and daemons."""
        with contextlib.suppress(subprocess.SubprocessError):
            self._run("scancel", "--user=root", "--signal=KILL", "--full")
            time.sleep(1)
        daemons = []
        for pid_file in self.dir.glob("*.pid"):
            with contextlib.suppress(ValueError, psutil.Error):
                daemons.append(psutil.Process(int(pid_file.read_text())))
                daemons[-1].terminate()
        for daemon in psutil.wait_procs(daemons, timeout=10)[1]:
            daemon.kill()

    def _run(self, *command):
        for _ in range(TRIES):
            done = subprocess.run(
                command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
            )
            if done.returncode == 0 or command[0] != "scontrol":
                break
            time.sleep(1)
        if done.returncode:
            raise subprocess.SubprocessError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def idle(self):
        return len(re.findall(r"State=IDLE ", self._run("scontrol", "-o", "show", "node")))

    def clears_up(self):
        return "COMPLETING" in self._run("scontrol", "-o", "show", "node")

    def until(self, condition, what, patience_s=PATIENCE_S):
        end = time.monotonic() + patience_s
        while not condition():
            assert time.monotonic() < end, f"it never came that {what}"
            time.sleep(0.3)

    def submit(self, script, *arguments, options=(), **environment):
        """A job of the script; `options` are sbatch's, the rest is added to the job's environment."""
        own = {"OPD_SETUP": f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}", **environment}
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script), *map(str, arguments)],
            env={**self.environment, **own},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip())

    def submit_urgent(self, directory):
        """A job that needs all nodes, in the partition with more priority."""
        script = directory / "urgent.sh"
        script.write_text("#!/bin/sh\nhostname\n")
        where = ["--partition=urgent", f"--nodes={self.nodes}", "--exclusive", f"--output={directory}/urgent.out"]
        return self.submit(script, options=where)

    def job(self, number):
        return Job(self, number)

    def rank(self, rank, job):
        """The process of a rank of the job."""
        for process in self.processes(job):
            with contextlib.suppress(psutil.Error):
                if "train" in process.cmdline() and process.environ().get("SLURM_PROCID") == str(rank):
                    return process
        raise AssertionError(f"rank {rank} does not run")

    @contextlib.contextmanager
    def held(self, job):
        """A rank stands still meanwhile, and then finds a signal: so a warning that is on its way cannot come too late
        for a run that takes seconds."""
        process = self.rank(0, job)
        process.suspend()
        try:
            yield
            self.until(lambda: _pending(process), "the rank is warned")
        finally:
            process.resume()

    def processes(self, job):
        """All of the job, its batch script and what it and the ranks have started."""
        wanted, found = {"SLURM_CONF": self.environment["SLURM_CONF"], "SLURM_JOB_ID": job.number}, []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if wanted.items() <= process.environ().items():
                    found.append(process)
        return found

    def start_node(self, node):
        """After `kill_node`."""
        self._run("slurmd", "-N", node)
        self.until(lambda: self.idle() == self.nodes, "all nodes are idle")

    def kill_node(self, node):
        """As a power cut does: the node's daemon and all of its processes."""
        daemon = psutil.Process(int((self.dir / f"slurmd-{node}.pid").read_text()))
        daemon.kill()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if mine and process.environ().get("SLURMD_NODENAME") == node:
                    process.kill()


def _pending(process):
    """Whether a process that stands still has a signal to look at."""
    (mask,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16))


class Job:
    """A submitted job."""

    def __init__(self, cluster, number):
        self.cluster, self.number = cluster, number

    def shown(self):
        """What scontrol shows of it, by name."""
        return dict(re.findall(r"(\w+)=(\S*)", self.cluster._run("scontrol", "-o", "show", "job", self.number)))

    @property
    def output(self):
        path = Path(self.shown()["StdOut"])
        return path.read_text() if path.is_file() else ""

    def wait_for(self, text, path=None, patience_s=400):
        """Until a file (the job's own output) has the text; fails when the job ends before."""

        def has_it():
            said = (path.read_text() if path.is_file() else "") if path else self.output
            assert text in said or not self.has_ended(), self.output
            return text in said

        self.cluster.until(has_it, f"{text} is in {path}", patience_s)

    def nodes(self):
        return self.cluster._run("scontrol", "show", "hostnames", self.shown()["NodeList"]).split()

    def has_ended(self):
        return self.shown()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")

    def end(self, patience_s=600):
        """(exit code, output) at the end."""
        self.cluster.until(self.has_ended, "the job ends", patience_s)
        return int(self.shown()["ExitCode"].partition(":")[0]), self.output

    def wait_for_requeue(self, patience_s=300):
        """Until it is pending again; then it may start soon (Slurm would wait for two minutes)."""
        self.cluster.until(lambda: self.shown()["Restarts"] == "1", "the job is requeued", patience_s)
        self.cluster.until(lambda: self.shown()["JobState"] == "PENDING", "the job is pending", patience_s)
        # Slurm 22.05 does not start a job right that it is still clearing up after.
        self.cluster.until(lambda: not self.cluster.clears_up(), "nothing of it is left", patience_s)
        self.cluster._run("scontrol", "update", f"JobId={self.number}", "StartTime=now+10")

    def cancel(self):
        """As a user does."""
        self.cluster._run("scancel", self.number)

    def signal(self, name):
        """To the batch script, as `#SBATCH --signal=B:` does."""
        self.cluster._run("scancel", "--batch", f"--signal={name}", self.number)


def _without_slurm():
    hidden = re.compile(r"RANK|LOCAL_RANK|WORLD_SIZE|MASTER_.*|TORCHELASTIC_.*|SLURM.*|OPD_.*|MEGATRON_OPD_.*")
    return {name: value for name, value in os.environ.items() if not hidden.fullmatch(name)}


def _free_ports(start, count):
    """The first of so many in a row."""
    for first in range(start, start + 1000 - count, count):
        with contextlib.ExitStack() as opened:
            try:
                for port in range(first, first + count):
                    opened.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise OSError("no free ports")
