"""Networks without their final layer, and weights for them from files of every kind."""

from __future__ import annotations

import pickle
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fashionnet.errors import UserError
from fashionnet.models import backbones
from fashionnet.runs import pretrained
from fashionnet.system import extras
from fashionnet.system.torchvision_import import import_torchvision
from fashionnet.train import train
from tests.conftest import Commands

NAME = "shufflenet_v2_x0_5"  # the smallest of torchvision's


@pytest.fixture(autouse=True, scope="module")
def _quick(one_thread: None) -> None:
    """Small networks on one thread; timm's need torchvision, which may need help."""
    import_torchvision()


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """A whole network's weights, its final layer of 1,000 classes included."""
    import_torchvision()
    from torchvision import models

    torch.manual_seed(1)
    state: dict[str, Tensor] = models.get_model(NAME, weights=None).state_dict()
    return state


def loaded(source: str | Path) -> nn.Module:
    backbone, _ = backbones.build("torchvision", NAME)
    pretrained.load(backbone, str(source), "torchvision", NAME)
    return backbone


def assert_is(backbone: nn.Module, whole: Mapping[str, Tensor], atol: float = 0) -> None:
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, whole[key], atol=atol, rtol=atol)


@pytest.mark.parametrize(("name", "width"), [(NAME, 1024), ("mobilenet_v3_small", 1024)])
def test_torchvisions_networks_give_features(name: str, width: int) -> None:
    backbone, found = backbones.build("torchvision", name)
    assert found == width
    with torch.inference_mode():
        assert backbone.eval()(torch.rand(2, 3, 64, 64)).shape == (2, width)


def test_timms_networks_give_features() -> None:
    pytest.importorskip("timm")
    backbone, width = backbones.build("timm", "tf_efficientnet_lite0")
    with torch.inference_mode():
        assert backbone.eval()(torch.rand(2, 3, 64, 64)).shape == (2, width) == (2, 1280)


def test_stages_go_from_the_picture_to_the_features_and_hold_all_weights() -> None:
    for library, name, least in (("torchvision", "resnet18", 6), ("torchvision", NAME, 5)):
        backbone, _ = backbones.build(library, name)
        stages = backbones.stages(backbone)
        assert len(stages) >= least
        held = {id(p) for stage in stages for p in stage.parameters()}
        assert held == {id(p) for p in backbone.parameters()}
    resnet, _ = backbones.build("torchvision", "resnet18")
    assert backbones.stages(resnet)[-1] is resnet.layer4


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize(
    ("library", "name", "message"),
    [
        ("torchvision", "resnet81", r"is not a classification model .* \(did you mean res"),
        ("torchvision", "googlenet", "no final Linear layer"),
        ("torchvision", "squeezenet1_0", "no final Linear layer"),
        ("keras", "resnet18", "model.library=keras is not known; choose torchvision or timm"),
    ],
)
def test_what_is_not_a_backbone_is_refused(library: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbones.build(library, name)


def test_timm_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=f"needs timm: {re.escape(extras.install_command('timm'))}"):
        backbones.build("timm", "tf_efficientnet_lite0")


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, path)


