"""Confusions, precision and recall, calibration: on numbers that one can check by hand."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from fashionnet.analysis.diagnosis import (
    NUM_BINS,
    Bin,
    ClassFigures,
    Confusion,
    Diagnosis,
    calibration,
    class_figures,
    confusion_matrix,
    expected_calibration_error,
)

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
    expected = [[1, 2, 0], [1, 1, 0], [0, 1, 0]]
    assert confusion_matrix(LABELS, PREDICTED, 3).tolist() == expected
    assert a_diagnosis().confusion.tolist() == expected


def test_precision_recall_and_f1_are_those_of_the_definitions() -> None:
    figures = class_figures(confusion_matrix(LABELS, PREDICTED, 3), NAMES)
    assert figures == [
        ClassFigures("a", pytest.approx(1 / 2), pytest.approx(1 / 3), pytest.approx(2 / 5), 3),
        ClassFigures("b", pytest.approx(1 / 4), pytest.approx(1 / 2), pytest.approx(1 / 3), 2),
        ClassFigures("c", None, 0.0, 0.0, 1),  # never predicted: no precision, and no nan
    ]


def test_a_class_that_does_not_occur_has_no_recall() -> None:
    absent = np.array([[2, 0, 1], [0, 0, 0], [0, 0, 0]])
    a, b, c = class_figures(absent, NAMES)
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


def test_worst_confusions_come_first_and_right_answers_are_none() -> None:
    found = a_diagnosis().worst_confusions()
    assert found == [Confusion("a", "b", 2), Confusion("b", "a", 1), Confusion("c", "b", 1)]
    assert a_diagnosis().worst_confusions(1) == found[:1]
    assert str(Confusion("Shirt", "Coat", 1234)) == "Shirt taken for Coat: 1,234"


def test_calibration_by_hand() -> None:
    """Two of four bins: 0.4 and 0.5 lie in (0.25, 0.5], the rest above 0.75."""
    confidence = np.array([0.4, 0.5, 0.8, 0.9, 1.0])
    right = np.array([True, False, True, False, True])
    bins = calibration(confidence, right, 4)
    assert bins == [
        Bin(0.0, 0.25, 0, None, None),
        Bin(0.25, 0.5, 2, pytest.approx(0.45), 0.5),
        Bin(0.5, 0.75, 0, None, None),
        Bin(0.75, 1.0, 3, pytest.approx(0.9), pytest.approx(2 / 3)),
    ]
    by_hand = 2 / 5 * (0.5 - 0.45) + 3 / 5 * (0.9 - 2 / 3)
    assert expected_calibration_error(bins) == pytest.approx(by_hand)


def test_an_edge_belongs_to_the_bin_below_it() -> None:
    edges = np.linspace(0, 1, NUM_BINS + 1)[1:]
    bins = calibration(edges, np.ones(NUM_BINS, bool))
    assert [part.count for part in bins] == [1] * NUM_BINS
    above = calibration(np.array([0.0, 1 + 1e-12]), np.ones(2, bool))  # rounding
    assert (above[0].count, above[-1].count) == (1, 1)


def test_the_calibrated_and_the_overconfident() -> None:
    """Right as often as it says: 0. Always sure, and right half of the time: one half."""
    half = np.arange(10) % 2 == 0
    assert expected_calibration_error(calibration(np.full(10, 0.5), half)) == pytest.approx(0)
    assert expected_calibration_error(calibration(np.ones(10), half)) == pytest.approx(0.5)


def test_figures_of_the_whole() -> None:
    diagnosis = a_diagnosis()
    assert diagnosis.accuracy == pytest.approx(2 / 6)
    assert len(diagnosis.bins) == NUM_BINS
    assert diagnosis.calibration_error == expected_calibration_error(diagnosis.bins)
