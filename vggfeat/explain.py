"""What a score is made of: the exact contribution of every position of the net's map to it, at each
scale, of an image and of its mirror image.

A linear classifier on averaged maps is linear in the maps, once the norms that the descriptor is
divided by are taken as constants of the image; so are the scores of a net's own fc8, averaged over
positions. A score is then a sum over positions, and the classifier's intercept.

K classes, D channels of a map, h, w its positions, Q scales, H, W height and width of the image.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from vggfeat.aggregate import aggregate, fuse
from vggfeat.checked import first_few, shown
from vggfeat.decode import read_rgb
from vggfeat.describe import description_of_one, list_of_images
from vggfeat.errors import UnreadableImage, VggfeatError
from vggfeat.images import mirror as mirrored
from vggfeat.images import smallest_side
from vggfeat.model import Model
from vggfeat.page import (
    Section,
    html,
    join,
    overlaid,
    overlay_switch,
    page,
    table,
    thumbnail,
    transparent,
)
from vggfeat.results import images as images_in_words
from vggfeat.store import Description
from vggfeat.weights import Network

FOR, AGAINST = (214, 66, 12), (37, 99, 201)  # colours of evidence
OPAQUE = 0.6  # at most, of a map on a photograph
CELLS = 64  # of a map that is drawn, along the longer side
NOTEBOOK = 320  # pixels of a photograph in a notebook, along the longer side
FIGURES = 200  # of a page
PAGE_PIXELS = 4_000_000  # of all photographs on a page; about 1.3 MB

Floats = NDArray[np.float64]


def evidence(
    model: Model | Network,
    images: Iterable[Any],
    *,
    classes: Sequence[str] | None = None,
    top: int = 1,
    scales: Sequence[int] | None = None,
    mirror: bool | None = None,
) -> list[Evidence]:
    """The evidence for classes in each image; `Explainer` one image after the other.

    images: see `vggfeat.embed`. Raises what `Explainer` does; UnreadableImage, which begins with
    the image's path or number, for the first that can't be read.
    """
    explainer = Explainer(model, scales, mirror)
    return [
        explainer(image, classes, top, os.fspath(image) if named(image) else f"image {i}")
        for i, image in enumerate(list_of_images(images))
    ]


def named(image: Any) -> bool:
    """Whether it is a path."""
    return isinstance(image, str | os.PathLike)


@dataclass(frozen=True)
class Contributions:
    """To the scores, of the positions of one map: a net's, at one scale, of the image or its
    mirror image.

    values_Khw: the contributions; those of the mirror image are folded back, left to right.
    rows_h2, columns_w2: where a position looks at the image, as fractions of its height and width:
    the pixels between one position and the next; of FC layers the window that fc6 covers. field:
    side in pixels, at this scale, of all that a position sees (its receptive field); None where the
    net doesn't tell, as transformers, whose positions see everything.
    """

    net: str
    layer: str
    Q: int
    mirrored: bool
    values_Khw: Floats
    rows_h2: Floats
    columns_w2: Floats
    field: int | None


@dataclass(frozen=True)
class Evidence:
    """Of an image, for some classes: `scores_K` are the sums of all contributions, and
    `constants_K`, which have no place in the image: intercepts, and the offset of a norm that the
    net's head applies to its mean.
    """

    name: str
    pixels_HWC: NDArray[np.uint8] = field(repr=False)
    classes: list[str]
    scores_K: Floats
    constants_K: Floats
    maps: tuple[Contributions, ...] = field(repr=False)

    @cached_property
    def sums_K(self) -> Floats:
        """Of all contributions."""
        total: Floats = np.sum([part.values_Khw.sum(axis=(1, 2)) for part in self.maps], axis=0)
        return total

    def number(self, name: str | int) -> int:
        """Of a class by its name. Raises VggfeatError where it wasn't asked for."""
        if name in range(len(self.classes)):
            return int(name)
        if name not in self.classes:
            raise VggfeatError(f"the evidence is for {', '.join(self.classes)}, not {shown(name)}")
        return self.classes.index(str(name))

    def on_pixels(self, name: str | int = 0, shape: tuple[int, int] | None = None) -> Floats:
        """(H, W): each contribution to a class's score spread evenly over where its position looks;
        the sum is that of the contributions. shape: of another grid over the image.
        """
        k = self.number(name)
        return self._drawn([part.values_Khw[k] for part in self.maps], shape)

    def _drawn(self, values: Sequence[Floats], shape: tuple[int, int] | None) -> Floats:
        """(H, W), of a value for each position (h, w) of each map."""
        H, W = shape or self.pixels_HWC.shape[:2]
        drawn = np.zeros((H, W))
        for part, values_hw in zip(self.maps, values, strict=True):
            drawn += _spread(part.rows_h2, H).T @ values_hw @ _spread(part.columns_w2, W)
        return drawn

    def heat(self, name: str | int = 0) -> NDArray[np.uint8]:
        """RGBA of a grid over the image, CELLS along the longer side: what speaks for the class in
        orange, against it in blue, the strongest OPAQUE. It is what `on_pixels` has there, against
        what equal contributions would leave there: windows overlap, most of all in the middle.
        """
        H, W = self.pixels_HWC.shape[:2]
        h, w = (max(1, round(CELLS * side / max(H, W))) for side in (H, W))
        equal = [
            np.full(part.values_Khw.shape[1:], 1 / part.values_Khw[0].size) for part in self.maps
        ]
        equal_hw = self._drawn(equal, (h, w))
        density = np.divide(
            self.on_pixels(name, (h, w)), equal_hw, out=np.zeros((h, w)), where=equal_hw > 0
        )
        strength = np.abs(density) / (np.abs(density).max() or 1)
        rgba = np.empty((h, w, 4), np.uint8)
        rgba[..., :3] = np.where(density[..., None] > 0, FOR, AGAINST)
        rgba[..., 3] = np.round(255 * OPAQUE * strength)
        return rgba

    def overlay(self, name: str | int = 0) -> NDArray[np.uint8]:
        """(H, W, 3): the photograph, paler, with `heat` on it."""
        photograph = Image.fromarray(self.pixels_HWC)
        pale = Image.blend(photograph, photograph.convert("L").convert("RGB"), 0.7)
        heat = Image.fromarray(self.heat(name)).resize(pale.size, Image.Resampling.BICUBIC)
        pale.paste(heat, mask=heat.getchannel("A"))
        return np.array(pale)

    def sees(self) -> str:
        """In a sentence, what a position of these maps sees of the image."""
        sentences = []
        for net, layer in dict.fromkeys((part.net, part.layer) for part in self.maps):
            own = [part for part in self.maps if (part.net, part.layer) == (net, layer)]
            if (side := own[0].field) is None:
                sentences.append(
                    f"How far a position of {net}'s {layer} sees isn't known: it may see all of the"
                    " image."
                )
                continue
            whole = [str(Q) for Q in sorted({part.Q for part in own}) if side >= Q]
            all_of = f", at Q = {', '.join(whole)} all of the smallest side" if whole else ""
            sentences.append(f"A position of {net}'s {layer} sees {side} x {side} pixels{all_of}.")
        return " ".join(sentences)

    def says(self, name: str | int = 0) -> str:
        """The sum of a class's score, in words."""
        k = self.number(name)
        every = np.concatenate([part.values_Khw[k].ravel() for part in self.maps])
        against = f" {every[every < 0].sum():+.2f} against," if (every < -0.005).any() else ""
        return (
            f"{self.classes[k]} {self.scores_K[k]:+.2f} = {every[every > 0].sum():+.2f} for,"
            f"{against} {self.constants_K[k]:+.2f} without a place (the intercept)"
        )

    def _repr_html_(self) -> str:
        return str(
            join(
                html(
                    '<figure style="display: inline-block; margin: .5em"><img src="{uri}">'
                    "<figcaption>{words}</figcaption></figure>",
                    uri=thumbnail(self.overlay(k), NOTEBOOK),
                    words=self.says(k),
                )
                for k in range(len(self.classes))
            )
            + html("<p>{sees}</p>", sees=self.sees())
        )


