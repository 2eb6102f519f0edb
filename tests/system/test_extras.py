"""The commands that messages name for packages that are not installed."""

import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fashionnet.system import extras

PROJECT = Path(__file__).resolve().parents[2]
NAMED = {
    name
    for path in (PROJECT / "src").rglob("*.py")
    for name in re.findall(r'extras\.(?:missing|require)\("[^"]*", "(\w+)"', path.read_text())
}


def declared() -> set[str]:
    text = (PROJECT / "pyproject.toml").read_text()
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))


def test_every_extra_that_a_message_names_is_declared() -> None:
    assert {"plots", "search", "sklearn", "timm", "export"} <= NAMED
    assert declared() >= NAMED


def test_no_other_place_says_how_to_install() -> None:
    said = [
        path.name for path in (PROJECT / "src").rglob("*.py") if "pip install" in path.read_text()
    ]
    assert said == []


@pytest.mark.parametrize("folder", [PROJECT, Path("/")])
def test_the_command_installs_from_this_checkout_with_its_pins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    python, *rest = shlex.split(extras.install_command("timm"))
    assert os.path.samefile(python, sys.executable)
    *pip, dash_c, constraints, dash_e, target = rest
    assert (pip, dash_c, dash_e) == (["-m", "pip", "install"], "-c", "-e")
    assert Path(constraints).resolve() == PROJECT / "constraints.txt"
    assert Path(target.removesuffix("[timm]")).resolve() == PROJECT
    assert folder == Path("/") or target == ".[timm]"


@pytest.mark.slow
@pytest.mark.parametrize("folder", [PROJECT, Path("/")])
def test_pip_understands_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    command = shlex.split(extras.install_command("sweeps"))
    dry = ["--dry-run", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, *dry], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr


def test_a_wheel_says_itself_what_an_extra_requires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "_TOP", tmp_path)
    info = tmp_path / "fashionnet-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: fashionnet\nVersion: 9\nRequires-Dist: torch>=2\n"
        "Requires-Dist: pandas>=2.2; extra == 'plots'\n"
        "Requires-Dist: scipy>=1.13; (python_version < '4') and extra == \"plots\"\n"
        "Requires-Dist: timm>=1; extra == 'timm'\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert metadata.version("fashionnet") == "9"
    command = shlex.split(extras.install_command("plots"))
    assert command[1:] == ["-m", "pip", "install", "pandas>=2.2", "scipy>=1.13"]
