"""Where a configuration is composed from, and Hydra's grammar of overrides."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fashionnet.errors import UserError

# What composing raises for what a user got wrong; ValueError covers UnicodeDecodeError.
RAISED = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    ValueError,
    OSError,
    OverflowError,
)

_MOST_VALUES = 20  # of a sweep, that are checked


@dataclass(frozen=True)
class Source:
    """Where a configuration is composed from.

    Attributes:
        conf: the folder of the primary configuration.
        name: of the primary configuration.
        folders: further folders with groups, as `--config-dir` names them.
        is_sweep: whether an override may stand for several values.
    """

    conf: Path
    name: str = "train"
    folders: tuple[Path, ...] = ()
    is_sweep: bool = field(default=False, compare=False)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Composes a configuration as Hydra does, and lets Hydra's own errors through.

        Hydra reads every file each time. Here the configuration of the chosen options is kept until
        a file changes, and the values of keys are set on a copy of it.
        """
        config = self._with_hydras(overrides)
        with open_dict(config):
            del config["hydra"]
        return config

    def _with_hydras(self, overrides: Sequence[str]) -> DictConfig:
        """Composes a configuration, Hydra's own part included."""
        each = [parsed(text) for text in overrides]
        if any(override.key_or_group == "hydra.searchpath" for override in each):
            return self.compose_anew(overrides)
        groups = {*self.groups, *self._chosen(()).hydra.runtime.choices}
        choices, values = [], []
        for text, override in zip(overrides, each, strict=True):
            key = override.key_or_group
            if override.is_sweep_override():
                raise HydraException("several values")
            if (key in groups or "/" in key) and not isinstance(override.value(), dict):
                choices.append(text)
            else:
                values.append(override)
        config = copy.deepcopy(self._chosen(choices))
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config

    def _chosen(self, choices: Sequence[str]) -> DictConfig:
        """Returns the configuration with options of groups; it must not be changed."""
        return _composed(self, tuple(choices), self._stamps)

    def compose_anew(self, overrides: Sequence[str]) -> DictConfig:
        """Composes a configuration with Hydra alone, Hydra's own part included."""
        given = list(overrides)
        if self.folders:
            paths = ",".join(quoted(f"file://{path.absolute()}") for path in self.folders)
            given.append(f"hydra.searchpath=[{paths}]")
        with warnings.catch_warnings(), self._opened():
            warnings.simplefilter("ignore")  # of a folder that is not there
            return hydra.compose(self.name, given, return_hydra_config=True)

    @cached_property
    def _files(self) -> list[tuple[Path, Path]]:
        """Each YAML file, with its folder."""
        return [
            (path, folder)
            for folder in (self.conf, *self.folders)
            for pattern in ("*.yaml", "*/**/*.yaml")
            for path in folder.glob(pattern)
        ]

    @cached_property
    def _stamps(self) -> tuple[object, ...]:
        """A value that changes when a file does."""
        return tuple(_stamp(path) for path, _folder in self._files)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[GlobalHydra]:
        """Lets the body use Hydra, also inside a job of Hydra's."""
        before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(str(self.conf.absolute()), version_base="1.3"):
                yield GlobalHydra.instance()
        finally:
            GlobalHydra.instance().hydra = before

    def options(self, group: str) -> list[str]:
        """Returns the options of a group, sorted; none for an unknown group."""
        with self._opened() as opened:
            found = set(opened.config_loader().get_group_options(group))
        for folder in self.folders:
            found |= {path.stem for path in (folder / group).glob("*.yaml")}
        return sorted(found)

    @cached_property
    def groups(self) -> list[str]:
        """Returns the names of the groups, without Hydra's own."""
        names = {path.parent.relative_to(folder).as_posix() for path, folder in self._files}
        return sorted(name for name in names if name.partition("/")[0] not in (".", "hydra"))

    @cached_property
    def base(self) -> DictConfig:
        """The configuration without overrides, Hydra's own part included."""
        return self._with_hydras(())

    def is_group(self, key: str) -> bool:
        name = key.partition("@")[0]
        return name in self.groups or (name.startswith("hydra/") and bool(self.options(name)))

    def tree(self, around: Sequence[str]) -> dict[str, Any]:
        """Returns dotted key → value of a configuration, its sections included."""
        try:
            config = self._with_hydras([o for t in around for o in self.values(t)[:1]])
        except RAISED:
            config = self.base
        return dict(leaves(OmegaConf.to_container(config, resolve=False)))

    def values(self, text: str) -> list[str]:
        """Returns the overrides, one value each, that one of a sweep stands for."""
        override = parsed(text)
        if not override.is_sweep_override():
            return [text]
        key, sweep = override.get_key_element(), override._value
        if isinstance(sweep, ChoiceSweep):
            found = [Transformer.str(value) for value in sweep.list]
        elif isinstance(sweep, RangeSweep):
            numbers = list(sweep.range())
            found = [str(number) for number in {numbers[0], numbers[-1]}] if numbers else []
        elif isinstance(sweep, IntervalSweep):
            found = [str(sweep.start), str(sweep.end)]
        else:
            found = []
        return [f"{key}={value}" for value in found[:_MOST_VALUES]]

    def files(self, texts: Sequence[str]) -> Iterator[tuple[Path, str]]:
        """Yields the files that overrides choose, with their groups: the primary one first."""
        yield self.conf / f"{self.name}.yaml", ""
        waiting = []
        for text in texts:
            with contextlib.suppress(HydraException, ValueError):
                for one in self.values(text):
                    override = parsed(one)
                    group = override.key_or_group.partition("@")[0]
                    waiting.append((group, str(override.value())))
        seen: set[Path] = set()
        while waiting:
            group, option = waiting.pop(0)
            for folder in (self.conf, *self.folders):
                path = folder / group / f"{option}.yaml"
                if os.path.lexists(path) and path not in seen:
                    seen.add(path)
                    yield path, group
                    for key, value in choices_in(read(path)):
                        name = group_of(key.value).strip("/") if value else group
                        waiting.append((name, str((value or key).value)))

    def is_several(self, text: str) -> bool:
        """Returns whether an override stands for several values."""
        return parses(text) and parsed(text).is_sweep_override()


