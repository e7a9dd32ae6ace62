"""What the machine has to work with, and how long that takes in words; without PyTorch."""

from __future__ import annotations

import os

CORES = os.cpu_count() or 1


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would say: "90.0 s", "12.5 min", "3.4 h", "5.2 days"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
