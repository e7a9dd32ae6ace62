"""Posteriors that are kept: what nets say of images, in a file that every average of the paper is
made from.

N images, Q test scales, K classes. `posteriors` computes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np

from vggfeat.checked import OneOf, Range, Several
from vggfeat.errors import VggfeatError
from vggfeat.hdf5 import Damaged, File, column, damaged, document, open_file, write_file
from vggfeat.metrics import tells, top_k_wrong

FORMAT, FORMAT_VERSION = "vggfeat-posteriors", 2
MODES = ("dense", "crops", "centre")
BOTH = ("dense", "crops")
"""Whose average is "both"."""
FACTS = (
    *(
        "net",
        "train_scale",
        "crop",
        "learn",
        "task",
        "recipe",
        "changes",
        "stands_for",
        "seed",
        "epochs",
        "training_set",
    ),
    *("weights", "fingerprint", "pool", "precision"),
)
"""Of a net, as strings; "" is unknown, as is a fact that an older file doesn't have."""
MOST = 1000  # nets, and scales of one


class _Net(TypedDict):
    of: dict[str, str]
    scales: Annotated[tuple[Annotated[int, Range(1, 2**31)], ...], Several(MOST, different=True)]
    modes: Annotated[list[Annotated[str, OneOf(MODES)]], Several(len(MODES), different=True)]


class _Facts(TypedDict):
    dataset: str
    data: str
    split: str
    nets: Annotated[list[_Net], Several(MOST)]


@dataclass
class Posteriors:
    """What one net says of N images.

    facts: of the net, `FACTS`.
    scales: Q in pixels.
    modes: one of `MODES` -> (Q, N, K) float32; NaN where the image is unreadable.
    """

    facts: dict[str, str]
    scales: tuple[int, ...]
    modes: dict[str, np.ndarray]

    def mean(self, mode: str, scales: Sequence[int] | None = None) -> np.ndarray:
        """(N, K): the average over test scales, and for "both" over those two modes. VggfeatError:
        not kept.
        """
        chosen = self.scales if scales is None else tuple(scales)
        wanted = BOTH if mode == "both" else (mode,)
        name = f"net {self.facts['net']} ({self.facts['weights']})"
        known = ", ".join(map(str, self.scales))
        for m in wanted:
            if m not in self.modes:
                raise VggfeatError(
                    f"the posteriors of {name} are {', '.join(self.modes)} only, not {m}"
                )
        for q in chosen:
            if q not in self.scales:
                raise VggfeatError(f"the posteriors of {name} have no Q={q}, only Q = {known}")
        rows = [self.scales.index(q) for q in chosen]
        means = [self.modes[m][rows].mean(0, dtype=np.float64) for m in wanted]
        mean_NK: np.ndarray = np.mean(means, axis=0)
        return mean_NK


