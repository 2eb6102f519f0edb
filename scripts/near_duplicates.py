"""Counts the test pictures of Fashion-MNIST that have a near-duplicate in the training set.

    python scripts/near_duplicates.py

The idea is that of Barz & Denzler 2019 (arXiv:1906.08255), the rule is our own: two pictures are
near-duplicates if the Pearson correlation of their 784 pixels is at least 0.99, of one with the
other or with its mirror image, since a network may be trained on mirrored pictures. Correlation
does not see a change of brightness or contrast.

The threshold was chosen by looking at pairs (docs/near_duplicates.png). From 0.997 on, both show
the same garment. Between 0.99 and that, most show plain garments of one cut, most often trousers,
so the rule counts too many rather than too few. Below 0.99 the first pairs of two labels come up.

It writes docs/results/near_duplicates.json with the indices of the test pictures and the picture of
some pairs; `python scripts/tables.py` makes the table of docs/results.md from the file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks import results
from torch import Tensor

THRESHOLD = 0.99
LEVELS = (0.999, 0.997, 0.995, THRESHOLD, 0.985, 0.98, 0.97)
PLOT = results.ROOT / "docs" / "near_duplicates.png"
_BLOCK = 1_000  # test pictures whose correlations are computed together: 240 MB
_SHOWN = 10  # pairs in a row of the picture


def main() -> None:
    """The command: `python scripts/near_duplicates.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR")
    parser.add_argument("--plot", type=Path, default=PLOT, metavar="FILE")
    given = parser.parse_args()
    from fashionnet.data import published

    dataset = published.load("fashion_mnist")
    train, test = dataset.train, dataset.open_test()
    found = nearest(train.images, test.images)
    figures = counted(found, train.labels, test.labels)
    figures["class_names"] = list(dataset.class_names)
    print(f"written: {results.keep('near_duplicates', figures, given.out)}")
    draw(found, train.images, test.images, given.plot)
    print(f"written: {given.plot}")


def indices(folder: Path = results.FOLDER) -> list[int]:
    """Returns the test pictures that have a near-duplicate, as the last count left them."""
    values = json.loads((folder / "near_duplicates.json").read_text())
    return [pair["test"] for pair in values["figures"]["pairs"]]


@dataclass(frozen=True)
class Nearest:
    """For each test picture the training picture that is most like it.

    Attributes:
        correlation: float32 (N,), -1 to 1.
        index: int64 (N,), of the training picture.
        is_mirrored: bool (N,), whether it is like the mirror image.
    """

    correlation: Tensor
    index: Tensor
    is_mirrored: Tensor


def nearest(train: Tensor, test: Tensor) -> Nearest:
    """Correlates every test picture and its mirror image with every training picture.

    Args:
        train, test: uint8 (N, H, W).
    """
    references = standardized(train).T
    rows = []
    for pictures in test.split(_BLOCK):
        ways = [standardized(each) @ references for each in (pictures, pictures.flip(2))]
        (plain, at), (mirror, mirror_at) = (way.max(dim=1) for way in ways)
        mirrored = mirror > plain
        rows.append((plain.maximum(mirror), torch.where(mirrored, mirror_at, at), mirrored))
    return Nearest(*(torch.cat(column) for column in zip(*rows, strict=True)))


def standardized(images: Tensor) -> Tensor:
    """Returns (N, H * W) whose products are correlations; a picture of one color becomes zeros."""
    pixels = images.flatten(1).float()
    pixels = pixels - pixels.mean(dim=1, keepdim=True)
    return pixels / pixels.norm(dim=1, keepdim=True).clamp(min=1e-6)


def counted(found: Nearest, train_labels: Tensor, test_labels: Tensor) -> dict[str, Any]:
    """Returns the near-duplicates, most alike first, and how many there are from each level on."""
    other = train_labels[found.index] != test_labels
    levels = []
    for level in LEVELS:
        reached = found.correlation >= level
        by_class = test_labels[reached].bincount(minlength=10).tolist()
        num_other = int((reached & other).sum())
        levels.append({"correlation": level, "other_label": num_other, "by_class": by_class})
    order = most_alike_first(found)
    pairs = [
        {
            "test": i,
            "train": int(found.index[i]),
            "correlation": round(float(found.correlation[i]), 5),
            "mirrored": bool(found.is_mirrored[i]),
            "labels": [int(test_labels[i]), int(train_labels[found.index[i]])],
        }
        for i in order
        if found.correlation[i] >= THRESHOLD
    ]
    num = len(test_labels)
    return {"threshold": THRESHOLD, "test_pictures": num, "levels": levels, "pairs": pairs}


def most_alike_first(found: Nearest) -> list[int]:
    """Returns the test pictures, of pairs that are equally alike in their order in the set."""
    rounded = [round(each, 5) for each in found.correlation.tolist()]
    return sorted(range(len(rounded)), key=lambda i: -rounded[i])


def draw(found: Nearest, train: Tensor, test: Tensor, path: Path) -> None:
    """Draws pairs, the test picture above: the most alike, and those on both sides of the rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = most_alike_first(found)
    num = int((found.correlation >= THRESHOLD).sum())
    groups = {
        "the most alike": order[:_SHOWN],
        f"the least alike that count, from {THRESHOLD} on": order[num - _SHOWN : num],
        "the most alike that do not count": order[num : num + _SHOWN],
    }
    figure = plt.figure(figsize=(_SHOWN * 0.9, 7.2), layout="constrained")
    for part, (title, shown) in zip(figure.subfigures(3, 1), groups.items(), strict=True):
        part.suptitle(f"{title}: test picture above, training picture below", fontsize=9)
        axes = part.subplots(2, _SHOWN)
        for column, i in enumerate(shown):
            like = train[found.index[i]]
            pair = test[i], like.flip(1) if found.is_mirrored[i] else like
            for row, picture in enumerate(pair):
                axes[row, column].imshow(picture, cmap="gray", vmin=0, vmax=255)
                axes[row, column].axis("off")
            mark = ", mirrored" if found.is_mirrored[i] else ""
            axes[0, column].set_title(f"{found.correlation[i]:.4f}{mark}", fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