def _spread(windows_n2: Floats, length: int) -> Floats:
    """(n, length): the share of each window that each of so many equal parts of the side has."""
    edges = np.linspace(0, 1, length + 1)
    low, high = windows_n2[:, :1], windows_n2[:, 1:]
    inside = np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None)
    shares: Floats = inside / inside.sum(axis=1, keepdims=True)
    return shares


class Explainer:
    """What a classifier, or a net by its own fc8, makes of images: image -> Evidence.

    model: of `vggfeat.open_model`; or a net of `vggfeat.load` with fc8, as `pretrain` trains it:
    its class score map, before softmax, and the mean of its scores over positions (Sect. 3.2),
    scales and mirror image. scales, mirror: of a net alone; by default its own, and with the mirror
    image. Raises VggfeatError for what has no coefficients, or describes boxes; what
    `Model.networks` raises.
    """

    def __init__(
        self,
        model: Model | Network,
        scales: Sequence[int] | None = None,
        mirror: bool | None = None,
    ) -> None:
        self.parts: tuple[Description, ...]
        if isinstance(model, Network):
            if model.boxes:
                raise VggfeatError(f"weights {model.spec} say boxes, not classes")
            fc8 = model.fc8()
            part = description_of_one(model, "fc7", scales, mirror is None or mirror)
            self.networks, self.parts = [model], (part,)
            self.pool: str | None = None
            self.coef_KD = fc8.weight.double().cpu().numpy()
            self.intercept_K = fc8.bias.double().cpu().numpy()
            K = len(self.coef_KD)
            self.classes = model.classes or [f"class {k}" for k in range(K)]
            return
        if not isinstance(model, Model):
            raise VggfeatError(
                f"`model` has no coefficients that evidence could be told of: it is {shown(model)};"
                " give what vggfeat.open_model or vggfeat.load returns"
            )
        if scales is not None or mirror is not None:
            raise VggfeatError(
                "a classifier describes images as those that it learned from: leave out `scales`"
                " and `mirror`"
            )
        model.refuse_images()
        self.networks, self.parts, self.pool = model.networks, model.parts, model.pool
        self.coef_KD, self.intercept_K = model.coef_KD, model.intercept_K
        self.classes = model.classes

    def numbers(self, classes: Sequence[str]) -> list[int]:
        """Of classes by their names. Raises VggfeatError for one that there isn't."""
        if isinstance(classes, str):
            raise VggfeatError(f"`classes` is one name: give a list, [{classes!r}]")
        for name in classes:
            if name not in self.classes:
                raise VggfeatError(
                    f"there is no class {shown(name)}: give one of {first_few(self.classes, 20)}"
                )
        return [self.classes.index(name) for name in classes]

    def __call__(
        self, image: Any, classes: Sequence[str] | None = None, top: int = 1, name: str = "image"
    ) -> Evidence:
        """image: what `decode.read_rgb` takes. classes: names; None: the `top` with the highest
        scores. name: of the image, for who reads. Raises UnreadableImage.
        """
        if not isinstance(top, numbers.Integral) or top < 1:
            raise VggfeatError(f"`top` must be a whole number from 1 up, not {shown(top)}")
        chosen = None if classes is None else self.numbers(classes)
        try:
            pixels_HWC = read_rgb(image)
            passes = [
                [self._maps(network, part, pixels_HWC, Q) for Q in part.scales]
                for network, part in zip(self.networks, self.parts, strict=True)
            ]
        except UnreadableImage as error:
            raise UnreadableImage(f"{name}: {error}") from error
        raw_parts = [
            np.stack([np.mean([each.pooled_D for each in of_scale], axis=0) for of_scale in part])
            for part in passes
        ]
        scores_K = self._scores(raw_parts)
        if chosen is None:
            chosen = [int(k) for k in (-scores_K).argsort(kind="stable")[:top]]
        weights = self._on_descriptors(self.coef_KD[chosen].astype(np.float64), raw_parts)
        constants_K = self.intercept_K[chosen].astype(np.float64)
        maps = []
        for network, part, of_part, coef_QKD in zip(
            self.networks, self.parts, passes, weights, strict=True
        ):
            for Q, of_scale, coef_KD in zip(part.scales, of_part, coef_QKD, strict=True):
                for each in of_scale:
                    made, offset_K = each.contributions(
                        network, part.layer, Q, coef_KD / len(of_scale)
                    )
                    maps.append(made)
                    constants_K += offset_K
        return Evidence(
            name,
            pixels_HWC,
            [self.classes[k] for k in chosen],
            scores_K[chosen],
            constants_K,
            tuple(maps),
        )

    def _maps(
        self, network: Network, part: Description, pixels_HWC: NDArray[np.uint8], Q: int
    ) -> list[_Pass]:
        """Of the image at one scale, and of its mirror image."""
        rescaled = smallest_side(pixels_HWC, Q, network.filter)
        image_1HWC = torch.from_numpy(rescaled.copy())[None].to(network.device)
        found = []
        for flip in (False, True)[: 1 + part.mirror]:
            with torch.inference_mode():
                seen = mirrored(image_1HWC) if flip else image_1HWC
                map_1Dhw = network.maps_of(seen, part.layer)
                pooled_D = network.module.pooled(map_1Dhw, part.layer)[0]
            values_Dhw = map_1Dhw[0].float().cpu().numpy()
            found.append(_Pass(flip, rescaled.shape[:2], values_Dhw, pooled_D.cpu().numpy()))
        return found

    def _scores(self, raw_parts: list[NDArray[np.float32]]) -> Floats:
        """(K,) as the classifier, or the net, has them, of descriptors (Q, D) a part."""
        if self.pool is None:
            x_D = raw_parts[0].astype(np.float64).mean(axis=0)
        else:
            x_D = fuse([aggregate(raw_QD[None], self.pool) for raw_QD in raw_parts])[0]
        scores_K: Floats = x_D @ self.coef_KD.T + self.intercept_K
        return scores_K

    def _on_descriptors(
        self, coef_KD: Floats, raw_parts: list[NDArray[np.float32]]
    ) -> list[Floats]:
        """Of each part (Q, K, D): what weighs its scales' descriptors, so that the sum over all is
        the score but for the intercept. It is `aggregate` and `fuse` read backwards.
        """
        if self.pool is None:
            Q = len(raw_parts[0])
            return [np.stack([coef_KD / Q] * Q)]
        pooled = [aggregate(raw_QD[None], self.pool)[0] for raw_QD in raw_parts]
        bounds = np.cumsum([len(x_D) for x_D in pooled])[:-1]
        slices = np.split(coef_KD, bounds, axis=1)
        if len(pooled) > 1:
            units = [x_D / _length(x_D) for x_D in pooled]
            whole = _length(np.concatenate(units))
            slices = [
                part_KD / (_length(x_D) * whole)
                for part_KD, x_D in zip(slices, pooled, strict=True)
            ]
        return [
            _on_scales(part_KD, raw_QD.astype(np.float64), self.pool)
            for part_KD, raw_QD in zip(slices, raw_parts, strict=True)
        ]


