"""Transfer: the frozen stays as it was, features are computed once, fine-tuning must earn it."""

from __future__ import annotations

import io
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fashionnet import models
from fashionnet.config.schema import FineTuningConfig
from fashionnet.data.examples import Examples
from fashionnet.errors import UserError
from fashionnet.evaluate import evaluate
from fashionnet.mistakes import mistakes
from fashionnet.models import backbones
from fashionnet.models.mlp import MLP
from fashionnet.models.transfer import Transfer
from fashionnet.models.weights import weights_sha256
from fashionnet.predict import predict
from fashionnet.reproduce import reproduce
from fashionnet.runs import saved
from fashionnet.runs.network import photo_size
from fashionnet.runs.pretrained import load_pretrained
from fashionnet.system import devices
from fashionnet.system.torchvision_import import import_torchvision
from fashionnet.train import train
from fashionnet.training import evaluation, features, gradients, heads, loop, optim
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.state import TrainState
from tests.conftest import COLORS, Commands, own_data_folder

NAME = "shufflenet_v2_x0_5"  # the smallest of torchvision's
TIMM_NAME = "test_resnet"  # a tiny one, for tests


@pytest.fixture(autouse=True, scope="module")
def _quick(one_thread: None) -> None:
    """Small networks on one thread; timm's need torchvision, which may need help."""
    import_torchvision()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives what is computed once a folder of its own, beside the real data."""
    from fashionnet.data import published

    published.load("fashion_mnist")
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(features, "cache_folder", lambda: folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights that separate colors."""
    torch.manual_seed(0)
    model = network(None)
    loop.fit(fit_of(model, 3e-3), pictures(120), pictures(9, seed=1), 3, loop.Watcher())
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(model.backbone.state_dict(), path)
    return path


def network(weights: Path | None, **options: Any) -> Transfer:
    torch.manual_seed(3)
    source = {"pretrained": str(weights)} if weights else {"trained": "scratch"}
    model = Transfer(**{"name": NAME, "num_classes": 3, **source, **options})
    load_pretrained(model)
    return model


