"""The configuration: schema, checks, hash, and every file of `conf/`."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hypothesis import example, given, settings, strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fashionnet import models
from fashionnet.config import compose, schema
from fashionnet.config.schema import CheckpointConfig, Config, DataConfig, EarlyStoppingConfig
from fashionnet.config.source import Source
from fashionnet.errors import UserError
from fashionnet.models import weights
from fashionnet.training import optim, schedule

GROUPS = (
    *("augmentation", "data", "experiment", "hydra/launcher", "model", "optimizer", "schedule"),
)
FILES = sorted(
    str(path.relative_to(compose.CONF).with_suffix("")) for path in compose.CONF.rglob("*.yaml")
)


def a_config(**changes: Any) -> Config:
    return Config(
        model={"_target_": "fashionnet.models.mlp.MLP", "hidden": 4, "dropout": 0.2},
        optimizer={"_target_": "fashionnet.training.optim.Adam", "lr": 0.001},
        **{"data": DataConfig("fashion_mnist"), **changes},
    )


def typed(*overrides: str) -> Config:
    return compose.typed(compose.compose(*overrides))


@cache
def default() -> Config:
    """The configuration without overrides; composing one takes a tenth of a second."""
    return typed()


# -------------------------------------------------------------------------------- the files


def test_every_file_of_conf_is_in_a_group_that_is_tested() -> None:
    groups = [name.rpartition("/")[0] for name in FILES if name != "train"]
    assert "train" in FILES
    assert sorted(set(groups)) == sorted(GROUPS)
    assert len(groups) == len(FILES) - 1 >= 6
    assert {"model/mlp", "model/mlp_no_dropout", "optimizer/adam", "experiment/lesson"} <= {*FILES}


@pytest.mark.parametrize("name", [name for name in FILES if name != "train"])
def test_every_file_of_conf_composes_and_builds(name: str) -> None:
    group, _, option = name.rpartition("/")
    own = ("data._target_=mydata.load",) if name == "data/function" else ()
    config = typed(f"{group}={option}", *own)
    model = models.build(config.model, (28, 28), 10, config.seed)
    optimizer = optim.build(config.optimizer, model)
    assert optimizer.param_groups[0]["lr"] == config.optimizer["lr"]
    assert schedule.build(config.schedule)(0.5) <= 1
    json.dumps(schema.as_dict(config))  # goes into run.json


def test_every_experiment_says_its_command() -> None:
    for path in (compose.CONF / "experiment").glob("*.yaml"):
        assert f"experiment={path.stem}" in path.read_text(), path


def test_the_default_is_the_lesson() -> None:
    config = default()
    assert config == typed("experiment=lesson")
    assert (config.epochs, config.batch_size, config.validation_split) == (5, 32, 0.1)
    assert config.seed == 0
    model = models.build(config.model, (28, 28), 10, 0)
    assert weights.num_parameters(model) == 101_770
    assert config.optimizer == {
        "_target_": "fashionnet.training.optim.Adam",
        "lr": 1e-3,
        "beta_1": 0.9,
        "beta_2": 0.999,
        "epsilon": 1e-7,
        "weight_decay": 0.0,
    }
    assert config.schedule == {
        "_target_": "fashionnet.training.schedule.Constant",
        "warmup": 0.0,
    }
    assert config.early_stopping == EarlyStoppingConfig("val_loss", None, 0.0, False)


def test_the_twin_without_dropout_differs_in_nothing_else() -> None:
    lesson, twin = schema.as_dict(default()), schema.as_dict(typed("model=mlp_no_dropout"))
    assert schema.differing_keys(lesson, twin) == ["model.dropout"]
    assert twin["model"]["dropout"] == 0


KEYS: dict[str, Any] = {
    "seed": 7,
    "epochs": 50,
    "batch_size": 64,
    "validation_split": 0.25,
    "device": "cpu",
    "deterministic": True,
    "threads": 2,
    "gradients": "autograd",
    "resume": "never",
    "overwrite": True,
    "model.hidden": [256, 128],
    "model.dropout": 0.5,
    "optimizer.lr": 0.01,
    "data.root": "/somewhere",
    "data.limit": 1000,
    "early_stopping.monitor": "val_accuracy",
    "early_stopping.patience": 3,
    "early_stopping.min_delta": 0.01,
    "early_stopping.restore_best_weights": True,
    "checkpoint.every_seconds": 5.0,
}


def test_every_key_of_the_contract_can_be_overridden() -> None:
    plain = schema.as_dict(typed(*(f"{key}={value}" for key, value in KEYS.items())))
    assert schema.differing_keys(schema.as_dict(default()), plain) == sorted(KEYS)
    for key, value in KEYS.items():
        found: Any = plain
        for part in key.split("."):
            found = found[part]
        assert found == value and type(found) is type(value), key


def test_a_width_may_be_a_number() -> None:
    assert typed("model.hidden=256").model["hidden"] == 256


# -------------------------------------------------------------------------------- the checks

NAN, INF = math.nan, math.inf
WRONG: list[tuple[str, list[Any]]] = [
    ("epochs", [0, -1]),
    ("batch_size", [0, -1]),
    ("validation_split", [-0.1, 1, 1.5, NAN]),
    ("seed", [-1, 2**63]),
    ("threads", [0, -1, 100_000_000]),
    ("gradients", ["hand", ""]),
    ("resume", ["always", "Auto"]),
    ("data.limit", [0, -5]),
    ("data.scale", [0, -1, NAN, INF, None, True]),
    ("checkpoint.every_seconds", [0, -1, NAN, INF]),
    ("early_stopping.patience", [-1]),
    ("early_stopping.min_delta", [NAN, INF]),
    ("early_stopping.monitor", ["val_los", "", "f1"]),
    ("model", [None, "mlp", 3, ["mlp"]]),
    ("optimizer", [None, "adam", 3]),
    ("optimizer.lr", [0, -1, NAN, INF, "fast", True, None]),
]


def changed(key: str, value: Any) -> Config:
    """Returns a sound configuration but for one key."""
    config = a_config()
    parent, _, name = key.rpartition(".")
    node = getattr(config, parent) if parent else config
    if isinstance(node, dict):
        node[name] = value
    else:
        setattr(node, name, value)
    return config


def test_a_sound_configuration_passes() -> None:
    schema.check(a_config())


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG for value in values]
)
def test_each_check_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        schema.check(changed(key, value))
    assert str(caught.value).startswith(f"{key}={value!r}" if key == "model" else f"{key}=")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 1),
        ("batch_size", 1),
        ("batch_size", 10**9),
        ("validation_split", 0),
        ("validation_split", 0.999),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("threads", None),
        ("threads", 1),
        ("gradients", "by_hand"),
        ("resume", "never"),
        ("data.limit", 1),
        ("data.scale", 1),
        ("checkpoint.every_seconds", 1e9),
        ("early_stopping.patience", 0),
        ("early_stopping.min_delta", -0.1),
        ("early_stopping.monitor", "accuracy"),
        ("optimizer.lr", 1e-12),
    ],
)
def test_the_ends_of_each_range_pass(key: str, value: Any) -> None:
    schema.check(changed(key, value))


@cache
def composed(*overrides: str) -> DictConfig:
    return compose.compose(*overrides)


def numeric_keys() -> list[tuple[str, str]]:
    """Returns every key with a number, in the schema and in each option of each group."""
    found = [("", key) for key in schema.ranges()]
    for option in sorted(compose.CONF.glob("*/*.yaml")):
        group = option.parent.name
        if group in ("model", "optimizer"):
            node = composed(f"{group}={option.stem}")[group]
            numbers = [key for key, value in node.items() if isinstance(value, int | float)]
            found += [(f"{group}={option.stem}", f"{group}.{key}") for key in numbers]
    return found


BEYOND_REASON = [10**400, -(10**400), 10**4000, 10**39, 1e39, INF, -INF, NAN]


@pytest.mark.parametrize(("option", "key"), numeric_keys())
def test_numbers_beyond_reason_are_refused_by_their_key(option: str, key: str) -> None:
    for value in BEYOND_REASON:
        config = copy.deepcopy(composed(*filter(None, [option])))
        try:
            OmegaConf.update(config, key, value)
        except (OmegaConfBaseException, OverflowError):
            continue  # Hydra's door refuses it: no whole number, or one of too many digits
        with pytest.raises(UserError) as caught:
            compose.typed(config)
        assert str(caught.value).startswith(f"{key}=")
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_the_keys_with_numbers_are_those_that_the_schema_types() -> None:
    numbers = {
        f"{prefix}{item.name}"
        for prefix, node in {
            "": Config,
            "data.": DataConfig,
            "early_stopping.": EarlyStoppingConfig,
            "checkpoint.": CheckpointConfig,
            "distributed.": schema.DistributedConfig,
            "augmentation.": schema.AugmentationConfig,
            "fine_tuning.": schema.FineTuningConfig,
        }.items()
        for item in fields(node)
        if str(item.type).split(" |")[0] in ("int", "float")
    }
    assert schema.ranges().keys() == numbers


@pytest.mark.parametrize(
    "override",
    [
        "validation_split=" + "1" * 400,
        "seed=" + "1" * 5000,
        "model.dropout=0." + "1" * 5000,
        "epochs=-" + "9" * 4400,
    ],
)
def test_a_number_longer_than_python_reads_is_refused_by_its_key(override: str) -> None:
    with pytest.raises(
        UserError, match=rf"^{override.partition('=')[0]} has a number of \d+ digits"
    ):
        compose.compose(override)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([[[[[[[[[3]]]]]]]]], "nested too deeply"),
        (list(range(2000)), "2000 items"),
        ("x" * 5000, "5000 characters"),
        ({3: 4}, "a key that is not a word"),
        ({"a": [1, INF]}, r"model\.hidden\.a\[1\]=inf"),
        (b"x", "is a bytes"),
    ],
)
def test_an_argument_beyond_reason_is_refused_by_its_key(value: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.hidden.*{said}|^{said}"):
        schema.check(changed("model.hidden", value))


def test_an_optimizer_may_have_no_lr() -> None:
    config = a_config()
    del config.optimizer["lr"]
    schema.check(config)


@pytest.mark.parametrize("monitor", ["loss", "accuracy", "val_loss", "val_accuracy"])
@pytest.mark.parametrize("split", [0, 0.1])
@pytest.mark.parametrize("how", [{}, {"patience": 1}, {"restore_best_weights": True}])
def test_a_validation_monitor_needs_a_validation_set(
    monitor: str, split: float, how: dict[str, Any]
) -> None:
    stopping = EarlyStoppingConfig(monitor, **how)
    config = a_config(early_stopping=stopping, validation_split=split)
    if how and split == 0 and monitor.startswith("val_"):
        with pytest.raises(UserError, match=rf"early_stopping\.monitor={monitor} .*split=0"):
            schema.check(config)
    else:
        schema.check(config)


_numbers = st.integers(-3, 10**6) | st.floats()


@settings(deadline=None)
@given(
    epochs=st.integers(-2, 3),
    batch_size=st.integers(-2, 3),
    split=st.floats(-0.5, 1.5) | st.just(NAN),
    lr=_numbers,
    scale=_numbers,
    limit=st.none() | st.integers(-2, 3),
)
def test_a_configuration_passes_only_if_every_value_is_in_range(
    epochs: int, batch_size: int, split: float, lr: float, scale: float, limit: int | None
) -> None:
    config = a_config(
        epochs=epochs,
        batch_size=batch_size,
        validation_split=split,
        data=DataConfig("fashion_mnist", limit=limit, scale=scale),
    )
    config.optimizer["lr"] = lr
    fine = {
        "epochs": epochs >= 1,
        "batch_size": batch_size >= 1,
        "validation_split": 0 <= split < 1,
        "optimizer.lr": 0 < lr <= 1e38,
        "data.scale": 1e-30 <= scale <= 1e30,
        "data.limit": limit is None or limit >= 1,
    }
    if all(fine.values()):
        schema.check(config)
    else:
        with pytest.raises(UserError) as caught:
            schema.check(config)
        assert fine[str(caught.value).partition("=")[0]] is False


def test_a_near_miss_is_named() -> None:
    with pytest.raises(UserError, match=r"did you mean val_loss\?"):
        schema.check(changed("early_stopping.monitor", "val_los"))


# ------------------------------------------------------------------------------- composing


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epoch=3", r"^epoch=3: unknown key epoch; type epochs=3$"),
        ("foo=3", r"^foo=3: unknown key foo; known here: .*epochs"),
        ("model=nope", r"^model=nope: model has no such option; choose cnn, mlp, mlp_no_dropout,"),
        ("epochs=many", r"^epochs=many: 'many' is not a whole number$"),
        ("epochs=1.5", r"^epochs=1\.5: '1\.5' is not a whole number$"),
        ("seed=null", r"seed=null.*not Optional"),
        ("overwrite=perhaps", r"overwrite=perhaps.*'perhaps'"),
        ("data.limit=[1]", r"data\.limit=\[1\]"),
        ("early_stopping=3", r"early_stopping=3"),
        ("epochs", r"^epochs is not KEY=VALUE; type epochs=5$"),
        ("epochs=1,2", r"epochs=1,2"),
        ("model.hidden=[1,2", r"\[1,2"),
        ("model=3", r"."),
    ],
)
def test_a_refused_override_is_reported_in_one_line(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        compose.compose(override)
    assert "\n" not in str(caught.value)
    assert "full_key" not in str(caught.value)
    assert "object_type" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+epoch=3", r"^unknown key epoch \(did you mean epochs\?\); known here: seed, epochs"),
        ("+early_stopping.patiance=3", r"^unknown key early_stopping\.patiance \(did you mean"),
        ("+data.rot=x", r"^unknown key data\.rot .*did you mean root"),
        ("epochs=0", r"^epochs=0 must be 1 or more, or null$"),
        ("device=tpu", r"^device=tpu is not known; choose auto, cpu, cuda"),
        ("data.name=other", r"^data\.name=other is not known; choose fashion_mnist"),
        ("optimizer.lr=-1", r"^optimizer\.lr=-1 must be above 0$"),
        ("epochs=${nothing}", r"nothing"),
        ("~model", r"model"),
    ],
)
def test_a_wrong_configuration_is_reported_in_one_line(override: str, said: str) -> None:
    composed = compose.compose(override)
    with pytest.raises(UserError, match=said) as caught:
        compose.typed(composed)
    assert "\n" not in str(caught.value)


def test_model_keys_are_checked_by_the_model_instead() -> None:
    # A user's own model may take any key, so the schema cannot know them.
    assert typed("+model.depth=3").model["depth"] == 3


def test_interpolations_are_resolved() -> None:
    assert typed("seed=4", "epochs=${seed}").epochs == 4


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("epochs=9", "model.hidden=[1,2]", "+model.depth=3", "~model.dropout"),
        ("model.trained=all", "model=resnet18", "optimizer=sgd", "optimizer.momentum=0.5"),
        ("experiment=small_data", "seed=4", "data={limit: 7}", "hydra.run.dir=x"),
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=3"),
    ],
)
def test_what_is_kept_between_two_composes_changes_nothing(overrides: tuple[str, ...]) -> None:
    source = Source(compose.CONF)
    expected = source.compose_anew(overrides)
    with open_dict(expected):
        del expected["hydra"]
    assert source.compose(overrides) == expected == source.compose(overrides)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "optimizer/mine.yaml"
    path.parent.mkdir()
    for lr in (0.5, 0.25):
        path.write_text(f"lr: {lr}\n")
        config = Source(compose.CONF, folders=(tmp_path,)).compose(["optimizer=mine"])
        assert config.optimizer.lr == lr


def test_explain_is_one_line_for_any_error() -> None:
    assert compose.explain(ValueError("two\nlines")) == "two lines"
    assert compose.explain(ValueError()) == "ValueError"


# --------------------------------------------------------------------------------- the hash


def hash_with(key: str = "seed", value: Any = 0) -> str:
    return schema.config_hash(schema.as_dict(changed(key, value)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.root", "/elsewhere"),
        ("resume", "never"),
        ("overwrite", True),
        ("checkpoint.every_seconds", 1),
    ],
)
def test_the_hash_leaves_out_what_cannot_change_the_numbers(key: str, value: Any) -> None:
    assert hash_with(key, value) == hash_with()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("epochs", 6),
        ("batch_size", 16),
        ("validation_split", 0.2),
        ("device", "cpu"),
        ("threads", 2),
        ("deterministic", True),
        ("gradients", "autograd"),
        ("model.hidden", 64),
        ("model.dropout", 0.3),
        ("optimizer.lr", 0.01),
        ("optimizer.momentum", 0.9),
        ("data.limit", 10),
        ("data.scale", 1),
        ("early_stopping.patience", 2),
        ("early_stopping.restore_best_weights", True),
    ],
)
def test_the_hash_depends_on_what_can(key: str, value: Any) -> None:
    assert hash_with(key, value) != hash_with()


def test_where_a_run_lies_is_no_part_of_its_configuration() -> None:
    assert typed("hydra.run.dir=elsewhere") == default()


NOT_HASHED = (
    *("resume", "overwrite", "evaluate_test", "checkpoint", "git_patch", "debug"),
    "distributed",
)


def test_every_key_of_the_schema_is_either_hashed_or_known_not_to_be() -> None:
    plain = schema.as_dict(a_config())
    for key in plain:
        other = {**plain, key: {"root": 1, "x": 2} if key == "data" else "something else"}
        left_out = key in NOT_HASHED
        assert (schema.config_hash(other) == schema.config_hash(plain)) is left_out, key


def test_the_hash_does_not_depend_on_the_order_of_keys() -> None:
    plain = schema.as_dict(a_config())
    turned = json.loads(json.dumps(plain))
    for node in (turned, turned["model"], turned["data"]):
        for key in list(node)[:-1]:
            node[key] = node.pop(key)
    assert list(turned["model"]) != list(plain["model"])
    assert schema.config_hash(turned) == schema.config_hash(plain)


def test_hashing_leaves_the_configuration_as_it_was() -> None:
    plain = schema.as_dict(a_config(data=DataConfig("fashion_mnist", root="here")))
    before = copy.deepcopy(plain)
    schema.config_hash(plain)
    assert plain == before


def test_differing_keys() -> None:
    a = asdict(a_config(seed=1, checkpoint=CheckpointConfig(5)))
    b = asdict(a_config(seed=2))
    b["model"]["extra"] = None
    b["model"]["hidden"] = [4]
    assert schema.differing_keys(a, b) == [
        "checkpoint.every_seconds",
        "model.extra",
        "model.hidden",
        "seed",
    ]
    assert schema.differing_keys(a, a) == []
    assert schema.differing_keys(b, a) == schema.differing_keys(a, b)


def test_a_key_that_is_null_differs_from_one_that_is_not_there() -> None:
    assert schema.differing_keys({"a": None}, {"a": 1}) == ["a"]
    assert schema.differing_keys({"a": {"b": 1}}, {"a": 1}) == ["a"]


# ---------------------------------------------------------------------------- folder names


@given(text=st.text(max_size=300))
@example(text=".")
@example(text="..")
def test_a_folder_name_is_one(text: str) -> None:
    name = compose.folder_name(text)
    assert 0 < len(name) <= 150
    assert Path(name).name == name
    assert not set(name) & set("/\\\0\n :*?\"'<>|")
    assert compose.folder_name(text) == name


def test_folder_names_can_be_read() -> None:
    assert compose.folder_name("model=mlp,seed=3") == "model=mlp,seed=3"
    assert compose.folder_name("model.hidden=[64,32]") == "model.hidden=[64,32]"
    assert compose.folder_name("data.root=/a b") == "data.root=_a_b"
    assert compose.folder_name("") == "default"


def test_long_folder_names_stay_apart() -> None:
    first, second = "seed=1," * 30 + "a", "seed=1," * 30 + "b"
    assert compose.folder_name(first) != compose.folder_name(second)


def test_run_folders_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for _ in range(3):
        composed = compose.compose("seed=3", return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", composed)
        assert composed.hydra.run.dir == composed.hydra.run.dir  # one run has one folder
        folders.add(str(composed.hydra.run.dir))
    assert len(folders) == 3
    assert all(path.startswith("outputs/mlp/") and "_seed3_" in path for path in folders)


@pytest.mark.parametrize(
    "overrides",
    [
        ("epochs=3", "steps=300"),
        ("epochs=5", "steps=300"),
        ("experiment=small_data", "steps=300"),
        ("experiment=transfer_comparison", "epochs=3"),
    ],
)
def test_epochs_and_steps_are_two_lengths(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"epochs=\d+ and steps=300 are two lengths"):
        compose.typed(compose.compose(*overrides), overrides)


def test_steps_take_the_place_of_epochs() -> None:
    config = compose.typed(compose.compose("steps=300"), ["steps=300"])
    assert (config.epochs, config.steps) == (None, 300)
    again = compose.typed(compose.compose("steps=300", "epochs=null"), ["steps=300"])
    assert again == config
    with pytest.raises(UserError, match="epochs=null needs steps=N"):
        compose.typed(compose.compose("epochs=null"))
