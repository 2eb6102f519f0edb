"""Forms that values read from a file must have: what a stranger wrote is checked once, at the door.

A form is a function of a value and its dotted key. It returns nothing, or raises `UserError` with
what is wrong. Forms are put together from smaller ones, so that a schema reads like a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fashionnet.config.schema import Range
from fashionnet.errors import UserError, shortened

Form = Callable[[Any, str], None]

_MOST_NESTED = 8
_MOST_NODES = 20_000  # of a value that no schema describes


def number(low: float, high: float) -> Form:
    """Returns the form of a finite number in a range."""
    return in_range(Range(low, high))


def integer(low: int, high: int) -> Form:
    """Returns the form of a whole number in a range."""
    return in_range(Range(low, high), whole=True)


def in_range(range_: Range, whole: bool = False) -> Form:
    """Returns the form of a number in a `Range` of the configuration."""

    def check(value: Any, key: str) -> None:
        if whole and type(value) is not int:
            _refuse(value, key, "must be a whole number")
        if (must := range_.refusal(value)) is not None:
            _refuse(value, key, must)

    return check


def figure(value: Any, key: str) -> None:
    """The form of what was measured: a number of float32's size; nan and infinity, too."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or 1e39 < abs(value) < float("inf"):
        _refuse(value, key, "must be a number")


def flag(value: Any, key: str) -> None:
    """The form of true and false."""
    if not isinstance(value, bool):
        _refuse(value, key, "must be true or false")


def text(most: int) -> Form:
    """Returns the form of text of at most so many characters."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, str):
            _refuse(value, key, "must be text")
        if len(value) > most:
            raise UserError(f"{key} has {len(value)} characters, more than {most}")

    return check


def one_of(*choices: str) -> Form:
    """Returns the form of one of some words."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, str) or value not in choices:
            _refuse(value, key, f"must be one of {', '.join(choices)}")

    return check


def optional(form: Form) -> Form:
    """Returns a form that null has as well."""

    def check(value: Any, key: str) -> None:
        if value is not None:
            form(value, key)

    return check


def list_of(form: Form, least: int, most: int, distinct: bool = False) -> Form:
    """Returns the form of a list whose items, `least` to `most` of them, have a form each."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, list):
            _refuse(value, key, "must be a list")
        if not least <= len(value) <= most:
            raise UserError(f"{key} has {len(value)} items; it must have {least} to {most}")
        for index, item in enumerate(value):
            form(item, f"{key}[{index}]")
        if distinct and len(set(value)) < len(value):
            raise UserError(f"{key} names one thing twice")

    return check


def group(
    required: Mapping[str, Form], others: Mapping[str, Form] | None = None, rest: Form | None = None
) -> Form:
    """Returns the form of a mapping.

    Args:
        required: the forms of the keys that must be there.
        others: the forms of those that may be.
        rest: the form of every other one; None takes any plain values of a bounded size.
    """
    named = {**(others or {}), **required}

    def check(value: Any, key: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, key or "it", "must be a group of keys")
        prefix = f"{key}." if key else ""
        for name in required:
            if name not in value:
                raise UserError(f"{prefix}{name} is missing")
        for name, part in value.items():
            named.get(name, rest or plain)(part, f"{prefix}{shortened(name)}")

    return check


def plain(value: Any, key: str) -> None:
    """The form of any plain values that are not nested too deeply, nor too many."""
    level, total = [value], 0
    for _ in range(_MOST_NESTED):
        total += len(level)
        if total > _MOST_NODES:
            raise UserError(f"{key} holds more than {_MOST_NODES} values")
        parts = [
            list(each.values()) if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        ]
        level = [part for each in parts for part in each]
        if not level:
            return
    raise UserError(f"{key} is nested too deeply: more than {_MOST_NESTED} levels")


def _refuse(value: Any, key: str, must: str) -> None:
    raise UserError(f"{key}={shortened(value)} {must}")