SAVES: dict[str, Callable[[Any, Path], None]] = {
    "weights.safetensors": save_safetensors,
    "weights.pth": torch.save,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", SAVES)
def test_weights_come_from_files_of_every_kind(
    whole: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    SAVES[name](whole, tmp_path / name)
    assert_is(loaded(tmp_path / name), whole)


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def _within(key: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: state, "epoch": 3, "optimizer": {"state": {}}}


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    **{f"in {key}": partial(_within, key) for key in ("state_dict", "my_own_name")},
    **{
        f"as {prefix}": partial(_prefixed, prefix)
        for prefix in ("module.", "backbone.", "module._orig_mod.", "model.net.backbone.")
    },
    "Lightning's": lambda state: {
        "state_dict": {**_prefixed("model.", state), "loss.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
    },
    "an average beside it": lambda state: {
        "state_dict": state,
        "state_dict_ema": {key: torch.zeros_like(value) for key, value in state.items()},
    },
    "compiled within": lambda state: {
        key.replace("stage2.", "stage2._orig_mod."): value for key, value in state.items()
    },
    "counters of another kind": lambda state: {
        key: value.int() if key.endswith("tracked") else value for key, value in state.items()
    },
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_weights_that_are_wrapped_load(whole: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    torch.save(WRAPPERS[name](whole), tmp_path / "w.pt")
    assert_is(loaded(tmp_path / "w.pt"), whole)


_KEY = "conv1.0.weight"
ODD: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "nan": (lambda s: s | {_KEY: s[_KEY] * float("nan")}, f"{_KEY} holds numbers that are nan or"),
    "too large": (lambda s: s | {_KEY: s[_KEY].double() + 1e300}, f"{_KEY} holds numbers that"),
    "a statistic": (
        lambda s: s | {"conv1.1.running_var": s["conv1.1.running_var"] * float("nan")},
        "conv1.1.running_var holds numbers that are nan",
    ),
    "meta": (lambda s: s | {_KEY: s[_KEY].to("meta")}, f"{_KEY} has a shape and no values"),
    "sparse": (lambda s: s | {_KEY: s[_KEY].to_sparse()}, f"{_KEY} is sparse"),
    "quantized": (
        lambda s: s | {_KEY: torch.quantize_per_tensor(s[_KEY], 0.1, 0, torch.qint8)},
        f"{_KEY} is quantized",
    ),
    "integer": (lambda s: s | {_KEY: s[_KEY].to(torch.int8)}, f"{_KEY} is of int8, not of floatin"),
    "complex": (lambda s: s | {_KEY: s[_KEY] * 1j}, f"{_KEY} is of complex64, not of floating"),
    "two networks": (
        lambda s: {**_prefixed("student.", s), **_prefixed("teacher.", s)},
        "holds several such networks, student, teacher; save the state dict of one",
    ),
    "nothing": (lambda s: {"epoch": 3}, "holds no weights by name"),
    "deep": (lambda s: _nested(s, 50), "holds no weights by name"),
}


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = {"in": value}
    return value


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("name", ODD)
def test_tensors_that_are_not_weights_are_named(
    whole: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    make, message = ODD[name]
    torch.save(make(dict(whole)), tmp_path / "w.pt")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        loaded(tmp_path / "w.pt")
    assert str(caught.value).startswith(f"model.pretrained={tmp_path / 'w.pt'}")


def test_what_a_final_layer_holds_does_not_matter(whole: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**whole, "fc.weight": whole["fc.weight"] / 0}, tmp_path / "w.pt")
    assert_is(loaded(tmp_path / "w.pt"), whole)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_network_is_refused_with_how_to_save_its_weights(tmp_path: Path) -> None:
    network, _ = backbones.build("torchvision", NAME)
    torch.save(network, tmp_path / "w.pt")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    for name, what in (("w.pt", "torchvision.models.shuffle"), ("script.pt", "TorchScript")):
        with pytest.raises(UserError, match=rf"{what}.*torch\.save\(model\.state_dict\(\), FILE\)"):
            loaded(tmp_path / name)


def test_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.pretrained=.* is a folder"):
        loaded(tmp_path)
    with pytest.raises(UserError, match=r"nowhere\.pth: the file does not exist"):
        loaded(tmp_path / "nowhere.pth")


def test_weights_without_the_final_layer_or_its_counters_load(
    whole: dict[str, Tensor], tmp_path: Path
) -> None:
    short = {k: v for k, v in whole.items() if not k.startswith("fc.")}
    short = {k: v for k, v in short.items() if not k.endswith("num_batches_tracked")}
    torch.save(short, tmp_path / "w.pth")
    assert_is(loaded(tmp_path / "w.pth"), whole)


def test_weights_of_half_precision_become_whole(whole: dict[str, Tensor], tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in whole.items()}
    save_safetensors(half, tmp_path / "w.safetensors")
    backbone = loaded(tmp_path / "w.safetensors")
    assert next(backbone.parameters()).dtype == torch.float32
    assert_is(backbone, whole, atol=1e-2)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    from torchvision import models

    torch.save(models.mobilenet_v3_small(weights=None).state_dict(), tmp_path / "m.pth")
    with pytest.raises(UserError, match=rf"holds no weights of {NAME}: \d+ keys are missing"):
        loaded(tmp_path / "m.pth")


def test_weights_of_another_size_are_refused(whole: dict[str, Tensor], tmp_path: Path) -> None:
    key = "conv5.0.weight"
    torch.save({**whole, key: whole[key][:10]}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"conv5\.0\.weight is \(10, 192, 1, 1\) there, \(1024,"):
        loaded(tmp_path / "w.pth")


def test_weights_of_a_larger_network_are_refused(whole: dict[str, Tensor], tmp_path: Path) -> None:
    more = {f"stage9.{i}.weight": torch.zeros(1) for i in range(5)}
    torch.save({**whole, **more}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="weights of another network"):
        loaded(tmp_path / "w.pth")


class Malice:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, legacy: bool) -> None:
    state = {"a": Malice(tmp_path / "mark")}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UserError,
        match=r"w\.pth holds more than named tensors, getattr, and was not opened; save the wei",
    ):
        loaded(tmp_path / "w.pth")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", pickle.dumps([1, 2])])
def test_a_file_without_weights_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pretrained=.*w\.(pth|safetensors)"):
        loaded(path)


def test_weights_without_names_are_refused(tmp_path: Path) -> None:
    for i, state in enumerate(([torch.zeros(1)], torch.zeros(1), {"a": 3}, {1: torch.zeros(1)})):
        torch.save(state, tmp_path / f"{i}.pth")
        with pytest.raises(UserError, match="holds no weights by name"):
            loaded(tmp_path / f"{i}.pth")


def test_without_a_network_the_error_says_which_file_goes_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (("https_proxy", "http://127.0.0.1:9"), ("no_proxy", "")):
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies it has met
    with pytest.raises(UserError) as refusal:
        train("model=resnet18", "data.limit=100", run_dir=tmp_path / "run")
    for part in (
        "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        str(tmp_path / "torch/hub/checkpoints"),
        "model.pretrained=PATH",
    ):
        assert part in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("hf-hub:timm/resnet18", "timm/resnet18", "local-dir:/etc", "local-dir:resnet18"),
        *("resnet18.x:/etc", "resnet18.a/../b", "resnet18.a.b", "", "..", 3, ["resnet18"], None),
        "x" * 5000,
    ],
)
def test_only_architectures_are_built_by_name(name: Any) -> None:
    # timm by itself fetches the first of these, and opens the folders of others.
    pytest.importorskip("timm")
    for library in backbones.LIBRARIES:
        with pytest.raises(UserError, match=r"^model\.name=") as caught:
            backbones.build(library, name)
        assert len(str(caught.value)) < 300


def test_without_a_network_timm_is_refused_at_once_and_in_a_line(
    commands: Commands, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    began = time.monotonic()
    message = commands.fail(
        *("train", "model=timm", "data.limit=100", "hydra.run.dir=run"),
        cwd=tmp_path,
        https_proxy="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hub"),
    )
    assert "ImageNet weights of tf_efficientnet_lite0 cannot be fetched" in message
    assert "model.pretrained=PATH" in message
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began < 60  # its own client tries for longer
