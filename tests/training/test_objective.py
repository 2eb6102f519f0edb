"""What a fit minimizes: smoothed and weighted cross-entropy, and a model's own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashionnet.config import compose
from fashionnet.errors import UserError
from fashionnet.models.mlp import MLP
from fashionnet.train import train
from fashionnet.training import gradients, objective
from fashionnet.training.augmentation import Mix
from fashionnet.training.by_hand import ByHand
from fashionnet.training.objective import Objective

pytestmark = pytest.mark.usefixtures("one_thread")

LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 0, 1])
PLAIN = F.cross_entropy(LOGITS, LABELS, reduction="none")


def test_smoothing_shares_a_fraction_of_each_label_among_all_classes() -> None:
    loss, losses = Objective(nn.Identity(), label_smoothing=0.3)(LOGITS, LABELS)
    targets = F.one_hot(LABELS, 3) * 0.7 + 0.1
    expected = -(targets * F.log_softmax(LOGITS, 1)).sum(1)
    assert losses is not None
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(loss, expected.mean())


def test_balanced_weights_are_scikit_learns() -> None:
    weight = pytest.importorskip("sklearn.utils.class_weight")
    expected = weight.compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy())
    weights = objective.balanced_weights(LABELS, 3)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    loss, losses = Objective(nn.Identity(), class_weights=weights)(LOGITS, LABELS)
    assert losses is not None
    torch.testing.assert_close(losses, PLAIN * weights[LABELS])
    torch.testing.assert_close(loss, losses.mean())  # over the batch, as Keras; not by weights


def test_a_class_without_examples_has_no_weight_and_the_mean_stays_one() -> None:
    weights = objective.balanced_weights(LABELS, 5)
    assert weights[3:].tolist() == [0, 0]
    assert weights[LABELS].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "class_weights": torch.rand(3)}])
def test_mixed_pictures_count_for_both_their_labels(options: dict[str, Any]) -> None:
    minimized = Objective(nn.Identity(), **options, mixes=True)
    mix = Mix(LABELS.roll(1), torch.tensor(0.3))
    loss, losses = minimized(LOGITS, LABELS, mix)
    (own, _), (others, _) = minimized(LOGITS, LABELS), minimized(LOGITS, mix.labels)
    torch.testing.assert_close(loss, 0.3 * own + 0.7 * others)
    assert losses is not None and losses.mean().item() == pytest.approx(loss.item())


def test_it_is_what_a_step_goes_down() -> None:
    model, x, mix = nn.Linear(4, 3), torch.randn(6, 4), Mix(LABELS.roll(1), torch.tensor(0.3))
    minimized = Objective(model, 0.2, torch.tensor([1.0, 2.0, 3.0]), mixes=True)
    step = gradients.choose("auto", model, minimized)
    step(x, LABELS, mix)
    loss, losses = minimized(model(x), LABELS, mix)
    assert step.losses is not None and losses is not None and torch.equal(step.losses, losses)
    torch.testing.assert_close(model.weight.grad, torch.autograd.grad(loss, model.weight)[0])


class Own(MLP):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none") ** 2


def test_gradients_by_hand_are_for_plain_cross_entropy_alone() -> None:
    weights = torch.ones(10)
    assert isinstance(gradients.choose("auto", MLP()), ByHand)
    for model, given in (
        (MLP(), Objective(MLP(), label_smoothing=0.1)),
        (MLP(), Objective(MLP(), class_weights=weights)),
        (MLP(), Objective(MLP(), mixes=True)),
        (Own(), None),
    ):
        assert isinstance(gradients.choose("auto", model, given), gradients.Autograd)
        with pytest.raises(UserError, match="minimizes another loss; use gradients=autograd"):
            gradients.choose("by_hand", model, given)


@pytest.mark.parametrize(
    "key", ["label_smoothing=0.1", "class_weights=balanced", "augmentation.cutmix=0.5"]
)
def test_what_changes_cross_entropy_is_refused_where_it_would_do_nothing(key: str) -> None:
    with pytest.raises(UserError, match=r"gradients=by_hand computes plain cross-entropy"):
        compose.typed(compose.compose(key, "gradients=by_hand"))
    config = compose.typed(compose.compose(key))
    objective.build(config, MLP(), LABELS, 10)
    with pytest.raises(UserError, match=r"Own has a loss of its own; leave the key out"):
        objective.build(config, Own(), LABELS, 10)


def test_values_that_are_refused() -> None:
    for key, said in (
        ("label_smoothing=1", "label_smoothing=1.0 must be below 1"),
        ("class_weights=even", "class_weights=even is not known; choose balanced"),
        ("augmentation.erase=1.1", "augmentation.erase=1.1 must be at most 1"),
        ("augmentation.shift=0.6", "augmentation.shift=0.6 must be at most 0.5"),
        ("augmentation=strong augmentation.mixup=0.7", "add up to more than 1"),
        ("fine_tuning.backbone_lr=0", "fine_tuning.backbone_lr=0.0 must be above 0"),
        ("fine_tuning.head_epochs=-1", "fine_tuning.head_epochs=-1 must be 0 or more"),
    ):
        with pytest.raises(UserError, match=said):
            compose.typed(compose.compose(*key.split()))


def test_loss_is_what_is_minimized_and_val_loss_stays_cross_entropy(tmp_path: Path) -> None:
    options = ("data.limit=64", "validation_split=0.002", "epochs=1", "device=cpu")
    still = (*options, "model=mlp_no_dropout", "optimizer.lr=1e-30", "gradients=autograd")
    plain = train(*still, run_dir=tmp_path / "plain").history[0]
    keys = ("label_smoothing=0.5", "class_weights=balanced", "augmentation.mixup=1")
    for key in keys:
        row = train(*still, key, run_dir=tmp_path / key).history[0]
        assert row["loss"] != pytest.approx(plain["loss"], rel=1e-3)
        assert row["val_loss"] == plain["val_loss"]


def test_an_augmented_run_is_a_function_of_its_configuration(tmp_path: Path) -> None:
    options = ("data.limit=64", "validation_split=0.002", "device=cpu", "augmentation=strong")
    one, two = (train(*options, "epochs=2", run_dir=tmp_path / name) for name in "ab")
    assert one.record["weights_sha256"] == two.record["weights_sha256"]
    train(*options, "epochs=1", run_dir=tmp_path / "c")
    assert (
        train(*options, "epochs=2", run_dir=tmp_path / "c").history[1]["loss"]
        == (one.history[1]["loss"])
    )
    plain = train(*options[:-1], "epochs=2", run_dir=tmp_path / "d")
    assert plain.history[0]["loss"] != one.history[0]["loss"]
