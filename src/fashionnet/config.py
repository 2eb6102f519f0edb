"""The configuration: its schema, its checks across fields, its hash, and where `conf/` lies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fashionnet import launcher, refusals, submitted
from fashionnet.errors import UserError, interruption, shortened
from fashionnet.files import (
    missing_folders,
    refuse_strange,
    refuse_strange_below,
    remove,
    remove_empty,
)

_HERE = Path(__file__).resolve().parent
# A wheel carries conf/ inside the package; a checkout has it at the top.
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parents[1] / "conf"


_INT32, _INT64 = 2**31 - 1, 2**63 - 1
_FLOAT = 1e38  # of what float32 holds
_MOST_THREADS = 1024  # far more end torch itself, without a word


@dataclass(frozen=True)
class Range:
    """The numbers that a key may have.

    Attributes:
        low, high: the ends; they are in the range themselves unless it is open there.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def refusal(self, value: Any) -> str | None:
        """Returns what a value must be and is not; None where it is in the range."""
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
_RATE = Range(0, _FLOAT, open_low=True)

# What a group's node may hold, whatever class takes it.
_MOST_NESTED, _MOST_ITEMS, _MOST_CHARACTERS = 8, 1000, 4096
_LONG_NUMBER = re.compile(r"[\d_]{300,}")  # of fewer digits any number is a float


def _in(range_: Range, default: Any) -> Any:
    """Returns a field of the schema whose number must be in a range."""
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
    """What looks into a fit: torch's anomaly detection, and its profiler."""

    anomaly: bool = False
    profile: bool = False


@dataclass
class DistributedConfig:
    """How long, in seconds, processes that train together wait for one another."""

    timeout_seconds: float = _in(_SECONDS, 1800.0)


@dataclass
class DataConfig:
    """Which data, where it lies, how many images to train on, what pixels are divided by.

    Attributes:
        classes: names of the classes of Fashion-MNIST to take; null takes all.
        size: pixels of a photo's side; null takes the network's own.
        seed: of the photos' order, hence of what is trained, validated and tested on.
        test_split: share of the photos that is held out where there is but one set of them.
    """

    name: str = MISSING
    root: str | None = None
    limit: int | None = _in(_COUNT, None)
    scale: float = _in(Range(1e-30, 1e30), 255.0)
    classes: list[str] | None = None
    size: int | None = _in(Range(8, 1024), None)
    seed: int = _in(_SEED, 0)
    test_split: float = _in(Range(0, 1, open_low=True, open_high=True), 0.2)


@dataclass
class Config:
    """Everything that decides a run. Keys are Keras' words where the lesson has them."""

    seed: int = _in(_SEED, 0)
    epochs: int = _in(_COUNT, 5)
    batch_size: int = _in(_COUNT, 32)
    validation_split: float = _in(Range(0, 1, open_high=True), 0.1)
    device: str = "auto"
    threads: int | None = _in(Range(1, _MOST_THREADS), 1)
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


_DEVICE = re.compile(r"auto|cpu|(cuda|mps)(:\d+)?")

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


class Refused(BaseException):
    """Carries a user error past Hydra, which would print lines of its own about it, or go on."""


@contextlib.contextmanager
def _past_hydra() -> Iterator[None]:
    """Lets a callback refuse: Hydra makes a warning of its errors and goes on."""
    try:
        yield
    except UserError as error:
        raise Refused from error


class MadeFolders(Callback):
    """Notes which folders Hydra is about to make, to take back those of a run or sweep refused."""

    made: ClassVar[list[Path]] = []
    sweep: ClassVar[Path | None] = None  # the folder of the sweep under way

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before it makes the run's folder."""
        HydraConfig.instance().set_config(config)  # the folder's name refers to it
        with _past_hydra():
            MadeFolders.made = missing_folders(Path(config.hydra.run.dir).absolute())

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before it makes the sweep's folder."""
        HydraConfig.instance().set_config(config)
        folder = Path(config.hydra.sweep.dir)
        with _past_hydra():
            _refuse_strange_sweep(folder)
            MadeFolders.made = missing_folders(folder.absolute())
        MadeFolders.sweep = folder

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
                    remove(whole / submitted.FOLDER)
            remove_empty(cls.made)


def _refuse_strange_sweep(folder: Path) -> None:
    """Refuses a sweep's folder through which Hydra and submitit would write elsewhere."""
    for name in ("multirun.yaml", submitted.FOLDER):
        refuse_strange(folder / name, folder)
    refuse_strange_below(folder / submitted.FOLDER)
    with contextlib.suppress(FileNotFoundError):
        plan = folder / "multirun.yaml"
        if plan.is_symlink() or plan.lstat().st_nlink > 1:  # Hydra would write through it
            plan.unlink()


def run_name(seed: int) -> str:
    """Returns a name for a run's folder: the time, the seed and something unique.

    The processes of a job, and its restarts, share it: there it is the job's id.

    Raises:
        UserError: several processes of a job without an id.
    """
    if launcher.num_processes() == 1:
        now, number = datetime.now(), str(seed)[:20]  # one beyond its range is refused later on
        return f"{now:%Y-%m-%d_%H-%M-%S}_seed{number}_{uuid.uuid4().hex[:6]}"
    job = launcher.job_id()
    if job is None:
        raise UserError(
            "several processes need one run directory: give hydra.run.dir=PATH, or start them with "
            "torchrun --standalone or torchrun --rdzv-id=ID"
        )
    return f"seed{str(seed)[:20]}_{folder_name(job)}"


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