@dataclass
class KeptPosteriors:
    """Posteriors of several nets for the same images, and what they are of.

    data: the name of the images' folder (of several, where they differ). classes: K names, the
    order of the posteriors. labels: (N,) index into classes, -1 unknown. unreadable: row -> reason;
    in one of the nets, at least. crc32: (N,) of the images' files, 0 where no net could read one;
    of length 0 where it is unknown for a net.
    """

    dataset: str
    data: str
    split: str
    names: list[str]
    labels: np.ndarray
    classes: list[str]
    unreadable: dict[int, str]
    nets: list[Posteriors]
    crc32: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))

    def save(self, path: Path) -> None:
        """Write as HDF5; the file appears whole. Raises CantWrite where the disk refuses."""
        rows = sorted(self.unreadable)
        facts = {
            "dataset": self.dataset,
            "data": self.data,
            "split": self.split,
            "nets": [
                {"of": net.facts, "scales": net.scales, "modes": list(net.modes)}
                for net in self.nets
            ],
        }
        arrays = {
            "facts": document(facts),
            **column("names", self.names),
            **column("classes", self.classes),
            "labels": self.labels.astype(np.int32),
            "unreadable/rows": np.array(rows, np.int64),
            **column("unreadable/reasons", [self.unreadable[i] for i in rows]),
        }
        if len(self.crc32):
            arrays["images/crc32"] = self.crc32.astype(np.uint32)
        for n, net in enumerate(self.nets):
            for mode, posteriors_QNK in net.modes.items():
                arrays[f"nets/{n:03d}/{mode}"] = np.asarray(posteriors_QNK, np.float32)
        write_file(path, FORMAT, FORMAT_VERSION, arrays)

    @classmethod
    def read(cls, path: Path) -> KeptPosteriors:
        """The inverse of `save`. Raises VggfeatError for a file that is none, or damaged."""
        with open_file(path, FORMAT, FORMAT_VERSION) as file, damaged(path):
            facts: _Facts = file.document("facts", _Facts)
            names, classes = file.texts("names"), file.texts("classes")
            labels = file.array("labels", "i", (len(names),))
            if labels.size and not -1 <= labels.min() <= labels.max() < len(classes):
                raise Damaged(f"it has labels outside of -1..{len(classes) - 1}")
            rows = file.array("unreadable/rows", "i", (None,))
            if (np.diff(rows) <= 0).any() or (
                rows.size and not 0 <= rows[0] <= rows[-1] < len(names)
            ):
                raise Damaged(f"its unreadable rows don't rise within 0..{len(names) - 1}")
            unreadable = dict(zip(rows.tolist(), file.texts("unreadable/reasons"), strict=True))
            readable = np.ones(len(names), bool)
            readable[rows] = False
            crc32 = np.zeros(0, np.uint32)
            if "images/crc32" in file.arrays:  # an older file doesn't know its images
                crc32 = file.array("images/crc32", "u", (len(names),))
            return cls(
                facts["dataset"],
                facts["data"],
                facts["split"],
                names,
                labels,
                classes,
                unreadable,
                [_net(file, n, net, readable, len(classes)) for n, net in enumerate(facts["nets"])],
                crc32,
            )

    @classmethod
    def joined(cls, parts: Iterable[tuple[str, KeptPosteriors]]) -> KeptPosteriors:
        """One of all the nets of several, each with the name of where it is from.

        Raises VggfeatError when one is of other images or classes than the first.
        """
        (_, first), *others = parts
        known = all(len(part.crc32) for part in (first, *(other for _, other in others)))
        for name, other in others:
            first._take_in(other, name)
        if not known:
            first.crc32 = first.crc32[:0]
        return first

    @property
    def image_set(self) -> str:
        """sha256 of what an error is of: the images' names and classes in order, and the classes to
        choose among.

        Of the checksums of their files, too, where they are known.
        """
        images = [f"{name}\0{true}" for name, true in zip(self.names, self._truth(), strict=True)]
        if len(self.crc32):
            images = [
                f"{image}\0{crc32:08x}"
                for image, crc32 in zip(images, self.crc32.tolist(), strict=True)
            ]
        text = "\n".join([*images, "", *sorted(self.classes)])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def _truth(self) -> list[str]:
        """Each image's class, "" where it is unknown."""
        return [self.classes[label] if label >= 0 else "" for label in self.labels]

    def _take_in(self, other: KeptPosteriors, path: str) -> None:
        if other.names != self.names or other.split != self.split:
            raise VggfeatError(
                f"{path} is of other images ({len(other.names):,} of {other.dataset} {other.split},"
                f" not {len(self.names):,} of {self.dataset} {self.split}): it can't be fused"
            )
        if sorted(other.classes) != sorted(self.classes):
            raise VggfeatError(f"{path} has other classes than the first: it can't be fused")
        if other._truth() != self._truth():
            raise VggfeatError(f"{path} has the same images in other classes: it can't be fused")
        if len(other.crc32) and len(self.crc32):
            unlike = np.flatnonzero(
                (other.crc32 != self.crc32) & (other.crc32 > 0) & (self.crc32 > 0)
            )
            if len(unlike):
                raise VggfeatError(
                    f"{path} is of other pictures under the same names ({len(unlike):,} of"
                    f" {len(self.names):,}, such as {self.names[unlike[0]]}): it can't be fused"
                )
        self.data = " and ".join(dict.fromkeys([*self.data.split(" and "), other.data]))
        order = [other.classes.index(name) for name in self.classes]
        for net in other.nets:
            net.modes = {mode: posteriors[:, :, order] for mode, posteriors in net.modes.items()}
            self.nets.append(net)
        self.unreadable |= other.unreadable
        if len(other.crc32):
            self.crc32 = np.maximum(self.crc32, other.crc32) if len(self.crc32) else other.crc32

    def fused(self, mode: str, scales: Sequence[int] | None = None) -> np.ndarray:
        """(N, K): the average over scales, modes and nets; NaN where unreadable."""
        fused_NK: np.ndarray = np.mean([net.mean(mode, scales) for net in self.nets], axis=0)
        return fused_NK

    def errors(self, posteriors_NK: np.ndarray) -> tuple[float | None, float | None]:
        """Top-1 and top-5 error over the labelled images, %; None where it tells nothing of so few
        classes.
        """
        top1, top5 = (
            (
                100 * float(self.wrong(posteriors_NK, k).mean())
                if tells(k, len(self.classes))
                else None
            )
            for k in (1, 5)
        )
        return top1, top5

    def wrong(self, posteriors_NK: np.ndarray, k: int) -> np.ndarray:
        """(n,) bool over the labelled images: the true class is not among the k most likely. So are
        unreadable ones.
        """
        labelled = self.labels >= 0
        readable = labelled & ~np.isnan(posteriors_NK).any(1)
        wrong = np.ones(len(self.labels), bool)
        if readable.any():
            wrong[readable] = top_k_wrong(posteriors_NK[readable], self.labels[readable], k)
        return wrong[labelled]


