"""ImageNet's layout: real folders first, then made-up ones."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.vggfeat.datasets.made import DATA, fails, needs_data, sizes, touch
from tests.vggfeat.datasets.test_devkit import write_meta
from vggfeat.datasets import load
from vggfeat.datasets.devkit import GROUND_TRUTH, SOLUTION


@needs_data
def test_imagenette_in_the_ilsvrc_layout() -> None:
    items = load("imagenet", DATA / "imagenette144")
    assert sizes(items) == {"train": 9469, "val": 1000} and items.labels is not None
    assert (
        items.classes[0] == "n01440764"
        and len(items.classes) == 10
        and items.protocol == "single-label"
    )
    assert np.bincount(items.labels[items.splits["val"]]).tolist() == [100] * 10
    for row in (0, 5000, 9469, 10468):
        assert items.names[row].split("/")[1] == items.classes[items.labels[row]]
        assert Path(str(items.source(row))).is_file()


def test_imagenet_with_one_of_its_parts(tmp_path: Path) -> None:
    fails("imagenet", tmp_path, str(tmp_path / "train"), str(tmp_path / "val"))
    touch(tmp_path, "val/n02/b.JPEG", "val/n02/a.JPEG", "val/n01/c.JPEG")
    items = load("imagenet", tmp_path)
    assert items.names == ["val/n01/c.JPEG", "val/n02/a.JPEG", "val/n02/b.JPEG"] and sizes(
        items
    ) == {"val": 3}
    touch(tmp_path, "train/n00/d.JPEG", "train/n02/e.JPEG")
    fails("imagenet", tmp_path, str(tmp_path / "val" / "n01"))
    touch(tmp_path, "train/n01/f.JPEG")
    items = load("imagenet", tmp_path)
    # train's classes number val
    assert items.labels is not None and items.labels.tolist() == [
        0,
        1,
        2,
        1,
        2,
        2,
    ]


def test_imagenet_by_other_words_and_beside_other_things(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "Training/n01/a.JPEG",
        "Validation/n01/b.JPEG",
        "test/1.JPEG",
        "devkit/a.txt",
        "x.tar",
        "y.jpg",
    )
    items = load("imagenet", tmp_path)
    assert items.names == ["Training/n01/a.JPEG", "Validation/n01/b.JPEG"] and sizes(items) == {
        "train": 1,
        "val": 1,
    }
    (remark,) = items.remarks
    for piece in ("(.tar 1)", "1 folder beside Training and Validation: devkit", "y.jpg"):
        assert piece in remark
    touch(tmp_path, "test/n01/1.JPEG")  # ILSVRC's own are flat
    assert (
        "2 folders beside Training and Validation, for example devkit"
        in load("imagenet", tmp_path).remarks[0]
    )
    touch(tmp_path, "train/n01/a.JPEG")  # the plain word goes before
    assert load("imagenet", tmp_path).names == ["train/n01/a.JPEG", "Validation/n01/b.JPEG"]
    touch(tmp_path, "valid/n01/b.JPEG")
    fails("imagenet", tmp_path, "both Validation and valid, for val")


# --- as it is downloaded --------------------------------------------------------------------------

DEVKIT = "ILSVRC2012_devkit_t12/data"
TRUTH = ["n02", "n01", "n02", "n01"]  # of validation images 1 to 4
LIST = "ImageId,PredictionString\n"


def devkit(folder: Path, truth: list[str] = TRUTH) -> None:
    """The devkit's two files; n02 has number 1."""
    folder.mkdir(parents=True, exist_ok=True)
    write_meta(folder / "meta.mat", [("n02", 1, 0), ("n01", 2, 0), ("n03", 3, 0)])
    numbers = {"n02": 1, "n01": 2, "n03": 3}
    (folder / GROUND_TRUTH).write_text("".join(f"{numbers[name]}\n" for name in truth))


def solution(folder: Path, truth: list[str] = TRUTH) -> None:
    """Kaggle's list, in an order of its own."""
    lines = [
        f"ILSVRC2012_val_{i:08d},{name} 1 2 30 40 {name} 5 6 70 80 \n"
        for i, name in enumerate(truth, 1)
    ]
    (folder / SOLUTION).write_text(LIST + "".join(reversed(lines)))


