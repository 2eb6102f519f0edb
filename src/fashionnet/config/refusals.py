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
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fashionnet.config.conf_files import ConfFile
from fashionnet.config.source import RAISED, Source, parsed, parses, sentence, shell
from fashionnet.config.suggestions import Suggestions
from fashionnet.errors import UserError
from fashionnet.system import extras

_NOT_CONVERTED = re.compile(r"Value '([^']*)'.*could not be converted to (Integer|Float|Boolean)")
_KINDS = {
    "Integer": "is not a whole number",
    "Float": "is not a number",
    "Boolean": "is neither true nor false",
}
_NO_OPTION = re.compile("ould not|^Config group over")
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
    try:
        return _case(source, overrides, check).explained(error)
    except RAISED:  # only Hydra's own message is left
        return sentence(error)


def accept(source: Source, overrides: Sequence[str], check: Callable[[DictConfig], object]) -> None:
    """Composes and checks overrides, each value of a sweep once; raises what is refused."""
    case = _case(source, overrides, check)
    case.accept(case.overrides)


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
        span, error = found
        texts = self.overrides[span]
        others = [*self.overrides[: span.start], *self.overrides[span.stop :]]
        if in_file := self.in_files(texts, error):
            return in_file
        (why, choices), alone = self.why(texts, error), self.usable(others)
        way = self.way(texts, others, alone)
        ways = [shell(*way)] if way else []
        if self.source.is_several(texts[0]) and not self.source.is_sweep:
            sweep = replace(self, source=replace(self.source, is_sweep=True))
            way = sweep.way(texts, others, alone)
            if any(map(self.source.is_several, way)):
                ways = [] if self.source.is_group(texts[0].partition("=")[0]) else ways
                ways.insert(0, f"{shell('-m', *way)} for a run with each")
        return "; ".join(filter(None, (why, f"type {', or '.join(ways)}" if ways else choices)))

    def way(self, texts: Sequence[str], others: Sequence[str], alone: Sequence[str]) -> list[str]:
        """Returns the likeliest overrides that were meant and are accepted, or []."""
        given = [list(texts)] if len(texts) == 1 and self.source.is_several(texts[0]) else []
        for meant in itertools.chain(given, Suggestions(self.source).meant(texts, alone)):
            plain = [word for word in meant if "=" in word]
            case = self
            if "--config-dir" in meant:
                folders = (*self.source.folders, Path(meant[1]))
                case = replace(self, source=replace(self.source, folders=folders))
            if case.is_accepted([*others, *plain]) or case.is_accepted([*alone, *plain]):
                return meant
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

    def culprit(self, error: BaseException) -> tuple[slice, BaseException] | None:
        """Returns the words of the first refused override, and what refuses it."""
        for i, text in enumerate(self.overrides):
            try:
                if parsed(text).is_sweep_override() and not self.source.is_sweep:
                    return slice(i, i + 1), HydraException("several values")
            except (HydraException, ValueError) as own:
                return self.span(i), own
        _ = self.source.base
        keys = [parsed(text).key_or_group for text in self.overrides]
        order = sorted(range(len(keys)), key=lambda i: not self.source.is_group(keys[i]))
        choices = [self.overrides[i] for i in order if self.source.is_group(keys[i])]
        are_accepted = len(choices) > 1 and self.is_accepted(choices, checked=False)
        kept = choices if are_accepted else []
        for i in order[len(kept) :]:
            try:
                self.accept([*kept, self.overrides[i]], checked=False)
            except RAISED as own:
                return slice(i, i + 1), own
            kept.append(self.overrides[i])
        try:
            self.accept(kept)
        except RAISED as own:
            error = own
        if (key := self.key_of(error)) in keys:
            last = len(keys) - keys[::-1].index(str(key))
            return slice(last - 1, last), error
        return None

    def span(self, index: int) -> slice:
        """Returns the words that were meant as one override."""
        text = self.overrides[index]
        after = [word.strip() for word in self.overrides[index + 1 : index + 3]]
        if "=" not in text and index and self.overrides[index - 1].endswith("="):
            return slice(index - 1, index + 1)
        if "=" in text or not after or "=" in after[0].lstrip("=") or after[0].startswith("-"):
            return slice(index, index + 1)
        return slice(index, index + (3 if after[0] == "=" and len(after) > 1 else 2))

    def why(self, texts: Sequence[str], error: BaseException) -> tuple[str, str]:
        """Returns what is wrong with the override as typed, and the choices, if they are known."""
        text, shown, said = texts[0], shell(*texts), sentence(error)
        key, equals, value = text.partition("=")
        key, choices = key.lstrip("+~"), ""
        if not equals or len(texts) > 1 or not re.fullmatch(r"[A-Za-z_][\w./@:-]*", key):
            return f"{shown} is not KEY=VALUE", ""
        cause = error.__cause__ or error.__context__
        launcher = re.search(r"hydra/launcher/(\w+)'", said)
        section = self.source.tree(()).get(key)
        if not parses(text):
            said = _unparsable(value)
        elif self.source.is_several(text) and not self.source.is_sweep:
            said = "several values for one run"
        elif isinstance(error, UserError):  # names the override itself
            said, _, known = said.partition("; known here: ")
            return said, known and f"known here: {known}"
        elif launcher and launcher[1] in _EXTRAS:
            needs = f"{shown} needs a package that is not installed"
            return sentence(extras.missing(needs, _EXTRAS[launcher[1]])), ""
        elif _NO_OPTION.search(said) and self.source.is_group(key):
            group = key.partition("@")[0]
            options = self.source.options(group)
            said, choices = f"{group} has no such option", f"choose {', '.join(options)}"
        elif isinstance(cause, OmegaConfBaseException) and "not in" in str(cause):
            parent = cause.parent_node
            names = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
            known = ", ".join(name for name in names if name not in ("hydra", "_target_"))
            said, choices = f"unknown key {cause.full_key}", f"known here: {known}"
        elif kind := _NOT_CONVERTED.search(said):
            said = f"{kind[1]!r} {_KINDS[kind[2]]}"
        elif said.startswith("Could not append"):
            said = f"{key} is there already"
        elif isinstance(section, dict):
            said = f"{key} is a section; its keys: {', '.join(map(str, section))}"
        return f"{shown}: {said}", choices

    def in_files(self, texts: Sequence[str], error: BaseException) -> str | None:
        """Returns what is wrong with a file that overrides choose, and where in it."""
        files = [ConfFile(*each, self.source) for each in self.source.files(texts)]
        for file in files:
            if said := file.fault():
                return said
        key = self.key_of(error)
        # The primary configuration is at fault only if no override sets the key.
        for file in reversed(files[bool(texts) :] if key else []):
            if place := file.place(key or ""):
                near = "" if isinstance(error, UserError) else self.near_key(key or "")
                return f"{place}: {near or sentence(error)}"
        return None

    def near_key(self, key: str) -> str | None:
        """Returns "unknown key …" with a similar key, if there is one; None for a known key."""
        tree = self.source.tree(())
        if key in tree or self.source.is_group(key):
            return None
        near = next(Suggestions(self.source).keys_near(key, tree), None)
        return f"unknown key {key}{f' (did you mean {near}?)' if near else ''}"

    def key_of(self, error: BaseException) -> str | None:
        """Returns the dotted key that an error is about."""
        for each in (error, error.__cause__, error.__context__):
            if isinstance(each, OmegaConfBaseException) and each.full_key:
                return str(each.full_key)
        named = re.match(r"(?:unknown key )?([\w./-]+)", sentence(error))
        return named[1] if named and isinstance(error, UserError) else None


def _case(source: Source, overrides: Sequence[str], check: Callable[[DictConfig], object]) -> _Case:
    """Returns a case whose source has the folders that hydra.searchpath names."""
    folders, rest = list(source.folders), []
    for text in overrides:
        if text.lstrip("+").startswith("hydra.searchpath=") and parses(text):
            value = parsed(text).value()
            places = value if isinstance(value, list) else [value]
            folders += [Path(str(place).removeprefix("file://")) for place in places]
        else:
            rest.append(text)
    return _Case(replace(source, folders=tuple(folders)), tuple(rest), check)


def _unparsable(value: str) -> str:
    if value.startswith("="):
        return "one = too many"
    if re.search(r"[\s;]\S+=", value):
        return "several overrides in one word"
    return "~ is not expanded here" if value.startswith("~") else "the value needs quotes"
