"""Where a classifier goes wrong, in numbers: confusions, precision and recall, calibration.

Shapes: N examples, C classes, M bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fashionnet.errors import visible

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_BINS = 15  # as in the tables of Guo et al.


@dataclass(frozen=True)
class ClassFigures:
    """How well one class is recognized.

    Attributes:
        precision: the fraction of the predictions of this class that are correct; None without one.
        recall: the fraction of its examples that are predicted to be it; None without one.
        f1: their harmonic mean, 2·correct / (predicted + support); None if both are None.
        support: examples of the class.
    """

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True)
class Bin:
    """The examples whose prediction has a probability above `low`, up to `high`.

    Attributes:
        confidence: mean probability of the predictions; None in an empty bin.
        accuracy: the fraction of them that is correct; None in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Mistake:
    """A wrong answer.

    Attributes:
        index: of the example in its set, from 0.
        true, predicted: names of classes.
        probability: of the prediction.
        probabilities: of each class.
    """

    index: int
    true: str
    predicted: str
    probability: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Confusion:
    """How often one class was taken for another."""

    true: str
    predicted: str
    count: int

    def __str__(self) -> str:
        return f"{visible(self.true)} taken for {visible(self.predicted)}: {self.count:,}"


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """A network's predictions for a set, and the true labels.

    Attributes:
        split: name of the set.
        class_names: C names.
        labels: int64 (N,), what is true.
        probabilities: float64 (N, C); each row adds up to 1.
    """

    split: str
    class_names: tuple[str, ...]
    labels: Ints
    probabilities: Floats

    @cached_property
    def predicted(self) -> Ints:
        """The most probable class of each example, int64 (N,)."""
        classes: Ints = self.probabilities.argmax(1)
        return classes

    @cached_property
    def confidence(self) -> Floats:
        """The probability of each prediction, float64 (N,)."""
        highest: Floats = self.probabilities.max(1)
        return highest

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is correct, bool (N,)."""
        return np.equal(self.predicted, self.labels)

    @property
    def accuracy(self) -> float:
        """The fraction of the predictions that is correct."""
        return float(self.correct.mean())

    @cached_property
    def wrong(self) -> Ints:
        """Which predictions are wrong, the most confident first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]

    @cached_property
    def confusion(self) -> Ints:
        """Counts, (C, C): in row i and column j, how many of class i are predicted to be j."""
        num = len(self.class_names)
        pairs = np.bincount(self.labels * num + self.predicted, minlength=num**2)
        return pairs.reshape(num, num)

    @cached_property
    def classes(self) -> list[ClassFigures]:
        """Precision, recall and F1 of each class."""
        counts = self.confusion
        columns = (c.tolist() for c in (counts.diagonal(), counts.sum(0), counts.sum(1)))
        return [
            ClassFigures(
                name,
                _ratio(correct, predicted),
                _ratio(correct, support),
                _ratio(2 * correct, predicted + support),
                support,
            )
            for name, correct, predicted, support in zip(self.class_names, *columns, strict=True)
        ]

    @cached_property
    def bins(self) -> list[Bin]:
        """Predictions by their probability, in `NUM_BINS` bins of equal width.

        Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2: bin m of M holds
        ((m - 1) / M, m / M].
        """
        edges = np.linspace(0, 1, NUM_BINS + 1)
        # min: a probability that rounding puts above 1 belongs to the last bin
        which = np.minimum(np.searchsorted(edges[1:], self.confidence), NUM_BINS - 1)
        sums = [
            np.bincount(which, weights, NUM_BINS).tolist()
            for weights in (np.ones(len(which)), self.confidence, self.correct)
        ]
        return [
            Bin(low, high, int(num), _ratio(confidence, num), _ratio(correct, num))
            for low, high, num, confidence, correct in zip(
                edges[:-1].tolist(), edges[1:].tolist(), *sums, strict=True
            )
        ]

    @property
    def calibration_error(self) -> float:
        """Σ count/N · |accuracy - confidence|, equation 3 of Guo et al. 2017; 0 is perfect."""
        gaps = [
            part.count * abs(part.accuracy - part.confidence)
            for part in self.bins
            if part.accuracy is not None and part.confidence is not None
        ]
        return sum(gaps) / len(self.labels)

    def mistakes(self, num: int) -> list[Mistake]:
        """Returns the `num` most confident mistakes, or all where there are fewer."""
        names = self.class_names
        return [
            Mistake(
                index,
                names[self.labels[index]],
                names[self.predicted[index]],
                float(self.confidence[index]),
                tuple(self.probabilities[index].tolist()),
            )
            for index in self.wrong[:num].tolist()
        ]

    def count_mistakes(self, num: int) -> str:
        """Returns in words how many mistakes there are and that `num` of them are shown."""
        if not len(self.wrong):
            return f"no mistakes among {len(self.labels):,} pictures"
        return f"{num:,} of {len(self.wrong):,} mistakes, the most confident first"

    def worst_confusions(self, num: int = 5) -> list[Confusion]:
        """Returns the `num` most frequent confusions, the worst first."""
        errors = self.confusion * (1 - np.eye(len(self.class_names), dtype=np.int64))
        worst = np.argsort(-errors, axis=None, kind="stable")[:num]
        names = self.class_names
        found = zip(*np.unravel_index(worst, errors.shape), strict=True)
        return [Confusion(names[i], names[j], int(errors[i, j])) for i, j in found if errors[i, j]]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
