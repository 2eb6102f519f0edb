"""scripts/train, scripts/test and their set-up, as a user starts them.

Most tests run the real scripts, the real venv and the real pip on a tiny project that depends on
nothing and needs no network. The last one installs this project itself.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SCRIPTS = ("scripts/train", "scripts/test", "scripts/setup.sh", ".ci/run")

TINY_PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "fashionnet"
version = "0"
"""

# A build backend of the standard library alone. While there is a file `slow`, a build does not end.
TINY_BACKEND = """\
import pathlib, time, zipfile

METADATA = '''\\
Metadata-Version: 2.1
Name: fashionnet
Version: 0
Provides-Extra: plots
Provides-Extra: search
Provides-Extra: sweeps
Provides-Extra: test
Provides-Extra: parity
'''

WHEEL = '''\\
Wheel-Version: 1.0
Generator: tiny
Root-Is-Purelib: true
Tag: py3-none-any
'''

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    here = pathlib.Path(__file__).parent
    if (here / "slow").exists():
        (here / "building").touch()
        time.sleep(600)
    needs = (here / "needs").read_text() if (here / "needs").exists() else ""
    name = "fashionnet-0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
        wheel.writestr("fashionnet.pth", str(here / "src"))
        wheel.writestr("fashionnet-0.dist-info/METADATA", METADATA + needs)
        wheel.writestr("fashionnet-0.dist-info/WHEEL", WHEEL)
        wheel.writestr("fashionnet-0.dist-info/RECORD", "")
    return name
"""

TINY_TRAIN = """\
import json, os, sys

print(json.dumps({"args": sys.argv[1:], "cwd": os.getcwd(), "python": sys.executable}))
"""

EVERYDAY = ("plots", "search", "sweeps")  # extras that scripts/train installs
PARALLEL = "-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder"
# Stands in for ruff, mypy and pytest; fails where there is a file of its name with a dot before it.
TINY_TOOL = """\
import pathlib, sys

tool = pathlib.Path(__file__).stem
print(tool, *sys.argv[1:])
sys.exit(pathlib.Path("." + tool).exists())
"""


def write_tiny_project(root: Path) -> Path:
    (root / "src/fashionnet").mkdir(parents=True)
    (root / "scripts").mkdir()
    for name in SCRIPTS:
        if name.startswith("scripts/"):
            shutil.copy(PROJECT / name, root / name)
    (root / "pyproject.toml").write_text(TINY_PYPROJECT)
    (root / "constraints.txt").write_text("# none\n")
    (root / "backend.py").write_text(TINY_BACKEND)
    (root / "src/fashionnet/__init__.py").touch()
    (root / "src/fashionnet/train.py").write_text(TINY_TRAIN)
    for tool in ("ruff", "mypy", "pytest"):
        (root / f"src/{tool}.py").write_text(TINY_TOOL)
    return root


def environment(**changes: str) -> dict[str, str]:
    """Returns a user's environment: nothing of this venv, and a python3 that is this one's base."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")}
    base = os.path.dirname(os.path.realpath(sys.executable))
    return kept | {"PATH": os.pathsep.join([base, kept["PATH"]])} | changes


def start(script: Path, *args: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [script, *args],
        cwd=cwd or script.parent,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(
    script: Path, *args: str, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    process = start(script, *args, cwd=cwd, **env)
    try:
        stdout, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(script, process.returncode, stdout, stderr)


def assert_trained(done: subprocess.CompletedProcess[str], project: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["python"] == str(project / ".venv/bin/python")


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Asserts status 2 and one `error:` line, the last one, that says all of `words`."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert all(line.startswith("fashionnet: ") for line in before), done.stderr
    for word in words:
        assert word in last


def fingerprint(project: Path) -> list[tuple[str, int]]:
    """Returns what any set-up would change: the times of the stamp, the log and the packages."""
    venv = project / ".venv"
    paths = [venv / ".fashionnet-setup", venv / "setup.log", *venv.glob("lib/*/site-packages/*")]
    return sorted((str(path), path.stat().st_mtime_ns) for path in paths)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny project on which nothing was run yet; its path has a space in it."""
    return write_tiny_project(tmp_path / "a project")


