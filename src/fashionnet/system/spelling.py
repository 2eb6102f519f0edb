"""Words that are meant by a misspelled one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any


def closest(word: str, choices: Any) -> str:
    """Returns ` (did you mean …?)` for a near miss, else nothing."""
    near = next(likely(word, list(choices)), None)
    return f" (did you mean {near}?)" if near else ""


def letters_of(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())


def is_same_word(word: str, other: str) -> bool:
    """Returns whether two words differ by a slip at most."""
    one, two = letters_of(word), letters_of(other)
    return one == two or difflib.SequenceMatcher(None, one, two).ratio() > 0.85


def likely(word: str, choices: Sequence[str]) -> Iterator[str]:
    """Yields choices that may be meant by a word, the likeliest first."""
    squeezed = {choice: letters_of(choice) for choice in choices}
    own = letters_of(word)
    if not 0 < len(own) <= 100:  # comparing takes the square of the length
        return
    same = [choice for choice in choices if squeezed[choice] == own]
    likely = difflib.get_close_matches(own, list(squeezed.values()), 3, 0.6)
    close = [c for text in likely for c in choices if squeezed[c] == text]
    part = [c for c in choices if len(own) > 2 and (own in squeezed[c] or squeezed[c] in own)]
    yield from dict.fromkeys([*same, *close, *(c for c in part if squeezed[c])])