def pictures(num: int = 30, side: int = 32, seed: int = 0) -> Examples:
    """Noise with a touch of a color, which is the label."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (num, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.arange(num) % 3
    for i, label in enumerate(labels.tolist()):
        images[i, label] += 120
    return Examples(images, labels)


def fit_of(model: Transfer, lr: float = 0.01, **stopping: Any) -> TrainState:
    node = {"_target_": "fashionnet.training.optim.Adam", "lr": lr}
    early_stopping = EarlyStopping(**stopping)
    gradient = gradients.choose("auto", model)
    return TrainState(model, optim.build(node, model, 0.1), gradient, early_stopping, 0, 8, 255.0)


def whole_state(model: Transfer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in nn.Module.state_dict(model).items()}


# ------------------------------------------------------------------------------------- frozen


def test_a_frozen_backbone_keeps_every_bit_while_the_head_learns(weights: Path) -> None:
    model = network(weights)
    before = weights_sha256(model.backbone.state_dict())  # buffers included
    head = model.head.weight.detach().clone()
    loop.fit(fit_of(model), pictures(), pictures(9, seed=1), 3, loop.Watcher())
    assert weights_sha256(model.backbone.state_dict()) == before
    assert not torch.equal(model.head.weight, head)


def test_its_state_is_the_head_and_the_rest_is_frozen(weights: Path) -> None:
    model = network(weights)
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    assert set(model.frozen_state()) == {f"backbone.{key}" for key in model.backbone.state_dict()}
    other = network(None)
    assert not other.frozen_state()
    assert set(other.state_dict()) == set(whole_state(other))


def test_states_go_back_to_where_they_came_from(weights: Path) -> None:
    model, other = network(weights), Transfer(name=NAME, num_classes=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.head.weight, model.head.weight)
    x = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(other.eval()(x), model.eval()(x))
    other.load_frozen_state(model.frozen_state())
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_the_last_stages_alone_can_be_trained(weights: Path) -> None:
    model = network(weights, trained=2)
    stages = backbones.stages(model.backbone)
    before = [weights_sha256(stage.state_dict()) for stage in stages]
    loop.fit(fit_of(model), pictures(), pictures(9, seed=1), 2, loop.Watcher())
    changed = [weights_sha256(s.state_dict()) != b for s, b in zip(stages, before, strict=True)]
    assert changed == [False] * (len(stages) - 2) + [True] * 2
    assert not set(model.state_dict()) & set(model.frozen_state())
    assert {**model.state_dict(), **model.frozen_state()}.keys() == whole_state(model).keys()


@pytest.mark.parametrize("options", [{"trained": "all"}, {"batch_norm": "trained"}, {}])
def test_statistics_of_batches_move_where_they_may(weights: Path, options: dict[str, Any]) -> None:
    model = network(weights, **{"trained": "all", **options}) if options else network(None)
    before = whole_state(model)
    loop.fit(fit_of(model), pictures(), pictures(9, seed=1), 1, loop.Watcher())
    moved = {k for k, v in whole_state(model).items() if not torch.equal(v, before[k])}
    is_kept = options == {"trained": "all"}
    assert any(key.endswith("running_mean") for key in moved) is not is_kept
    assert any(key.endswith("weight") and key.startswith("backbone.conv1") for key in moved)


def test_the_backbone_learns_more_slowly_than_the_head(weights: Path) -> None:
    model = network(weights, trained="all")
    optimizer = optim.build({"_target_": "fashionnet.training.optim.Adam", "lr": 0.5}, model, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.005]
    assert [p for g in optimizer.param_groups for p in g["params"]][:2] == [
        model.head.weight,
        model.head.bias,
    ]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_norm": "off"}, "model.batch_norm=off is not known; choose frozen, trained"),
        ({"size": 4}, "model.size=4 must be 8 to 1024 pixels"),
        ({"trained": 99}, "model.trained=99 must be head, all, scratch, or the last 1 to"),
        ({"trained": "tail"}, "model.trained=tail must be"),
        ({"head_stages": 0}, "model.head_stages=0 must be 1 to"),
        ({"head_stages": 99}, "model.head_stages=99 must be 1 to"),
        (
            {"name": "swin_t", "trained": "scratch", "size": 64, "head_stages": 3},
            r"model.head_stages=3 needs stages that give maps \(N, C, H, W\)",
        ),
        ({"mean": [0.5]}, "model.mean=.*three numbers"),
        ({"std": 1e-60}, r"model\.std=1e-60 must be three numbers of 1e-06 or more"),
        ({"mean": float("nan")}, r"model\.mean=nan must be three numbers"),
        ({"mean": True}, r"model\.mean=True must be three numbers"),
        ({"pretrained": None, "trained": "head"}, r"model\.pretrained=None must be imagenet, a fi"),
        ({"pretrained": "none", "trained": "head"}, r"none goes with model\.trained=scratch"),
        ({"dropout": 1}, "dropout=1 is not in 0..1"),
    ],
)
def test_wrong_options_are_named(weights: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        network(weights, **options)


def test_from_scratch_nothing_is_pretrained_and_all_learns_alike(weights: Path) -> None:
    model, other = network(weights, trained="scratch"), network(None)
    assert torch.equal(next(model.parameters()), next(other.parameters()))
    assert {group["lr"] for group in model.parameter_groups(0.5, 0.1)} == {0.5}
    assert heads.fit_first(fit_of(model), pictures(), pictures(9), FineTuningConfig(0.1, 9)) is None


# ----------------------------------------------------------------------------------- pictures


def test_gray_pictures_become_three_channels_of_the_asked_size(weights: Path) -> None:
    model = network(weights, size=32).eval()
    gray = torch.rand(4, 28, 28)
    resized = torch.nn.functional.interpolate(
        gray[:, None], (32, 32), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(model(gray), model(resized.expand(-1, 3, -1, -1)))


def test_pictures_are_normalized(weights: Path) -> None:
    x = torch.rand(2, 3, 32, 32)
    model = network(weights, mean=[0.1, 0.2, 0.3], std=[2, 4, 8]).eval()
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [2.0, 4.0, 8.0]]).view(2, 3, 1, 1)
    torch.testing.assert_close(model.features(x), model.backbone((x - mean) / std))


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({}, backbones.IMAGENET_MEAN, backbones.IMAGENET_STD),
        ({"mean": 0, "std": 1}, (0, 0, 0), (1, 1, 1)),
        ({"mean": [0, 0.5, 0]}, (0, 0.5, 0), backbones.IMAGENET_STD),
        ({"library": "timm", "name": "tf_efficientnet_lite0"}, (0.5,) * 3, (0.5,) * 3),
        ({"library": "timm", "name": "tf_efficientnet_lite0", "mean": 0}, (0,) * 3, (0.5,) * 3),
    ],
)
def test_pictures_are_normalized_as_the_library_says_unless_keys_do(
    options: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    if "library" in options:
        pytest.importorskip("timm")
    model = network(None, **options)
    assert model.mean.flatten().tolist() == pytest.approx(mean)
    assert model.std.flatten().tolist() == pytest.approx(std)


@pytest.mark.parametrize(
    ("node", "size"),
    [
        ({"_target_": "fashionnet.models.transfer.Transfer"}, 224),
        ({"_target_": "fashionnet.models.transfer.Transfer", "name": "efficientnet_b3"}, 300),
        ({"_target_": "mine.Net", "library": "timm", "name": "test_resnet"}, 160),
        ({"_target_": "fashionnet.models.transfer.Transfer", "size": 64}, 64),
        ({"_target_": "fashionnet.models.mlp.MLP"}, 224),
    ],
)
def test_photos_have_the_networks_own_size(node: dict[str, Any], size: int) -> None:
    if "library" in node:
        pytest.importorskip("timm")
    assert photo_size(node, {}) == size
    assert photo_size(node, {"data": {"image_shape": [3, 99, 99]}}) == 99


def test_features_are_computed_in_the_runs_precision(weights: Path) -> None:
    model, examples = network(weights), pictures(6)
    exact = features.inputs(model, examples, 255.0).images
    with devices.started("cpu", 1, False, precision="bfloat16"):
        rough = features.inputs(model, examples, 255.0).images
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    alike = torch.nn.functional.cosine_similarity(exact, rough)
    assert (alike > 0.9).all()


# ----------------------------------------------------------------------------------- features


def test_the_head_sees_the_stages_it_is_to_see(weights: Path) -> None:
    model = network(weights, head_stages=3).eval()
    x = torch.rand(4, 3, 32, 32)
    maps = (x - model.mean) / model.std
    means = []
    for stage in ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"):
        maps = model.backbone.get_submodule(stage)(maps)
        means.append(maps.mean((2, 3)))
    # The last stage is conv5, whose mean is the network's own feature.
    expected = torch.cat(means[-3:], 1)
    assert model.head.in_features == expected.shape[1] > network(weights).head.in_features
    torch.testing.assert_close(model.features(x), expected)


def test_stages_that_the_head_sees_are_not_part_of_the_weights(weights: Path) -> None:
    one, three = network(weights), network(weights, head_stages=3)
    assert weights_sha256(one.frozen_state()) == weights_sha256(three.frozen_state())
    examples = pictures()
    kept = [features.inputs(model, examples, 255.0).images for model in (one, three)]
    assert torch.equal(kept[0], kept[1][:, -kept[0].shape[1] :])


def test_stages_that_the_head_sees_learn_through_it(weights: Path) -> None:
    model = network(weights, trained="all", head_stages=2)
    with torch.no_grad():
        model.head.weight[:, -1024:] = 0  # what comes through the last stage
    examples = pictures(8)
    logits = model.train()(examples.images / 255)
    (gradient,) = torch.autograd.grad(
        logits.square().sum(), [model.backbone.stage4[0].branch2[0].weight]
    )
    assert gradient.abs().sum() > 0


def test_kept_and_live_logits_agree(weights: Path) -> None:
    model, examples = network(weights), pictures()
    kept = features.inputs(model, examples, 255.0)
    assert kept.images.shape == (30, 1024) and torch.equal(kept.labels, examples.labels)
    live, found = (evaluation.logits_of(model, x, 255.0) for x in (examples.images, kept.images))
    torch.testing.assert_close(found, live, atol=1e-5, rtol=0)


def test_features_are_computed_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = network(weights), pictures()
    first = features.inputs(model, examples, 255.0)
    with monkeypatch.context() as patch:
        patch.setattr(features, "_computed", lambda *_: pytest.fail("computed again"))
        assert torch.equal(features.inputs(model, examples, 255.0).images, first.images)
        for other, scale in ((pictures(seed=2), 255.0), (pictures(29), 255.0), (examples, 1.0)):
            with pytest.raises(pytest.fail.Exception):
                features.inputs(model, other, scale)
        with torch.no_grad():
            next(model.backbone.parameters()).add_(1e-3)
        with pytest.raises(pytest.fail.Exception):
            features.inputs(model, examples, 255.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda content: content + bytes(4 * 6),
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
)
def test_damaged_features_are_computed_anew_and_reported(
    weights: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, examples = network(weights), pictures(6)
    first = features.inputs(model, examples, 255.0)
    (file,) = features.cache_folder().glob("*/features.bin")
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    assert torch.equal(features.inputs(model, examples, 255.0).images, first.images)
    assert file.read_bytes() == sound
    assert f"{file} is damaged" in caplog.text


def test_features_of_other_pictures_are_not_taken(weights: Path) -> None:
    model = network(weights)
    first, second = (features.inputs(model, pictures(6, seed=s), 255.0).images for s in (0, 1))
    files = sorted(features.cache_folder().glob("*/features.bin"))
    one, two = (file.read_bytes() for file in files)
    files[0].write_bytes(two)
    files[1].write_bytes(one)
    assert torch.equal(features.inputs(model, pictures(6, seed=0), 255.0).images, first)
    assert torch.equal(features.inputs(model, pictures(6, seed=1), 255.0).images, second)


def test_features_of_another_machine_are_not_taken(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = network(weights), pictures(6)
    features.inputs(model, examples, 255.0)
    monkeypatch.setattr(features, "_computed", lambda *_: pytest.fail("computed"))
    features.inputs(model, examples, 255.0)
    facts = devices.arithmetic(torch.device("cpu"))
    for key in facts:
        monkeypatch.setattr(devices, "arithmetic", lambda _, key=key: facts | {key: "another"})
        with pytest.raises(pytest.fail.Exception):
            features.inputs(model, examples, 255.0)


def test_two_jobs_compute_features_once(
    weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, examples = network(weights).eval(), pictures(6)
    together, computed, calls = threading.Barrier(2), features._computed, []

    def slowly(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        time.sleep(0.1)  # the other one comes meanwhile
        return computed(*arguments)

    def job(_: int) -> torch.Tensor:
        together.wait()
        return features.inputs(model, examples, 255.0).images

    monkeypatch.setattr(features, "_computed", slowly)
    with ThreadPoolExecutor(2) as pool, caplog.at_level("INFO"):
        first, second = pool.map(job, range(2))
    assert torch.equal(first, second) and len(calls) == 1
    assert "another process computes the same features; waiting for it" in caplog.text


def test_where_features_cannot_be_kept_they_are_computed(
    weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, examples = network(weights), pictures(6)
    first = features.inputs(model, examples, 255.0).images
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(features, "cache_folder", lambda: tmp_path / "file")
    assert torch.equal(features.inputs(model, examples, 255.0).images, first)


def test_other_networks_see_the_pictures_themselves(weights: Path) -> None:
    examples = pictures(6)
    for model in (nn.Linear(2, 2), network(weights, trained=1)):
        assert features.inputs(model, examples, 255.0) is examples


# --------------------------------------------------------------------- weights and the run's seed


def in_torchs_cache(home: Path) -> dict[str, torch.Tensor]:
    """Puts a whole network where torchvision keeps what it fetched; returns its weights."""
    from torchvision import models as library

    url = library.get_model_weights(NAME)["DEFAULT"].url
    path = home / "hub/checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    state: dict[str, torch.Tensor] = library.get_model(NAME).state_dict()
    torch.save(state, path)
    return state


def in_hubs_cache(home: Path) -> dict[str, torch.Tensor]:
    """Puts a whole network of timm's where its hub keeps what it fetched; returns its weights."""
    import timm
    from safetensors.torch import save_file

    repository = timm.get_pretrained_cfg(TIMM_NAME).hf_hub_id
    place, commit = home / f"models--{repository.replace('/', '--')}", "a" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    state: dict[str, torch.Tensor] = timm.create_model(TIMM_NAME).state_dict()
    save_file(state, place / "snapshots" / commit / "model.safetensors")
    return state


