"""Random changes to training pictures: what may change, by how much, and for whom it is drawn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fashionnet.models import augmentation
from fashionnet.system.rows import Rows

Change = Callable[[Tensor, Rows], Tensor]
CHANGES: dict[str, Change] = {
    "flipped": augmentation.flipped,
    "shifted": lambda x, rows: augmentation.shifted(x, 0.25, rows),
    "erased": lambda x, rows: augmentation.erased(x, 0.5, rows),
}


def whole(x: Tensor) -> Rows:
    return Rows(0, len(x), len(x))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("shape", [(1, 12, 9), (3, 8, 8)])
def test_a_part_of_a_batch_is_changed_as_in_the_whole(
    change: Change, shape: tuple[int, ...]
) -> None:
    x = torch.rand(64, *shape)
    torch.manual_seed(7)
    expected = change(x, whole(x))
    after = torch.rand(1)
    assert expected.shape == x.shape and not torch.equal(expected, x)
    for start, stop in ((0, 64), (0, 21), (21, 60), (63, 64)):
        torch.manual_seed(7)
        assert torch.equal(change(x[start:stop], Rows(start, stop, 64)), expected[start:stop])
        assert torch.equal(torch.rand(1), after)  # the generators of all processes stay in step


def test_every_other_picture_is_mirrored() -> None:
    x = torch.rand(400, 1, 4, 6)
    torch.manual_seed(0)
    found = augmentation.flipped(x, whole(x))
    same = (found == x).all(3).all(2).all(1)
    assert torch.equal(found[~same], x[~same].flip(3))
    assert 160 < int(same.sum()) < 240


def test_shifts_move_pictures_by_no_more_than_asked() -> None:
    x = torch.zeros(64, 3, 8, 8)
    x[:, :, 4, 4] = 1
    torch.manual_seed(0)
    moved = augmentation.shifted(x, 0.25, whole(x))
    assert (moved.amax((2, 3)) == 1).all() and (moved.sum((2, 3)) == 1).all()
    places = moved[:, 0].flatten(1).argmax(1)
    assert {*(places // 8 - 4).tolist()} == {*(places % 8 - 4).tolist()} == {-2, -1, 0, 1, 2}


def test_what_is_erased_is_one_rectangle_of_noise() -> None:
    x = torch.full((600, 1, 20, 40), 2.0)
    torch.manual_seed(0)
    found = augmentation.erased(x, 0.5, whole(x))
    changed = (found != x)[:, 0]
    touched = changed.flatten(1).any(1)
    assert 240 < int(touched.sum()) < 360
    rows, columns = changed[touched].any(2), changed[touched].any(1)
    assert torch.equal(changed[touched], rows[:, :, None] & columns[:, None, :])
    for places, side in ((rows, 20), (columns, 40)):
        edges = places.int().diff(dim=1).abs().sum(1) + places[:, 0] + places[:, -1]
        assert (edges == 2).all()  # in one piece
        lengths = places.sum(1)
        assert int(lengths.min()) == round(0.15 * side) and int(lengths.max()) == round(0.4 * side)
        assert places[:, 0].any() and places[:, -1].any()  # anywhere
    noise = found[:, 0][changed]
    assert float(noise.min()) >= 0 and float(noise.max()) < 1 and 0.28 < float(noise.std()) < 0.30
    assert torch.equal(augmentation.erased(x, 0.0, whole(x)), x)
    assert (augmentation.erased(x, 1.0, whole(x)) != x).flatten(1).any(1).all()


def test_what_is_mixed_is_a_part_of_another_picture() -> None:
    torch.manual_seed(0)
    shares, fresh = [], 0
    for _ in range(300):
        x = torch.arange(1.0, 9.0).view(8, 1, 1, 1).expand(8, 3, 12, 20)
        found, mix = augmentation.mixed(x, 0.5)
        if mix is None:
            fresh += 1
            assert torch.equal(found, x)
            continue
        own = found == x
        assert torch.equal(found[~own], x[mix.partners][~own])
        moved = mix.partners != torch.arange(8)
        kept = own.double().mean((1, 2, 3))
        torch.testing.assert_close(kept[moved], torch.full_like(kept[moved], mix.share))
        assert sorted(mix.partners.tolist()) == list(range(8))
        shares.append(mix.share)
    assert 110 < fresh < 190
    assert min(shares) < 0.1 and max(shares) > 0.95 and 0.4 < sum(shares) / len(shares) < 0.62
