"""The rooms of the package: imports point one way, nothing imports itself in a circle.

Every import counts, those inside functions too; those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "fashionnet"

# Lowest first. Rooms of one floor do not know each other.
FLOORS = (
    {"errors"},
    {"system", "toys"},
    {"config"},
    {"data", "models"},
    {"training"},
    {"runs"},
    {"analysis"},
    {"commands"},  # the modules at the top of the package
)
LONGEST_CHAIN = 10


def modules(source: Path) -> dict[str, Path]:
    """Returns the modules below a package's folder by their dotted names; the root is left out."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        if name := ".".join(parts[:-1] if parts[-1] == "__init__" else parts):
            found[name] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Returns the modules of the package that a file imports, wherever it does."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    return {name for node in ast.walk(tree) for name in names(node, known)}


def names(node: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.startswith("fashionnet."):
                yield alias.name.removeprefix("fashionnet.")
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        base = f"{node.module}."
        if base.startswith("fashionnet."):
            base = base.removeprefix("fashionnet.")
            for alias in node.names:
                if f"{base}{alias.name}" in known:
                    yield f"{base}{alias.name}"
                elif base:
                    yield base.rstrip(".")


def graph(source: Path) -> dict[str, set[str]]:
    known = modules(source)
    return {name: imported(path, known) - {name} for name, path in known.items()}


def room(module: str) -> str:
    top = module.partition(".")[0]
    return top if any(top in floor for floor in FLOORS) else "commands"


def against_the_order(edges: dict[str, set[str]]) -> list[str]:
    """Returns the imports that point up, or into another room of the same floor."""
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    return [
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in sorted(others)
        if (here := room(module)) != (there := room(other)) and floor[there] >= floor[here]
    ]


def longest_chain(edges: dict[str, set[str]]) -> list[str]:
    """Returns the longest chain of modules that import one another.

    Raises:
        CycleError: they do in a circle.
    """
    chains: dict[str, list[str]] = {}
    for module in TopologicalSorter(edges).static_order():
        below = [chains[other] for other in edges[module]]
        chains[module] = [module, *max(below, key=len, default=[])]
    return max(chains.values(), key=len)


def test_imports_point_one_way() -> None:
    assert against_the_order(graph(SOURCE)) == []


def test_no_circle_and_no_long_chain() -> None:
    chain = longest_chain(graph(SOURCE))
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        (
            "system/files.py",
            "from fashionnet.runs import record",
            "system.files imports runs.record",
        ),
        ("models/mlp.py", "import fashionnet.data.photos", "models.mlp imports data.photos"),
        ("runs/saved.py", "from fashionnet import train", "runs.saved imports train"),
        (
            "errors.py",
            "def f():\n    from fashionnet.system.files import walk",
            "errors imports system.files",
        ),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, module: str, line: str, said: str) -> None:
    for name, path in modules(SOURCE).items():
        copy = tmp_path / path.relative_to(SOURCE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
        assert name
    (tmp_path / module).write_text(f"{(tmp_path / module).read_text()}\n{line}\n")
    assert against_the_order(graph(tmp_path)) == [said]


def test_commands_come_without_what_takes_seconds_to_import() -> None:
    commands = [path.stem for path in SOURCE.glob("*.py") if "def main(" in path.read_text()]
    assert {"compare", "list", "search", "train"} <= {*commands}
    imports = "import sys, " + ", ".join(f"fashionnet.{command}" for command in commands)
    slow = {"torch", "pandas", "sklearn", "optuna", "matplotlib"}
    code = f"{imports}; assert not {slow} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_module_is_longer_than_a_reader_holds_in_mind() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {path.name: num for path, num in lengths.items() if num > 400} == {}
