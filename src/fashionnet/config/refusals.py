"""What Hydra refuses, in one line: the override or file that is meant, and what to type instead.

Hydra names neither in many cases, and knows nothing of what was meant. Here the first override
that cannot be composed is found by composing, and a suggestion is made only if it composes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Sweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fashionnet.config import conf_files
from fashionnet.errors import UserError
from fashionnet.system import extras
from fashionnet.system.spelling import closest, letters_of, likely

# What composing raises for what a user got wrong; ValueError covers UnicodeDecodeError.
RAISED = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    ValueError,
    OSError,
    OverflowError,
)

_MOST_VALUES = 20  # of a sweep that are looked at
_MOST_TRIES = 60  # compositions that may be tried to find a suggestion

_WORDS = {
    **dict.fromkeys(("learning_rate", "learningrate", "step_size", "eta"), "optimizer.lr"),
    **dict.fromkeys(("bs", "batch", "batches", "minibatch"), "batch_size"),
    **dict.fromkeys(("n_epochs", "num_epochs", "nb_epochs", "max_epochs", "ep"), "epochs"),
    **dict.fromkeys(("val_split", "validation", "val", "valid_split"), "validation_split"),
    **dict.fromkeys(("units", "width", "hidden_units", "hidden_size", "layers"), "model.hidden"),
    **dict.fromkeys(("drop", "dropout_rate", "drop_rate", "p"), "model.dropout"),
    **dict.fromkeys(("data_dir", "data_root", "data_path", "datadir", "dir"), "data.root"),
    **dict.fromkeys(("num_images", "n", "subset", "max_samples"), "data.limit"),
    **dict.fromkeys(("gpu", "gpus", "cuda", "accelerator"), "device"),
    **dict.fromkeys(("random_seed", "random_state", "manual_seed"), "seed"),
    **dict.fromkeys(("num_threads", "num_workers", "workers", "jobs"), "threads"),
    **dict.fromkeys(("net", "network", "arch", "architecture"), "model"),
    **dict.fromkeys(("opt", "optim", "solver"), "optimizer"),
    **dict.fromkeys(("dataset", "data_set"), "data"),
    **dict.fromkeys(("exp", "config", "recipe"), "experiment"),
    **dict.fromkeys(("force", "exist_ok"), "overwrite"),
    **dict.fromkeys(("out", "output", "output_dir", "out_dir", "run_dir"), "hydra.run.dir"),
    **dict.fromkeys(("outdir", "save_dir", "logdir", "log_dir"), "hydra.run.dir"),
    **dict.fromkeys(("launcher", "hydra.launcher"), "hydra/launcher"),
}  # fmt: skip
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_MEANT = {
    **dict.fromkeys(("none", "nil", "no", "all", "auto", "off", "never", "false"), "null"),
    **dict.fromkeys(("yes", "on", "y", "ja", "1"), "true"),
}
_LISTS = ("model.hidden", "model.mean", "model.std", "data.classes")
_NOT_CONVERTED = {
    "Integer": "is not a whole number",
    "Float": "is not a number",
    "Boolean": "is neither true nor false",
}
_EXTRAS = {"joblib": "sweeps", "submitit_slurm": "slurm", "submitit_local": "slurm"}


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
    is_sweep: bool = False

    def compose(self, overrides: Sequence[str], return_hydra_config: bool = False) -> DictConfig:
        """Composes a configuration, and lets Hydra's own errors through."""
        import hydra

        given = list(overrides)
        if self.folders:
            paths = ",".join(_quoted(f"file://{path.absolute()}") for path in self.folders)
            given.append(f"hydra.searchpath=[{paths}]")
        with warnings.catch_warnings(), self._opened():
            warnings.simplefilter("ignore")  # of a folder that is not there
            return hydra.compose(self.name, given, return_hydra_config)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[GlobalHydra]:
        """Lets the body use Hydra, also inside a job of Hydra's."""
        import hydra

        before = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(str(self.conf.absolute()), version_base="1.3"):
                yield GlobalHydra.instance()
        finally:
            GlobalHydra.instance().hydra = before

    @lru_cache  # noqa: B019  # while one refusal is looked into
    def options(self, group: str) -> list[str]:
        """Returns the options of a group, sorted; none where there is no such group."""
        with self._opened() as opened:
            found = set(opened.config_loader().get_group_options(group))
        for folder in self.folders:
            found |= {path.stem for path in (folder / group).glob("*.yaml")}
        return sorted(found)

    def groups(self) -> list[str]:
        """Returns the names of the groups, without Hydra's own."""
        folders = (self.conf, *self.folders)
        names = {
            path.parent.relative_to(folder).as_posix()
            for folder in folders
            for path in folder.glob("*/**/*.yaml")
        }
        return sorted(name for name in names if name.partition("/")[0] != "hydra")


