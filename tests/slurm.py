"""A real Slurm on this machine for the tests: munged, slurmctld and slurmd, without systemd.

    python -m tests.slurm python scripts/requeue.py --times 10

runs a command beside one. Everything lies in one folder and speaks over loopback; what was started
here is stopped here, by its process. Needs root and Debian's slurmctld, slurmd, slurm-client and
munge.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # daemons lie there

# submitit asks sacct for the states of its jobs, and waits for ever for one that died where sacct
# knows nothing. Without a database of accounts this answers from what slurmctld still remembers.
_SACCT = r"""#!/bin/sh
echo 'JobID|State|NodeList'
for word; do case $previous in -j) ids="$ids $word";; esac; previous=$word; done
for id in $ids; do scontrol -o show job "$id" 2>/dev/null; done | tr ' ' '\n' | awk -F= '
    function tell() {
        if (job != "") print (array == "" ? job : array "_" task) "|" state "|" nodes
    }
    $1 == "JobId" { tell(); job = $2; array = task = state = nodes = "" }
    $1 == "ArrayJobId" { array = $2 }
    $1 == "ArrayTaskId" { task = $2 }
    $1 == "JobState" { state = $2 }
    $1 == "NodeList" { nodes = $2 }
    END { tell() }'
"""


def missing() -> str | None:
    """Returns why there can be no Slurm here, or None."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"no Slurm on this machine: {', '.join(absent)} not found"
    return None if os.geteuid() == 0 else "starting Slurm's daemons takes root"


def _configuration(folder: Path, num_nodes: int, ports: list[int]) -> str:
    """Returns slurm.conf: times cut short, every address loopback, nothing of the machine's own."""
    host = socket.gethostname().partition(".")[0]
    cores = os.cpu_count() or 1
    lines = [
        "ClusterName=tests",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        # A job that is queued again waits until its old credential has expired: 120 s by default.
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
        "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",
        "SlurmdParameters=config_overrides",  # two nodes may claim the cores of one machine
        "JobRequeue=1",
        "ReturnToService=2",
        "KillWait=10",
        "MinJobAge=3600",
        "MailProg=/bin/true",
        "GresTypes=gpu",
    ]
    names = []
    for number in range(1, num_nodes + 1):
        names.append(f"node{number}")
        lines.append(
            f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]} "
            f"CPUs={cores} RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
        )
    shared = f"Nodes={','.join(names)} MaxTime=INFINITE DefaultTime=60 State=UP"
    lines += [
        f"PartitionName=debug {shared} Default=YES PriorityTier=1 GraceTime=10",
        f"PartitionName=urgent {shared} PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def _free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def cluster(num_nodes: int) -> Iterator[dict[str, str]]:
    """Runs a Slurm of `num_nodes` nodes in the body; hands out the environment of its users."""
    # munge asks that others may enter the folder, hence none of pytest's.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with _running(folder, num_nodes) as environment:
            yield environment


@contextlib.contextmanager
def _running(folder: Path, num_nodes: int) -> Iterator[dict[str, str]]:
    config, programs = folder / "slurm.conf", folder / "bin"
    for made in (folder / "state", programs):
        made.mkdir()
    config.write_text(_configuration(folder, num_nodes, _free_ports(num_nodes + 1)))
    # In name only: no job finds a GPU behind these.
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (programs / "sacct").write_text(_SACCT)
    (programs / "sacct").chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
    # The daemons, and so the jobs, see a hosts file of their own in which every name is loopback.
    (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(nodes)}\n")
    env = {**os.environ, "SLURM_CONF": str(config), "PATH": f"{programs}:{_PATH}"}
    own_hosts = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts; exec "$@"']
    own_hosts.append(str(folder / "hosts"))
    munged = [
        *("munged", "--foreground", "--num-threads=2", f"--key-file={folder}/munge.key"),
        *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"),
        *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
    ]
    daemons: list[subprocess.Popen[bytes]] = []

    def launch(*command: str) -> None:
        log = (folder / f"daemon-{len(daemons)}.out").open("wb")
        daemons.append(
            subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        )

    def answers(*command: str) -> bool:
        dead = [daemon.args for daemon in daemons if daemon.poll() is not None]
        assert not dead, f"{dead} ended\n{_logs(folder)}"
        return _told(env, *command) is not None

    try:
        launch(*munged)
        _wait_for(lambda: answers("munge", "-n", "-S", f"{folder}/munge.socket"), folder)
        launch(*own_hosts, "slurmctld", "-D", "-f", str(config))
        _wait_for(lambda: answers("scontrol", "ping"), folder)
        for node in nodes:
            launch(*own_hosts, "slurmd", "-D", "-f", str(config), "-N", node)
        _wait_for(lambda: _idle(env) == nodes, folder)
        yield env
    finally:
        if len(daemons) > 1:
            _told(env, "scancel", "--user=root")
            with contextlib.suppress(TimeoutError):
                _wait_for(lambda: _told(env, "squeue", "-h") in ("", None), folder)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _told(env: Mapping[str, str], *command: str) -> str | None:
    """Returns what a command prints, or None where it fails."""
    try:
        ended = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def _idle(env: Mapping[str, str]) -> list[str]:
    return sorted({*(_told(env, "sinfo", "-h", "-N", "-t", "idle", "-o", "%N") or "").split()})


def _wait_for(reached: Callable[[], bool], folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"Slurm did not come up in {seconds:g} s\n{_logs(folder)}")
        time.sleep(0.2)


def _logs(folder: Path) -> str:
    logs = [*sorted(folder.glob("*.out")), *sorted(folder.glob("*.log"))]
    return "\n".join(f"{log.name}: {log.read_text()[-500:]}" for log in logs)


def main() -> None:
    """Runs a command with a Slurm of its own: `python -m tests.slurm COMMAND...`."""
    why = missing()
    if why is not None or len(sys.argv) < 2:
        raise SystemExit(f"error: {why or 'give a command to run'}")
    with cluster(num_nodes=1) as environment:
        raise SystemExit(subprocess.run(sys.argv[1:], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
