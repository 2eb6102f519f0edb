"""Networks without their final layer, and weights for them from files of every kind."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fashionnet import backbones, extras
from fashionnet.errors import UserError
from fashionnet.torchvision_import import import_torchvision
from tests.conftest import Commands

NAME = "shufflenet_v2_x0_5"  # the smallest of torchvision's


@pytest.fixture(autouse=True, scope="module")
def _quick(one_thread: None) -> None:
    """Small networks on one thread."""


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
    backbones.load(backbone, str(source), "torchvision", NAME)
    return backbone


def assert_is(backbone: nn.Module, whole: Mapping[str, Tensor], atol: float = 0) -> None:
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, whole[key], atol=atol, rtol=atol)


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 512), (NAME, 1024), ("mobilenet_v3_small", 1024)]
)
def test_torchvisions_networks_give_features(name: str, width: int) -> None:
    backbone, told = backbones.build("torchvision", name)
    assert told == width
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
    ("library", "name", "said"),
    [
        ("torchvision", "resnet81", r"no classification model of torchvision \(did you mean res"),
        ("torchvision", "googlenet", "no final Linear layer"),
        ("torchvision", "squeezenet1_0", "no final Linear layer"),
        ("keras", "resnet18", "model.library=keras is not known; choose torchvision or timm"),
    ],
)
def test_what_is_no_backbone_is_refused(library: str, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        backbones.build(library, name)


def test_timm_missing_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
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
    "nested.pt": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "parallel.pt": lambda state, path: torch.save(
        {f"module.{key}": value for key, value in state.items()}, path
    ),
}


@pytest.mark.parametrize("name", SAVES)
def test_weights_come_from_files_of_every_kind(
    whole: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    SAVES[name](whole, tmp_path / name)
    assert_is(loaded(tmp_path / name), whole)


def test_weights_without_the_final_layer_or_its_counters_do_too(
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
    with pytest.raises(UserError, match=r"w\.pth is damaged, or holds more than named tensors"):
        loaded(tmp_path / "w.pth")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", pickle.dumps([1, 2])])
def test_a_file_that_holds_no_weights_is_refused(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pretrained=.*w\.(pth|safetensors)"):
        loaded(path)


def test_weights_without_names_are_refused(tmp_path: Path) -> None:
    for i, state in enumerate(([torch.zeros(1)], torch.zeros(1), {"a": 3}, {1: torch.zeros(1)})):
        torch.save(state, tmp_path / f"{i}.pth")
        with pytest.raises(UserError, match="holds no weights by name"):
            loaded(tmp_path / f"{i}.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth: there is no such file"):
        loaded(tmp_path / "nowhere.pth")


def test_without_a_network_the_error_says_which_file_goes_where(
    commands: Commands, tmp_path: Path
) -> None:
    said = commands.fail(
        *("train", "model=resnet18", "data.limit=100", "hydra.run.dir=run"),
        cwd=tmp_path,
        https_proxy="http://127.0.0.1:9",
        TORCH_HOME=str(tmp_path / "torch"),
    )
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in said
    assert str(tmp_path / "torch/hub/checkpoints") in said
    assert "model.pretrained=PATH" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("hf-hub:timm/resnet18", "hf_hub:timm/resnet18.a1_in1k", "timm/resnet18"),
        *("local-dir:/etc", "local-dir:resnet18", "resnet18.x:/etc", "resnet18.x://y/z"),
        *("resnet18.a/../b", "resnet18.a.b", "", "..", 3, ["resnet18"], None, "x" * 5000),
    ],
)
def test_only_architectures_are_built_by_name(name: Any) -> None:
    # timm by itself fetches the first of these, and opens the folders of others.
    pytest.importorskip("timm")
    for library in backbones.LIBRARIES:
        with pytest.raises(UserError, match=r"^model\.name=") as caught:
            backbones.build(library, name)
        assert len(str(caught.value)) < 300
