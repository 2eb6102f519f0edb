"""Suggests overrides in place of a refused one, the likeliest first."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashionnet.config.source import Source, keys_in, parses, quoted
from fashionnet.system.spelling import letters_of, likely

_MOST_TRIES = 60  # candidates

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
_CHOICES = (
    *("auto", "autograd", "by_hand", "never", "min", "max"),
    *("loss", "accuracy", "val_loss", "val_accuracy"),
)
_DEVICES = ("auto", "cpu", "cuda", "mps")
_LISTS = r"model\.(hidden|mean|std)|data\.classes"

# What may be meant by a value, the likeliest first: a pattern of keys, one of values, and what to
# write instead. A rule may be too general, since only what composes is suggested.
_Meant = str | Callable[[re.Match[str]], str | Iterable[str]]
_RULES: tuple[tuple[str, str, _Meant], ...] = (
    ("device", r"(?:gpu|cuda|nvidia)?[ :_-]*(\d+)", r"cuda:\1"),
    ("device", "gpu|nvidia|true", "cuda"),
    ("device", ".+", lambda m: likely(m[0], _DEVICES)),
    (_LISTS, r"[^\s(\[{]+", r"\g<0>"),
    (_LISTS, r"[(\[{]?([^\[].*?)[)\]}]?", lambda m: f"[{re.sub(_BETWEEN_NUMBERS, ',', m[1])}]"),
    (".*", "~.*", lambda m: os.path.expanduser(m[0])),
    (".*", "|".join(_NUMBERS), lambda m: str(_NUMBERS.index(m[0].lower()))),
    (".*", r"\d{1,3}([,_']\d{3})+", lambda m: re.sub(r"\D", "", m[0])),
    (".*", r"(\d+),(\d+)", r"\1.\2"),
    (".*", r"(\d+)\.0*", r"\1"),
    (".*", r"\d+e\d{1,2}", lambda m: str(int(float(m[0])))),
    (".*", r"(\d*\.?\d+) ?%", lambda m: repr(float(m[1]) / 100)),
    (".*", ".+", r"\g<0>"),
    ("resume", "false|no|off|0", "never"),
    ("resume", ".*", "auto"),
    (".*", ".+", lambda m: m[0].lower()),
    (".*", "none|nil|no|all|auto|off|never|false", "null"),
    (".*", "yes|on|y|ja|1", "true"),
    (".*", ".+", lambda m: likely(m[0], _CHOICES)),
)
_BETWEEN_NUMBERS = r"(?<=\d)[\s,]+(?=\d)"


@dataclass(frozen=True)
class Suggestions:
    """Suggestions in place of overrides that a source refuses."""

    source: Source

    def meant(self, texts: Sequence[str], others: Sequence[str]) -> Iterator[list[str]]:
        """Yields overrides that may have been meant, the likeliest first, composable or not."""
        seen: set[tuple[str, ...]] = {tuple(texts)}
        for number, words in enumerate(self.candidates(texts, others)):
            if number > _MOST_TRIES:
                return
            if tuple(words) not in seen and all(parses(w) for w in words if "=" in w):
                seen.add(tuple(words))
                yield words

    def candidates(self, texts: Sequence[str], others: Sequence[str]) -> Iterator[list[str]]:
        text, rest = texts[0].strip(), [t.strip() for t in texts[1:]]
        tree = self.source.tree(others)
        nested = re.fullmatch(r"(\w+)=([\w-]+)[.,:](\w+)=(.*)", text)
        if nested:
            yield [f"{nested[1]}={nested[2]}", f"{nested[1]}.{nested[3]}={nested[4]}"]
        if any(c in text for c in " \t;") and re.search(r"[=\s;][^=]*=", text):
            parts = [part for part in re.split(r"[\s;]+", text) if part]
            if len(parts) > 1 and all(parses(part) for part in parts):
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
            if key not in tree:
                yield from self.with_options(key, value)

    def with_options(self, key: str, value: str) -> Iterator[list[str]]:
        """Yields the key together with each option of a group that has it."""
        above, _, leaf = key.rpartition(".")
        for group in [group for group in ("model", "optimizer", "data") if above in ("", group)]:
            for option in self.source.options(group):
                files = self.source.files([f"{group}={option}"])
                if leaf != "name" and any(
                    leaf in keys_in(path) for path, of_group in files if of_group == group
                ):
                    yield [f"{group}={option}", f"{group}.{leaf}={value}"]

    def pairs(self, text: str, rest: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yields each key and value into which an override may be split."""
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
        """Yields `key` itself if it is known, else the keys and groups that it resembles."""
        names = [*tree, *self.source.groups]
        if key in names or self.source.is_group(key):
            yield key
            return
        dotted = key.replace("/", ".")
        found = [name for name in names if letters_of(name) == letters_of(dotted)]
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
        """Yields overrides of `key` with values that resemble `value`."""
        if self.source.is_group(key):
            yield from self.options_near(key, value)
            return
        section = tree.get(key)
        if isinstance(section, dict):
            yield from ([f"{key}.{name}={value}"] for name in section if name != "_target_")
            return
        for word in _words(key, value.strip().strip("'\""), section):
            yield [f"{key}={word}"]
            if not isinstance(section, int | float | list):
                yield [f"{key}={quoted(word)}"]

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
            yield ["data=photos", word if parses(word) else f"data.root={quoted(root)}"]

    def from_path(self, text: str) -> Iterator[list[str]]:
        """Yields the choice of an option that was given by the path of its YAML file."""
        key, equals, value = text.partition("=")
        path = Path(value if equals else key.lstrip("-"))
        if path.suffix not in (".yaml", ".yml"):
            return
        folder, group = path.parent.parent, path.parent.name
        if group in self.source.groups or path.is_file():
            choice = f"{group}={path.stem}"
            yield [choice]
            yield ["--config-dir", os.fspath(folder), choice]

    def bare(self, word: str, tree: dict[str, Any]) -> Iterator[list[str]]:
        """Yields what a single word may mean: an option, a key with its value, a folder."""
        groups = [group for group in self.source.groups if word in self.source.options(group)]
        yield from ([f"{group}={word}"] for group in groups)
        for key in self.keys_near(word, tree):
            before = tree.get(key)
            if self.source.is_group(key):
                yield from ([f"{key}={option}"] for option in self.source.options(key))
            elif isinstance(before, bool):
                yield [f"{key}={'false' if before else 'true'}"]
            elif before is not None and not isinstance(before, dict | list):
                yield [f"{key}={before}"]
        for group in self.source.groups:
            for near in likely(word, self.source.options(group)):
                yield [f"{group}={near}"]
        if os.path.isdir(os.path.expanduser(word)):
            yield from self.photos_in(word)


def _words(key: str, value: str, before: Any) -> Iterator[str]:
    """Yields what may be meant by the value of a key; of an empty one, the value `before`."""
    if not value and before is not None:
        yield str(before)
    for keys, values, meant in _RULES:
        match = re.fullmatch(values, value, re.IGNORECASE)
        if match and re.fullmatch(keys, key):
            found = match.expand(meant) if isinstance(meant, str) else meant(match)
            yield from [found] if isinstance(found, str) else found
