"""Sweeps, jobs and requeueing on a real Slurm of two nodes, started here on this machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import slurm
from tests.conftest import Commands, FinishedRun

ROOT = Path(__file__).resolve().parents[1]
# A few seconds of fit.
LONG = (
    *("epochs=40", "data.limit=2000", "batch_size=8", "validation_split=0.01", "device=cpu"),
    "checkpoint.every_seconds=0.2",
)
SHORT = ("epochs=1", "data.limit=500", "device=cpu")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing())),
]


class Cluster(Commands):
    """Commands that find the cluster."""

    def ask(self, *command: str) -> str:
        """Returns what a command of Slurm prints."""
        done = self.call(command, ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, script: str, *arguments: str, cwd: Path) -> str:
        """Submits a script as a user does, and returns the job's number."""
        done = self.call(["sbatch", "--parsable", *script.split(), *arguments], cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str, what: str = "JobState") -> str:
        words = self.ask("scontrol", "-o", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{what}="))

    def wait(self, job: str, *states: str, seconds: float = 180) -> None:
        wait_for(lambda: self.state(job) in states, seconds, lambda: self.state(job))


def wait_for(reached: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, told()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(commands: Commands) -> Iterator[Cluster]:
    with slurm.cluster(num_nodes=2) as environment:
        own = {"PYTHON": sys.executable, "PROCESSES": "2"}  # for the scripts
        yield Cluster(commands.server, commands.environment | environment | own)


@pytest.fixture(scope="module")
def undisturbed(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The long run, never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    commands.succeed("train", *LONG, "hydra.run.dir=run", cwd=folder)
    return FinishedRun(folder / "run")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder that the scripts can be submitted from."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    return tmp_path


def num_epochs(run_dir: Path) -> int:
    history = run_dir / "history.jsonl"
    return history.read_text().count("\n") if history.exists() else 0


# -- sweeps ----------------------------------------------------------------------------------------


def test_a_sweep_is_an_array_of_jobs(cluster: Cluster, tmp_path: Path) -> None:
    sweep = ("-m", "hydra/launcher=slurm", *SHORT, "seed=range(2)", "hydra.sweep.dir=sweep")
    # Of each seed one job is refused as it starts.
    done = cluster.run("train", *sweep, "batch_size=32,-1", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stdout.splitlines()
    start = lines.index("sweep sweep: 2 completed")
    failed = [line for line in lines[start:] if line.startswith("  failed: ")]
    assert len(failed) == 2
    assert all(line.endswith("batch_size=-1 must be 1 or more") for line in failed)
    runs = {
        path.name: FinishedRun(path)
        for path in (tmp_path / "sweep").iterdir()
        if path.name[0] != "." and path.is_dir()
    }
    assert len(runs) == 2
    (job,) = {
        path.name.partition("_")[0]
        for path in (tmp_path / "sweep/.submitit").glob("*_*")
        if path.is_dir()
    }
    cluster.wait(f"{job}_0", "COMPLETED")  # the controller learns of it a moment later
    # The bits are those of a run without Slurm.
    cluster.succeed("train", *SHORT, "seed=1", "hydra.run.dir=alone", cwd=tmp_path)
    (same,) = [run for name, run in runs.items() if "seed=1" in name]
    assert same.bits == FinishedRun(tmp_path / "alone").bits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["hydra.launcher.partition=nowhere"], "invalid partition specified: nowhere"),
        (["hydra.launcher.gres=abacus:1"], "Slurm refused the jobs: "),
    ],
)
def test_what_slurm_refuses_is_told(
    options: list[str], said: str, cluster: Cluster, tmp_path: Path
) -> None:
    sweep = ("-m", "hydra/launcher=slurm", *SHORT, "seed=0,1", "hydra.sweep.dir=a/sweep")
    done = cluster.run("train", *sweep, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and said in done.stderr
    assert "Traceback" not in done.stderr and "no run" not in done.stdout
    assert not [*tmp_path.iterdir()]


def test_without_slurm_a_sweep_says_so(commands: Commands, tmp_path: Path) -> None:
    sweep = ("-m", "hydra/launcher=slurm", *SHORT, "seed=0,1", "hydra.sweep.dir=sweep")
    done = commands.run("train", *sweep, cwd=tmp_path, PATH=str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: hydra/launcher=slurm: Slurm is not on")
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]


def test_the_same_sweep_on_one_machine_without_slurm(commands: Commands, tmp_path: Path) -> None:
    sweep = ("-m", "hydra/launcher=submitit_local", *SHORT, "seed=0,1", "hydra.sweep.dir=sweep")
    done = commands.run("train", *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sweep sweep: 2 completed" in done.stdout


def test_a_job_that_is_cancelled_is_named(cluster: Cluster, tmp_path: Path) -> None:
    sweep = ("-m", "hydra/launcher=slurm", *LONG, "epochs=100000", "hydra.sweep.dir=sweep")
    line = cluster.line("train", *sweep, "seed=0")
    process = started(cluster, line, tmp_path)
    wait_for(lambda: any(map(num_epochs, (tmp_path / "sweep").glob("*"))), 60, lambda: "no run")
    (record,) = (tmp_path / "sweep").glob("*/run.json")
    (job,) = [p.name for p in (tmp_path / "sweep/.submitit").iterdir() if p.is_dir()]
    cluster.ask("scancel", job)
    printed, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "sweep sweep: 1 interrupted" in printed and f"{job} left no result" in printed
    assert f"error: job {job} ended without a result (state: " in told
    assert "Traceback" not in told
    assert FinishedRun(record.parent).record["status"] == "interrupted"


def started(cluster: Cluster, line: list[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line,
        cwd=cwd,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# -- preemption ------------------------------------------------------------------------------------


def test_a_sweeps_job_that_is_preempted_comes_back(
    cluster: Cluster, undisturbed: FinishedRun, tmp_path: Path
) -> None:
    sweep = ("-m", "hydra/launcher=slurm", *LONG, "seed=0", "hydra.sweep.dir=sweep")
    process = started(cluster, cluster.line("train", *sweep), tmp_path)
    wait_for(
        lambda: any(n >= 3 for n in map(num_epochs, (tmp_path / "sweep").glob("*"))),
        60,
        lambda: "no run",
    )
    (job,) = [p.name for p in (tmp_path / "sweep/.submitit").iterdir() if p.is_dir()]
    # As submitit is told of a preemption, and of the end of its time.
    cluster.ask("scancel", "--signal=USR2", job)
    (run_dir,) = (path.parent for path in (tmp_path / "sweep").glob("*/run.json"))
    wait_for(lambda: cluster.state(job, "Restarts") == "1", 30, lambda: cluster.state(job))
    assert FinishedRun(run_dir).record["status"] == "interrupted"
    assert 3 <= num_epochs(run_dir) < 40
    _, told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    assert FinishedRun(run_dir).bits == undisturbed.bits


def test_jobs_that_are_queued_again_go_on(
    cluster: Cluster, undisturbed: FinishedRun, project: Path
) -> None:
    # An operator, or a preemption, queues a job again; --signal=B:USR1@60 signals that its time is
    # up.
    again = {}
    for command in (("scontrol", "requeue"), ("scancel", "--batch", "--signal=USR1")):
        again[cluster.submit("--gpus=0 scripts/slurm.sbatch", *LONG, cwd=project)] = command
    for job, command in again.items():
        run_dir = project / f"outputs/slurm/{job}"
        wait_for(lambda: num_epochs(run_dir) >= 3, 60, lambda: cluster.state(job))  # noqa: B023
        cluster.ask(*command, job)
    for job in again:
        run = FinishedRun(project / f"outputs/slurm/{job}")
        wait_for(lambda: run.record["status"] == "interrupted", 60, lambda: "runs on")  # noqa: B023
        assert 3 <= num_epochs(run.path) < 40
    for job, command in again.items():
        cluster.wait(job, "COMPLETED")
        assert cluster.state(job, "Restarts") == "1"
        log = (project / f"slurm-{job}.log").read_text()
        assert ("queued again" in log) is (command[0] == "scancel")
        assert FinishedRun(project / f"outputs/slurm/{job}").bits == undisturbed.bits


# -- scripts ---------------------------------------------------------------------------------------


def test_an_array_over_seeds_and_several_processes_on_a_node_and_on_two(
    cluster: Cluster, project: Path
) -> None:
    """They run side by side: most of their time is importing, and waiting for each other."""
    small = (*SHORT, "gradients=autograd", "epochs=2")
    array = cluster.submit("--array=3-4 --gpus=0 scripts/slurm.sbatch", *SHORT, cwd=project)
    torchrun = "scripts/slurm-torchrun.sbatch"
    jobs = {cluster.submit(torchrun, *small, cwd=project): 2}
    jobs[cluster.submit(f"--nodes=2 --gpus-per-node=0 {torchrun}", *small, cwd=project)] = 4
    cluster.succeed("train", *small, "hydra.run.dir=alone", cwd=project)
    alone = FinishedRun(project / "alone").history
    for seed in (3, 4):
        cluster.wait(f"{array}_{seed}", "COMPLETED")
        run = FinishedRun(project / f"outputs/slurm/{array}_{seed}")
        assert (run.record["status"], run.record["seed"]) == ("completed", seed)
    for job, num in jobs.items():
        cluster.wait(job, "COMPLETED", "FAILED", "TIMEOUT")
        assert cluster.state(job) == "COMPLETED", (project / f"slurm-{job}.log").read_text()
        run = FinishedRun(project / f"outputs/slurm/{job}")
        assert run.record["processes"] == num
        losses = [[row["val_loss"] for row in rows] for rows in (run.history, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