@pytest.fixture(scope="module")
def first_call(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A tiny project and how the first call of its scripts/train went, from another folder."""
    folder = tmp_path_factory.mktemp("ready")
    project = write_tiny_project(folder / "a project")
    return project, run(project / "scripts/train", "model=mlp", "name=two words", cwd=folder)


@pytest.fixture
def ready(first_call: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """A tiny project that is set up, for tests that leave it so."""
    return first_call[0]


# -- as they lie in the repository -----------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_bash(name: str) -> None:
    path = PROJECT / name
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert os.access(path, os.X_OK) == (path.suffix != ".sh")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


def test_constraints_pin_exact_versions_and_no_cuda_build() -> None:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    exact = re.compile(r'[a-z0-9-]+==[0-9][0-9a-z.]*(; python_version (<|>=) "3\.11")?')
    assert [pin for pin in pins if not exact.fullmatch(pin)] == []
    assert [pin for pin in pins if pin.startswith(("nvidia", "cuda", "triton"))] == []
    assert "torch==2.13.0" in pins


# -- setting up, and not again ---------------------------------------------------------------------


@pytest.mark.slow
def test_first_call_sets_up_then_trains_in_the_users_folder(
    first_call: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    project, done = first_call
    assert_trained(done, project)
    assert json.loads(done.stdout)["args"] == ["model=mlp", "name=two words"]
    assert json.loads(done.stdout)["cwd"] == str(project.parent)
    assert "fashionnet: making .venv with Python 3." in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fashionnet: set up in ")
    # What it says is ready to paste, whatever is in the path.
    activate = last.partition("in this shell: ")[2]
    pasted = [
        "bash",
        "-euc",
        f"{activate}; cd /; python -c 'import fashionnet, sys; print(sys.prefix)'",
    ]
    prefix = subprocess.run(pasted, env=environment(), capture_output=True, text=True, check=True)
    assert prefix.stdout == f"{project / '.venv'}\n"


@pytest.mark.slow
def test_later_calls_install_nothing(ready: Path, tmp_path: Path) -> None:
    before = fingerprint(ready)
    linked_script, linked_project = tmp_path / "start", tmp_path / "linked"
    linked_script.symlink_to(ready / "scripts/train")
    linked_project.symlink_to(ready)
    starts: list[tuple[Path, Path, dict[str, str]]] = [
        (ready / "scripts/train", ready, {}),
        (ready / "scripts/train", tmp_path, {"CDPATH": str(tmp_path)}),
        (linked_script, tmp_path, {}),
        (linked_project / "scripts/train", tmp_path, {}),
        (ready / "scripts/train", tmp_path, {"PYTHON": "python3"}),
        (ready / "scripts/train", tmp_path, {"PYTHON": str(ready / ".venv/bin/python")}),
    ]
    for script, cwd, env in starts:
        done = run(script, cwd=cwd, **env)
        assert_trained(done, ready)
        assert json.loads(done.stdout)["cwd"] == str(cwd)
        assert done.stderr == ""
    assert fingerprint(ready) == before


@pytest.mark.slow
def test_status_of_the_training_is_the_scripts(ready: Path) -> None:
    train = ready / "src/fashionnet/train.py"
    try:
        train.write_text("raise SystemExit(3)")
        assert run(ready / "scripts/train").returncode == 3
    finally:
        train.write_text(TINY_TRAIN)


@pytest.mark.slow
def test_test_script_adds_its_extras_and_runs_every_check(ready: Path, tmp_path: Path) -> None:
    mine = ready / ".venv/mine"
    mine.touch()

    done = run(ready / "scripts/test", "-k", "two words", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = ["ruff check", "ruff format --check", "mypy", f"pytest {PARALLEL} -k two words"]
    assert done.stdout.splitlines() == expected
    assert "fashionnet: bringing .venv up to date" in done.stderr
    assert mine.exists()
    before = fingerprint(ready)

    for tool in ("ruff", "mypy", "pytest"):
        (ready / f".{tool}").touch()
        done = run(ready / "scripts/test", "-k", "two words")
        (ready / f".{tool}").unlink()
        assert done.returncode != 0
        assert done.stdout.splitlines() == expected
        assert done.stderr.splitlines()[-1].startswith(f"error: failed: {tool}")

    assert run(ready / "scripts/train").stderr == ""
    assert fingerprint(ready) == before


@pytest.mark.slow
def test_changed_pins_bring_the_venv_up_to_date(ready: Path) -> None:
    before = fingerprint(ready)
    mine = ready / ".venv/mine"
    mine.touch()
    for name in ("pyproject.toml", "scripts/setup.sh", "constraints.txt"):
        text = (ready / name).read_text()
        (ready / name).write_text(f"{text}# changed\n")
        assert not is_done(ready)
        if name != "constraints.txt":
            (ready / name).write_text(text)
            assert is_done(ready)
    done = run(ready / "scripts/train")
    assert_trained(done, ready)
    assert "fashionnet: bringing .venv up to date" in done.stderr
    assert fingerprint(ready) != before
    assert mine.exists()
    assert is_done(ready)


def is_done(project: Path) -> bool:
    """Returns whether the scripts would set nothing up."""
    ask = f'project={shlex.quote(str(project))}; . "$project/scripts/setup.sh"; read_stamp; is_done'
    return subprocess.run(["bash", "-euc", ask], env=environment(), check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("flock"), reason="flock is not installed")
def test_two_set_ups_at_once(tiny: Path) -> None:
    (tiny / "slow").touch()
    first = start(tiny / "scripts/train")
    wait_for(tiny / "building")
    second = start(tiny / "scripts/train")
    assert second.stderr is not None
    said = second.stderr.readline()  # comes while the first one still builds
    assert "another set-up is under way" in said
    # The first one, script and pip, is gone; the second one takes over.
    (tiny / "slow").unlink()
    os.killpg(first.pid, signal.SIGKILL)
    stdout, stderr = second.communicate(timeout=300)
    first.communicate()
    assert_trained(subprocess.CompletedProcess([], second.returncode, stdout, stderr), tiny)
    assert "making .venv anew" in stderr


def wait_for(path: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


# -- repairs ---------------------------------------------------------------------------------------


def assert_made_anew(project: Path) -> None:
    old = project / ".venv/old"
    old.touch()
    assert not is_done(project)
    done = run(project / "scripts/train")
    assert_trained(done, project)
    assert "fashionnet: making .venv anew" in done.stderr
    assert not old.exists()
    assert is_done(project)


@pytest.mark.slow
def test_a_broken_venv_is_made_anew(ready: Path) -> None:
    stamp, python = ready / ".venv/.fashionnet-setup", ready / ".venv/bin/python"
    sound, base = stamp.read_text(), python.readlink()
    stamp.write_text("unfinished\n")
    assert not is_done(ready)
    stamp.write_text(sound)
    python.unlink()
    shutil.copy(python.parent / base, python)  # another file than the one that was set up with
    assert not is_done(ready)
    python.unlink()
    python.symlink_to("/nowhere/python3")
    assert_made_anew(ready)


@pytest.mark.slow
def test_a_moved_venv_is_made_anew(ready: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(ready, tmp_path / "moved", symlinks=True)
    assert str(ready) in (moved / ".venv/bin/pip").read_text()
    stamp = moved / ".venv/.fashionnet-setup"
    *others, extras = stamp.read_text().splitlines()
    stamp.write_text("\n".join([*others, f"{extras} parity"]))
    assert_made_anew(moved)
    assert set(stamp.read_text().splitlines()[-1].split()) == {*extras.split(), "parity"}
    assert str(moved) in (moved / ".venv/bin/pip").read_text()


@pytest.mark.slow
def test_a_venv_made_by_hand_is_used_and_kept(tiny: Path) -> None:
    command = ["python3", "-m", "venv", str(tiny / ".venv")]
    subprocess.run(command, env=environment(), check=True)
    mine = tiny / ".venv/mine"
    mine.touch()
    done = run(tiny / "scripts/train")
    assert_trained(done, tiny)
    assert "installing into the .venv that is there" in done.stderr
    assert mine.exists()


@pytest.mark.slow
def test_a_failing_pip_names_its_reason_and_its_log(ready: Path) -> None:
    log = ready / ".venv/setup.log"
    (ready / "needs").write_text("Requires-Dist: lost @ file:///lost.whl\n")
    with (ready / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    try:
        done = run(ready / "scripts/train")
        assert_refused(done, "pip could not install", "lost.whl is not", str(log))
        assert "lost.whl" in log.read_text()
    finally:
        (ready / "needs").unlink()
    done = run(ready / "scripts/train")
    assert_trained(done, ready)
    assert "bringing .venv up to date" in done.stderr


# -- refusals --------------------------------------------------------------------------------------


@pytest.fixture
def odd_python(tmp_path: Path) -> Callable[[str], str]:
    """Makes an interpreter: the real one, in which a line of Python has run before all else."""

    def make(line: str) -> str:
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(line)
        python = tmp_path / "python3"
        python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        return str(python)

    return make


def test_python_without_venv_names_the_package(
    tiny: Path, odd_python: Callable[[str], str]
) -> None:
    python = odd_python("import sys; sys.modules['ensurepip'] = None")
    package = "apt-get install python{}.{}-venv".format(*sys.version_info)
    assert_refused(run(tiny / "scripts/train", PYTHON=python), "python3-venv", package)
    assert not (tiny / ".venv").exists()


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0), (2, 7, 18)])
def test_python_of_another_version_is_refused(
    tiny: Path, odd_python: Callable[[str], str], version: tuple[int, ...]
) -> None:
    python = odd_python(f"import sys; sys.version_info = {version}")
    done = run(tiny / "scripts/train", PYTHON=python)
    assert_refused(done, f"{python} is Python {'.'.join(map(str, version))}", "3.10")
    assert not (tiny / ".venv").exists()


@pytest.mark.parametrize("python", ["/nowhere/python3", "true", "cat", "two words"])
def test_what_is_no_python_is_refused(tiny: Path, python: str) -> None:
    assert_refused(run(tiny / "scripts/train", PYTHON=python), f"PYTHON={python} is no Python")


def bare_path(folder: Path, *, without: tuple[str, ...] = ()) -> str:
    """Returns a PATH with nothing but the tools that the scripts may use."""
    tools = "bash cat dirname env flock head ls mkdir mv readlink rm sha256sum"
    folder.mkdir()
    for tool in set(tools.split()) - set(without):
        found = shutil.which(tool)
        if found:
            (folder / tool).symlink_to(found)
    return str(folder)


def test_no_python_at_all(tiny: Path, tmp_path: Path) -> None:
    done = run(tiny / "scripts/train", PATH=bare_path(tmp_path / "bin"))
    assert_refused(done, "no Python of 3.10 to 3.13 found", "apt-get install python3", "PYTHON=")


@pytest.mark.slow
def test_bash_and_coreutils_are_enough(tiny: Path, tmp_path: Path) -> None:
    path = bare_path(tmp_path / "bin", without=("flock",))
    done = run(tiny / "scripts/train", PATH=path, PYTHON=os.path.realpath(sys.executable))
    assert_trained(done, tiny)
    assert "flock" not in done.stderr


def test_something_else_in_the_venvs_place_is_left_alone(tiny: Path) -> None:
    mine = tiny / ".venv/mine"
    mine.parent.mkdir()
    mine.touch()
    assert_refused(run(tiny / "scripts/train"), f"{mine.parent} is there", "move it away")
    assert mine.exists()


@pytest.fixture
def on_small_disk(tiny: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs scripts/train with the tiny project on a disk of 8 MB that a command spoils first."""
    mount = """
        cp -a "$1" "$1.copy"
        mount -t tmpfs -o size=8m small "$1" || exit 99
        cp -a "$1.copy/." "$1"
    """

    def run_after(spoil: str) -> subprocess.CompletedProcess[str]:
        command = mount + spoil + '; exec "$1/scripts/train"'
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "bash", "-euc", command, "bash", tiny],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode == 99 or done.stderr.startswith("unshare: "):
            pytest.skip("no disk can be mounted here")
        return done

    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    return run_after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ('mount -o remount,ro "$1"', "Read-only file system"),
        ("true", "No space left on device"),  # the venv's pip alone is larger than the disk
        ('head -c 9000000 /dev/zero >"$1/full" 2>/dev/null || true', "No space left on device"),
    ],
    ids=["read-only", "small", "full"],
)
def test_a_disk_that_cannot_be_written_to(
    tiny: Path,
    on_small_disk: Callable[[str], subprocess.CompletedProcess[str]],
    spoil: str,
    reason: str,
) -> None:
    done = on_small_disk(spoil)
    assert_refused(done, reason, str(tiny), "free some space")