def typed(
    config: DictConfig, overrides: Sequence[str] = (), source: refusals.Source | None = None
) -> Config:
    """Returns the resolved, checked configuration of a composed one.

    Args:
        overrides: that it was composed from, for what to type instead of one.
        source: where it was composed from; None for `conf/`.

    Raises:
        UserError: a value out of its range, or two that do not go together.
    """
    for text in overrides:
        if text.startswith("~") and text[1:].partition("=")[0] in Config.__dataclass_fields__:
            raise UserError(f"{text}: a key cannot be removed; leave it out to have its default")
    try:
        return _checked(config)
    except (UserError, OmegaConfBaseException, OverflowError) as error:
        raise UserError(explain(error, overrides, source)) from None


def _checked(config: DictConfig) -> Config:
    checked = OmegaConf.to_object(config)
    assert isinstance(checked, Config)
    _refuse_unknown(checked)
    if not _DEVICE.fullmatch(checked.device):
        raise UserError(
            f"device={checked.device} is not known; choose auto, cpu, cuda, cuda:1, mps"
        )
    check(checked)
    return checked


def _refuse_unknown(node: Any, prefix: str = "") -> None:
    """Refuses keys that the schema does not have; Hydra's `+key=value` adds any."""
    known = [item.name for item in fields(node)]
    for key, value in vars(node).items():
        if key not in known:
            near = refusals.closest(key, known)
            raise UserError(f"unknown key {prefix}{key}{near}; known here: {', '.join(known)}")
        if is_dataclass(value):
            _refuse_unknown(value, f"{prefix}{key}.")


def check(config: Config) -> None:
    """Checks ranges and combinations, and names the key of the first that is wrong.

    Raises:
        UserError: with the key, its value and what it may be.
    """
    _check_ranges(config)
    _check_batch_is_shared(config.batch_size, launcher.num_processes())
    _choice("gradients", config.gradients, ("auto", "autograd", "by_hand"))
    _choice("resume", config.resume, ("auto", "never"))
    _choice("data.name", config.data.name, ("fashion_mnist", "photos"))
    if config.data.name == "photos" and config.data.classes is not None:
        raise UserError("data.classes is for Fashion-MNIST; for photos, leave folders out")
    stopping = config.early_stopping
    _choice("early_stopping.mode", stopping.mode, ("auto", "min", "max"))
    stops = stopping.patience is not None or stopping.restore_best_weights
    _choice(
        "early_stopping.monitor",
        stopping.monitor,
        ("loss", "accuracy", "val_loss", "val_accuracy"),
    )
    if stops and config.validation_split == 0 and stopping.monitor.startswith("val_"):
        raise UserError(
            f"early_stopping.monitor={stopping.monitor} needs a validation set; "
            "with validation_split=0 there is none"
        )
    if config.debug.anomaly and config.gradients != "autograd":  # auto may choose by_hand
        raise UserError(f"debug.anomaly=true needs gradients=autograd, not {config.gradients}")
    for group in ("model", "optimizer"):
        node = getattr(config, group)
        if not isinstance(node, Mapping):
            given = f"{group}={shortened(repr(node))}"
            raise UserError(f"{given} must be a group with a _target_, e.g. {group}=NAME")
        refuse_unreasonable(node, group)
    if "lr" in config.optimizer:
        _require(config.optimizer["lr"], _RATE, "optimizer.lr")


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
    """Refuses what no class takes as an argument: numbers, text or lists beyond all reason.

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
            f"no multiple of their number; use {near}"
        )


def _require(value: Any, range_: Range, key: str, may_be_null: bool = False) -> None:
    if may_be_null and value is None:
        return
    if (must := range_.refusal(value)) is not None:
        raise UserError(f"{key}={shortened(value)} {must}{', or null' if may_be_null else ''}")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = refusals.closest(value, choices)
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


def compose(*overrides: str, return_hydra_config: bool = False) -> DictConfig:
    """Composes a configuration from overrides, as the command line does, without running it.

    Raises:
        UserError: an override that Hydra refuses.
    """
    refuse_long_numbers(overrides)
    register()
    source = refusals.Source(CONF)
    try:
        return source.compose(overrides, return_hydra_config)
    except refusals.RAISED as error:
        raise UserError(explain(error, overrides, source)) from None


def refuse_long_numbers(overrides: Iterable[str]) -> None:
    """Refuses overrides with numbers of more digits than Python and OmegaConf read.

    Raises:
        UserError: with the key of the first.
    """
    for override in overrides:
        if long := _LONG_NUMBER.search(override):
            key = shortened(override.partition("=")[0])
            raise UserError(f"{key} has a number of {len(long[0])} digits; give a smaller one")


def check_search(*overrides: str) -> None:
    """Refuses overrides, some of which stand for several values, as each would be by itself.

    Raises:
        UserError: with the override as typed, and what to type instead.
    """
    register()
    source = refusals.Source(CONF, is_sweep=True)
    try:
        refusals.accept(source, overrides, _checked)
    except refusals.RAISED as error:
        raise UserError(explain(error, overrides, source)) from None


def explain(
    error: BaseException, overrides: Sequence[str] = (), source: refusals.Source | None = None
) -> str:
    """Returns one line for a refused configuration, with what to type instead where that is known.

    Args:
        overrides: as they were typed.
        source: where the configuration is composed from; None for `conf/`.

    Raises:
        KeyboardInterrupt: Hydra failed because that struck it.
    """
    if (struck := interruption(error)) is not None:
        raise struck
    register()
    return refusals.explain(error, source or refusals.Source(CONF), overrides, _checked)


def output_folder() -> Path:
    """Returns where runs are looked for when no folder is given."""
    return Path(os.curdir) / "outputs"
