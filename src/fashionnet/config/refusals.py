"""Explains in one line what Hydra refuses: the faulty override or file, and what to type instead.

Hydra often names neither. The first override that cannot be composed is found by composing, and a
suggestion is made only if it composes.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fashionnet.config import conf_files
from fashionnet.config.source import RAISED, Source, leaves, parsed, parses, sentence, shell
from fashionnet.config.suggestions import Suggestions
from fashionnet.errors import UserError
from fashionnet.system import extras

_NOT_CONVERTED = {
    "Integer": "is not a whole number",
    "Float": "is not a number",
    "Boolean": "is neither true nor false",
}
_EXTRAS = {"joblib": "sweeps", "submitit_slurm": "slurm", "submitit_local": "slurm"}


def explain(
    error: BaseException,
    source: Source,
    overrides: Sequence[str],
    check: Callable[[DictConfig], object],
) -> str:
    """Returns one line for what was refused: why, and what to type instead.

    Args:
        error: what composing or checking raised.
        overrides: all of them, as they were typed.
        check: raises what is wrong with a composed configuration.
    """
    source, rest = _with_search_path(source, overrides)
    try:
        return _Case(source, tuple(rest), check).explained(error)
    except RAISED:  # only Hydra's own message is left
        return sentence(error)


def _with_search_path(source: Source, overrides: Sequence[str]) -> tuple[Source, list[str]]:
    """Returns a source with the folders that hydra.searchpath names, and the other overrides."""
    folders, rest = list(source.folders), []
    for text in overrides:
        if text.lstrip("+").startswith("hydra.searchpath=") and parses(text):
            value = parsed(text).value()
            places = value if isinstance(value, list) else [value]
            folders += [Path(str(place).removeprefix("file://")) for place in places]
        else:
            rest.append(text)
    return replace(source, folders=tuple(folders)), rest


def accept(source: Source, overrides: Sequence[str], check: Callable[[DictConfig], object]) -> None:
    """Composes and checks overrides, each value of a sweep once; raises what is refused."""
    source, rest = _with_search_path(source, overrides)
    _Case(source, tuple(rest), check).accept(rest)


@dataclass(frozen=True)
class _Case:
    """Refused overrides, the source they are composed from, and the check of the result."""

    source: Source
    overrides: tuple[str, ...]
    check: Callable[[DictConfig], object]

    def accept(self, texts: Sequence[str], checked: bool = True) -> None:
        """Composes overrides, each value of a sweep once; raises what is refused."""
        variants = [self.source.values(text) if self.source.is_sweep else [text] for text in texts]
        for i in range(max(map(len, variants), default=1)):
            chosen = [values[min(i, len(values) - 1)] for values in variants if values]
            config = self.source.compose(chosen)
            if checked:
                self.check(config)

    def is_accepted(self, texts: Sequence[str], checked: bool = True) -> bool:
        try:
            self.accept(texts, checked)
        except RAISED:
            return False
        return True

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
        if self.source.is_several(texts[0]) and not self.source.is_sweep:
            sweep = replace(self, source=replace(self.source, is_sweep=True))
            for meant in sweep.ways(texts, others, alone):
                if any(map(self.source.is_several, meant)):
                    key = texts[0].partition("=")[0]
                    ways = [] if self.source.is_group(key) else ways
                    ways.insert(0, f"{shell('-m', *meant)} for a run with each")
        return "; ".join(filter(None, (why, f"type {', or '.join(ways)}" if ways else choices)))

    def ways(
        self, texts: Sequence[str], others: Sequence[str], alone: Sequence[str]
    ) -> list[list[str]]:
        """Returns the likeliest overrides that were meant and are accepted, or none."""
        given = [list(texts)] if len(texts) == 1 and self.source.is_several(texts[0]) else []
        for meant in itertools.chain(given, Suggestions(self.source).meant(texts, alone)):
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
        if self.is_accepted(texts, checked=False):
            return list(texts)
        kept: list[str] = []
        for text in texts:
            with contextlib.suppress(*RAISED):
                self.accept([*kept, text], checked=False)
                kept.append(text)
        return kept

    def culprit(self, error: BaseException) -> tuple[int, int, BaseException] | None:
        """Returns the first refused override: its index, how many words it spans, and the error."""
        for i, text in enumerate(self.overrides):
            try:
                if parsed(text).is_sweep_override() and not self.source.is_sweep:
                    return i, 1, HydraException("several values")
            except (HydraException, ValueError) as own:
                return (*self.span(i), own)
        _ = self.source.base
        choices: list[int] = []
        values: list[int] = []
        for i, text in enumerate(self.overrides):
            (choices if self.source.is_group(parsed(text).key_or_group) else values).append(i)
        kept: list[str] = []
        all_choices = [self.overrides[i] for i in choices]
        if len(choices) > 1 and self.is_accepted(all_choices, checked=False):
            kept, choices = all_choices, []
        for i in (*choices, *values):
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
            if key and parsed(text).key_or_group == key:
                return i, 1, error
        return None

    def span(self, index: int) -> tuple[int, int]:
        """Returns the index and the number of the words that were meant as one override."""
        text = self.overrides[index]
        if "=" in text:
            return index, 1
        if index and self.overrides[index - 1].endswith("="):
            return index - 1, 2
        after = [word.strip() for word in self.overrides[index + 1 : index + 3]]
        if not after or "=" in after[0].lstrip("=") or after[0].startswith("-"):
            return index, 1
        return index, 3 if after[0] == "=" and len(after) > 1 else 2

    def why(self, texts: Sequence[str], error: BaseException) -> tuple[str, str]:
        """Returns what is wrong with the override as typed, and the possible choices."""
        text, shown, said = texts[0], shell(*texts), sentence(error)
        key, equals, value = text.partition("=")
        bare = key.lstrip("+~")
        choices = ""
        if not equals or len(texts) > 1 or not re.fullmatch(r"[A-Za-z_][\w./@:-]*", bare):
            return f"{shown} is not KEY=VALUE", ""
        if not parses(text):
            known = _unparsable(value)
        elif self.source.is_several(text) and not self.source.is_sweep:
            known = "several values for one run"
        elif isinstance(error, UserError):  # names the override itself
            said, _, known = said.partition("; known here: ")
            return said, known and f"known here: {known}"
        elif self.source.is_group(bare) and (
            "ould not" in said or said.startswith("Config group over")
        ):
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
        section = self.source.tree(()).get(key)
        if kind and kind[2] in _NOT_CONVERTED:
            return f"{kind[1]!r} {_NOT_CONVERTED[kind[2]]}"
        if said.startswith("Could not append"):
            return f"{key} is there already"
        if isinstance(section, dict) and not self.source.is_group(key):
            return f"{key} is a section; its keys: {', '.join(map(str, section))}"
        return said

    def in_files(self, texts: Sequence[str], error: BaseException) -> str | None:
        """Returns what is wrong with a file that overrides choose, and where in it."""
        files = list(dict.fromkeys(self.source.files(texts)))
        for path, group in files:
            said = conf_files.fault(path, group, self.source, self.schema_keys)
            if said:
                return said
        key = self.key_of(error)
        # The primary configuration is at fault only if no override sets the key.
        for path, group in reversed(files[bool(texts) :] if key else []):
            place = conf_files.place(path, key or "", group)
            if place:
                near = "" if isinstance(error, UserError) else self.near_key(key or "")
                return f"{place}: {near or sentence(error)}"
        return None

    def near_key(self, key: str) -> str | None:
        """Returns "unknown key …" with a similar key, if there is one; None for a known key."""
        tree = dict(leaves(OmegaConf.to_container(self.source.base, resolve=False)))
        if key in tree or self.source.is_group(key):
            return None
        near = next(Suggestions(self.source).keys_near(key, tree), None)
        return f"unknown key {key}{f' (did you mean {near}?)' if near else ''}"

    @cached_property
    def schema_keys(self) -> list[str]:
        with contextlib.suppress(*RAISED):
            return [str(key) for key in self.source.base if key != "experiment"]
        return []

    def key_of(self, error: BaseException) -> str | None:
        """Returns the dotted key that an error is about."""
        for each in (error, error.__cause__, error.__context__):
            if isinstance(each, OmegaConfBaseException) and each.full_key:
                return str(each.full_key)
        named = re.match(r"(?:unknown key )?([\w./-]+)", sentence(error))
        return named[1] if named and isinstance(error, UserError) else None


def _unparsable(value: str) -> str:
    if value.startswith("="):
        return "one = too many"
    if re.search(r"[\s;]\S+=", value):
        return "several overrides in one word"
    return "~ is not expanded here" if value.startswith("~") else "the value needs quotes"
