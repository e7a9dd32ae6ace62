"""ImageNet (ILSVRC-2012), or any part of it, in its usual layout.

    train/n01440764/n01440764_10026.JPEG
    val/n01440764/ILSVRC2012_val_00000293.JPEG

The official validation archive is flat: its images must first be sorted into folders named by synset id.
"""

from __future__ import annotations

from pathlib import Path

from vggfeat.datasets.download import need_root
from vggfeat.datasets.folder import children, read_splits
from vggfeat.datasets.items import Items
from vggfeat.errors import VggfeatError


def load(root: Path | None, download: bool = False) -> Items:
    """Splits "train" and "val", or the one that is there; classes are the sorted synset ids.

    labels: (N,) int32.
    Raises VggfeatError when neither folder is there, a class folder is empty, or "val" has a class that
    "train" lacks.
    """
    if download:
        raise VggfeatError(
            "imagenet has no open download: get it from image-net.org, then leave out `download`"
        )
    root = need_root("imagenet", root, "the folder that holds train and val")
    folder_of = {split: split for split in ("train", "val") if (root / split).is_dir()}
    if not folder_of:
        looked = " or ".join(str((root / split).absolute()) for split in ("train", "val"))
        raise VggfeatError(f"no folder {looked}: give `root` the folder that holds train/WNID and val/WNID")
    if "val" in folder_of and not children(root / "val")[0]:
        raise VggfeatError(
            f"no class folders in {(root / 'val').absolute()}: sort the validation images into folders "
            "named by synset id, or move val away to use train alone"
        )
    return read_splits("imagenet", root, folder_of)
