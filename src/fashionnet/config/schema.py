"""The configuration: its schema, its ranges, its checks across fields, and its hash."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from fashionnet.errors import UserError, shortened
from fashionnet.system import spelling

_INT32, _INT64 = 2**31 - 1, 2**63 - 1
_FLOAT = 1e38  # of what float32 holds
_MOST_THREADS = 1024  # torch aborts without a message at far more


@dataclass(frozen=True)
class Range:
    """The range of a number.

    Attributes:
        low, high: bounds, inclusive unless the range is open there.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def refusal(self, value: Any) -> str | None:
        """Returns how a value violates the range, e.g. "must be 1 or more"; None if it does not."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (isinstance(value, float) and math.isnan(value)):
            return "must be a finite number"
        if value > self.high or (self.open_high and value == self.high):
            return f"must be {'below' if self.open_high else 'at most'} {self.high:,}"
        if value < self.low or (self.open_low and value == self.low):
            return f"must be {f'above {self.low}' if self.open_low else f'{self.low} or more'}"
        return None


_COUNT, _FROM_0, _FINITE = Range(1, _INT32), Range(0, _INT32), Range(-_FLOAT, _FLOAT)
_INTEGER = Range(-_INT64, _INT64)
_SEED, _SECONDS = Range(0, _INT64), Range(0, 1e9, open_low=True)
_RATE, _FRACTION = Range(0, _FLOAT, open_low=True), Range(0, 1)

# The limits of a group's node, for any class.
_MOST_NESTED, _MOST_ITEMS, _MOST_CHARACTERS = 8, 1000, 4096


def _in(range_: Range, default: Any) -> Any:
    """Returns a dataclass field with a default and a range."""
    return field(default=default, metadata={"range": range_})


@dataclass
class EarlyStoppingConfig:
    """Keras' EarlyStopping; `patience: null` turns it off."""

    monitor: str = "val_loss"
    patience: int | None = _in(_FROM_0, None)
    min_delta: float = _in(_FINITE, 0.0)
    restore_best_weights: bool = False
    mode: str = "auto"
    baseline: float | None = _in(_FINITE, None)
    start_from_epoch: int = _in(_FROM_0, 0)


@dataclass
class CheckpointConfig:
    """How often, in seconds, a checkpoint is written besides every epoch's end."""

    every_seconds: float = _in(_SECONDS, 30.0)


@dataclass
class DebugConfig:
    """Debugging of a fit: torch's anomaly detection, and its profiler."""

    anomaly: bool = False
    profile: bool = False


@dataclass
class DistributedConfig:
    """How long, in seconds, processes that train together wait for one another."""

    timeout_seconds: float = _in(_SECONDS, 1800.0)


@dataclass
class DataConfig:
    """The data set, its folder, the number of training images, the divisor of pixels.

    Attributes:
        _target_: a function that returns the arrays of a data set, see `data.arrays`.
        classes: names of the classes of Fashion-MNIST to take; null takes all.
        size: pixels of a photo's side; null takes the network's own.
        seed: of the photos' order, which decides the training, validation and test sets.
        test_split: fraction of the photos that is held out where they come as a single set.
    """

    name: str = MISSING
    _target_: str | None = None
    root: str | None = None
    limit: int | None = _in(_COUNT, None)
    scale: float = _in(Range(1e-30, 1e30), 255.0)
    classes: list[str] | None = None
    size: int | None = _in(Range(8, 1024), None)
    seed: int = _in(_SEED, 0)
    test_split: float = _in(Range(0, 1, open_low=True, open_high=True), 0.2)


PUBLISHED = ("fashion_mnist", "mnist", "kmnist", "cifar10")
DATASETS = (*PUBLISHED, "photos", "npz")
EPOCHS = 5  # the lesson's
_CONSTANT = {"_target_": "fashionnet.training.schedule.Constant"}


@dataclass
class AugmentationConfig:
    """Random changes to training pictures, for any model.

    Attributes:
        flip: probability that a picture is mirrored left to right.
        shift: a picture moves by up to this fraction of its sides.
        crop: a random square takes the picture's place, smaller by up to this fraction.
        erase: probability that a rectangle of a picture becomes noise.
        cutmix: probability that the pictures of a batch take rectangles of one another, and as much
            of their labels.
        mixup: probability that the pictures of a batch are blended, and their labels.
    """

    flip: float = _in(_FRACTION, 0.0)
    shift: float = _in(Range(0, 0.5), 0.0)
    crop: float = _in(Range(0, 0.9), 0.0)
    erase: float = _in(_FRACTION, 0.0)
    cutmix: float = _in(_FRACTION, 0.0)
    mixup: float = _in(_FRACTION, 0.0)