def explain(
    error: BaseException,
    source: Source,
    overrides: Sequence[str],
    check: Callable[[DictConfig], object],
) -> str:
    """Returns one line for what was refused: what is meant by it, and what to type instead.

    Args:
        error: what composing or checking raised.
        overrides: all of them, as they were typed.
        check: raises what is wrong with a composed configuration.
    """
    source, rest = _with_search_path(source, overrides)
    try:
        return _Case(source, tuple(rest), check).explained(error)
    except RAISED:  # no more can be found out than what was said
        return sentence(error)


def _with_search_path(source: Source, overrides: Sequence[str]) -> tuple[Source, list[str]]:
    """Returns a source with the folders that hydra.searchpath names, and the other overrides."""
    folders, rest = list(source.folders), []
    for text in overrides:
        if text.lstrip("+").startswith("hydra.searchpath=") and _parses(text):
            value = _parsed(text).value()
            places = value if isinstance(value, list) else [value]
            folders += [Path(str(place).removeprefix("file://")) for place in places]
        else:
            rest.append(text)
    return replace(source, folders=tuple(folders)), rest


def accept(source: Source, overrides: Sequence[str], check: Callable[[DictConfig], object]) -> None:
    """Composes and checks overrides, each value of a sweep once; raises what is refused."""
    source, rest = _with_search_path(source, overrides)
    _Case(source, tuple(rest), check).accept(rest)


def sentence(error: BaseException) -> str:
    """Returns Hydra's or OmegaConf's own words in one line, without its appendices."""
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
    """Returns words as one types them in a shell, and in Python where that is possible."""
    return " ".join(_shell_word(word) for word in words)


def _shell_word(word: str) -> str:
    if shlex.quote(word) == word or "'" not in word:
        return shlex.quote(word)
    return f'"{word}"' if not re.search(r'["$`\\!]', word) else shlex.quote(word)


def _quoted(value: str) -> str:
    """Returns a text as Hydra takes it literally, in quotes."""
    quote = '"' if "'" in value and '"' not in value else "'"
    inner = re.sub(rf"(\\*)({quote}|$)", lambda m: m[1] * 2 + (m[2] and f"\\{m[2]}"), value)
    return f"{quote}{inner}{quote}"


def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _parses(text: str) -> bool:
    try:
        _parsed(text)
    except (HydraException, ValueError):
        return False
    return True


