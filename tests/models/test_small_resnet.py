"""The residual network for short trainings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fashionnet.errors import UserError
from fashionnet.models import build
from fashionnet.models.small_resnet import SmallResNet, _Convolution, _Convolve
from fashionnet.models.weights import num_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_default_has_the_parameters_that_its_docs_name() -> None:
    node = {"_target_": "fashionnet.models.small_resnet.SmallResNet"}
    model = build(node, (28, 28), 10, seed=0)
    assert num_parameters(model) == 639_594
    assert model(torch.rand(3, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize(
    ("shape", "widths"), [((28, 28), [8]), ((3, 32, 32), [8, 12, 16]), ((9, 13), [4, 4])]
)
def test_it_takes_gray_and_color_of_any_size(shape: tuple[int, ...], widths: list[int]) -> None:
    model = SmallResNet(widths, input_shape=shape, num_classes=7)
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    assert model.eval()(torch.rand(2, *shape)).shape == (2, 7)


def test_evaluation_sees_the_mirror_image_and_training_does_not() -> None:
    torch.manual_seed(0)
    model, x = SmallResNet([8, 8]), torch.rand(5, 28, 28)
    assert not torch.allclose(model(x), model(x.flip(-1)))
    model.eval()
    torch.testing.assert_close(model(x), model(x.flip(-1)))
    single = SmallResNet([8, 8], mirrored=False).eval()
    single.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), (single(x) + single(x.flip(-1))) / 2)
    assert not torch.allclose(single(x), single(x.flip(-1)))


def test_the_first_layer_is_fixed_and_its_patterns_are_orthogonal_pairs() -> None:
    layer = SmallResNet([8], input_shape=(3, 28, 28)).features[0]
    assert isinstance(layer, torch.nn.Conv2d)
    assert not layer.weight.requires_grad
    weight = layer.weight.detach()
    for channel in range(3):
        own = weight[32 * channel : 32 * channel + 32]
        has_mean = own.sum((2, 3)).abs() > 1e-4
        assert has_mean.nonzero().tolist() == [[0, channel], [16, channel]]  # the constant ones
        assert torch.equal(own[:16], -own[16:])
        patterns = own[:16, channel].flatten(1)
        products = patterns @ patterns.T
        norms = torch.tensor([(1 + 2 * u) * (1 + 2 * v) for u in range(4) for v in range(4)])
        torch.testing.assert_close(products, torch.diag(norms.float() ** 2), atol=1e-3, rtol=1e-5)
        assert own.count_nonzero() == own[:, channel].count_nonzero()


def test_its_patterns_respond_about_equally_to_garments() -> None:
    from fashionnet.config.schema import DataConfig
    from fashionnet.data import load

    pictures = load(DataConfig(name="fashion_mnist")).train.images[:2000].float() / 255
    layer = SmallResNet([8]).features[0]
    found = layer(pictures.unsqueeze(1))[:, :16].std((0, 2, 3))
    assert found.min() / found.median() > 0.5 and found.max() / found.median() < 3


def test_its_arithmetic_is_that_of_torch() -> None:
    torch.manual_seed(1)
    model, x = SmallResNet([4, 6, 5], mirrored=False).eval(), torch.rand(2, 28, 28)
    weights = dict(model.named_parameters())
    first = F.relu(F.conv2d(x.unsqueeze(1), weights["features.0.weight"], stride=2, padding=1))
    scale = 1 / math.sqrt(1 + 1e-5)  # batch statistics that are not trained yet

    def stage(name: str, x: torch.Tensor, pool: int = 1) -> torch.Tensor:
        found = F.conv2d(x, weights[f"{name}.0.weight"], padding=1)
        return F.relu(F.max_pool2d(found, pool) * scale)

    first = stage("features.2", first, 2)
    second = stage("features.3", first)
    second = second + stage("features.4.layer", second)
    third = stage("features.6", F.max_pool2d(second, 2))
    third = third + stage("features.7.layer", third)
    logits = F.linear(third.amax((2, 3)), weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(model(x), logits)


def test_the_gradients_of_its_convolutions_are_right() -> None:
    torch.manual_seed(2)
    x = torch.rand(3, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Convolve.apply, (x, weight))


@pytest.mark.parametrize(
    ("side", "is_bfloat16", "is_swapped"),
    [(3, False, True), (4, True, True), (7, True, True), (7, False, False), (14, True, False)],
)
def test_its_convolutions_are_those_of_torch(
    side: int, is_bfloat16: bool, is_swapped: bool
) -> None:
    torch.manual_seed(3)
    layer, x = _Convolution(16, 32), torch.randn(24, 16, side, side, requires_grad=True)
    result = torch.randn(24, 32, side, side)

    def gradients(convolve: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            found = convolve()
        assert found.dtype == (torch.bfloat16 if is_bfloat16 else torch.float32)
        own, *parts = found, *torch.autograd.grad((found * result).sum(), (x, layer.weight))
        return own, *parts

    ours = gradients(lambda: layer(x))
    assert ("_Convolve" in str(ours[0].grad_fn)) == is_swapped
    theirs = gradients(lambda: F.conv2d(x, layer.weight, padding=1))
    for own, other in zip(ours, theirs, strict=True):
        error = (own - other).float().norm() / other.float().norm()
        assert error < (8e-3 if is_bfloat16 else 1e-6)


def test_its_convolutions_are_plain_in_evaluation() -> None:
    layer = _Convolution(2, 3).eval()
    assert "_Convolve" not in str(layer(torch.rand(1, 2, 3, 3)).grad_fn)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([], "must be a list of channel numbers"),
        ([8, "a"], "must be a list of channel numbers"),
        ([8, True], "must be a list of channel numbers"),
        ([0], "each stage has 1 to 4096 channels"),
        ([5000], "each stage has 1 to 4096 channels"),
        ([8] * 6, "makes 6 stages, too many for pictures of 28 x 28 pixels"),
    ],
)
def test_impossible_widths_are_refused(widths: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SmallResNet(widths)