def mixes(config: AugmentationConfig) -> bool:
    """Returns whether pictures are mixed with one another, and so are their labels."""
    return config.cutmix > 0 or config.mixup > 0


@dataclass
class FineTuningConfig:
    """How a pretrained backbone is fine-tuned, with a new head.

    Attributes:
        backbone_lr: learning rate of the backbone, as a fraction of the head's.
        head_epochs: number of first epochs in which only the head is trained.
        head_lr: learning rate of the head in these epochs.
    """

    backbone_lr: float = _in(Range(0, 1, open_low=True), 0.1)
    head_epochs: int = _in(_FROM_0, 0)
    head_lr: float = _in(_RATE, 0.01)


@dataclass
class Config:
    """Everything that decides a run, in Keras' words.

    One of `epochs`, `steps` and `budget_seconds` says how long to train; the others are null.
    """

    seed: int = _in(_SEED, 0)
    epochs: int | None = _in(_COUNT, EPOCHS)
    steps: int | None = _in(_COUNT, None)
    budget_seconds: float | None = _in(_SECONDS, None)
    batch_size: int = _in(_COUNT, 32)
    validation_split: float = _in(Range(0, 1, open_high=True), 0.1)
    device: str = "auto"
    threads: int | None = _in(Range(1, _MOST_THREADS), 1)
    deterministic: bool = False
    tf32: bool = False
    precision: str = "float32"
    label_smoothing: float = _in(Range(0, 1, open_high=True), 0.0)
    class_weights: str | None = None
    gradients: str = "auto"
    resume: str = "auto"
    overwrite: bool = False
    evaluate_test: bool = True
    git_patch: bool = True
    model: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = field(default_factory=lambda: dict(_CONSTANT))
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    fine_tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


# What cannot change the numbers of a run stays out of its hash.
_NOT_HASHED = (
    *("resume", "overwrite", "evaluate_test", "checkpoint"),
    *("distributed", "git_patch", "debug"),
)


def check(config: Config, num_processes: int = 1) -> None:
    """Checks ranges and combinations, and names the key of the first that is wrong.

    Args:
        num_processes: number of processes that train together.

    Raises:
        UserError: with the key, its value and what it may be.
    """
    _check_ranges(config)
    if config.epochs is config.steps is config.budget_seconds is None:
        raise UserError("epochs=null needs steps=N or budget_seconds=S, to say how long to train")
    if config.budget_seconds is not None and num_processes > 1:
        raise UserError(
            f"budget_seconds={config.budget_seconds:g} is for one process; several take epochs=N "
            "or steps=N"
        )
    _check_batch_is_shared(config.batch_size, num_processes)
    _choice("gradients", config.gradients, ("auto", "autograd", "by_hand"))
    _choice("precision", config.precision, ("float32", "bfloat16"))
    if config.class_weights is not None:
        _choice("class_weights", config.class_weights, ("balanced",))
    if config.augmentation.cutmix + config.augmentation.mixup > 1:
        raise UserError("augmentation.cutmix and augmentation.mixup add up to more than 1")
    if config.gradients == "by_hand":
        _check_by_hand(config)
    _choice("resume", config.resume, ("auto", "never"))
    _check_data(config.data)
    stopping = config.early_stopping
    _choice("early_stopping.mode", stopping.mode, ("auto", "min", "max"))
    stops = stopping.patience is not None or stopping.restore_best_weights
    monitors = ("loss", "accuracy", "val_loss", "val_accuracy")
    _choice("early_stopping.monitor", stopping.monitor, monitors)
    if stops and config.validation_split == 0 and stopping.monitor.startswith("val_"):
        raise UserError(
            f"early_stopping.monitor={stopping.monitor} needs a validation set; "
            "with validation_split=0 there is none"
        )
    if config.debug.anomaly and config.gradients != "autograd":  # auto may choose by_hand
        raise UserError(f"debug.anomaly=true needs gradients=autograd, not {config.gradients}")
    for group in ("model", "optimizer", "schedule"):
        node = getattr(config, group)
        if not isinstance(node, Mapping):
            given = f"{group}={shortened(repr(node))}"
            raise UserError(f"{given} must be a group with a _target_, e.g. {group}=NAME")
        refuse_unreasonable(node, group)
    if "lr" in config.optimizer:
        _require(config.optimizer["lr"], _RATE, "optimizer.lr")