def flat(base: Path) -> None:
    """Validation images as the official archive has them, beside two training images."""
    touch(base, "train/n01/a.JPEG", "train/n02/b.JPEG")
    touch(base, *(f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)))


@pytest.mark.parametrize("told", ["devkit", "list", "both"])
@pytest.mark.parametrize("inside", ["", "ILSVRC/Data/CLS-LOC"])
def test_flat_validation_images_are_as_if_they_were_sorted(
    told: str, inside: str, tmp_path: Path
) -> None:
    root = tmp_path / "flat"
    flat(root / inside)
    touch(root / inside, "test/ILSVRC2012_test_00000001.JPEG")
    if told != "list":
        devkit(root / DEVKIT)
    if told != "devkit":
        solution(root)
    touch(tmp_path / "sorted", "train/n01/a.JPEG", "train/n02/b.JPEG")
    by_class = [f"val/{name}/ILSVRC2012_val_{i:08d}.JPEG" for i, name in enumerate(TRUTH, 1)]
    touch(tmp_path / "sorted", *by_class)
    items, reference = load("imagenet", root), load("imagenet", tmp_path / "sorted")
    assert items.labels is not None and reference.labels is not None
    assert items.labels.tolist() == reference.labels.tolist() == [0, 1, 0, 0, 1, 1]
    assert items.labels.dtype == reference.labels.dtype
    assert (items.classes, items.protocol) == (reference.classes, reference.protocol)
    assert {k: v.tolist() for k, v in items.splits.items()} == {
        k: v.tolist() for k, v in reference.splits.items()
    }
    assert [name.rsplit("/", 1)[1] for name in items.names] == [
        name.rsplit("/", 1)[1] for name in reference.names
    ]
    assert items.names[2:] == [f"val/ILSVRC2012_val_0000000{i}.JPEG" for i in (2, 4, 1, 3)]
    assert items.remarks == reference.remarks == ()
    assert all(path.is_file() for path in items.paths())
    read = {path.name for path in items.paths()} - {Path(name).name for name in items.names}
    files = {"devkit": {GROUND_TRUTH}, "list": {SOLUTION}}
    assert read == files.get(told, {GROUND_TRUTH, SOLUTION})
    # from further below, too
    if inside and told == "list":
        for below in ("ILSVRC", inside):
            assert load("imagenet", root / below).names == items.names


