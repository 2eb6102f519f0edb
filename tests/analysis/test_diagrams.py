"""Pictures of a diagnosis: what is drawn, where, and in which order."""

from __future__ import annotations

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from fashionnet.analysis import diagrams
from fashionnet.analysis.diagnosis import Diagnosis
from fashionnet.data.published import SETS

CLASS_NAMES = SETS["fashion_mnist"].class_names


def a_diagnosis(num: int = 400, accuracy: float = 0.7) -> Diagnosis:
    """Random answers that are correct about as often as they should be."""
    random = np.random.default_rng(0)
    rows = random.dirichlet(np.full(10, 0.3), num)
    labels = random.integers(10, size=num)
    correct = random.random(num) < accuracy
    labels[correct] = rows[correct].argmax(1)
    return Diagnosis("validation", CLASS_NAMES, labels, rows)


def pictures(num: int) -> np.ndarray:
    """Flat pictures that differ in their gray."""
    return np.full((num, 28, 28), 0, np.uint8) + np.arange(num, dtype=np.uint8)[:, None, None]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("num", [1, 5, 16])
def test_the_gallery_is_in_order(num: int) -> None:
    """Row by row: the sentences, the numbers, the pictures and ten bars of each."""
    diagnosis = a_diagnosis()
    shown = diagnosis.mistakes(num)
    figure = diagrams.gallery(diagnosis, shown, pictures(num))
    (axes,) = figure.axes
    assert f"{num} of {len(diagnosis.wrong)} mistakes" in texts(figure)[0]
    heads = [text for text in texts(figure) if " taken for " in text]
    assert heads == [f"{mistake.true} taken for {mistake.predicted}" for mistake in shown]
    sure = [text for text in texts(figure) if " sure, no. " in text]
    assert sure == [f"{m.probability:.2%} sure, no. {m.index}" for m in shown]
    assert [int(image.get_array()[0, 0]) for image in axes.images] == list(range(num))
    corners = [(image.get_extent()[3], image.get_extent()[0]) for image in axes.images]
    assert corners == sorted(corners)  # each below or to the right of the one before
    assert [len(bars) for bars in axes.containers] == [10] * num
    for mistake, bars in zip(shown, axes.containers, strict=True):
        lengths = np.array([bar.get_width() for bar in bars])
        np.testing.assert_allclose(lengths / lengths.sum(), mistake.probabilities)


def test_nothing_in_the_gallery_overlaps() -> None:
    """Not even the longest names: every text lies in the picture, and beside all others."""
    diagnosis = a_diagnosis()
    long = Diagnosis("validation", ("T-shirt/top",) * 10, diagnosis.labels, diagnosis.probabilities)
    figure = diagrams.gallery(long, long.mistakes(8), pictures(8))
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent().extents for text in axes.texts]
    boxes += [image.get_window_extent().extents for image in axes.images]
    left, bottom, right, top = np.array(boxes).T
    inside = figure.bbox.extents
    assert left.min() >= inside[0] and bottom.min() >= inside[1]
    assert right.max() <= inside[2] and top.max() <= inside[3]
    across = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    along = np.minimum(top[:, None], top) - np.maximum(bottom[:, None], bottom)
    # Boxes of letters have room for accents, so the boxes of neighboring lines may overlap.
    np.testing.assert_array_less(np.where(np.eye(len(boxes)) > 0, 0, np.minimum(across, along)), 3)


def test_a_gallery_of_all_and_of_none() -> None:
    few = a_diagnosis(20)
    shown = few.mistakes(100)
    assert len(shown) == len(few.wrong) < 20
    assert texts(diagrams.gallery(few, shown, pictures(len(shown))))[0] == (
        f"validation set: {len(shown)} of {len(shown)} mistakes, the most confident first"
    )
    perfect = a_diagnosis(accuracy=1.1)
    figure = diagrams.gallery(perfect, [], pictures(0))
    assert texts(figure)[0] == "validation set: no mistakes among 400 pictures"


def test_the_confusion_matrix_shows_its_counts() -> None:
    diagnosis = a_diagnosis()
    figure = diagrams.confusion(diagnosis)
    (axes,) = figure.axes
    assert [int(text) for text in texts(figure)] == diagnosis.confusion.ravel().tolist()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert tuple(label.get_text() for label in labels) == CLASS_NAMES
    shades = axes.images[0].get_array()
    assert (shades.diagonal() < 0).all()  # blue
    assert (shades[~np.eye(10, dtype=bool)] >= 0).all()  # red


def test_calibration_shows_accuracy_and_count_of_each_bin() -> None:
    diagnosis = a_diagnosis()
    figure = diagrams.calibration(diagnosis)
    upper, lower = figure.axes
    filled = [part for part in diagnosis.bins if part.count]
    drawn = [(bar.get_x(), bar.get_height()) for bar in upper.containers[0]]
    assert drawn == [(part.low, part.accuracy) for part in filled]
    assert [text.get_text() for text in lower.texts] == [str(p.count) for p in diagnosis.bins]
    title = re.search(r"error ([\d.]+)", upper.get_title())
    assert title and float(title[1]) == pytest.approx(diagnosis.calibration_error, abs=1e-4)


def test_a_perfect_network_is_drawn() -> None:
    """Nothing is divided by the mistakes that there are not."""
    sure = Diagnosis("test", CLASS_NAMES, np.arange(10), np.eye(10))
    diagrams.confusion(sure)
    upper, _ = diagrams.calibration(sure).axes
    assert upper.get_title() == "test set: expected calibration error 0.0000"


@pytest.mark.parametrize("num", [2, 300])
def test_drawing_takes_no_longer_with_many_classes(num: int) -> None:
    """What costs time is every text and bar: their number is bounded, and nothing overlaps."""
    random = np.random.default_rng(0)
    rows, labels = random.dirichlet(np.full(num, 0.3), 600), random.integers(num, size=600)
    names = tuple(f"a class with a long name {i}" for i in range(num))
    diagnosis = Diagnosis("validation", names, labels, rows)
    confusion = diagrams.confusion(diagnosis)
    assert len(texts(confusion)) == (num**2 if num <= 40 else 0)
    (axes,) = confusion.axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert 0 < len(shown) <= 60 and len(set(shown)) == len(shown)
    assert len(axes.get_xticklabels()) == len(shown)
    confusion.canvas.draw()
    lines = np.array([label.get_window_extent().extents for label in axes.get_yticklabels()])
    assert (np.diff(np.sort(lines[:, 1])) > 5).all()  # pixels from line to line

    mistakes = diagnosis.mistakes(4)
    gallery = diagrams.gallery(diagnosis, mistakes, pictures(4))
    for mistake, bars in zip(mistakes, gallery.axes[0].containers, strict=True):
        assert len(bars) == min(num, 12)
        lengths = [bar.get_width() for bar in bars]
        assert max(lengths) / 0.88 == pytest.approx(mistake.probability)
    assert len(texts(gallery)) < 80
    named = [text for text in gallery.axes[0].texts if text.get_color() == "tab:blue"]
    assert len(named) == 5  # the head's, and the true class of each
