"""Confusions, precision and recall, calibration: on numbers that one can check by hand."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from fashionnet.analysis.diagnosis import NUM_BINS, ClassFigures, Confusion, Diagnosis

NAMES = ("a", "b", "c")
LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 1, 1, 1, 0, 1])  # c is never predicted
CONFIDENCE = np.array([0.9, 0.6, 0.8, 0.7, 0.8, 0.5])


def a_diagnosis() -> Diagnosis:
    """Six examples of three classes; the rest of each row is shared by the two other classes."""
    rows = np.repeat((1 - CONFIDENCE[:, None]) / 2, 3, axis=1)
    rows[np.arange(6), PREDICTED] = CONFIDENCE
    return Diagnosis("validation", NAMES, LABELS, rows)


def test_rows_of_the_matrix_are_true_and_columns_predicted() -> None:
    assert a_diagnosis().confusion.tolist() == [[1, 2, 0], [1, 1, 0], [0, 1, 0]]


def test_precision_recall_and_f1_are_those_of_the_definitions() -> None:
    assert a_diagnosis().classes == [
        ClassFigures("a", pytest.approx(1 / 2), pytest.approx(1 / 3), pytest.approx(2 / 5), 3),
        ClassFigures("b", pytest.approx(1 / 4), pytest.approx(1 / 2), pytest.approx(1 / 3), 2),
        ClassFigures("c", None, 0.0, 0.0, 1),  # never predicted: no precision, and no nan
    ]


def test_a_class_that_does_not_occur_has_no_recall() -> None:
    rows = np.eye(3)[[0, 0, 2]]
    a, b, c = Diagnosis("validation", NAMES, np.array([0, 0, 0]), rows).classes
    assert astuple(a)[1:] == (1.0, pytest.approx(2 / 3), pytest.approx(4 / 5), 3)
    assert astuple(b)[1:] == (None, None, None, 0)
    assert astuple(c)[1:] == (0.0, None, 0.0, 0)


def test_mistakes_are_in_order_of_their_confidence() -> None:
    """Those that are equally sure stay in the order of the set."""
    found = a_diagnosis().mistakes(10)
    assert [mistake.index for mistake in found] == [2, 4, 1, 5]
    assert [mistake.probability for mistake in found] == [0.8, 0.8, 0.6, 0.5]
    assert [(mistake.true, mistake.predicted) for mistake in found[:2]] == [("a", "b"), ("b", "a")]
    assert found[0].probabilities == pytest.approx((0.1, 0.8, 0.1))
    assert a_diagnosis().mistakes(3) == found[:3]


def test_worst_confusions_come_first_without_correct_answers() -> None:
    found = a_diagnosis().worst_confusions()
    assert found == [Confusion("a", "b", 2), Confusion("b", "a", 1), Confusion("c", "b", 1)]
    assert a_diagnosis().worst_confusions(1) == found[:1]
    assert str(Confusion("Shirt", "Coat", 1234)) == "Shirt taken for Coat: 1,234"


def sure(confidence: list[float], correct: list[bool]) -> Diagnosis:
    """Predictions of class 0 with these probabilities."""
    rows = np.stack([confidence, np.zeros(len(confidence))], axis=1)
    return Diagnosis("validation", ("a", "b"), np.where(correct, 0, 1), rows)


def test_calibration_by_hand() -> None:
    """Two of fifteen bins: 0.41 and 0.45 lie in (6/15, 7/15], the rest above 14/15."""
    found = sure([0.41, 0.45, 0.95, 0.99, 1.0], [True, False, True, False, True])
    filled = [part for part in found.bins if part.count]
    assert [astuple(part) for part in filled] == [
        (pytest.approx(6 / 15), pytest.approx(7 / 15), 2, pytest.approx(0.43), 0.5),
        (pytest.approx(14 / 15), 1.0, 3, pytest.approx(0.98), pytest.approx(2 / 3)),
    ]
    by_hand = 2 / 5 * (0.5 - 0.43) + 3 / 5 * (0.98 - 2 / 3)
    assert found.calibration_error == pytest.approx(by_hand)
    empty = found.bins[0]
    assert (empty.count, empty.confidence, empty.accuracy) == (0, None, None)


def test_an_edge_belongs_to_the_bin_below_it() -> None:
    edges = np.linspace(0, 1, NUM_BINS + 1)[1:].tolist()
    assert [part.count for part in sure(edges, [True] * NUM_BINS).bins] == [1] * NUM_BINS
    bins = sure([0.0, 1 + 1e-12], [True, True]).bins  # rounding
    assert (bins[0].count, bins[-1].count) == (1, 1)


def test_the_calibrated_and_the_overconfident() -> None:
    """Correct as often as it says: 0. Always sure, and correct half of the time: one half."""
    assert sure([0.5] * 10, [True, False] * 5).calibration_error == pytest.approx(0)
    assert sure([1.0] * 10, [True, False] * 5).calibration_error == pytest.approx(0.5)
    assert a_diagnosis().accuracy == pytest.approx(2 / 6)
