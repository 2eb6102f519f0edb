"""The configuration: its schema, its checks across fields, its hash, and where `conf/` lies."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fashionnet import launcher, submitted
from fashionnet.errors import UserError
from fashionnet.files import missing_folders, remove_empty

_HERE = Path(__file__).resolve().parent
# A wheel carries conf/ inside the package; a checkout has it at the top.
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parents[1] / "conf"


@dataclass
class EarlyStoppingConfig:
    """Keras' EarlyStopping; `patience: null` turns it off."""

    monitor: str = "val_loss"
    patience: int | None = None
    min_delta: float = 0.0
    restore_best_weights: bool = False
    mode: str = "auto"
    baseline: float | None = None
    start_from_epoch: int = 0


@dataclass
class CheckpointConfig:
    """How often, in seconds, a checkpoint is written besides every epoch's end."""

    every_seconds: float = 30.0


@dataclass
class DebugConfig:
    """What looks into a fit: torch's anomaly detection, and its profiler."""

    anomaly: bool = False
    profile: bool = False


@dataclass
class DistributedConfig:
    """How long, in seconds, processes that train together wait for one another."""

    timeout_seconds: float = 1800.0


@dataclass
class DataConfig:
    """Which data, where it lies, how many images to train on, what pixels are divided by.

    Attributes:
        classes: names of the classes of Fashion-MNIST to take; null takes all.
        size: pixels of a photo's side.
        seed: of the photos' order, hence of what is trained, validated and tested on.
        test_split: share of the photos that is held out where there is but one set of them.
    """

    name: str = MISSING
    root: str | None = None
    limit: int | None = None
    scale: float = 255.0
    classes: list[str] | None = None
    size: int = 224
    seed: int = 0
    test_split: float = 0.2


@dataclass
class Config:
    """Everything that decides a run. Keys are Keras' words where the lesson has them."""

    seed: int = 0
    epochs: int = 5
    batch_size: int = 32
    validation_split: float = 0.1
    device: str = "auto"
    threads: int | None = 1
    deterministic: bool = False
    tf32: bool = False
    gradients: str = "auto"
    resume: str = "auto"
    overwrite: bool = False
    git_patch: bool = True
    model: Any = MISSING
    optimizer: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


_MOST_THREADS = 1024  # far more end torch itself, without a word

# What cannot change the numbers of a run stays out of its hash.
_NOT_HASHED = ("resume", "overwrite", "checkpoint", "distributed", "git_patch", "debug")


def register() -> None:
    """Makes the schema and the resolvers of `conf/` known to Hydra; may be called again."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver(
        "unique", lambda: uuid.uuid4().hex[:6], use_cache=True, replace=True
    )
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("epochs_of_steps", epochs_of_steps, replace=True)
    OmegaConf.register_new_resolver("where", where, replace=True)


class MadeFolders(Callback):
    """Notes which folders Hydra is about to make, to take back those of a run or sweep refused."""

    made: ClassVar[list[Path]] = []
    sweep: ClassVar[Path | None] = None  # the folder of the sweep under way

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before it makes the run's folder."""
        HydraConfig.instance().set_config(config)  # the folder's name refers to it
        MadeFolders.made = missing_folders(Path(config.hydra.run.dir).absolute())

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before it makes the sweep's folder."""
        HydraConfig.instance().set_config(config)
        MadeFolders.sweep = Path(config.hydra.sweep.dir)
        MadeFolders.made = missing_folders(MadeFolders.sweep.absolute())

    @classmethod
    def take_back(cls) -> None:
        """Removes the folders made for what was refused before it began, with a sweep's plan."""
        if cls.made:
            with contextlib.suppress(OSError):
                whole, top = cls.made[0], set(os.listdir(cls.made[0]))
                # What was to be submitted lies there; a job that was has a folder of its own.
                if top <= {"multirun.yaml", submitted.FOLDER} and not any(
                    part.is_dir() for part in (whole / submitted.FOLDER).glob("*")
                ):
                    (whole / "multirun.yaml").unlink()
                    shutil.rmtree(whole / submitted.FOLDER, ignore_errors=True)
            remove_empty(cls.made)


