"""Every file under `conf/`: it runs, and an experiment's header says what to type and to expect."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from fashionnet.config import compose
from fashionnet.errors import UserError
from fashionnet.models import backbones
from fashionnet.train import train
from tests.conftest import Commands

FILES = sorted(compose.CONF.rglob("*.yaml"))
OPTIONS = [
    f"{path.parent.relative_to(compose.CONF)}={path.stem}"
    for path in FILES
    if path.parent != compose.CONF
]
EXPERIMENTS = [option for option in OPTIONS if option.startswith("experiment=")]
BUDGETED = ("experiment=two_minutes", "experiment=ten_seconds", "experiment=gpu_record")
# What would be slow to smoke-test as it stands.
SMALLER = ("epochs=1", "data.limit=64")


def text_of(option: str) -> str:
    return (compose.CONF / f"{option.replace('=', '/')}.yaml").read_text()


def header(experiment: str) -> str:
    """Returns the comment that opens an experiment's file, without its marks."""
    lines = text_of(experiment).splitlines()
    assert lines[0] == "# @package _global_"
    opening = lines[1 : next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in opening)


def test_no_file_is_missed() -> None:
    assert len(OPTIONS) == len(FILES) - 1  # but train.yaml itself
    assert set(OPTIONS) == {
        *(
            "model=mlp",
            "model=mlp_no_dropout",
            "model=cnn",
            "model=small_resnet",
            "model=transfer",
            "model=timm",
        ),
        *("model=resnet18", "model=resnet34", "model=resnet50"),
        *("optimizer=adam", "optimizer=adamw", "optimizer=sgd"),
        *(f"schedule={name}" for name in ["constant", "cosine", "one_cycle", "plateau", "step"]),
        *("augmentation=none", "augmentation=light", "augmentation=strong"),
        *("data=fashion_mnist", "data=mnist", "data=kmnist", "data=cifar10"),
        *("data=photos", "data=npz", "data=function"),
        *("experiment=transfer", "experiment=fine_tune", "experiment=transfer_comparison"),
        *("experiment=thousand_labels", "hydra/launcher=slurm"),
        *("experiment=lesson", "experiment=overfit", "experiment=overfit_dropout"),
        *("experiment=overfit_early_stopping", "experiment=unscaled_pixels"),
        *("experiment=learning_rate_too_high", "experiment=train_to_100"),
        *("experiment=small_data", "experiment=batch_size", "experiment=two_minutes"),
        *("experiment=ten_seconds", "experiment=gpu_record"),
        *("experiment=debug", "experiment=debug_one_batch"),
        *("experiment=debug_anomaly", "experiment=debug_profile"),
    }


def transferred(option: str, photos: Path, folder: Path) -> list[str]:
    """Returns what makes an option of transfer learning small and needs no download."""
    name = option.partition("=")[2]
    few = [f"data.root={photos}", "data.size=32", "data.limit=32"]
    if name in ("transfer", "fine_tune", "transfer_comparison", "thousand_labels"):
        backbone, _ = backbones.build("torchvision", "shufflenet_v2_x0_5")
        torch.save(backbone.state_dict(), folder / "w.pth")
        weights = ["model.name=shufflenet_v2_x0_5", f"model.pretrained={folder / 'w.pth'}"]
        trained = ["model.trained=all"] if option == "model=transfer" else []  # for augmentation
        return ["data=photos", *few, *weights, *trained]
    if name == "timm" or name.startswith("resnet"):
        return ["data=photos", *few, "model.trained=scratch"]
    return []