def _on_scales(coef_KD: Floats, raw_QD: Floats, pool: str) -> Floats:
    """(Q, K, D), of what weighs `aggregate`'s row of one image."""
    Q = len(raw_QD)
    if pool == "average":
        return np.stack([coef_KD / (Q * _length(raw_QD.mean(axis=0)))] * Q)
    if pool == "max":  # a channel's value is that of the scale which wins; of equals the first
        winner_D = raw_QD.argmax(axis=0)
        each = coef_KD / _length(raw_QD.max(axis=0))
        return np.stack([np.where(winner_D == q, each, 0) for q in range(Q)])
    lengths = [_length(raw_D) for raw_D in raw_QD]
    units = [raw_D / length for raw_D, length in zip(raw_QD, lengths, strict=True)]
    whole = _length(np.concatenate(units))
    slices = np.split(coef_KD, Q, axis=1)
    return np.stack([part / (n * whole) for part, n in zip(slices, lengths, strict=True)])


def _length(x_D: NDArray[Any]) -> float:
    """By which `aggregate` divides: zeros stay as they are."""
    return float(np.linalg.norm(x_D.astype(np.float64))) or 1.0


@dataclass(frozen=True)
class _Pass:
    """One image, or its mirror image, at one scale: shape (H, W) of it, the layer's map, and the
    descriptor that is made of it.
    """

    flip: bool
    shape: tuple[int, ...]
    map_Dhw: NDArray[np.float32]
    pooled_D: NDArray[np.float32]

    def contributions(
        self, network: Network, layer: str, Q: int, coef_KD: Floats
    ) -> tuple[Contributions, Floats]:
        """To coef @ descriptor; and what of that has no place, (K,)."""
        D, h, w = self.map_Dhw.shape
        mean_D = self.map_Dhw.mean(axis=(1, 2), dtype=np.float64)
        on_mean_KD, offset_K = network.module.linear_pooled(coef_KD, mean_D, layer)
        values_Khw = (on_mean_KD / (h * w) @ self.map_Dhw.reshape(D, -1)).reshape(-1, h, w)
        rows_h2, columns_w2, seen = network.module.looks_at(layer, (h, w), self.shape)
        if self.flip:
            values_Khw, columns_w2 = values_Khw[:, :, ::-1], 1 - columns_w2[::-1, ::-1]
        made = Contributions(
            network.name, layer, Q, self.flip, values_Khw, rows_h2, columns_w2, seen
        )
        return made, offset_K