def run_name(seed: int) -> str:
    """Returns a name for a run's folder: the time, the seed and something unique.

    The processes of a job, and its restarts, share it: there it is the job's id.

    Raises:
        UserError: several processes of a job without an id.
    """
    if launcher.num_processes() == 1:
        return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_seed{seed}_{uuid.uuid4().hex[:6]}"
    job = launcher.job_id()
    if job is None:
        raise UserError(
            "several processes need one run directory: give hydra.run.dir=PATH, or start them with "
            "torchrun --standalone or torchrun --rdzv-id=ID"
        )
    return f"seed{seed}_{folder_name(job)}"


def epochs_of_steps(steps: int, batch_size: int, limit: int | None) -> int:
    """Returns how many epochs of `limit` pictures take at least so many steps.

    Raises:
        UserError: there is no `data.limit` to reckon with.
    """
    if not isinstance(limit, int) or limit < 1 or batch_size < 1:
        raise UserError(f"epochs for {steps} steps need data.limit=N and a batch_size, 1 or more")
    return -(-steps // -(-limit // batch_size))


def where(value: Any, is_this: Any, then: Any, otherwise: Any) -> Any:
    """Returns `then` where a value is this one, else `otherwise`; for keys that go with another."""
    return then if value == is_this else otherwise


def folder_name(text: str) -> str:
    """Returns `text` as the name of a folder: no separators, at most 150 characters."""
    name = "".join(c if c.isalnum() or c in "=,.+-_[]" else "_" for c in text) or "default"
    name = "_" * len(name) if name in (".", "..") else name
    if len(name) <= 150:
        return name
    return f"{name[:130]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def typed(config: DictConfig) -> Config:
    """Returns the resolved, checked configuration of a composed one.

    Raises:
        UserError: a value out of its range, or two that do not go together.
    """
    try:
        checked = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    assert isinstance(checked, Config)
    _refuse_unknown(checked)
    check(checked)
    return checked


def _refuse_unknown(node: Any, prefix: str = "") -> None:
    """Refuses keys that the schema does not have; Hydra's `+key=value` adds any."""
    known = [item.name for item in fields(node)]
    for key, value in vars(node).items():
        if key not in known:
            near = closest(key, known)
            raise UserError(f"unknown key {prefix}{key}{near}; known here: {', '.join(known)}")
        if is_dataclass(value):
            _refuse_unknown(value, f"{prefix}{key}.")


def check(config: Config) -> None:
    """Checks ranges and combinations, and names the key of the first that is wrong.

    Raises:
        UserError: with the key, its value and what it may be.
    """
    _require(config.epochs >= 1, "epochs", config.epochs, "must be 1 or more")
    _require(config.batch_size >= 1, "batch_size", config.batch_size, "must be 1 or more")
    _check_batch_is_shared(config.batch_size, launcher.num_processes())
    split = config.validation_split
    _require(0 <= split < 1, "validation_split", split, "must be at least 0 and below 1")
    _require(config.seed >= 0, "seed", config.seed, "must be 0 or more")
    threads = config.threads
    _require(
        threads is None or 1 <= threads <= _MOST_THREADS,
        "threads",
        threads,
        f"must be 1 to {_MOST_THREADS}, or null",
    )
    _choice("gradients", config.gradients, ("auto", "autograd", "by_hand"))
    _choice("resume", config.resume, ("auto", "never"))
    _choice("data.name", config.data.name, ("fashion_mnist", "photos"))
    if config.data.name == "photos" and config.data.classes is not None:
        raise UserError("data.classes is for Fashion-MNIST; for photos, leave folders out")
    _require(config.data.seed >= 0, "data.seed", config.data.seed, "must be 0 or more")
    held_out = config.data.test_split
    _require(0 < held_out < 1, "data.test_split", held_out, "must be above 0 and below 1")
    limit, scale = config.data.limit, config.data.scale
    _require(limit is None or limit >= 1, "data.limit", limit, "must be 1 or more, or null")
    _require(_positive(scale), "data.scale", scale, "must be a finite number above 0")
    seconds = config.checkpoint.every_seconds
    _require(seconds > 0, "checkpoint.every_seconds", seconds, "must be above 0")
    waited = config.distributed.timeout_seconds
    _require(waited > 0, "distributed.timeout_seconds", waited, "must be above 0")
    stopping = config.early_stopping
    patience, min_delta = stopping.patience, stopping.min_delta
    _require(
        patience is None or patience >= 0,
        "early_stopping.patience",
        patience,
        "must be 0 or more, or null to turn it off",
    )
    _require(
        math.isfinite(min_delta), "early_stopping.min_delta", min_delta, "must be a finite number"
    )
    _choice("early_stopping.mode", stopping.mode, ("auto", "min", "max"))
    start, baseline = stopping.start_from_epoch, stopping.baseline
    _require(start >= 0, "early_stopping.start_from_epoch", start, "must be 0 or more")
    _require(
        baseline is None or math.isfinite(baseline),
        "early_stopping.baseline",
        baseline,
        "must be a finite number, or null",
    )
    stops = patience is not None or stopping.restore_best_weights
    _choice(
        "early_stopping.monitor",
        stopping.monitor,
        ("loss", "accuracy", "val_loss", "val_accuracy"),
    )
    if stops and split == 0 and stopping.monitor.startswith("val_"):
        raise UserError(
            f"early_stopping.monitor={stopping.monitor} needs a validation set; "
            "with validation_split=0 there is none"
        )
    if config.debug.anomaly and config.gradients != "autograd":  # auto may choose by_hand
        raise UserError(f"debug.anomaly=true needs gradients=autograd, not {config.gradients}")
    for group in ("model", "optimizer"):
        node = getattr(config, group)
        if not isinstance(node, Mapping):
            raise UserError(f"{group}={node!r} must be a group with a _target_, e.g. {group}=NAME")
    if "lr" in config.optimizer:
        lr = config.optimizer["lr"]
        _require(_positive(lr), "optimizer.lr", lr, "must be a finite number above 0")


def _check_batch_is_shared(batch_size: int, num_processes: int) -> None:
    if batch_size % num_processes:
        below = batch_size // num_processes * num_processes
        near = " or ".join(str(size) for size in (below, below + num_processes) if size)
        raise UserError(
            f"batch_size={batch_size} is the batch of all {num_processes} processes together, and "
            f"no multiple of their number; use {near}"
        )


def _require(fine: bool, key: str, value: Any, must: str) -> None:
    if not fine:
        raise UserError(f"{key}={value} {must}")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(
            f"{key}={value} is not known; choose {', '.join(choices)}{closest(value, choices)}"
        )


def _positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def closest(word: str, choices: Any) -> str:
    """Returns ` (did you mean …?)` for a near miss, else nothing."""
    near = difflib.get_close_matches(word, list(choices), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def as_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as plain values, for `run.json`."""
    return asdict(config)


def that_counts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plain configuration without what cannot change the numbers of a run."""
    counted = {key: value for key, value in config.items() if key not in _NOT_HASHED}
    data = counted.get("data")
    if isinstance(data, Mapping):
        counted["data"] = {key: value for key, value in data.items() if key != "root"}
    return counted


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns the hash of what counts in a plain configuration."""
    return hashlib.sha256(json.dumps(that_counts(config), sort_keys=True).encode()).hexdigest()


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted keys at which two plain configurations differ."""
    keys: list[str] = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            keys += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right or (key in a) != (key in b):
            keys.append(f"{prefix}{key}")
    return keys


def compose(*overrides: str, return_hydra_config: bool = False) -> DictConfig:
    """Composes a configuration from overrides, as the command line does, without running it.

    Raises:
        UserError: an override that Hydra refuses.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    register()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("train", list(overrides), return_hydra_config)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(explain(error)) from None


def explain(error: BaseException) -> str:
    """Returns one line for Hydra's or OmegaConf's refusal of a configuration."""
    said = _sentence(error)
    if said.startswith("Config group override must be"):
        return "a group must be given the name of an option, e.g. model=mlp; see --help for them"
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        reason = _sentence(cause)
        if cause.full_key and "not in" in reason:  # an unknown key: what may stand there?
            parent = cause.parent_node
            known = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
            word = str(cause.full_key).rpartition(".")[2]
            listed = f"; known here: {', '.join(known)}" if known else ""
            return f"unknown key {cause.full_key}{closest(word, known)}{listed}"
        if reason not in said and "$" not in reason:  # OmegaConf's own template
            return f"{said}: {reason}"
    return said


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    kept = []
    for line in lines:
        if line.startswith(("Config search path", "full_key:", "object_type=", "reference_type=")):
            break
        kept.append(line)
    return " ".join(" ".join(kept).split()) or type(error).__name__


def output_folder() -> Path:
    """Returns where runs are looked for when no folder is given."""
    return Path(os.curdir) / "outputs"
