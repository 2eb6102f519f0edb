"""How Hydra is asked to run jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra

from fashionnet.config.compose import CONF
from fashionnet.config.hydra_app import _Given
from fashionnet.config.source import Source
from tests.conftest import Commands

HYDRAS = Hydra.get_mode


def asks_hydra(*overrides: str, source: Source | None = None) -> bool:
    """Returns whether Hydra composes a configuration to learn its mode."""
    with _Given(list(overrides), source or Source(CONF)).composed_once():
        return Hydra.get_mode is HYDRAS


@pytest.mark.parametrize(
    "overrides", [(), ("seed=1",), ("experiment=overfit",), ("early_stopping.mode=min",)]
)
def test_a_configuration_is_composed_once(overrides: tuple[str, ...]) -> None:
    assert not asks_hydra(*overrides)
    assert Hydra.get_mode is HYDRAS


def test_hydra_reads_its_mode_where_an_override_or_a_file_may_set_it(tmp_path: Path) -> None:
    assert asks_hydra("hydra.mode=MULTIRUN")
    assert asks_hydra("hydra.searchpath=[folder]")
    assert asks_hydra(source=Source(CONF, folders=(tmp_path,)))
    for mode in ("MULTIRUN", "RUN", "2"):
        (tmp_path / "train.yaml").write_text(f"hydra:\n  mode: {mode}\n")
        assert asks_hydra(source=Source(tmp_path))


def test_the_mode_may_be_an_override(commands: Commands, tmp_path: Path) -> None:
    small = ("epochs=1", "data.limit=64", "device=cpu", "hydra.sweep.dir=sweep")
    commands.succeed("train", "hydra.mode=MULTIRUN", "seed=0,1", *small, cwd=tmp_path)
    assert len(list(tmp_path.glob("sweep/*/run.json"))) == 2
