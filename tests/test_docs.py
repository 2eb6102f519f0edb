"""Claims of the documentation that a program can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
LESSON = (ROOT / "docs" / "lesson.md").read_text()
KERAS_PROGRAM = (ROOT / "scripts" / "peers" / "keras_lesson.py").read_text()


def lesson_table() -> list[tuple[str, str, str]]:
    """Returns the rows of the lesson's table: Keras line, line here, file."""
    after = LESSON.split("<!-- lesson table", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|$", after, re.MULTILINE)
    return [(str(a), str(b), str(c)) for a, b, c in rows]


def without_spaces(text: str) -> str:
    return re.sub(r"\s+", "", text).replace(",)", ")").replace(",]", "]")


def test_the_table_has_the_whole_lesson() -> None:
    assert len(lesson_table()) == 18


@pytest.mark.parametrize("row", lesson_table(), ids=lambda row: row[0][:40])
def test_each_keras_line_is_in_the_keras_program_that_the_benchmark_runs(
    row: tuple[str, str, str],
) -> None:
    assert without_spaces(row[0]) in without_spaces(KERAS_PROGRAM)


@pytest.mark.parametrize("row", lesson_table(), ids=lambda row: row[0][:40])
def test_each_line_here_is_in_the_file_it_names(row: tuple[str, str, str]) -> None:
    keras_line, line, name = row
    text = (ROOT / name).read_text()
    if name.endswith(".yaml"):
        (key, value), *_ = OmegaConf.create(line).items()
        assert OmegaConf.create(text)[key] == value
    else:
        assert any(found.strip() == line for found in text.splitlines()), line
    if name.endswith("train.py"):
        # In train.py it stands right under the Keras line that it mirrors.
        under = text.split(f"# keras: {keras_line}", 1)
        assert len(under) == 2, keras_line
        assert line in under[1].split("# keras:", 1)[0]


def test_the_lines_of_train_py_come_in_the_lessons_order() -> None:
    text = (ROOT / "src" / "fashionnet" / "train.py").read_text()
    places = [text.index(line) for _, line, name in lesson_table() if name.endswith("train.py")]
    assert places == sorted(places)


PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_is_reachable_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([\w.]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_groups_and_commands_that_are_typed_exist(page: Path) -> None:
    """Every `python -m fashionnet.X` is a command, every group=option that it names a file."""
    for line in page.read_text().splitlines():
        for command in re.findall(r"python -m fashionnet\.(\w+)", line):
            assert (ROOT / f"src/fashionnet/{command}.py").is_file(), line
        if "python -m fashionnet.train" in line:
            for group, option in re.findall(
                r"(?<=\s)(model|optimizer|schedule|experiment)=(\w+)", line
            ):
                known = (ROOT / f"conf/{group}/{option}.yaml").is_file()
                assert known or option in ("convnet",), line


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1800
