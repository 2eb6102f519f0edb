"""What Hydra refuses: one line that names it, and a suggestion that is accepted as printed."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from omegaconf import DictConfig

from fashionnet.config import compose, source as sources
from fashionnet.config.conf_files import ConfFile
from fashionnet.config.source import Source, shell
from fashionnet.errors import UserError
from fashionnet.search import search
from fashionnet.train import train
from tests.conftest import Commands

# What was typed, a `|` between words, and what the line says to type.
TYPED = {
    # words that are no KEY=VALUE
    "epochs 3": "epochs=3",
    "epochs|3": "epochs=3",
    "epochs|=|3": "epochs=3",
    "epochs=|3": "epochs=3",
    "epochs:3": "epochs=3",
    "epochs": "epochs=5",
    "--seed|3": "seed=3",
    "--lr|0.1|--epochs|3": "optimizer.lr=0.1",
    "model.mlp": "model=mlp",
    "model mlp": "model=mlp",
    "lesson": "experiment=lesson",
    "conf/model/mlp.yaml": "model=mlp",
    "seed=1 epochs=2": "seed=1 epochs=2",
    "model=mlp;epochs=3": "model=mlp epochs=3",
    "optimizer=adam.lr=0.1": "optimizer=adam optimizer.lr=0.1",
    # keys
    "lr=0.1": "optimizer.lr=0.1",
    "optimizer.learning_rate=0.1": "optimizer.lr=0.1",
    "optimizer/lr=0.1": "optimizer.lr=0.1",
    "dropot=0.3": "model.dropout=0.3",
    "root=/x": "data.root=/x",
    "batch-size=3": "batch_size=3",
    "+epochs=3": "epochs=3",
    "momentum=0.9": "optimizer=sgd optimizer.momentum=0.9",
    "optimizer=sgd|momentum=0.9": "optimizer.momentum=0.9",
    "experiment=transfer|lr=0.01": "optimizer.lr=0.01",
    "launcher=joblib": "hydra/launcher=joblib",
    # options
    "model=mpl": "model=mlp",
    "model=conf/model/mlp.yaml": "model=mlp",
    "data=fashion-mnist": "data=fashion_mnist",
    "data=mnst": "data=mnist",
    "data=/my/photos": "data=photos data.root=/my/photos",
    # values
    "epochs=five": "epochs=5",
    "epochs=3.0": "epochs=3",
    "epochs=1e3": "epochs=1000",
    "epochs=": "epochs=5",
    "validation_split=10%": "validation_split=0.1",
    "optimizer.lr=0,1": "optimizer.lr=0.1",
    "threads=all": "threads=null",
    "device=gpu": "device=cuda",
    "resume=true": "resume=auto",
    "gradients=by-hand": "gradients=by_hand",
    "early_stopping=3": "early_stopping.patience=3",
    "data.classes=Bag": "'data.classes=[Bag]'",
    "data.classes=Bag,Coat": "'data.classes=[Bag,Coat]'",
    "data.classes=[Bag": "'data.classes=[Bag]'",
    "model.hidden=(64,32)": "'model.hidden=[64,32]'",
    # characters
    "hydra.run.dir=a=b": '''"hydra.run.dir='a=b'"''',
    "data.root=фото": '''"data.root='фото'"''',
    "data.root=my photos (1)": '''"data.root='my photos (1)'"''',
    "data.root=it's": shlex.quote('data.root="it\'s"'),
    "data.root=~/x": f"data.root={os.path.expanduser('~/x')}",
    # several values
    "seed=0,1": "-m seed=0,1",
    "seed=range(3)": "-m 'seed=range(3)'",
    "lr=0.1,0.2": "-m optimizer.lr=0.1,0.2",
    "model=mlp,mlp_no_dropout": "-m model=mlp,mlp_no_dropout",
}


BEFORE = ("optimizer=sgd", "experiment=transfer")


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose.typed(compose.compose(*overrides), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("typed", "meant"), TYPED.items(), ids=list(TYPED))
def test_the_line_says_what_to_type_and_that_is_accepted(typed: str, meant: str) -> None:
    said = refused(*typed.split("|"))
    suggested = said.rpartition("; type ")[2].partition(" for a run with each")[0]
    assert suggested == meant
    words = shlex.split(suggested)
    words += [word for word in typed.split("|")[:-1] if word in BEFORE]
    if words[0] == "-m":
        compose.check_search(*words[1:])
    else:
        compose.typed(compose.compose(*words))


@pytest.mark.parametrize(
    "typed", ["a b", "фото", "it's", 'say "hi"', "$HOME", "a\\b'c", "x!y", "a\\", "`x`", "[*?]"]
)
def test_a_shell_gives_back_what_is_printed(typed: str) -> None:
    pasted = ["bash", "-c", f"printf %s {shell(typed)}"]
    assert subprocess.run(pasted, capture_output=True, text=True, check=True).stdout == typed


@pytest.mark.parametrize("value", ["фото", "it's", "a=b", "x'y\"z", "a b (c), [d]"])
def test_a_quoted_value_arrives_as_it_is(value: str) -> None:
    suggested = shlex.split(refused(f"data.root={value}=").rpartition("; type ")[2])
    assert compose.compose(*suggested).data.root == f"{value}="


def test_both_ways_out_are_named_where_there_are_two() -> None:
    said = refused("model.hidden=64,32")
    assert "-m model.hidden=64,32 for a run with each, or 'model.hidden=[64,32]'" in said


def test_what_cannot_be_guessed_is_answered_with_what_there_is() -> None:
    assert refused("foo=1").startswith("foo=1: unknown key foo; known here: seed, epochs,")
    assert refused("model=xyz").endswith("choose " + ", ".join(sorted(models())))
    assert refused("~seed").startswith("~seed: a key cannot be removed")


def models() -> list[str]:
    return [path.stem for path in (compose.CONF / "model").glob("*.yaml")]


def test_the_first_of_several_faults_is_the_one_that_is_named() -> None:
    assert refused("seed=1", "model.trained=all", "model=resnet18", "epochs=five") == (
        "epochs=five: 'five' is not a whole number; type epochs=5"
    )


@pytest.mark.parametrize("typed", ["epochs=five", "momentum=0.9", "seed=0,1", "model=mpl"])
def test_few_configurations_are_composed_to_explain_a_refusal(
    typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources._composed.cache_clear()
    composed: list[Sequence[str]] = []
    anew = Source.compose_anew

    def counted(source: Source, overrides: Sequence[str]) -> DictConfig:
        composed.append(overrides)
        return anew(source, overrides)

    monkeypatch.setattr(Source, "compose_anew", counted)
    refused(typed)
    assert len(composed) <= 4


def test_functions_say_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for said, overrides in {
        "type optimizer.lr=0.1": ["lr=0.1"],
        "type optimizer.lr=0.1,0.2": ["lr=0.1,0.2"],
        "type 'optimizer.lr=tag(log,interval(1e-4,1e-2))'": ["lr=tag(log,interval(1e-4,1e-2))"],
        "type model=mlp,mlp_no_dropout": ["model=mlp,mlp-no-dropout"],
    }.items():
        with pytest.raises(UserError, match=r"; type ") as caught:
            if len(overrides[0]) < 8:
                train(*overrides)
            search(*overrides)
        assert str(caught.value).endswith(said)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- a user's own files

GLOBAL = "# @package _global_\n"
FILES = {
    "a tab": (f"{GLOBAL}epochs: 3\n\tseed: 4\n", 3, 1, "spaces, not tabs"),
    "indentation": (f"{GLOBAL}epochs: 3\n  seed: 4\n", 3, 7, "check the indentation"),
    "a key twice": (f"{GLOBAL}epochs: 3\nepochs: 4\n", 3, 1, "duplicate key epochs"),
    "a quote": (f'{GLOBAL}device: "cpu\nepochs: 3\n', 2, 9, "quote opens here"),
    "a bracket": (f"{GLOBAL}data:\n  classes: [Bag\n", 3, 12, "bracket opens here"),
    "an at sign": (f"{GLOBAL}epochs: @3\n", 2, 9, "put the value in quotes"),
    "a list": (f"{GLOBAL}- epochs: 3\n", 2, 1, "not a list"),
    "a value": (f"{GLOBAL}epochs 3\n", 2, 1, "not a single value"),
    "two documents": (f"{GLOBAL}---\nepochs: 3\n---\nseed: 4\n", 4, 1, "second document"),
    "defaults of another type": (f"{GLOBAL}defaults: mlp\n", 2, 11, "must be a list"),
    "a missing option": (f"{GLOBAL}defaults:\n  - override /model: mpl\n", 3, 5, "mean mlp?"),
    "a missing group": (f"{GLOBAL}defaults:\n  - override /modle: mlp\n", 3, 5, "mean model?"),
    "a relative group": (f"{GLOBAL}defaults:\n  - override model: mlp\n", 3, 5, "'override /model"),
    "no override": (f"{GLOBAL}defaults:\n  - /model: mlp\n", 3, 5, "'override /model: mlp'"),
    "a missing file": (f"{GLOBAL}defaults:\n  - other\n", 3, 5, "there is no experiment/other"),
    "no package": ("epochs: 3\n", 1, 1, "lacks the line '# @package _global_'"),
    "no package, groups": ("defaults:\n  - override /model: mlp\n", 1, 1, "lacks the line"),
    "a package below": (f"# mine\n{GLOBAL}epochs: 3\n", 2, 1, "must be the first line"),
    "another package": ("# @package global\nepochs: 3\n", 1, 1, "must read '# @package _global_'"),
    "an unknown key": (f"{GLOBAL}seed: 1\nepoch: 3\n", 3, 1, "did you mean epochs?"),
    "a key of a section": (f"{GLOBAL}lr: 0.1\n", 2, 1, "did you mean optimizer.lr?"),
    "a wrong type": (f"{GLOBAL}epochs: three\n", 2, 1, "'three'"),
    "out of range": (f"{GLOBAL}epochs: 0\n", 2, 1, "must be 1 or more"),
    "not UTF-8": (f"{GLOBAL}device: \udcff\n", 2, 9, "not UTF-8"),
    "a control character": (f"{GLOBAL}device: \x00\n", 2, 9, "not allowed"),
}


def write(folder: Path, text: str, name: str = "experiment/mine.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


@pytest.mark.parametrize("what", FILES)
def test_a_slip_in_a_file_is_named_with_its_place(what: str, tmp_path: Path) -> None:
    text, line, column, said = FILES[what]
    path = write(tmp_path, text)
    printed = refused(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert printed.startswith(f"{path}, line {line}, column {column}: ")
    assert said in printed


def test_a_file_that_is_chosen_by_a_file_is_looked_at(tmp_path: Path) -> None:
    write(tmp_path, f"{GLOBAL}defaults:\n  - override /model: own\n")
    path = write(tmp_path, "_target_: x\n\thidden: 3\n", "model/own.yaml")
    printed = refused(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert printed.startswith(f"{path}, line 2, column 1: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "", "experiment/mine.yaml")
    path.unlink()
    path.symlink_to("nowhere")
    printed = refused(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert printed.startswith(f"{path} cannot be read: ")


def test_nothing_is_wrong_with_the_files_of_the_package() -> None:
    source = Source(compose.CONF)
    for path in compose.CONF.glob("[!h]*/*.yaml"):
        assert ConfFile(path, path.parent.name, source).fault() is None


@pytest.mark.slow
def test_commands_say_it_with_the_folder_and_with_the_primary_file(
    commands: Commands, tmp_path: Path
) -> None:
    tab = f"{GLOBAL}epochs: 3\n\tseed: 4\n"
    write(tmp_path / "mine", tab)
    write(tmp_path / "mine", tab, "main.yaml")
    for arguments, name in (
        (("--config-dir", "mine", "experiment=mine"), "mine/experiment/mine.yaml"),
        (("--config-path", str(tmp_path / "mine"), "--config-name", "main"), "mine/main.yaml"),
    ):
        printed = commands.fail("train", *arguments, cwd=tmp_path)
        assert printed.startswith(f"{name}, line 3, column 1: ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
