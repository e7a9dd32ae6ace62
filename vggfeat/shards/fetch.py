"""Images from a store into memory, a shard at a time: many requests at once, each image once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from vggfeat.datasets import Items
from vggfeat.errors import VggfeatError
from vggfeat.place import AbsentError, place_of

REQUESTS = 32
"""At once: a store answers one in some 30 ms, and a shard of 8,192 has as many to wait for."""
MOST_BYTES = 1 << 29
"""Of an image's file, which is held in memory."""
MOST_ALL = 1 << 34
"""Of all images of a shard."""
NO_SUCH_FILE = "no such file"


def fetched(items: Items) -> tuple[Items, dict[int, str]]:
    """The items with their images' files in memory, where they are in a store; and row -> why it
    has none: the store says that there is no such file, or it is too large.

    Raises StorageError where the store doesn't answer: nothing is known against an image then.
    """
    if items.url is None or items.images is not None:
        return items, {}
    images, image_N = items.by_file()
    addresses = [images.address(i) for i in range(len(images))]
    answers: list[bytes | VggfeatError] = []
    held = 0
    with ThreadPoolExecutor(REQUESTS) as pool:
        for answer in pool.map(_answer, addresses):
            answers.append(answer)
            held += len(answer) if isinstance(answer, bytes) else 0
            if held > MOST_ALL:
                raise VggfeatError(
                    f"the images from {addresses[0]} on have more than {MOST_ALL:,} bytes: give"
                    " fewer `shard_rows`, and another `out`"
                )
    content = as_objects([each if isinstance(each, bytes) else b"" for each in answers])
    reasons = {
        row: str(answers[image])
        for row, image in enumerate(image_N.tolist())
        if not isinstance(answers[image], bytes)
    }
    return replace(items, images=content[image_N]), reasons


def _answer(address: str) -> bytes | VggfeatError:
    try:
        data = place_of(address).read("", MOST_BYTES + 1)
    except AbsentError:
        return VggfeatError(NO_SUCH_FILE)
    if len(data) > MOST_BYTES:
        return VggfeatError(f"larger than {MOST_BYTES:,} bytes")
    return data


def as_objects(values: Iterable[bytes]) -> np.ndarray:
    """(N,) objects: as a list of N, and NumPy can take rows of it."""
    listed = list(values)
    made = np.empty(len(listed), object)
    for i, value in enumerate(listed):
        made[i] = value
    return made
