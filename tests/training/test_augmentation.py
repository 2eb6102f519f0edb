"""Augmentation: what each change does to pictures, and what its random numbers depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fashionnet.config.schema import AugmentationConfig
from fashionnet.data.examples import Examples
from fashionnet.errors import UserError
from fashionnet.models.mlp import MLP
from fashionnet.models.transfer import Transfer
from fashionnet.system import seeds
from fashionnet.training import augmentation, loop
from fashionnet.training.augmentation import Augmentation, Mix
from fashionnet.training.by_hand import ByHand
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.optim import Adam
from fashionnet.training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

STRONG = {"flip": 0.5, "shift": 0.2, "crop": 0.3, "erase": 0.5, "cutmix": 0.5, "mixup": 0.5}


def changed(x: Tensor, seed: int = 0, epoch: int = 1, step: int = 0, **keys: float) -> Tensor:
    return changed_and_mixed(x, seed, epoch, step, **keys)[0]


def changed_and_mixed(
    x: Tensor, seed: int = 0, epoch: int = 1, step: int = 0, **keys: float
) -> tuple[Tensor, Mix | None]:
    augment = Augmentation(AugmentationConfig(**keys), seed)
    return augment(x, torch.arange(len(x)), epoch, step)


@pytest.mark.parametrize("shape", [(12, 9), (3, 8, 8)])
def test_changes_are_a_function_of_seed_epoch_and_step(shape: tuple[int, ...]) -> None:
    x = torch.rand(16, *shape)
    before, generator = x.clone(), torch.get_rng_state()
    found = [changed(x, *place, **STRONG) for place in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1))]
    assert torch.equal(changed(x, 0, 1, 0, **STRONG), found[0])
    assert all(not torch.equal(found[0], other) for other in found[1:])
    assert found[0].shape == x.shape and found[0].is_contiguous()
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), generator)


def test_pictures_are_mirrored_with_a_probability() -> None:
    x = torch.rand(400, 1, 4, 6)
    found = changed(x, flip=0.25)
    same = (found == x).all(3).all(2).all(1)
    assert torch.equal(found[~same], x[~same].flip(3))
    assert 270 < int(same.sum()) < 330
    assert torch.equal(changed(x, flip=1.0), x.flip(3))


def test_shifts_are_of_whole_pixels_and_no_larger_than_asked() -> None:
    x = torch.zeros(64, 3, 8, 12)
    x[:, :, 4, 4] = 1
    found = changed(x, shift=0.25)
    places = found[:, 0].flatten(1).argmax(1)
    assert {*(places // 12 - 4).tolist()} == {-2, -1, 0, 1, 2}
    assert {*(places % 12 - 4).tolist()} == {-3, -2, -1, 0, 1, 2, 3}
    expected = torch.zeros_like(x)
    expected[torch.arange(64), :, places // 12, places % 12] = 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_edges_are_continued_behind_a_shift() -> None:
    x = torch.ones(64, 8, 8)
    torch.testing.assert_close(changed(x, shift=0.25, crop=0.3), x)


def test_a_crop_is_a_part_of_the_picture_enlarged() -> None:
    ramp = torch.arange(40.0).expand(64, 40, 40)
    found = changed(ramp, crop=0.5)
    inner = found[:, :, 1:-1]
    steps = inner.diff(dim=2)  # 1 on the ramp; less where it is enlarged
    torch.testing.assert_close(steps.amin((1, 2)), steps.amax((1, 2)), atol=1e-3, rtol=0)
    zoom = steps.mean((1, 2))
    assert 0.5 <= float(zoom.min()) < 0.55 and 0.95 < float(zoom.max()) <= 1
    assert float(found.min()) >= 0 and float(found.max()) <= 39  # within the picture
    centers = found.mean((1, 2))
    assert float(centers.min()) < 16 and float(centers.max()) > 23  # and anywhere in it


def test_what_is_erased_is_one_rectangle_of_noise() -> None:
    x = torch.full((600, 1, 20, 40), 2.0)
    found = changed(x, erase=0.5)
    altered = (found != x)[:, 0]
    touched = altered.flatten(1).any(1)
    assert 240 < int(touched.sum()) < 360
    rows, columns = altered[touched].any(2), altered[touched].any(1)
    assert torch.equal(altered[touched], rows[:, :, None] & columns[:, None, :])
    for places, side in ((rows, 20), (columns, 40)):
        edges = places.int().diff(dim=1).abs().sum(1) + places[:, 0] + places[:, -1]
        assert (edges == 2).all()  # in one piece
        lengths = places.sum(1)
        assert int(lengths.min()) == round(0.15 * side) and int(lengths.max()) == round(0.4 * side)
        assert places[:, 0].any() and places[:, -1].any()  # anywhere
    noise = found[:, 0][altered]
    assert float(noise.min()) >= 0 and float(noise.max()) < 1 and 0.28 < float(noise.std()) < 0.30
    assert (changed(x, erase=1.0) != x).flatten(1).any(1).all()


def test_mixed_pictures_hold_as_much_of_another_as_their_labels_say() -> None:
    x = torch.arange(1.0, 9.0).view(8, 1, 1, 1).expand(8, 3, 12, 20)
    fractions: dict[str, list[float]] = {"plain": [], "cut": [], "blended": []}
    for step in range(300):
        found, mix = changed_and_mixed(x, step=step, cutmix=0.5, mixup=0.25)
        assert mix is not None
        others = mix.labels + 1.0  # what the pictures of these labels hold
        assert sorted(mix.labels.tolist()) == list(range(8))
        assert (mix.labels != torch.arange(8)).all()
        expected = mix.fraction * x[:, 0, 0, 0] + (1 - mix.fraction) * others
        torch.testing.assert_close(found.mean((1, 2, 3)), expected)
        is_whole = bool(((found == x) | (found == others.view(8, 1, 1, 1))).all())
        kind = ("cut" if is_whole else "blended") if mix.fraction < 1 else "plain"
        fractions[kind].append(mix.fraction.item())
    assert 50 < len(fractions["plain"]) < 100 and 50 < len(fractions["blended"]) < 100
    for kind in ("cut", "blended"):  # uniform in 0..1
        found_here = fractions[kind]
        assert min(found_here) < 0.1 and max(found_here) > 0.9
        assert 0.4 < sum(found_here) / len(found_here) < 0.6


def test_every_step_of_a_fit_has_changes_of_its_own() -> None:
    taken: list[tuple[int, int]] = []

    class Noting(Augmentation):
        def __call__(self, x: Tensor, labels: Tensor, epoch: int, step: int) -> Any:
            taken.append((epoch, step))
            return super().__call__(x, labels, epoch, step)

    model, augment = MLP(4, 0, (4, 4), 3), Noting(AugmentationConfig(flip=0.5), 0)
    examples = Examples(torch.zeros(10, 4, 4, dtype=torch.uint8), torch.arange(10) % 3)
    parts = (Adam(model.parameters()), ByHand(model), EarlyStopping())
    fit = TrainState(model, *parts, 0, 4, 255.0, augment=augment)
    loop.fit(fit, examples, examples[:0], 2, loop.Watcher())
    assert taken == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


def test_pictures_of_doubles_stay_doubles() -> None:
    x = torch.rand(4, 8, 8, dtype=torch.float64)
    found, mix = changed_and_mixed(x, **STRONG)
    assert found.dtype == torch.float64 and mix is not None


def test_none_changes_nothing_and_features_are_never_changed() -> None:
    model: Any = MLP()
    assert augmentation.build(AugmentationConfig(), model, 0) is None
    assert augmentation.build(AugmentationConfig(flip=0.5), model, 0) is not None
    seeds.seed_everything(0)
    frozen = Transfer(name="shufflenet_v2_x0_5")
    assert augmentation.build(AugmentationConfig(), frozen, 0) is None
    with pytest.raises(UserError, match=r"model\.trained=head computes the features .* once"):
        augmentation.build(AugmentationConfig(flip=0.5), frozen, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_on_a_gpu_changes_are_reproducible_and_nothing_waits() -> None:
    x, labels = torch.rand(16, 3, 8, 8, device="cuda"), torch.arange(16, device="cuda")
    augment = Augmentation(AugmentationConfig(**STRONG), 0)
    expected, _ = augment(x, labels, 1, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, mix = augment(x, labels, 1, 0)
        other, _ = augment(x, labels, 1, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mix is not None and found.device == x.device
    assert torch.equal(found, expected) and not torch.equal(other, expected)
