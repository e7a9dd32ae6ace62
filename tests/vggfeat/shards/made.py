"""A small data set with bad files, a small net, and a set of shards of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import photograph
from vggfeat import datasets
from vggfeat.datasets import Items
from vggfeat.describe import description_of
from vggfeat.place import Place, place_of
from vggfeat.shards.plan import Plan, missing_of, plan_of, settle
from vggfeat.shards.shard import describe_shard
from vggfeat.shards.sharded import seal
from vggfeat.sources import load
from vggfeat.versions import versions
from vggfeat.weights import Network
from vggfeat.writer import VERSIONS

SCALES = (36, 48)
SPEC = "random:A,width=0.05,crop=32"


def make_images(root: Path, bad: Collection[int] = (), n: int = 12) -> Items:
    """n images of three shapes in two classes; those of `bad` are none."""
    for i in range(n):
        path = root / f"c{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i in bad:
            path.write_bytes(b"no picture")
        else:
            Image.fromarray(photograph(i, 40 + 5 * (i % 3), 50)).save(path)
    return datasets.load("folder", root)


@dataclass(frozen=True)
class Job:
    """Items and how they are described."""

    items: Items
    network: Network
    layer: str | tuple[str, ...] | None = None

    def plan(self, shard_rows: int, store: str = "float32") -> Plan:
        description = description_of(self.network, self.layer, SCALES, True, ("image",))
        here = versions()
        return plan_of(
            self.items,
            description,
            tuple(map(self.network.dim, description.layers)),
            store,
            shard_rows=shard_rows,
            weights_metadata={
                k: v for k, v in sorted(self.network.metadata.items()) if k != "classes"
            },
            versions={name: here[name] for name in VERSIONS},
            command="cmd",
        )

    def begun(
        self, where: str | Path, shard_rows: int, store: str = "float32"
    ) -> tuple[Place, Plan]:
        place = place_of(where)
        return place, settle(place, self.plan(shard_rows, store), self.items)

    def made(
        self, where: str | Path, shard_rows: int, store: str = "float32"
    ) -> tuple[Place, Plan]:
        """A sealed set."""
        place, plan = self.begun(where, shard_rows, store)
        for k in missing_of(plan, list(place.names("data"))):
            assert describe_shard(place, plan, self.network, k, workers=1).put
        seal(place, plan)
        return place, plan


def job(root: Path, bad: Collection[int] = (), n: int = 12) -> Job:
    return Job(make_images(root, bad, n), load(SPEC, device="cpu", precision="float32"))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()
