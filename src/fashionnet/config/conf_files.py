"""Faults in a user's own YAML files for Hydra, with file, line and column."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fashionnet.config.schema import Config
from fashionnet.config.source import Source, choices_in, group_of, pairs, read
from fashionnet.system.files import as_typed
from fashionnet.system.spelling import closest

_HEADER = re.compile(r"\s*#\s*@?\s*package\b")
# Groups of which every configuration has an option.
_CHOSEN = ("model", "optimizer", "schedule", "augmentation", "data")
# An option of these groups sets the key of its group; of any other, keys at the top.
_KEYS = ("", "hydra", *Config.__dataclass_fields__)
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


@dataclass(frozen=True)
class ConfFile:
    """A YAML file of a configuration.

    Attributes:
        group: the group that the file is an option of; "" for a primary configuration.
        source: where the options lie that the file may choose.
    """

    path: Path
    group: str
    source: Source

    def fault(self) -> str | None:
        """Returns in one line what is wrong with the file, and where; None for a correct file."""
        try:
            OmegaConf.create(self.text)
        except OSError as error:
            return f"{as_typed(self.path)} cannot be read: {error.strerror}"
        except yaml.reader.ReaderError as error:
            said = f"the character {chr(error.character)!r} is not allowed"
            if 0xDC80 <= error.character <= 0xDCFF:
                said = "not UTF-8; save the file as UTF-8"
            before = self.text[: error.position]
            line, column = before.count("\n"), len(before.rpartition("\n")[2])
            return self._at(yaml.Mark("", 0, line, column, "", 0), said)
        except yaml.MarkedYAMLError as error:
            return self._at(*_in_words(error))
        except (ValueError, RecursionError, OmegaConfBaseException) as error:
            return f"{as_typed(self.path)}: {' '.join(str(error).split())}"
        top = yaml.compose(self.text, Loader=yaml.SafeLoader)
        if top is not None and not isinstance(top, yaml.MappingNode):
            kind = "a list" if isinstance(top, yaml.SequenceNode) else "a single value"
            return self._at(top.start_mark, f"the file must hold KEY: VALUE lines, not {kind}")
        return self._fault_of_package() or self._fault_of_defaults(top)

    def place(self, dotted: str) -> str | None:
        """Returns "FILE, line L, column C" of a key; None if the file does not set it."""
        node = read(self.path)
        if node is None:
            return None
        parts = dotted.split(".")
        if self.group and self.package != "_global_":
            above = self.group.split("/")
            if parts[: len(above)] != above:
                return None
            parts = parts[len(above) :]
        found: yaml.Node | None = None
        for part in parts:
            here = [(key, value) for key, value in pairs(node) if str(key.value) == part]
            if not here:
                return self._at(found.start_mark) if found and not pairs(node) else None
            found, node = here[-1]
        return None if found is None else self._at(found.start_mark)

    @cached_property
    def text(self) -> str:
        """What the file holds; a byte that is not UTF-8 is a lone surrogate."""
        return self.path.read_text(encoding="utf-8", errors="surrogateescape")

    @property
    def package(self) -> str | None:
        """The package that the first lines of the file name, as Hydra reads them."""
        for line in filter(None, map(str.strip, self.text.splitlines())):
            words = line.lstrip("#").split()
            if not re.match(r"#+\s*@", line) or len(words) != 2:
                return None
            if words[0] == "@package":
                return words[1]
        return None

    def _fault_of_package(self) -> str | None:
        first = self.group.partition("/")[0]
        if first in _KEYS or self.package == "_global_":
            return None
        lines = [i for i, line in enumerate(self.text.splitlines(), 1) if _HEADER.match(line)]
        needed = "'# @package _global_'"
        said = f"this line must read {needed}"
        if not lines:
            said = f"lacks the line {needed} at its top, so its keys land below {first}"
        elif self.package is None and lines[0] > 1:
            said = f"{needed} must be the first line of the file"
        return f"{as_typed(self.path)}, line {lines[0] if lines else 1}, column 1: {said}"

    def _fault_of_defaults(self, top: yaml.Node | None) -> str | None:
        for key, value in choices_in(top):
            name = str(key.value)
            said = self._fault_of_choice(name, value) if value else self._fault_of_file(name)
            if said:
                return self._at(key.start_mark, said)
        for key, value in pairs(top):
            if key.value == "defaults" and not isinstance(value, yaml.SequenceNode):
                said = "defaults must be a list, each line of it '- override /GROUP: OPTION'"
                return self._at(value.start_mark, said)
        return None

    def _fault_of_file(self, name: str) -> str | None:
        folder, _, option = self._absolute(group_of(name)).rpartition("/")
        options = self.source.options(folder)
        if option in ("_self_", "schema", *options):
            return None
        return f"there is no {folder and folder + '/'}{option}{closest(option, options)}"

    def _fault_of_choice(self, key: str, value: yaml.Node) -> str | None:
        """Returns what is wrong with the line `key: value` of a defaults list."""
        name = self._absolute(group_of(key))
        options, words = self.source.options(name), key.split()
        if not options and "optional" not in words:
            top = group_of(key).strip("/")
            if self.source.options(top):
                way_out = f"write 'override /{top}: {value.value}'"
                return f"{key} is looked for below {self.group}; {way_out}"
            names = [name for name in self.source.groups if "/" not in name]
            return f"there is no group {top}{closest(top, names)}"
        if not isinstance(value, yaml.ScalarNode) or value.tag.endswith(":null"):
            return None
        if value.value not in options and "optional" not in words and "$" not in value.value:
            near = closest(value.value, options) or f"; choose {', '.join(options)}"
            return f"{name} has no option {value.value}{near}"
        if self.group and name in _CHOSEN and "override" not in words:
            return f"{name} has an option already; write 'override /{name}: {value.value}'"
        return None

    def _absolute(self, name: str) -> str:
        """Returns the absolute name for one in the file's defaults list."""
        is_absolute = name.startswith("/") or not self.group
        return name.strip("/") if is_absolute else f"{self.group}/{name}"

    def _at(self, mark: yaml.Mark | None, said: str = "") -> str:
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"{as_typed(self.path)}{where}{said and f': {said}'}"


def _in_words(error: yaml.MarkedYAMLError) -> tuple[yaml.Mark | None, str]:
    """Returns where and what is wrong by YAML's own error, with advice."""
    mark, said = error.problem_mark or error.context_mark, str(error.problem)
    if error.context_mark and _NOT_CLOSED.search(said):
        what = "quote" if "quoted" in str(error.context) else "bracket"
        mark, said = error.context_mark, f"a {what} opens here and is not closed"
    if "another document" in said:
        said = "a second document begins here; remove this ---"
    advice = next((advice for words, advice in _ADVICE if words in said), "")
    return mark, f"{' '.join(said.split())}{advice and f'; {advice}'}"
