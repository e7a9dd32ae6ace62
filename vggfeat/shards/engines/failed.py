"""Shards that could not be described, whatever engine tried."""

from __future__ import annotations

from dataclasses import dataclass

ATTEMPTS = 3
"""Processes that may begin a shard before its images are looked for one by one."""


@dataclass(frozen=True)
class Failed:
    """Why, in words. refused: the process describes no shard at all: it has other weights, versions
    or no device.
    """

    shard: int
    why: str
    refused: bool