def combinations() -> list[list[str]]:
    """Returns every option but experiments and data, one of each group at a time."""
    groups: dict[str, list[str]] = {}
    for option in OPTIONS:
        if not option.startswith(("experiment=", "data=")):
            groups.setdefault(option.partition("=")[0], []).append(option)
    most = max(map(len, groups.values()))
    return [[options[i % len(options)] for options in groups.values()] for i in range(most)]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize(
    "options", [*combinations(), *([each] for each in EXPERIMENTS)], ids=" ".join
)
def test_every_option_trains(options: list[str], photos: Path, tmp_path: Path) -> None:
    by_steps = any("steps:" in text_of(option) for option in options)
    shorter = ["steps=2", *SMALLER[1:]] if by_steps else SMALLER
    if any(option in BUDGETED for option in options):
        shorter = ["budget_seconds=null", *SMALLER]
    if any(option in (*BUDGETED, "model=small_resnet") for option in options):
        shorter = [*shorter, "model.widths=[8,8]"]  # the whole test set is evaluated
    needed = [word for each in options for word in transferred(each, photos, tmp_path)]
    words = [*options, *shorter, *needed]
    run = train(*words, run_dir=tmp_path / "run")
    assert run.record["status"] == "completed"
    choices = run.record["choices"]
    for group, _, name in (word.partition("=") for word in words):
        assert choices.get(group, name) == name
    is_profiled = options == ["experiment=debug_profile"]
    assert (tmp_path / "run/trace.json").exists() is is_profiled


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_header_says_what_to_type(experiment: str) -> None:
    commands = [line.strip() for line in header(experiment).splitlines() if "python -m" in line]
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "fashionnet.train"]
        assert experiment in words
        overrides = [
            re.sub(r"=(\w+),.*|=range\((\d+)\)", r"=\1\2", w) for w in words[3:] if w != "-m"
        ]
        composed(*overrides)


@functools.cache
def composed(*overrides: str) -> None:
    """Composes and checks a configuration, which several headers may name."""
    compose.typed(compose.compose(*overrides))


NOT_MEASURED = ["experiment=gpu_record"]


def test_experiments_that_were_not_measured_say_so() -> None:
    saying = [each for each in EXPERIMENTS if "NOT MEASURED" in text_of(each)]
    assert saying == NOT_MEASURED
    assert not any("±" in header(each) for each in saying)


@pytest.mark.parametrize(
    "experiment", [e for e in EXPERIMENTS if "debug" not in e and e not in NOT_MEASURED]
)
def test_the_header_says_what_to_expect_and_where_it_was_measured(experiment: str) -> None:
    text = header(experiment)
    assert re.search(r"0\.\d+ ± 0\.\d+", text), "a figure with its spread"
    assert re.search(r"\d+ s a run", text)
    assert "AMD EPYC" in text and "torch 2." in text


def test_one_batch_is_learned_by_heart(tmp_path: Path) -> None:
    run = train("experiment=debug_one_batch", run_dir=tmp_path / "run")
    assert run.history[-1]["loss"] < 0.01
    assert run.history[-1]["accuracy"] == 1


def test_a_trace_holds_the_fits_operations(commands: Commands, tmp_path: Path) -> None:
    small = ("experiment=debug_profile", *SMALLER, "hydra.run.dir=run")
    commands.succeed("train", *small, cwd=tmp_path)  # and the profiler prints nothing
    trace = json.loads((tmp_path / "run/trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::addmm", "aten::_fused_adam_"} <= names


def test_looking_into_a_fit_changes_no_bit(tmp_path: Path) -> None:
    plain = train("gradients=autograd", *SMALLER, run_dir=tmp_path / "plain")
    with pytest.warns(UserWarning, match="Anomaly"):
        watched = train(
            *("gradients=autograd", "debug.anomaly=true", "debug.profile=true", *SMALLER),
            run_dir=tmp_path / "watched",
        )
    assert watched.record["weights_sha256"] == plain.record["weights_sha256"]
    assert watched.record["config_hash"] == plain.record["config_hash"]


@pytest.mark.parametrize("gradients", ["auto", "by_hand"])
def test_anomaly_detection_refuses_gradients_that_it_would_not_see(gradients: str) -> None:
    config = compose.compose("debug.anomaly=true", f"gradients={gradients}")
    with pytest.raises(UserError, match=r"debug\.anomaly=true needs gradients=autograd"):
        compose.typed(config)


def test_anomaly_detection_names_the_operation(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="Anomaly|Error detected"),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        train(
            *("gradients=autograd", "debug.anomaly=true", "optimizer=sgd", "optimizer.lr=1e30"),
            *("epochs=1", "data.limit=640"),
            run_dir=tmp_path / "run",
        )
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
