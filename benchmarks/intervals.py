"""Student's 95 % intervals, of figures that several seeds or splits gave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student


def half_interval(values: Sequence[float] | np.ndarray, overlap: float = 0.0) -> float:
    """Half of the interval of two values or more.

    overlap: of random splits of the same images, test images over training images: by so much of
    their variance the mean's is larger (Nadeau and Bengio, 2003). 0: the values are independent.
    """
    n = len(values)
    spread = np.std(values, ddof=1) * np.sqrt(1 / n + overlap)
    return float(student.ppf(0.975, n - 1) * spread)


def interval(values: Sequence[float] | np.ndarray, form: str = ".1f", overlap: float = 0.0) -> str:
    """Mean and half of the interval, as text; of one value that alone."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return format(mean, form)
    return f"{mean:{form}} +- {half_interval(values, overlap):{form}}"
