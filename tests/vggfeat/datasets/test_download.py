"""Downloads: whole or not at all, and through no network here."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from tests.vggfeat.datasets.made import Persons, annotation, fails, make_action, sizes, touch
from vggfeat.datasets import load
from vggfeat.datasets.voc import CLASSES


def make_tar(path: Path, files: dict[str, str]) -> str:
    """Write a tar archive of `files`; gives its MD5."""
    with tarfile.open(path, "w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return hashlib.md5(path.read_bytes()).hexdigest()


def voc_files(year: int, split_ids: dict[str, str]) -> dict[str, str]:
    base, files = f"VOCdevkit/VOC{year}", {}
    for split, image in split_ids.items():
        files[f"{base}/ImageSets/Main/{split}.txt"] = f"{image}\n"
        files |= {f"{base}/ImageSets/Main/{name}_{split}.txt": f"{image} -1\n" for name in CLASSES}
        files[f"{base}/JPEGImages/{image}.jpg"] = "pixels"
    return files


@pytest.mark.parametrize("root", [".", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_voc_download_through_torchvision(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import voc as torchvision_voc

    trainval = voc_files(2007, {"train": "000001", "val": "000002"})
    trainval["VOCdevkit/VOC2007/ImageSets/Main/trainval.txt"] = "000001\n000002\n"
    data = tmp_path / "data"
    data.mkdir()
    # The archives lie where an earlier try left them, so torchvision checks and unpacks them;
    # nothing listens at the address, so fetching one fails.
    archives = {"2007": trainval, "2007-test": voc_files(2007, {"test": "000003"})}
    for key, files in archives.items():
        entry = torchvision_voc.DATASET_YEAR_DICT[key]
        monkeypatch.setitem(entry, "url", f"http://127.0.0.1:9/{key}.tar")
        monkeypatch.setitem(entry, "md5", make_tar(data / entry["filename"], files))
    items = load("voc2007", data / root, download=True)
    assert sizes(items) == {"train": 1, "val": 1, "test": 1}
    assert items.root == data / "VOCdevkit" / "VOC2007"
    assert capsys.readouterr().out == ""

    # A second time nothing is fetched or unpacked, unless an image is missing.
    (data / "VOCtest_06-Nov-2007.tar").unlink()
    assert load("voc2007", data / root, download=True).names == items.names
    Path(str(items.source(0))).unlink()
    fails("voc2007", data / root, "could not download voc2007", "refused", download=True)
    # the archive still there was unpacked again
    assert Path(str(items.source(0))).read_text() == "pixels"


def test_what_is_there_of_voc_2012_is_held_against_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classification's lists may be there without those of the actions."""
    from torchvision.datasets import voc as torchvision_voc

    entry = torchvision_voc.DATASET_YEAR_DICT["2012"]
    monkeypatch.setitem(entry, "url", "http://127.0.0.1:9/2012.tar")
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for path, text in voc_files(2012, {"train": "000001", "val": "000002"}).items():
        touch(tmp_path, path)
        (tmp_path / path).write_text(text)
    assert len(load("voc2012", tmp_path, download=True)) == 2  # fetches nothing
    fails("voc2012action", tmp_path, "could not download voc2012", "refused", download=True)

    persons: dict[str, Persons] = {
        "train": {("000001", 1): ("jumping",)},
        "val": {("000002", 1): ("other",)},
    }
    make_action(folder, persons, ("train", "val"))
    (folder / "Annotations").mkdir()
    for image in ("000001", "000002"):
        text = annotation((0, 0, 5, 5), size=(50, 40), name="person")
        (folder / "Annotations" / f"{image}.xml").write_text(text)
    assert len(load("voc2012action", tmp_path, download=True)) == 2
    (folder / "JPEGImages" / "000001.jpg").unlink()
    fails("voc2012action", tmp_path, "could not download voc2012", "refused", download=True)


@pytest.mark.parametrize(
    ("name", "categories"),
    [("caltech101", "101_ObjectCategories"), ("caltech256", "256_ObjectCategories")],
)
def test_caltech_download_is_all_or_nothing(
    tmp_path: Path, name: str, categories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import caltech as torchvision_caltech

    def unpack(stop: bool) -> None:
        def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
            folder = Path(download_root) / ("caltech-101" if name == "caltech101" else "")
            touch(folder, "a/1.jpg", "b/1.jpg")
            Path(download_root, filename).touch()
            touch(
                Path(download_root),
                f"{categories}/BACKGROUND_Google/1.jpg",
                f"{categories}/b/1.jpg",
            )
            if stop:
                raise OSError("No space left\non device")
            touch(Path(download_root), f"{categories}/b/2.jpg")

        monkeypatch.setattr(torchvision_caltech, "download_and_extract_archive", fetch)

    unpack(stop=True)
    fails(name, tmp_path, f"could not download {name}", "No space left on device", download=True)
    fails(name, tmp_path, "no folder")  # the half-unpacked folder is not taken for the dataset
    unpack(stop=False)
    items = load(name, tmp_path, download=True)
    assert items.names == ["BACKGROUND_Google/1.jpg", "b/1.jpg", "b/2.jpg"]
    assert items.root == tmp_path / name / categories
    assert [path.name for path in tmp_path.iterdir()] == [name]
    unpack(stop=True)
    assert load(name, tmp_path, download=True).names == items.names


@pytest.mark.parametrize("name", ["imagenet", "folder", "csv", "digits", "photographs"])
def test_what_has_no_download_says_so(tmp_path: Path, name: str) -> None:
    fails(
        name,
        tmp_path,
        "leave out `download`" if name != "imagenet" else "no open download",
        download=True,
    )
