"""What people get who install the package instead of cloning the repository."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
CONF = sorted(path.relative_to(PROJECT).as_posix() for path in PROJECT.glob("conf/**/*.yaml"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(
        [*command, str(PROJECT)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new venv with the wheel in it; its other packages are the running ones.

    They come by a path in a .pth file. Python reads no .pth files of a folder that is added so,
    hence not the one of this checkout's editable install.
    """
    venv = tmp_path_factory.mktemp("venv")
    python = venv / "bin/python"
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index"]
    subprocess.run([*pip, "--no-deps", wheel], check=True)
    (site,) = venv.glob("lib/python3.*/site-packages")
    (site / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run(cwd: Path, *command: Path | str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_conf_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    code = [name for name in names if ".dist-info/" not in name]
    assert CONF
    assert sorted(n for n in code if "/conf/" in n) == [f"fashionnet/{name}" for name in CONF]
    assert "fashionnet/py.typed" in code
    plugin = "hydra_plugins/vectorized_launcher.py"  # a namespace that other packages share
    assert [name for name in code if not name.startswith("fashionnet/")] == [plugin]


def test_wheel_names_and_holds_its_license(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        (license,) = (n for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(license) == (PROJECT / "LICENSE").read_bytes()
    assert "License-Expression: MIT" in lines
    assert "License-File: LICENSE" in lines


def test_sdist_holds_what_the_project_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "LICENSE",
        "pyproject.toml",
        "constraints.txt",
        "scripts/train",
        "src/fashionnet/__init__.py",
    }
    assert names >= {*needed, *CONF, "tests/test_wheel.py"}
    assert not any(name.startswith(("outputs/", ".venv", ".ci", ".git/")) for name in names)


def test_commands_are_installed(installed: Path) -> None:
    commands = {"compare", "evaluate", "list", "mistakes", "playground", "predict", "reproduce"}
    commands |= {"train"}
    assert {path.name for path in installed.glob("fashionnet-*")} >= {
        f"fashionnet-{command}" for command in commands
    }


def test_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    code = "import fashionnet; print(fashionnet.__file__)"
    where = run(tmp_path, installed / "python", "-c", code)
    assert Path(where).is_relative_to(installed.parent)


def test_installed_package_composes_its_own_conf(installed: Path, tmp_path: Path) -> None:
    module = [installed / "python", "-m", "fashionnet.train"]
    for command in (module, [installed / "fashionnet-train"]):
        config = run(tmp_path, *command, "--cfg", "job", "model=mlp")
        assert "batch_size: 32" in config
        assert "validation_split: 0.1" in config
    assert list(tmp_path.iterdir()) == []