def test_flat_validation_images_without_training_images(tmp_path: Path) -> None:
    touch(tmp_path, *(f"Validation/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)), "x.tar")
    devkit(tmp_path / DEVKIT)
    items = load("imagenet", tmp_path)
    assert items.classes == ["n01", "n02"] and sizes(items) == {"val": 4}
    assert items.names[0] == "Validation/ILSVRC2012_val_00000002.JPEG"
    assert "(.tar 1)" in items.remarks[0] and "devkit" not in items.remarks[0]


def test_imagenet_with_the_flat_official_val(tmp_path: Path) -> None:
    touch(tmp_path, "train/n01/a.JPEG", "val/ILSVRC2012_val_00000001.JPEG")
    fails("imagenet", tmp_path, str(tmp_path / "val"), "synset id", GROUND_TRUTH, SOLUTION)


def test_labels_that_do_not_fit_the_flat_images(tmp_path: Path) -> None:
    flat(tmp_path)
    truth, listed = tmp_path / DEVKIT / GROUND_TRUTH, tmp_path / SOLUTION
    devkit(truth.parent, TRUTH[:3])
    fails("imagenet", tmp_path, str(truth), "with 3 images", "'ILSVRC2012_val_00000004.JPEG'")
    devkit(truth.parent, [*TRUTH, "n01"])
    fails("imagenet", tmp_path, str(truth), "5 lines for the 4 images", "_00000005")
    devkit(truth.parent)
    # the two contradict each other
    solution(tmp_path, ["n02", "n01", "n01", "n01"])
    fails(
        "imagenet",
        tmp_path,
        f"ILSVRC2012_val_00000003.JPEG is of class n02 by {truth}, of n01 by {listed}",
    )
    shutil.rmtree(truth.parent.parent)
    # an image that the list doesn't have, and one that it has and that isn't there
    solution(tmp_path, TRUTH[:3])
    fails("imagenet", tmp_path, str(listed), "with 3 images", "'ILSVRC2012_val_00000004.JPEG'")
    solution(tmp_path, [*TRUTH, "n01"])
    (remark,) = load("imagenet", tmp_path).remarks
    assert remark == "listed in LOC_val_solution.csv, but not there: 'ILSVRC2012_val_00000005'"
    # a class without training images
    solution(tmp_path, ["n02", "n03", "n02", "n01"])
    fails(
        "imagenet", tmp_path, "ILSVRC2012_val_00000002.JPEG", "of class n03", "no folder in train"
    )
    solution(tmp_path)
    touch(tmp_path, "val/ILSVRC2012_val_00000002.png")
    fails("imagenet", tmp_path, "holds ILSVRC2012_val_00000002 twice")
    (tmp_path / "val/ILSVRC2012_val_00000002.png").rename(tmp_path / "val/cat.jpg")
    fails("imagenet", tmp_path, "doesn't tell the class of 'cat.jpg'")


def pack(archive: Path, folder: Path, names: list[str]) -> None:
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        for name in names:
            tar.add(folder / name, name)


def test_the_documented_lines_unpack_what_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path / "made")
    devkit(tmp_path / "made" / DEVKIT)
    touch(tmp_path, "made/train/n01/a 2.JPEG")
    for name in ("n01", "n02"):
        folder = tmp_path / "made/train" / name
        pack(tmp_path / f"{name}.tar", folder, sorted(path.name for path in folder.iterdir()))
    pack(tmp_path / "ILSVRC2012_img_train.tar", tmp_path, ["n01.tar", "n02.tar"])
    val = tmp_path / "made/val"
    pack(tmp_path / "ILSVRC2012_img_val.tar", val, sorted(path.name for path in val.iterdir()))
    pack(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", tmp_path / "made", [DEVKIT.split("/")[0]])
    monkeypatch.chdir(tmp_path)
    document = (Path(__file__).parents[3] / "docs/datasets.md").read_text()
    lines = re.findall(r"^(?:mkdir|tar) .*$", document, re.M)
    assert len(lines) == 4 and sum("img_train" in line for line in lines) == 1
    for line in lines:
        subprocess.run(line, shell=True, check=True)
    reference = load("imagenet", tmp_path / "made")
    items = load("imagenet", Path("data"))
    assert (items.names, items.remarks) == (reference.names, ())
    # where the outer archive of training images was unpacked alone
    shutil.rmtree("data/train")
    Path("data/train").mkdir()
    subprocess.run("tar -xf ILSVRC2012_img_train.tar -C data/train", shell=True, check=True)
    (loop,) = re.findall(r"`(for t in \*\.tar; .*?; done)`", document)
    fails("imagenet", Path("data"), str(tmp_path / "data/train"), loop)
    subprocess.run(loop, shell=True, check=True, cwd="data/train")
    assert load("imagenet", Path("data")).names == reference.names
    assert not list(Path("data/train").glob("*.tar"))


@pytest.mark.skipif(
    shutil.which("tar") is None
    or b"GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True).stdout,
    reason="needs GNU tar",
)
def test_the_documented_line_unpacks_the_nested_archives(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text()
    block = next(part for part in text.split("```\n") if "TAR_FILENAME" in part)
    lines = [line for line in block.splitlines() if "devkit" not in line]
    assert len(lines) == 3

    def archive(path: Path, files: dict[str, bytes]) -> bytes:
        with tarfile.open(path, "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path.read_bytes()

    classes = {
        f"{wnid}.tar": archive(tmp_path / "x", {f"{wnid}_{i}.JPEG": wnid.encode() for i in (1, 2)})
        for wnid in ("n01440764", "n01443537")
    }
    archive(tmp_path / "ILSVRC2012_img_train.tar", classes)
    archive(tmp_path / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": b"v"})
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, check=True)
    data = tmp_path / "data"
    found = {path.relative_to(data).as_posix() for path in data.rglob("*.JPEG")}
    assert found == {
        "val/ILSVRC2012_val_00000001.JPEG",
        *(f"train/{n}/{n}_{i}.JPEG" for n in ("n01440764", "n01443537") for i in (1, 2)),
    }
    assert (data / "train/n01440764/n01440764_2.JPEG").read_bytes() == b"n01440764"
