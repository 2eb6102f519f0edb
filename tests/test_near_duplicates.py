"""Near-duplicates are found among made-up pictures, whatever their brightness or side."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("near_duplicates")


def test_duplicates_are_found_and_counted(module: ModuleType, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (50, 12, 12), dtype=torch.uint8, generator=draw)
    test = torch.randint(0, 256, (7, 12, 12), dtype=torch.uint8, generator=draw)
    test[0] = train[31]
    test[2] = train[4] // 2 + 60  # darker, and with less contrast
    test[3] = train[8].flip(1)
    test[4, :, 6:] = train[9, :, 6:]  # a half only
    test[5] = 77
    found = module.nearest(train, test)
    assert found.index[[0, 2, 3]].tolist() == [31, 4, 8]
    assert found.is_mirrored[[0, 2, 3]].tolist() == [False, False, True]
    expected = torch.corrcoef(torch.stack([test[4], train[9]]).flatten(1).double())[0, 1]
    assert float(found.correlation[4]) == pytest.approx(float(expected), abs=1e-5)
    assert found.correlation[5] == 0

    labels = torch.arange(50) % 10
    figures = module.counted(found, labels, torch.tensor([1, 0, 4, 0, 9, 0, 0]))
    assert [pair["test"] for pair in figures["pairs"]] == [0, 3, 2]
    assert [pair["labels"] for pair in figures["pairs"]] == [[1, 1], [0, 8], [4, 4]]
    (rule,) = (each for each in figures["levels"] if each["correlation"] == module.THRESHOLD)
    assert (sum(rule["by_class"]), rule["other_label"]) == (3, 1)
    (tmp_path / "near_duplicates.json").write_text(json.dumps({"figures": figures}))
    assert module.indices(tmp_path) == [0, 3, 2]
