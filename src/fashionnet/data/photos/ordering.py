"""The split and the order of photos: functions of the seed, the photos' hashes and their names."""

from __future__ import annotations

import hashlib
import heapq
import json
import unicodedata
from collections.abc import Iterable, Sequence

from fashionnet.data.photos.finding import Parts, Photo
from fashionnet.system import seeds


def arranged(
    parts: Parts, seed: int, test_split: float
) -> tuple[list[Photo], list[Photo], int | None]:
    """Returns the training and the test photos in the order of their rows.

    Args:
        parts: the training photos, those for validation if they have a folder, and the test photos;
            or all photos in one part.
        test_split: the fraction of each class that is held out where there is one part.

    Returns:
        The training photos, the test photos, and how many of the training photos, the last, come
        from a folder for validation; None without a folder for validation.
    """
    train, *others = (_by_class(members, seed) for members in parts.values())
    validation: list[Photo] = []
    if others:
        *between, test = others
        validation = [photo for part in between for photo in interleaved(part, seed)]
    else:
        nums = [max(1, min(round(test_split * len(one)), len(one) - 1)) for one in train]
        test = [one[:num] for one, num in zip(train, nums, strict=True)]
        train = [one[num:] for one, num in zip(train, nums, strict=True)]
    ordered = interleaved(train, seed) + validation
    return ordered, interleaved(test, seed), len(validation) or None


def _by_class(members: Iterable[Photo], seed: int) -> list[list[Photo]]:
    classes: dict[int, list[Photo]] = {}
    for photo in members:
        classes.setdefault(photo.label, []).append(photo)
    return [sorted(one, key=lambda photo: _key(photo, seed, "photos")) for one in classes.values()]


def _key(photo: Photo, seed: int, stream: str) -> tuple[int, str]:
    """Returns a photo's random place: by its hash, which is the same for every version of NumPy."""
    return seeds.derive(seed, stream, photo.sha256), unicodedata.normalize("NFC", photo.path)


def interleaved(classes: Sequence[Sequence[Photo]], seed: int) -> list[Photo]:
    """Spreads each class evenly, so that every head and tail of the list holds it in proportion.

    Tijdeman's rule (1980, "The chairman assignment problem"): of the classes that are due at a
    place, take the one whose time runs out first. The number of each class before any place then
    differs by less than one from its proportion. The seed decides between equals.

    The list is filled from its end, which puts rare classes early: a single photo is trained on
    rather than validated on.
    """
    num, slack = sum(map(len, classes)), 2 * max(len(classes) - 1, 1)
    turns = sorted(
        (
            # Places count from 1; the turns of a class are num / len(one) places apart.
            -(-num * (slack * rank + 1) // (slack * len(one))),  # the first place it may take
            num * (slack * (rank + 1) - 1) // (slack * len(one)),  # the last one
            _key(photo, seed, "turns"),
            label,
        )
        for label, one in enumerate(classes)
        for rank, photo in enumerate(one)
    )
    left = [list(one) for one in classes]
    due: list[tuple[int, tuple[int, str], int]] = []
    order = []
    next_turn = 0
    for place in range(1, num + 1):
        while next_turn < num and turns[next_turn][0] <= place:
            heapq.heappush(due, turns[next_turn][1:])
            next_turn += 1
        order.append(left[heapq.heappop(due)[-1]].pop())
    return order[::-1]


def order_sha256(train: Iterable[Photo], test: Iterable[Photo]) -> str:
    """Returns the hash of which photo, with which label, is in which row of the two sets."""
    rows = [[(photo.label, photo.sha256) for photo in part] for part in (train, test)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def manifest_sha256(members: Iterable[Photo]) -> str:
    """Returns the sha256 of what `sha256sum` prints for photos, sorted by path."""
    listed = sorted((unicodedata.normalize("NFC", p.path), p.sha256) for p in members)
    lines = (f"{sha256}  {path}\n" for path, sha256 in listed)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