def _stamp(path: Path) -> tuple[object, ...]:
    with contextlib.suppress(OSError):
        stat = path.stat()
        return path, stat.st_ino, stat.st_mtime_ns, stat.st_size
    return (path,)


@lru_cache(maxsize=64)
def _composed(source: Source, choices: tuple[str, ...], _stamps: object) -> DictConfig:
    return source.compose_anew(choices)


def sentence(error: BaseException) -> str:
    """Returns the message of Hydra or OmegaConf in one line, without its appendices."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    kept = []
    for line in str(error).splitlines():
        if line.strip().startswith(
            ("Config search path", "full_key:", "object_type=", "reference_type=", "See https:")
        ):
            break
        kept.append(line)
    said = " ".join(" ".join(kept).split()) or type(error).__name__
    if isinstance(error, OverflowError) and (key := re.search(r"full_key: (\S+)", str(error))):
        return f"{key[1]}: {said}"
    said = re.sub(r"^In '[^']*': \w+ raised while composing config: ", "", said)
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        reason = sentence(cause)
        if reason not in said and "$" not in reason:  # OmegaConf's own template
            return f"{said}: {reason}"
    return said


def shell(*words: str) -> str:
    """Returns words quoted for a shell, and where possible also valid inside a Python string."""
    return " ".join(
        f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)
        for word in words
    )


def quoted(value: str) -> str:
    """Returns a text in quotes, so that Hydra takes it literally."""
    quote = '"' if "'" in value and '"' not in value else "'"
    inner = re.sub(rf"(\\*)({quote}|$)", lambda m: m[1] * 2 + (m[2] and f"\\{m[2]}"), value)
    return f"{quote}{inner}{quote}"


def parsed(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def parses(text: str) -> bool:
    try:
        parsed(text)
    except (HydraException, ValueError):
        return False
    return True


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted key and value of a configuration, its sections included."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def keys_in(path: Path) -> list[str]:
    """Returns the keys at the top of a file; none for one that cannot be read."""
    return [str(key.value) for key, _value in pairs(read(path))]


def read(path: Path) -> yaml.Node | None:
    """Returns the top of a YAML file; None if the file is empty or cannot be read."""
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def choices_in(top: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.Node | None]]:
    """Yields the entries of a file's defaults list: group and option, or another file and None."""
    for key, value in pairs(top):
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            for entry in value.value:
                if isinstance(entry, yaml.ScalarNode):
                    yield entry, None
                yield from pairs(entry)


def pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    return list(node.value) if isinstance(node, yaml.MappingNode) else []


def group_of(key: str) -> str:
    """Returns the group of a key like "override /model@net"."""
    return key.rpartition(" ")[2].partition("@")[0]
