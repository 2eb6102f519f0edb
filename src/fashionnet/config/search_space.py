"""The space of a hyper-parameter search: Hydra's sweeps as distributions of Optuna."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fashionnet.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
    Space = dict[str, Distribution]  # by the keys that are searched over, in their order

# The seed, and what decides the validation set: losses on different ones cannot be compared.
_SHARED = (
    *("seed", "validation_split", "data", "data.name", "data.root", "data.classes"),
    *("data.seed", "data.test_split"),
)


def parse(overrides: Sequence[str]) -> tuple[list[str], Space]:
    """Separates what every trial shares from what is searched over.

    Returns:
        The fixed overrides as typed, and Optuna's distribution of each key that is searched over,
        sorted by key, so that the order of the overrides does not matter.

    Raises:
        UserError: an override that Hydra or a search refuses, or nothing to search over.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from fashionnet.config import compose

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except (HydraException, ValueError):
        compose.check_search(*overrides)
        raise
    keys = [override.key_or_group for override in parsed]
    fixed, space = [], {}
    for override, text in zip(parsed, overrides, strict=True):
        key = override.key_or_group
        hydras = override.is_hydra_override() and key != "hydra.searchpath"
        if hydras or key in ("resume", "overwrite"):
            raise UserError(f"{key} cannot be used in a search; leave it out")
        if not override.is_sweep_override():
            fixed.append(text)
            continue
        if keys.count(key) > 1:
            raise UserError(f"{key} is given twice; give a key that is searched over once")
        if key in _SHARED:
            raise UserError(f"{key} cannot be searched over; give all trials the same")
        try:
            space[override.get_key_element()] = distribution(override.value())
        except (ValueError, HydraException) as error:
            raise UserError(f"{text} cannot be searched over: {error}") from None
    if not space:
        raise UserError(
            "nothing to search over; give a key several values, "
            "e.g. 'optimizer.lr=tag(log,interval(1e-4,1e-2))'"
        )
    return fixed, dict(sorted(space.items()))


def distribution(sweep: Any) -> Distribution:
    """Returns Optuna's distribution for a sweep in Hydra's grammar.

    Raises:
        ValueError: a sweep of another kind, or numbers that Optuna or Hydra refuses.
    """
    from hydra.core.override_parser import types
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(sweep, types.ChoiceSweep) and not sweep.tags:
        # Numbers as they are; lists, null and words as they stand in an override.
        text = types.Transformer.str
        return CategoricalDistribution(
            [x if isinstance(x, int | float) else text(x) for x in sweep.list]
        )
    is_range = isinstance(sweep, types.RangeSweep)
    if not (is_range or isinstance(sweep, types.IntervalSweep)) or sweep.tags - {"log"}:
        raise ValueError("see python -m fashionnet.search --help")
    ends = [sweep.start, sweep.stop if is_range else sweep.end]
    if not all(map(math.isfinite, ends)):
        raise ValueError("its ends are not finite")
    if is_range and not (ends := sorted(sweep.range())):
        raise ValueError("it holds no number")
    low, high, log = ends[0], ends[-1], "log" in sweep.tags
    step = abs(sweep.step) if is_range else None
    if isinstance(low, int):
        return IntDistribution(low, high, log, step or 1)
    return FloatDistribution(low, high, log, step)