def _check_data(data: DataConfig) -> None:
    if data.name == "function" and data._target_ is None:
        raise UserError("data=function needs data._target_=MODULE.FUNCTION")
    if data._target_ is None:
        _choice("data.name", data.name, DATASETS)
    elif data.name in DATASETS:
        raise UserError(f"data._target_={data._target_} is not for data.name={data.name}")
    elif not re.fullmatch(r"\w{1,100}", data.name):
        raise UserError(f"data.name={shortened(data.name)} must be a word")
    if data.name != "fashion_mnist" and data.classes is not None:
        raise UserError("data.classes is for Fashion-MNIST; leave other data's classes out there")


def _check_by_hand(config: Config) -> None:
    others = {
        "precision=bfloat16": config.precision == "bfloat16",
        f"label_smoothing={config.label_smoothing}": config.label_smoothing > 0,
        f"class_weights={config.class_weights}": config.class_weights is not None,
        "augmentation.cutmix or .mixup": mixes(config.augmentation),
    }
    for key in (key for key, is_set in others.items() if is_set):
        raise UserError(
            f"gradients=by_hand computes plain cross-entropy in float32; {key} needs autograd"
        )


def ranges(node: type | object = Config, prefix: str = "") -> dict[str, Range]:
    """Returns the range of each number in the schema, by dotted key."""
    found: dict[str, Range] = {}
    for item in fields(node):  # type: ignore[arg-type]
        if "range" in item.metadata:
            found[f"{prefix}{item.name}"] = item.metadata["range"]
        elif isinstance(item.default_factory, type) and is_dataclass(item.default_factory):
            found |= ranges(item.default_factory, f"{prefix}{item.name}.")
    return found


def _check_ranges(config: Config) -> None:
    for key, range_ in ranges().items():
        part, _, name = key.rpartition(".")
        holder = getattr(config, part) if part else config
        may_be_null = "None" in {item.name: str(item.type) for item in fields(holder)}[name]
        _require(getattr(holder, name), range_, key, may_be_null)


def refuse_unreasonable(value: Any, key: str, depth: int = 0) -> None:
    """Refuses arguments of unreasonable size: numbers, text or lists that no class takes.

    Args:
        value: a group's node, or what is in one.
        key: its dotted name, for the message.

    Raises:
        UserError: with the key of what is refused.
    """
    if isinstance(value, Mapping | list | tuple):
        if depth == _MOST_NESTED:
            raise UserError(f"{key} is nested too deeply: more than {_MOST_NESTED} levels")
        if len(value) > _MOST_ITEMS:
            raise UserError(f"{key} has {len(value)} items, more than {_MOST_ITEMS}")
        is_group = isinstance(value, Mapping)
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in parts:
            if is_group and not isinstance(name, str):
                raise UserError(f"{key} has a key that is not a word: {shortened(name)}")
            refuse_unreasonable(part, f"{key}.{name}" if is_group else f"{key}[{name}]", depth + 1)
    elif isinstance(value, int):  # bool as well
        _require(int(value), _INTEGER, key)
    elif isinstance(value, float):
        _require(value, _FINITE, key)
    elif isinstance(value, str):
        if len(value) > _MOST_CHARACTERS:
            raise UserError(f"{key} has {len(value)} characters, more than {_MOST_CHARACTERS}")
    elif value is not None:
        raise UserError(f"{key} is a {type(value).__name__}; give a number, a word or a list")


def _check_batch_is_shared(batch_size: int, num_processes: int) -> None:
    if batch_size % num_processes:
        below = batch_size // num_processes * num_processes
        near = " or ".join(str(size) for size in (below, below + num_processes) if size)
        raise UserError(
            f"batch_size={batch_size} is the batch of all {num_processes} processes together, and "
            f"not a multiple of their number; use {near}"
        )


def _require(value: Any, range_: Range, key: str, may_be_null: bool = False) -> None:
    if may_be_null and value is None:
        return
    if (must := range_.refusal(value)) is not None:
        raise UserError(f"{key}={shortened(value)} {must}{', or null' if may_be_null else ''}")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = spelling.closest(value, choices)
        raise UserError(f"{key}={shortened(value)} is not known; choose {', '.join(choices)}{near}")


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


def at(values: Mapping[str, Any], dotted: str) -> Any:
    """Returns the value at a dotted key, whose parts may contain dots themselves (file names)."""
    for key, value in values.items():
        if key == dotted:
            return value
        if dotted.startswith(f"{key}.") and isinstance(value, Mapping):
            return at(value, dotted.removeprefix(f"{key}."))
    return None