# -- the project itself ----------------------------------------------------------------------------


def copy_project(target: Path) -> Path:
    """Copies what a clone would hold, and what is new here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT / name).is_file():  # not one that was removed and is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, target / name)
    return target


@pytest.mark.slow
@pytest.mark.network
def test_two_first_calls_at_once_on_a_fresh_checkout(tmp_path: Path) -> None:
    """What scripts/train installs is enough for the README's everyday commands."""
    project = copy_project(tmp_path / "checkout")
    # pip need not compile a gigabyte of packages for these few commands.
    given = ("--cfg", "job", "model=mlp")
    both = [start(project / "scripts/train", *given, PIP_NO_COMPILE="1") for _ in range(2)]
    try:
        said = [process.communicate(timeout=1200) for process in both]
        for command in (
            ["fashionnet.list"],
            ["fashionnet.playground", "xor", "--plot", str(tmp_path / "xor.png")],
            ["fashionnet.train", "-m", "hydra/launcher=joblib", "--cfg", "job"],
            ["fashionnet.search", "epochs=1"],
            ["fashionnet.compare", "none"],
            ["fashionnet.mistakes", "none"],
        ):
            python = project / ".venv/bin/python"
            done = subprocess.run(
                [python, "-m", *command],
                cwd=tmp_path,
                env=environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            assert "install" not in done.stderr and "No module" not in done.stderr, done.stderr
            assert done.returncode in (0, 2), done.stderr  # 2: nothing to search, no such run
    finally:
        shutil.rmtree(project / ".venv", ignore_errors=True)  # a gigabyte, or many
    for process, (stdout, stderr) in zip(both, said, strict=True):
        assert process.returncode == 0, stderr
        assert "batch_size: 32" in stdout
    assert sum("fashionnet: set up in" in stderr for _, stderr in said) == 1
