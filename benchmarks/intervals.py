"""Student's 95 % intervals, of figures that several seeds or splits gave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student


def half_interval(values: Sequence[float] | np.ndarray) -> float:
    """Half of the interval of two values or more."""
    n = len(values)
    return float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def interval(values: Sequence[float] | np.ndarray, form: str = ".1f") -> str:
    """Mean and half of the interval, as text; of one value that alone."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return format(mean, form)
    return f"{mean:{form}} +- {half_interval(values):{form}}"