def refuse_twice(nets: Iterable[Mapping[str, str]]) -> None:
    """Raise VggfeatError where two of the nets to be fused, by their `FACTS`, are one: it would
    weigh twice.
    """
    for a, b in combinations(nets, 2):
        pools = {a["pool"], b["pool"]} - {""}
        if (
            a["fingerprint"]
            and (a["fingerprint"], a["crop"]) == (b["fingerprint"], b["crop"])
            and len(pools) < 2
        ):
            names = " and ".join(dict.fromkeys((a["weights"], b["weights"])))
            raise VggfeatError(
                f"net {a['net']} ({names}) is there twice, the same weights: fused, it would weigh"
                " twice; give it once, at all Q that it is to have"
            )


def _net(file: File, n: int, facts: _Net, readable: np.ndarray, K: int) -> Posteriors:
    """The n-th net of a file. Raises Damaged."""
    if unknown := facts["of"].keys() - set(FACTS):
        raise Damaged(f"net {n} has {sorted(unknown)[0]!r:.60} among its facts")
    kept = {}
    for mode in facts["modes"]:
        name = f"nets/{n:03d}/{mode}"
        kept[mode] = posteriors_QNK = file.array(
            name, "f", (len(facts["scales"]), len(readable), K)
        )
        sound = (posteriors_QNK >= 0) & (posteriors_QNK <= 1 + 1e-5)  # NaN is neither
        if not sound[:, readable].all() or not (sound | np.isnan(posteriors_QNK)).all():
            raise Damaged(f"{name} has values that are no probabilities")
    known = {fact: facts["of"].get(fact, "") for fact in FACTS}
    if "changes" not in facts["of"]:
        # an older file: the recipe's name alone doesn't tell its numbers
        known["recipe"] = ""
    return Posteriors(known, facts["scales"], kept)