# --- a page ---------------------------------------------------------------------------------------


def figure(
    of_image: Evidence, name: str | int = 0, side: int = NOTEBOOK, caption: str = ""
) -> Markup:
    """The photograph, at most side pixels a side, with the evidence for a class over it."""
    return overlaid(
        thumbnail(of_image.pixels_HWC, side),
        transparent(of_image.heat(name)),
        of_image.name,
        caption or of_image.says(name),
    )


def card(of_image: Evidence, figures: int, label: str = "") -> Markup:
    """Of an image, on a page of so many figures, one a class: these, and the sums. label: its own
    class, where it is known.
    """
    side = int(np.clip((PAGE_PIXELS / max(figures, 1)) ** 0.5, 96, 480))
    rows = [
        (
            f"{part.net} {part.layer}, Q = {part.Q}{', mirror image' if part.mirrored else ''}",
            *(f"{values.sum():+.4f}" for values in part.values_Khw),
        )
        for part in of_image.maps
    ]
    rows.append(("without a place", *(f"{value:+.4f}" for value in of_image.constants_K)))
    rows.append(("score", *(f"{value:+.4f}" for value in of_image.scores_K)))
    return html(
        '<article><h3 title="{whole}">{name}</h3><p class="soft">{label}</p><div class="evidence">'
        "{figures}</div><details><summary>The sum, by map</summary>{sums}</details></article>",
        whole=of_image.name,
        name="/".join(Path(of_image.name).parts[-2:]),
        label=f"label: {label}" if label else "no label is known",
        figures=join(figure(of_image, k, side) for k in range(len(of_image.classes))),
        sums=table(["", *of_image.classes], rows, numbers=range(1, 1 + len(of_image.classes))),
    )


def evidence_page(cards: Sequence[Markup], sees: str) -> str:
    """Of images. sees: as of `Evidence.sees`, of any of them."""
    about = (
        "Orange places speak for the class, blue ones against it; the colour is strongest where the"
        " positions that look there have most. All of them, and what has no place, add up to the"
        f" score. {sees}"
    )
    body = overlay_switch("show the evidence")
    body += html('<div class="cards">{cards}</div>', cards=join(cards))
    title = "What speaks for a class"
    return page(title, "", [Section("evidence", images_in_words(len(cards)), body, about)])
