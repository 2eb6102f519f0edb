"""The allow-list that stands between a configuration and an import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fashionnet.config import targets
from fashionnet.errors import UserError

MODULE = '''
"""A user's module; importing it leaves a trace."""
from pathlib import Path

Path(__file__).with_name("imported").touch()
NUMBER = 3


class Net:
    def __init__(self, width, *, depth=1, input_shape=None):
        if width == "broken":
            raise ValueError("width must be\\na number")
        self.given = dict(width=width, depth=depth, input_shape=input_shape)


def anything(**given):
    return given


def picky(parameters, lr=0.1):
    return parameters, lr
'''


@pytest.fixture(autouse=True)
def _no_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(targets.ALLOW_VARIABLE, raising=False)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `usernets` that can be imported; returns the trace that importing it leaves."""
    (tmp_path / "usernets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "usernets", raising=False)
    return tmp_path / "imported"


def allow(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(targets.ALLOW_VARIABLE, text)


def test_the_packages_own_targets_are_allowed() -> None:
    from fashionnet.models.mlp import MLP

    node = {"_target_": "fashionnet.models.mlp.MLP", "hidden": 3, "dropout": 0.0}
    assert isinstance(targets.build(node, "model"), MLP)


def test_every_listed_target_can_be_built() -> None:
    for target in targets.ALLOWED:
        assert callable(targets.located({"_target_": target}, "model")), target


def test_a_stranger_is_refused_before_it_is_imported(module: Path) -> None:
    node = {"_target_": "usernets.Net", "width": 1}
    for refuse in (targets.located, targets.build):
        with pytest.raises(
            UserError, match=r"^model\._target_=usernets\.Net is not .* FASHIONNET_ALLOW="
        ):
            refuse(node, "model")
    assert not module.exists()
    assert "usernets" not in sys.modules


def test_a_program_is_refused_before_it_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(UserError, match=r"os\.system is not on the allow-list"):
        targets.build({"_target_": "os.system", "command": f"touch {trace}"}, "model")
    assert not trace.exists()


@pytest.mark.parametrize(
    "target",
    [
        "fashionnet.models.mlp",
        "fashionnet.models.mlp.MLP.forward",
        " fashionnet.models.mlp.MLP",
        "torch.load",
    ],
)
def test_only_whole_names_are_on_the_list(target: str) -> None:
    with pytest.raises(UserError, match="allow-list"):
        targets.build({"_target_": target}, "model")


@pytest.mark.parametrize(
    "text", ["usernets.Net", "a.B,usernets.Net", "a.B usernets.Net", " usernets.Net ,, a.B"]
)
def test_the_environment_extends_the_list(
    text: str, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, text)
    net = targets.build({"_target_": "usernets.Net", "width": 4}, "model")
    assert net.given["width"] == 4
    assert module.exists()
    assert "fashionnet.models.mlp.MLP" in targets.allowed()


@pytest.mark.parametrize("text", ["", "usernets", "usernets.Ne", "usernets.*"])
def test_the_environment_names_whole_targets(
    text: str, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, text)
    with pytest.raises(UserError, match="allow-list"):
        targets.build({"_target_": "usernets.Net", "width": 4}, "model")
    assert not module.exists()


@pytest.mark.parametrize("node", [{}, {"_target_": None}, {"_target_": ""}, {"_target_": 3}])
def test_a_node_needs_a_target(node: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^optimizer\._target_ names no class"):
        targets.build(node, "optimizer")


@pytest.mark.parametrize(
    "value",
    [
        {"_target_": "os.system"},
        {"_target_": "fashionnet.models.mlp.MLP"},
        {"deep": {"_target_": "os.system"}},
        [1, [{"_target_": "os.system"}]],
        ({"_target_": "os.system"},),
    ],
)
def test_a_target_inside_an_argument_is_refused(value: Any) -> None:
    node = {"_target_": "fashionnet.models.mlp.MLP", "hidden": value}
    with pytest.raises(UserError, match=r"model holds a _target_ inside an argument"):
        targets.build(node, "model")


def test_unknown_keys_are_refused_and_the_known_ones_named(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, "usernets.Net")
    node = {"_target_": "usernets.Net", "width": 1, "wdth": 2}
    with pytest.raises(
        UserError, match=r"^model\.wdth: usernets\.Net has no such argument; it has width, depth$"
    ):
        targets.build(node, "model", input_shape=(28, 28))


def test_offered_keywords_go_only_where_they_are_asked_for(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, "usernets.Net usernets.anything")
    node = {"_target_": "usernets.Net", "width": 1}
    built = targets.build(node, "model", input_shape=(2, 3), num_classes=4)
    assert built.given == {"width": 1, "depth": 1, "input_shape": (2, 3)}


@pytest.mark.parametrize("target", ["usernets.Net", "usernets.anything", "usernets.picky"])
@pytest.mark.parametrize("key", ["input_shape", "num_classes"])
def test_a_node_does_not_set_what_the_package_offers(
    target: str, key: str, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether or not the target asks for it, by name or as any keyword.
    allow(monkeypatch, "usernets.Net usernets.anything usernets.picky")
    with pytest.raises(UserError, match=rf"^model\.{key} .* leave it out$"):
        targets.build(
            {"_target_": target, "width": 1, key: None}, "model", input_shape=(2, 3), num_classes=4
        )
    assert not module.exists()  # refused before it is imported


def test_a_target_that_takes_any_keyword(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, "usernets.anything")
    assert targets.build({"_target_": "usernets.anything", "a": 1}, "model") == {"a": 1}


def test_a_positional_argument_is_not_for_the_node(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, "usernets.picky")
    node = {"_target_": "usernets.picky", "lr": 0.5}
    assert targets.build(node, "optimizer", [1]) == ([1], 0.5)
    with pytest.raises(UserError, match=r"optimizer\.parameters: .* it has lr$"):
        targets.build({**node, "parameters": [2]}, "optimizer", [1])


def test_what_a_target_refuses_is_told_in_one_line(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, "usernets.Net")
    with pytest.raises(UserError, match=r"model: usernets\.Net refused .*: width must be"):
        targets.build({"_target_": "usernets.Net", "width": "broken"}, "model")
    with pytest.raises(UserError, match=r"model: usernets\.Net refused .* 'width'"):
        targets.build({"_target_": "usernets.Net"}, "model")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("usernets.Nothing", "cannot be imported: .*Nothing"),
        ("nowhere_at_all.Net", "cannot be imported: No module named 'nowhere_at_all'"),
        ("usernets.NUMBER", "is not a class or function"),
        ("Net", "cannot be imported"),
        ("usernets.sub.Net", "cannot be imported"),
    ],
)
def test_allowed_targets_that_are_not_there(
    target: str, said: str, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, target)
    with pytest.raises(UserError, match=rf"^model\._target_={target} {said}"):
        targets.build({"_target_": target}, "model")


def test_the_list_is_read_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a.B" not in targets.allowed()
    monkeypatch.setenv(targets.ALLOW_VARIABLE, "a.B")
    assert "a.B" in targets.allowed()