@dataclass(frozen=True)
class _Case:
    """A refusal that is looked into."""

    source: Source
    overrides: tuple[str, ...]
    check: Callable[[DictConfig], object]

    # -- what there is -----------------------------------------------------------------------------

    @cached_property
    def base(self) -> DictConfig:
        """The configuration without overrides, Hydra's own part included."""
        return self.source.compose((), return_hydra_config=True)

    @cached_property
    def groups(self) -> list[str]:
        return self.source.groups()

    def is_group(self, key: str) -> bool:
        name = key.partition("@")[0]
        return name in self.groups or (
            name.startswith("hydra/") and bool(self.source.options(name))
        )

    def tree(self, around: Sequence[str]) -> dict[str, Any]:
        """Returns dotted key → value of a configuration, its sections included."""
        try:
            config = self.source.compose([o for t in around for o in self.values(t)[:1]], True)
        except RAISED:
            config = self.base
        return dict(_leaves(OmegaConf.to_container(config, resolve=False)))

    def values(self, text: str) -> list[str]:
        """Returns the overrides, one value each, that one of a sweep stands for."""
        parsed = _parsed(text)
        if not parsed.is_sweep_override():
            return [text]
        key, sweep = parsed.get_key_element(), parsed._value
        assert isinstance(sweep, Sweep) or sweep is not None
        if isinstance(sweep, ChoiceSweep):
            found = [Transformer.str(value) for value in sweep.list]
        elif isinstance(sweep, RangeSweep):
            numbers = list(sweep.range())[:_MOST_VALUES]
            found = [str(number) for number in {numbers[0], numbers[-1]}] if numbers else []
        elif isinstance(sweep, IntervalSweep):
            found = [str(sweep.start), str(sweep.end)]
        else:
            found = []
        return [f"{key}={value}" for value in found[:_MOST_VALUES]]

    def accept(self, texts: Sequence[str], checked: bool = True) -> None:
        """Composes overrides, each value of a sweep once; raises what is refused."""
        variants = [self.values(text) if self.source.is_sweep else [text] for text in texts]
        for i in range(max(map(len, variants), default=1)):
            chosen = [values[min(i, len(values) - 1)] for values in variants if values]
            config = self.source.compose(chosen)
            if checked:
                self.check(config)

    def is_accepted(self, texts: Sequence[str]) -> bool:
        try:
            self.accept(texts)
        except RAISED:
            return False
        return True

    # -- which override ----------------------------------------------------------------------------

    def explained(self, error: BaseException) -> str:
        try:
            found = self.culprit(error)
        except RAISED as own:  # the primary configuration itself
            return self.in_files((), own) or sentence(own)
        if found is None:
            return (self.overrides and self.in_files(self.overrides, error)) or sentence(error)
        index, length, error = found
        texts = self.overrides[index : index + length]
        others = [*self.overrides[:index], *self.overrides[index + length :]]
        in_file = self.in_files(texts, error)
        if in_file:
            return in_file
        (why, choices), alone = self.why(texts, error), self.usable(others)
        ways = [shell(*meant) for meant in self.ways(texts, others, alone)]
        if self.is_sweep(texts[0]) and not self.source.is_sweep:
            sweep = replace(self, source=replace(self.source, is_sweep=True))
            for meant in sweep.ways(texts, others, alone):
                if any(map(sweep.is_sweep, meant)):
                    key = texts[0].partition("=")[0]
                    ways = [] if self.is_group(key) else ways
                    ways.insert(0, f"{shell('-m', *meant)} for a run with each")
        return "; ".join(filter(None, (why, f"type {', or '.join(ways)}" if ways else choices)))

    def is_sweep(self, text: str) -> bool:
        return _parses(text) and _parsed(text).is_sweep_override()

    def ways(
        self, texts: Sequence[str], others: Sequence[str], alone: Sequence[str]
    ) -> list[list[str]]:
        """Returns what may have been meant by overrides and is accepted: the likeliest, if any."""
        given = [list(texts)] if len(texts) == 1 and self.is_sweep(texts[0]) else []
        for meant in itertools.chain(given, self.meant(texts, alone)):
            plain = [word for word in meant if "=" in word]
            case = self
            if "--config-dir" in meant:
                folders = (*self.source.folders, Path(meant[1]))
                case = replace(self, source=replace(self.source, folders=folders))
            if case.is_accepted([*others, *plain]) or case.is_accepted([*alone, *plain]):
                return [meant]
        return []

    def usable(self, texts: Sequence[str]) -> list[str]:
        """Returns the overrides that can be composed one after another."""
        kept: list[str] = []
        for text in texts:
            with contextlib.suppress(*RAISED):
                self.accept([*kept, text], checked=False)
                kept.append(text)
        return kept

    def culprit(self, error: BaseException) -> tuple[int, int, BaseException] | None:
        """Returns the first override that is refused: its place, how many it spans, and why."""
        for i, text in enumerate(self.overrides):
            try:
                parsed = _parsed(text)
                if parsed.is_sweep_override() and not self.source.is_sweep:
                    return i, 1, HydraException("several values")
            except (HydraException, ValueError) as own:
                return (*self.span(i), own)
        _ = self.base
        kept: list[str] = []
        groups_first = sorted(
            range(len(self.overrides)),
            key=lambda i: not self.is_group(_parsed(self.overrides[i]).key_or_group),
        )
        for i in groups_first:
            try:
                self.accept([*kept, self.overrides[i]], checked=False)
            except RAISED as own:
                return i, 1, own
            kept.append(self.overrides[i])
        try:
            self.accept(kept)
        except RAISED as own:
            error = own
        key = self.key_of(error)
        for i, text in reversed(list(enumerate(self.overrides))):
            if key and _parsed(text).key_or_group == key:
                return i, 1, error
        return None

    def span(self, index: int) -> tuple[int, int]:
        """Returns which words belong to one that is no override: their first, and how many."""
        text = self.overrides[index]
        if "=" in text:
            return index, 1
        if index and self.overrides[index - 1].endswith("="):
            return index - 1, 2
        after = [word.strip() for word in self.overrides[index + 1 : index + 3]]
        if not after or "=" in after[0].lstrip("=") or after[0].startswith("-"):
            return index, 1
        return index, 3 if after[0] == "=" and len(after) > 1 else 2

    def named_key(self, error: BaseException) -> str | None:
        found = re.match(r"(?:unknown key )?([\w./-]+)", sentence(error))
        return found[1] if found and isinstance(error, UserError) else None

    def why(self, texts: Sequence[str], error: BaseException) -> tuple[str, str]:
        """Returns what is wrong with the override as typed, and what there is to choose from."""
        text, shown, said = texts[0], shell(*texts), sentence(error)
        key, equals, value = text.partition("=")
        bare = key.lstrip("+~")
        choices = ""
        if not equals or len(texts) > 1 or not re.fullmatch(r"[A-Za-z_][\w./@:-]*", bare):
            return f"{shown} is not KEY=VALUE", ""
        if not _parses(text):
            known = _unparsable(value)
        elif self.is_sweep(text) and not self.source.is_sweep:
            known = "several values for one run"
        elif isinstance(error, UserError):  # names the override itself
            said, _, known = said.partition("; known here: ")
            return said, known and f"known here: {known}"
        elif self.is_group(bare) and ("ould not" in said or said.startswith("Config group over")):
            known, choices = self.why_no_option(bare.partition("@")[0], said)
        else:
            known, choices = self.why_no_key(error) or (self.why_no_value(bare, said), "")
        return f"{shown}{' ' if known.startswith('needs') else ': '}{known}", choices

    def why_no_key(self, error: BaseException) -> tuple[str, str] | None:
        cause = error.__cause__ or error.__context__
        if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
            return None
        if "not in" not in str(cause):
            return None
        parent = cause.parent_node
        known = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
        known = [name for name in known if name not in ("hydra", "_target_")]
        return f"unknown key {cause.full_key}", f"known here: {', '.join(known)}"

    def why_no_option(self, group: str, said: str) -> tuple[str, str]:
        missing = re.search(r"hydra/launcher/(\w+)'", said)
        if missing and missing[1] in _EXTRAS:
            needs = "needs a package that is not installed"
            return sentence(extras.missing(needs, _EXTRAS[missing[1]])), ""
        options = self.source.options(group)
        choices = f"choose {', '.join(options)}"
        if said.startswith("Config group override") and options:
            choices += f", e.g. {group}={options[0]}"
        return f"{group} has no such option", choices

    def why_no_value(self, key: str, said: str) -> str:
        kind = re.search(r"Value '([^']*)'.*could not be converted to (\w+)", said)
        section = self.tree(()).get(key)
        if kind and kind[2] in _NOT_CONVERTED:
            return f"{kind[1]!r} {_NOT_CONVERTED[kind[2]]}"
        if said.startswith("Could not append"):
            return f"{key} is there already"
        if isinstance(section, dict) and not self.is_group(key):
            return f"{key} is a section; its keys: {', '.join(map(str, section))}"
        return said

    # -- what was meant ----------------------------------------------------------------------------

    def meant(self, texts: Sequence[str], others: Sequence[str]) -> Iterator[list[str]]:
        """Yields what may have been meant, the likeliest first; not all of it can be composed."""
        seen: set[tuple[str, ...]] = {tuple(texts)}
        for number, words in enumerate(self.candidates(texts, others)):
            if number > _MOST_TRIES:
                return
            if tuple(words) not in seen and all(_parses(w) for w in words if "=" in w):
                seen.add(tuple(words))
                yield words

    def candidates(self, texts: Sequence[str], others: Sequence[str]) -> Iterator[list[str]]:
        text, rest = texts[0].strip(), [t.strip() for t in texts[1:]]
        if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
            text = text[1:-1]
            yield [text]
        tree = self.tree(others)
        nested = re.fullmatch(r"(\w+)=([\w-]+)[.,:](\w+)=(.*)", text)
        if nested:
            yield [f"{nested[1]}={nested[2]}", f"{nested[1]}.{nested[3]}={nested[4]}"]
        if any(c in text for c in " \t;") and re.search(r"[=\s;][^=]*=", text):
            parts = [part for part in re.split(r"[\s;]+", text) if part]
            if len(parts) > 1 and all(_parses(part) for part in parts):
                yield parts
        if text.rstrip(",;") != text:
            yield [text.rstrip(",;")]
        yield from self.from_path(text)
        for key, value in self.pairs(text, rest):
            for word in self.keys_near(key, tree):
                yield from self.values_near(word, value, tree)
        if "=" not in text:
            yield from self.bare(text.lstrip("-+~"), tree)
        for key, value in self.pairs(text, rest):
            yield from self.with_options(key, value)

    def with_options(self, key: str, value: str) -> Iterator[list[str]]:
        """Yields a key that another option of a group has, with the choice of that option."""
        above, _, leaf = key.rpartition(".")
        for group in [group for group in ("model", "optimizer", "data") if above in ("", group)]:
            for option in self.source.options(group):
                if leaf != "name" and f"{group}.{leaf}" in self.tree([f"{group}={option}"]):
                    yield [f"{group}={option}", f"{group}.{leaf}={value}"]

    def pairs(self, text: str, rest: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yields key and value that an override may be meant to have."""
        whole = " ".join([text, *rest]).strip()
        bare = whole.lstrip("-+~ ")
        if "=" in bare:
            key, _, value = bare.partition("=")
            yield key.strip(), value.lstrip("=").strip() if value[:1] in "= " else value
            return
        for separator in (r"\s+", ":", r"\.(?=[^.]*$)", "/(?=[^/]*$)"):
            parts = re.split(separator, bare, maxsplit=1)
            if len(parts) == 2 and all(parts):
                yield parts[0], parts[1].strip()

    def keys_near(self, key: str, tree: dict[str, Any]) -> Iterator[str]:
        """Yields keys and groups that a word may be meant for: itself, then near misses."""
        names = [*tree, *self.groups]
        found = [key] if key in names or self.is_group(key) else []
        dotted = key.replace("/", ".")
        found += [name for name in names if letters_of(name) == letters_of(dotted)]
        word = letters_of(dotted.rpartition(".")[2])
        found += [name for name in names if letters_of(name.rpartition(".")[2]) == word]
        common = _WORDS.get(key.lower().replace("-", "_")) or _WORDS.get(word)
        found += [common] if common else []
        parent = dotted.rpartition(".")[0]
        beside = [name for name in names if name.rpartition(".")[0] == parent]
        leaves = {name: name.rpartition(".")[2] for name in names if not name.startswith("hydra")}
        for choices in ({name: name.rpartition(".")[2] for name in beside}, leaves):
            for near in likely(dotted.rpartition(".")[2], list(choices.values())):
                found += [name for name, leaf in choices.items() if leaf == near]
        is_hydras = key.startswith("hydra")
        found = [n for n in found if n == common or n.startswith("hydra") is is_hydras]
        yield from list(dict.fromkeys(found))[:8]

    def values_near(self, key: str, value: str, tree: dict[str, Any]) -> Iterator[list[str]]:
        """Yields overrides of a key with values that may be meant."""
        if self.is_group(key):
            yield from self.options_near(key, value)
            return
        section = tree.get(key)
        if isinstance(section, dict):
            yield from ([f"{key}.{name}={value}"] for name in section if name != "_target_")
            return
        for word in self.plain_values(key, value, section):
            if not _parses(f"{key}={word}"):
                yield [f"{key}={_quoted(word)}"]
                continue
            if _parsed(f"{key}={word}").is_sweep_override() and not self.source.is_sweep:
                if key in _LISTS or isinstance(section, list):
                    yield [f"{key}=[{word.strip('()')}]"]
                if isinstance(section, str) or key.endswith((".root", ".dir")):
                    yield [f"{key}={_quoted(word)}"]
                continue
            yield [f"{key}={word}"]
            yield [f"{key}={_quoted(word)}"]
            if key in _LISTS:
                yield [f"{key}=[{word.strip('[]()')}]"]

    def plain_values(self, key: str, value: str, before: Any) -> Iterator[str]:
        bare = value.strip().strip("'\"")
        if key == "device":
            yield from self.devices(bare)
        if bare.startswith("~"):
            yield os.path.expanduser(bare)
        if "$" in bare and os.path.expandvars(bare) != bare:
            yield os.path.expandvars(bare)
        is_number = isinstance(before, int | float) and not isinstance(before, bool)
        if is_number or before is None:
            yield from _numbers(bare, isinstance(before, int))
        if (key in _LISTS or isinstance(before, list)) and re.search(r"^[({]|\s", bare):
            yield "[" + ",".join(re.split(r"[\s,]+", bare.strip("(){}[] "))) + "]"
        if bare.startswith("[") and not bare.endswith("]"):
            yield f"{bare}]"
        yield value
        if key == "resume":
            yield "never" if bare.lower() in ("false", "no", "off", "0") else "auto"
        low = bare.lower()
        if low != bare:
            yield low
        if low in _MEANT and (before is None or isinstance(before, bool) or is_number):
            yield _MEANT[low]
        if not bare and before is not None:
            yield str(before)
        if key in ("gradients", "resume", "early_stopping.monitor", "early_stopping.mode"):
            choices = "auto autograd by_hand never loss accuracy val_loss val_accuracy min max"
            yield from likely(bare, choices.split())
        yield bare

    def devices(self, value: str) -> Iterator[str]:
        low = value.lower().replace(" ", "")
        number = re.fullmatch(r"(?:gpu|cuda|nvidia)?[:_-]?(\d+)", low)
        if low == "1":  # how many, most likely
            yield "cuda"
        if number:
            yield f"cuda:{number[1]}"
        yield from {"metal": ["mps"], "apple": ["mps"]}.get(low, [])
        if low in ("gpu", "nvidia", "true", "cuda"):
            yield "cuda"
        yield low
        yield from likely(low, ["auto", "cpu", "cuda", "mps"])

    def options_near(self, group: str, value: str) -> Iterator[list[str]]:
        options = self.source.options(group)
        bare = value.strip("'\"")
        yield [f"{group}={value}"]
        if "," in value:
            each = (next(likely(word, options), word) for word in value.split(","))
            yield [f"{group}={','.join(each)}"]
        if group == "data":
            yield from self.photos_in(bare)
        for near in likely(Path(bare).stem if "/" in bare or "." in bare else bare, options):
            yield [f"{group}={near}"]

    def photos_in(self, folder: str) -> Iterator[list[str]]:
        root = os.path.expanduser(os.path.expandvars(folder))
        if "/" in root or os.path.isdir(root):
            word = f"data.root={root}"
            yield ["data=photos", word if _parses(word) else f"data.root={_quoted(root)}"]

    def from_path(self, text: str) -> Iterator[list[str]]:
        """Yields the choice of the option that a YAML file holds, by its path."""
        key, equals, value = text.partition("=")
        path = Path(value if equals else key.lstrip("-"))
        if path.suffix not in (".yaml", ".yml"):
            return
        folder, group = path.parent.parent, path.parent.name
        if group in self.groups or path.is_file():
            choice = f"{group}={path.stem}"
            yield [choice]
            yield ["--config-dir", os.fspath(folder), choice]

    def bare(self, word: str, tree: dict[str, Any]) -> Iterator[list[str]]:
        """Yields what a word alone may stand for: an option, a key with its value, a folder."""
        groups = [group for group in self.groups if word in self.source.options(group)]
        yield from ([f"{group}={word}"] for group in groups)
        for key in self.keys_near(word, tree):
            before = tree.get(key)
            if self.is_group(key):
                yield from ([f"{key}={option}"] for option in self.source.options(key))
            elif isinstance(before, bool):
                yield [f"{key}={'false' if before else 'true'}"]
            elif before is not None and not isinstance(before, dict | list):
                yield [f"{key}={before}"]
        for group in self.groups:
            for near in likely(word, self.source.options(group)):
                yield [f"{group}={near}"]
        if os.path.isdir(os.path.expanduser(word)):
            yield from self.photos_in(word)

    # -- files of the user's -----------------------------------------------------------------------

    def in_files(self, texts: Sequence[str], error: BaseException) -> str | None:
        """Returns what is wrong with a file that overrides choose, and where in it."""
        keys = [key for key in self.source.groups() if "/" not in key]
        groups = conf_files.Groups(
            self.source.options, keys, [*self.schema_keys], ["model", "optimizer", "data"]
        )
        files = list(dict.fromkeys(self.files(texts)))
        for path, group in files:
            said = conf_files.fault(path, group, groups, closest)
            if said:
                return said
        key = self.key_of(error)
        # A key of the primary configuration is only to blame where no override stands for it.
        for path, group in reversed(files[bool(texts) :] if key else []):
            place = conf_files.place(path, key or "", group)
            if place:
                near = "" if isinstance(error, UserError) else self.near_key(key or "")
                return f"{place}: {near or sentence(error)}"
        return None

    def near_key(self, key: str) -> str | None:
        """Returns that a key is not known, and which one may be meant; None for a known one."""
        tree = dict(_leaves(OmegaConf.to_container(self.base, resolve=False)))
        if key in tree or self.is_group(key):
            return None
        near = next((f" (did you mean {name}?)" for name in self.keys_near(key, tree)), "")
        return f"unknown key {key}{near}"

    @cached_property
    def schema_keys(self) -> list[str]:
        with contextlib.suppress(*RAISED):
            return [str(key) for key in self.base if key != "experiment"]
        return []

    def key_of(self, error: BaseException) -> str | None:
        """Returns the dotted key that an error is about."""
        for each in (error, error.__cause__, error.__context__):
            if isinstance(each, OmegaConfBaseException) and each.full_key:
                return str(each.full_key)
        return self.named_key(error)

    def files(self, texts: Sequence[str]) -> Iterator[tuple[Path, str]]:
        """Yields the files that overrides choose, with their groups: the primary one first."""
        folders = [self.source.conf, *self.source.folders]
        yield self.source.conf / f"{self.source.name}.yaml", ""
        waiting = []
        for text in texts:
            with contextlib.suppress(HydraException, ValueError):
                for one in self.values(text):
                    parsed = _parsed(one)
                    waiting.append((parsed.key_or_group.partition("@")[0], str(parsed.value())))
        seen: set[Path] = set()
        while waiting:
            group, option = waiting.pop(0)
            for folder in folders:
                path = folder / group / f"{option}.yaml"
                if os.path.lexists(path) and path not in seen:
                    seen.add(path)
                    yield path, group
                    below = ((name or f"/{group}", o) for name, o in conf_files.chosen_in(path))
                    waiting += [(name.strip("/"), o) for name, o in below]


def _numbers(text: str, whole: bool) -> Iterator[str]:
    """Yields numbers that a text may mean: words, percents, fractions, commas for points."""
    low = text.lower().replace(" ", "")
    if low in _NUMBERS:
        yield str(_NUMBERS.index(low))
    if re.fullmatch(r"\d{1,3}([,_']\d{3})+", low):
        yield re.sub(r"\D", "", low)
    if re.fullmatch(r"\d+,\d+", low) and not whole:
        yield low.replace(",", ".")
    with contextlib.suppress(ValueError, OverflowError):
        if float(low) == int(float(low)):
            yield str(int(float(low)))
    with contextlib.suppress(ValueError):
        if low.endswith("%"):
            yield repr(float(low[:-1]) / 100)
    with contextlib.suppress(ValueError, ZeroDivisionError):
        above, slash, below = low.partition("/")
        if slash:
            yield repr(float(above) / float(below))


def _unparsable(value: str) -> str:
    if value.startswith("="):
        return "one = too many"
    if re.search(r"[\s;]\S+=", value):
        return "several overrides in one word"
    return "~ is not expanded here" if value.startswith("~") else "the value needs quotes"


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
