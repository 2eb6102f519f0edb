"""Faults in a user's own YAML files for Hydra, with file, line and column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fashionnet.config.source import Source, defaults_of, group_of, pairs, read
from fashionnet.system.files import as_typed
from fashionnet.system.spelling import closest

_HEADER = re.compile(r"\s*#\s*@?\s*package\b")
# Groups of which every configuration has an option.
_CHOSEN = ("model", "optimizer", "schedule", "augmentation", "data")
_NOT_CLOSED = re.compile("unexpected end of stream|<stream end>")
# Words of YAML's messages, and what usually corrects the fault.
_ADVICE = (
    ("'\\t'", "indent with spaces, not tabs"),
    ("found character", "put the value in quotes"),
    ("mapping values are not allowed", "check the indentation, or quote a value that holds ': '"),
    ("<block end>", "check the indentation"),
    ("could not find expected ':'", "write KEY: VALUE"),
    ("undefined alias", "put the value in quotes"),
)


def fault(path: Path, group: str, source: Source, keys: Sequence[str]) -> str | None:
    """Returns in one line what is wrong with a YAML file, and where; None for a correct file.

    Args:
        group: the group that the file is an option of; "" for a primary configuration.
        keys: top-level keys of the configuration.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        return f"{as_typed(path)} cannot be read: {error.strerror}"
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        return f"{_at(path, before)}: not UTF-8; save the file as UTF-8"
    return _yaml_fault(path, text) or _content_fault(path, text, group, source, keys)


def _yaml_fault(path: Path, text: str) -> str | None:
    try:
        OmegaConf.create(text)
    except yaml.reader.ReaderError as error:
        what = f"the character {chr(error.character)!r} is not allowed"
        return f"{_at(path, text[: error.position])}: {what}"
    except yaml.MarkedYAMLError as error:
        return _marked(path, error)
    except (ValueError, RecursionError, OmegaConfBaseException) as error:
        return f"{as_typed(path)}: {' '.join(str(error).split())}"
    return None


def _content_fault(
    path: Path, text: str, group: str, source: Source, keys: Sequence[str]
) -> str | None:
    top = yaml.compose(text, Loader=yaml.SafeLoader)
    if top is not None and not isinstance(top, yaml.MappingNode):
        kind = "a list" if isinstance(top, yaml.SequenceNode) else "a single value"
        return f"{_at_node(path, top)}: the file must hold KEY: VALUE lines, not {kind}"
    return _package_fault(path, text, group, keys) or _defaults_fault(path, top, group, source)


def place(path: Path, dotted: str, group: str) -> str | None:
    """Returns "FILE, line L, column C" of a key in a file; None if the file does not set it."""
    node = read(path)
    if node is None:
        return None
    parts = dotted.split(".")
    if group and _header(path.read_text(encoding="utf-8")) != "_global_":
        above = group.split("/")
        if parts[: len(above)] != above:
            return None
        parts = parts[len(above) :]
    found: yaml.Node | None = None
    for part in parts:
        here = [(key, value) for key, value in pairs(node) if str(key.value) == part]
        if not here:
            return _at_node(path, found) if found and not pairs(node) else None
        found, node = here[-1]
    return None if found is None else _at_node(path, found)


def _marked(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark, said = error.problem_mark or error.context_mark, str(error.problem)
    if error.context_mark and _NOT_CLOSED.search(said):
        what = "quote" if "quoted" in str(error.context) else "bracket"
        mark, said = error.context_mark, f"a {what} opens here and is not closed"
    if "another document" in said:
        said = "a second document begins here; remove this ---"
    advice = next((advice for words, advice in _ADVICE if words in said), "")
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{as_typed(path)}{where}: {' '.join(said.split())}{advice and f'; {advice}'}"


def _package_fault(path: Path, text: str, group: str, keys: Sequence[str]) -> str | None:
    first = group.partition("/")[0]
    if not first or first in keys or _header(text) == "_global_":
        return None
    lines = [i for i, line in enumerate(text.splitlines(), 1) if _HEADER.match(line)]
    if not lines:
        said = f"lacks the line '# @package _global_' at its top, so its keys land below {first}"
    elif _header(text) is None and lines[0] > 1:
        said = "'# @package _global_' must be the first line of the file"
    else:
        said = "this line must read '# @package _global_'"
    return f"{as_typed(path)}, line {lines[0] if lines else 1}, column 1: {said}"


def _header(text: str) -> str | None:
    """Returns the package that the first lines of a file name, as Hydra reads them."""
    for line in filter(None, map(str.strip, text.splitlines())):
        words = line.lstrip("#").split()
        if not re.match(r"#+\s*@", line) or len(words) != 2:
            return None
        if words[0] == "@package":
            return words[1]
    return None


def _defaults_fault(path: Path, top: yaml.Node | None, group: str, source: Source) -> str | None:
    for entry in defaults_of(top):
        if isinstance(entry, yaml.ScalarNode):
            if entry.value in ("_self_", "schema"):
                continue
            name = str(entry.value).partition("@")[0]
            folder, _, option = _absolute(name, group).rpartition("/")
            if option in source.options(folder):
                continue
            near = closest(option, source.options(folder))
            return f"{_at_node(path, entry)}: there is no {folder and folder + '/'}{option}{near}"
        if not isinstance(entry, yaml.MappingNode):
            return f"{_at_node(path, entry)}: an entry of defaults must be GROUP: OPTION"
        for key, value in entry.value:
            said = _choice_fault(str(key.value), value, group, source)
            if said:
                return f"{_at_node(path, key)}: {said}"
    defaults = next((v for k, v in pairs(top) if k.value == "defaults"), None)
    if defaults is not None and not isinstance(defaults, yaml.SequenceNode):
        said = "defaults must be a list, each line of it '- override /GROUP: OPTION'"
        return f"{_at_node(path, defaults)}: {said}"
    return None


def _choice_fault(key: str, value: yaml.Node, group: str, source: Source) -> str | None:
    """Returns what is wrong with the line `key: value` of a defaults list."""
    name = _absolute(group_of(key), group)
    options, words = source.options(name), key.split()
    if not options and "optional" not in words:
        top = group_of(key).strip("/")
        if source.options(top):
            return f"{key} is looked for below {group}; write 'override /{top}: {value.value}'"
        names = [name for name in source.groups if "/" not in name]
        return f"there is no group {top}{closest(top, names)}"
    if not isinstance(value, yaml.ScalarNode) or value.tag.endswith(":null"):
        return None
    if value.value not in options and "optional" not in words and "$" not in value.value:
        near = closest(value.value, options) or f"; choose {', '.join(options)}"
        return f"{name} has no option {value.value}{near}"
    if group and name in _CHOSEN and "override" not in words:
        return f"{name} has an option already; write 'override /{name}: {value.value}'"
    return None


def _absolute(name: str, group: str) -> str:
    """Returns the absolute name for one in the defaults list of an option of `group`."""
    return name.strip("/") if name.startswith("/") or not group else f"{group}/{name}"


def _at_node(path: Path, node: yaml.Node) -> str:
    mark = node.start_mark
    return f"{as_typed(path)}, line {mark.line + 1}, column {mark.column + 1}"


def _at(path: Path, before: str) -> str:
    line = before.count("\n") + 1
    column = len(before) - (before.rfind("\n") + 1) + 1
    return f"{as_typed(path)}, line {line}, column {column}"