def begun(node: dict[str, Any], seed: int) -> tuple[Transfer, torch.Tensor]:
    """Builds the model of a run; returns it, and what is drawn next."""
    model = models.build(
        {"_target_": "fashionnet.models.transfer.Transfer", **node}, (3, 32, 32), 3, seed
    )
    load_pretrained(model)
    assert isinstance(model, Transfer)
    return model, torch.rand(4)


@pytest.mark.parametrize("source", ["imagenet", "file", "run", "timm"])
def test_the_seed_alone_decides_the_head_and_what_is_random(
    source: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    node = {"name": NAME, "pretrained": "imagenet"}
    if source == "imagenet":
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        state = in_torchs_cache(tmp_path)
    elif source == "timm":
        pytest.importorskip("timm")
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        state = in_hubs_cache(tmp_path)
        node |= {"library": "timm", "name": TIMM_NAME}
    else:
        state = torch.load(weights)
        run = request.getfixturevalue("run") if source == "run" else None
        node["pretrained"] = f"run:{run}" if run else str(weights)
    heads_of = {}
    for seed in (0, 1):
        model, drawn = begun(node, seed)
        scratch, expected = begun({**node, "trained": "scratch"}, seed)
        assert torch.equal(model.head.weight, scratch.head.weight)
        assert torch.equal(drawn, expected)
        for key, value in model.backbone.state_dict().items():
            assert torch.equal(value, state[key]), key
        heads_of[seed] = model.head.weight
    assert not torch.equal(heads_of[0], heads_of[1])


def test_reading_a_run_leaves_the_readers_generators_alone(run: Path) -> None:
    import random

    def drawn() -> tuple[float, float, list[float]]:
        return random.random(), float(np.random.rand()), torch.rand(2).tolist()

    def seeded() -> None:
        random.seed(7), np.random.seed(7), torch.manual_seed(7)

    seeded()
    expected = drawn()
    seeded()
    _ = saved.read(run).model
    assert drawn() == expected


# -------------------------------------------------------------------------------- fine-tuning


def fine_tuned(weights: Path, lr: float) -> tuple[TrainState, dict[str, Any]]:
    model = network(weights, trained="all")
    fit = fit_of(model, lr, restore_best_weights=True)
    examples, held_out = pictures(), pictures(9, seed=1)
    found = heads.fit_first(fit, examples, held_out, FineTuningConfig(head_epochs=5))
    assert found is not None and found["epochs"] == 5
    with devices.on_all_cores():  # as features are computed
        before = evaluation.evaluate(model, held_out, 255.0)
    assert before.accuracy == found["accuracy"]
    assert before.loss == pytest.approx(found["loss"])
    loop.fit(fit, examples, held_out, 3, loop.Watcher())
    with devices.on_all_cores():
        after = evaluation.evaluate(model, held_out, 255.0)
    return fit, found | {"after": after.loss}


def test_fine_tuning_that_helps_is_kept(weights: Path) -> None:
    fit, found = fine_tuned(weights, 0.01)
    assert found["after"] < found["loss"]
    assert found["after"] == pytest.approx(min(row["val_loss"] for row in fit.history))


def test_fine_tuning_that_harms_gives_way_to_the_head(weights: Path) -> None:
    fit, found = fine_tuned(weights, 0.3)
    assert min(row["val_loss"] for row in fit.history) > found["loss"]
    assert found["after"] == pytest.approx(found["loss"])


def test_a_head_is_not_fitted_twice(weights: Path) -> None:
    fit, one = fit_of(network(weights, trained="all")), FineTuningConfig(head_epochs=1)
    fit.step = 1  # as after a resume
    assert heads.fit_first(fit, pictures(), pictures(9), one) is None
    assert heads.fit_first(fit_of(network(weights)), pictures(), pictures(9), one) is None


def test_keys_for_a_backbone_are_refused_without_one(weights: Path, tmp_path: Path) -> None:
    heads.check(MLP(), FineTuningConfig())
    heads.check(network(weights), FineTuningConfig(head_epochs=2))
    with pytest.raises(UserError, match=r"fine_tuning\.head_epochs .* MLP has none; leave it out"):
        train("fine_tuning.head_epochs=2", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------- commands


def overrides(photos: Path, weights: Path, *others: str) -> list[str]:
    return [
        *("model=transfer", f"model.name={NAME}", f"model.pretrained={weights}", "data=photos"),
        *(f"data.root={photos}", "data.size=32", "epochs=2", "batch_size=8", *others),
    ]


@pytest.fixture(scope="module")
def cache(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder of the tests' own; `commands` outlive it."""
    with own_data_folder(tmp_path_factory.mktemp("cache")) as place:
        yield place


@pytest.fixture(scope="module")
def run(photos: Path, weights: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of experiment=transfer on photos."""
    path = tmp_path_factory.mktemp("run") / "run"
    train("experiment=transfer", *overrides(photos, weights, "epochs=3"), run_dir=path)
    return path


def test_a_run_on_photos_is_a_run_like_any_other(run: Path, photos: Path, cache: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "completed"
    assert record["data"]["class_names"] == sorted(COLORS)
    assert record["data"]["image_shape"] == [3, 32, 32]
    assert record["data"]["test"] == 24  # val/ is what is reported
    assert record["data"]["train"] + record["data"]["validation"] == 60
    assert record["test"]["accuracy"] > 0.9
    assert evaluate(run).loss == pytest.approx(record["validation"]["loss"])
    assert evaluate(run, "test").accuracy == record["test"]["accuracy"]
    assert json.loads((run / "run.json").read_text())["test"]["evaluations"] == 2
    (prediction,) = predict(run, [photos / "val/red/0.png"])
    assert prediction.best_guess == "red" and set(prediction.probabilities) == set(COLORS)
    report = mistakes(run)
    assert len(report.diagnosis.labels) == record["data"]["validation"]


@pytest.mark.parametrize("experiment", ["transfer", "fine_tune"])
def test_a_run_is_reproduced_to_the_bit(
    experiment: str, run: Path, photos: Path, weights: Path, tmp_path: Path
) -> None:
    source = None
    if experiment == "fine_tune":
        keys = overrides(photos, weights, "augmentation=strong", "epochs=1")
        run = train("experiment=fine_tune", *keys, run_dir=tmp_path / "run").run_dir
        source = str(shutil.copy(weights, tmp_path / "elsewhere.pth"))
    outcome = reproduce(run, out=tmp_path / "again", pretrained=source)
    assert (outcome.verdict, outcome.differences) == ("identical", [])


def test_a_run_holds_its_frozen_weights_once(run: Path, weights: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoints").iterdir()}
    assert sizes["frozen.pt"] > 10 * sizes["last.pt"]
    model = saved.read(run).model
    assert isinstance(model, Transfer)
    record = json.loads((run / "run.json").read_text())
    assert record["frozen_sha256"] == weights_sha256(model.frozen_state())
    assert weights_sha256(model.backbone.state_dict()) == weights_sha256(torch.load(weights))


def test_frozen_weights_of_another_network_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    torch.save({"model": {"head.weight": torch.zeros(1)}}, tmp_path / "copy/checkpoints/frozen.pt")
    with pytest.raises(UserError, match=r"frozen\.pt does not fit the recorded model"):
        _ = saved.read(tmp_path / "copy").model
    (tmp_path / "copy/checkpoints/frozen.pt").unlink()
    with pytest.raises(UserError, match=r"frozen\.pt is missing"):
        _ = saved.read(tmp_path / "copy").model


def test_a_run_is_the_source_of_another(
    run: Path, photos: Path, cache: Path, tmp_path: Path
) -> None:
    again = train(*overrides(photos, Path(f"run:{run}"), "epochs=1"), run_dir=tmp_path / "run")
    first, second = (json.loads((path / "run.json").read_text()) for path in (run, again.run_dir))
    assert first["frozen_sha256"] == second["frozen_sha256"]
    with pytest.raises(UserError, match=r"^model\.pretrained=run:/nowhere: /nowhere is not a"):
        train(*overrides(photos, Path("run:/nowhere")), run_dir=tmp_path / "other")
    with pytest.raises(UserError, match=f"is of {NAME}, this model is resnet18"):
        train(
            *overrides(photos, Path(f"run:{run}"), "model.name=resnet18"),
            run_dir=tmp_path / "other",
        )


def test_a_run_keeps_its_input_when_the_library_changes_it(
    photos: Path, weights: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(size: int, mean: float) -> None:
        found = backbones.Input(size, (mean,) * 3, (0.25,) * 3)
        monkeypatch.setattr(backbones, "expected_input", lambda *_: found)

    def bits(path: Path) -> str:
        return str(json.loads((path / "run.json").read_text())["weights_sha256"])

    keys = [key for key in overrides(photos, weights) if not key.startswith("data.size")]
    says(32, 0.3)
    two, three = (tmp_path / name for name in ("two", "three"))
    train(*keys, "epochs=1", run_dir=two)
    train(*keys, "epochs=2", run_dir=three)
    record = json.loads((two / "run.json").read_text())
    assert record["data"]["image_shape"] == [3, 32, 32]
    assert record["input"]["mean"] == pytest.approx([0.3] * 3)
    assert record["config"]["data"]["size"] is record["config"]["model"]["mean"] is None
    says(48, 0.7)
    assert evaluate(two).loss == record["validation"]["loss"]
    assert predict(two, [photos / "val/red/0.png"])[0].best_guess == "red"
    train(*keys, "epochs=2", run_dir=two)
    assert bits(two) == bits(three)
    # A network that starts from this one's weights takes its input, too.
    again = train(
        *[key for key in keys if "pretrained" not in key],
        *(f"model.pretrained=run:{two}", "epochs=1", "data.size=32"),
        run_dir=tmp_path / "again",
    )
    assert again.record["input"]["mean"] == pytest.approx([0.3] * 3)


@pytest.mark.slow
def test_a_killed_fine_tuning_goes_on_to_the_same_bits(
    commands: Commands, photos: Path, weights: Path, cache: Path, tmp_path: Path
) -> None:
    line = [
        *("train", "experiment=fine_tune"),
        *overrides(photos, weights, "threads=1", "epochs=5", "checkpoint.every_seconds=0.01"),
        *("augmentation=strong", "fine_tuning.head_epochs=2"),
    ]
    environment = {"FASHIONNET_DATA": str(cache)}
    commands.succeed(*line, "hydra.run.dir=whole", cwd=tmp_path, **environment)
    process = commands.start(*line, "hydra.run.dir=killed", cwd=tmp_path, **environment)
    history = tmp_path / "killed/history.jsonl"
    while process.poll() is None and not (history.exists() and history.read_text().count("\n") > 1):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert json.loads((tmp_path / "killed/run.json").read_text())["status"] == "running"
    weights_here = weights.rename(weights.with_name("moved.pth"))  # it needs them no more
    try:
        commands.succeed(*line, "hydra.run.dir=killed", cwd=tmp_path, **environment)
    finally:
        weights_here.rename(weights)
    whole, killed = (commands.opened(tmp_path / name) for name in ("whole", "killed"))
    assert whole.bits == killed.bits
    assert whole.record["kept"] == killed.record["kept"]


def test_facts_of_a_start_are_written_once(
    photos: Path, weights: Path, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    line = [
        *overrides(photos, weights, "epochs=1", "model.trained=1", "fine_tuning.head_epochs=1"),
        *("early_stopping.restore_best_weights=true", "device=cpu"),
    ]
    of_start = ("initial_weights_sha256", "frozen_sha256", "head", "kept")
    first = train(*line, run_dir=path).record
    assert set(of_start) <= first.keys()

    (path / "run.json").write_text(json.dumps({**first, "status": "interrupted"}))
    resumed = train(*line, "checkpoint.every_seconds=9", run_dir=path).record
    once = (*of_start, "started", "command", "device", "packages", "choices", "config", "git")
    assert {key: resumed[key] for key in once} == {key: first[key] for key in once}
    (part,) = resumed["continued"]
    assert part["started"] > resumed["started"]
    assert part["config"]["checkpoint"]["every_seconds"] == 9  # what was different is kept

    longer = train(*line, "epochs=2", run_dir=path).record
    assert {key: longer[key] for key in of_start[:3]} == {key: first[key] for key in of_start[:3]}
    assert longer["kept"] in ("head", "fine_tuned")
    assert "continued" not in longer and longer["parents"][-1] == resumed
    outcome = reproduce(path)
    assert (outcome.verdict, outcome.differences) == ("identical", [])


def test_classes_of_fashion_mnist(weights: Path, tmp_path: Path) -> None:
    classes = "data.classes=[Bag,Sandal,Coat]"
    run = train(classes, "data.limit=60", "epochs=1", run_dir=tmp_path / "run")
    assert run.record["data"]["class_names"] == ["Bag", "Sandal", "Coat"]
    assert run.record["data"]["test"] == 3000
    assert evaluate(run.run_dir, "test").accuracy == run.record["test"]["accuracy"]
    for wrong, message in (("[Bag,Hat]", "no class is called Hat"), ("[Bag]", "two or more")):
        with pytest.raises(UserError, match=message):
            train(f"data.classes={wrong}", run_dir=tmp_path / "other")


def test_a_png_of_examples_shows_photos_in_color() -> None:
    from fashionnet.runs import tiles

    examples = pictures(9, side=100)
    shown = Image.open(io.BytesIO(tiles.examples(examples, ("r", "g", "b"))))
    assert shown.mode == "RGB"
    red = np.asarray(shown)[20, 92 + 20]
    assert red[0] > red[1] + 60
