"""The pages in a real browser, headless and without a network: on a phone and a desk, light and
dark.

Needs Chromium (`apt-get install chromium`, or `playwright install chromium`); skipped without one.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.report import write_report as write_training_report
from vggfeat import exhibits
from vggfeat.datasets import Items
from vggfeat.mistakes import COLUMNS
from vggfeat.page import Section, html, join, overlaid, overlay_switch, thumbnail
from vggfeat.page import page as page_of
from vggfeat.results import Scored

from .conftest import HANG, photograph
from .pretrain.test_report import write_log
from .vggfeat.test_report import NASTY, features_of, model_of, results_of, write_report

FACTS = """() => {
  const lightness = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(document.body), ground = lightness(style.backgroundColor);
  const contrast = colour => {
    const a = lightness(colour), [low, high] = a < ground ? [a, ground] : [ground, a];
    return (high + 0.05) / (low + 0.05);
  };
  const all = selector => [...document.querySelectorAll(selector)];
  const broken = [];  // words whose letters stand in several lines
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const range = new Range();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest('script, svg, thead th, summary')) continue;
    for (const word of node.data.matchAll(/[\\p{L}\\p{N}]{2,}/gu)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const tops = new Set([...range.getClientRects()].map(rect => Math.round(rect.top)));
      if (tops.size > 1) broken.push(word[0]);
    }
  }
  return {
    ground: ground,
    contrast: Math.min(...all('p, td, th, figcaption, h2, h3, summary, footer').map(
      element => contrast(getComputedStyle(element).color))),
    overflow: document.documentElement.scrollWidth - innerWidth,
    broken: broken,
    columns: new Set(all('section').map(section => section.getBoundingClientRect().left)).size,
    images: all('img').length,
    gone: all('img').filter(
      image => !image.naturalWidth || (image.checkVisibility() && !image.clientWidth)).length,
    charts: all('svg').map(svg => svg.getBoundingClientRect().width),
    letters: all('svg text').map(text => text.getBoundingClientRect().height),
    outside: all('svg text').filter(text => {
      const a = text.getBoundingClientRect(), b = text.ownerSVGElement.getBoundingClientRect();
      return a.left < b.left - 1 || a.right > b.right + 1
        || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(text => text.textContent),
    figures: all('td.number').map(cell => {
      range.selectNodeContents(cell);
      return range.getBoundingClientRect().height;
    }),
    titles: all('section h2').map(title => title.textContent),
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    with sync_api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium here")
        # its sandbox doesn't work for root, as in containers; the pages are our own
        opened = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=1000 * HANG
        )
        yield opened
        opened.close()


@contextmanager
def opened(
    browser: Any, path: Path, width: int, scheme: str = "light", script: bool = True
) -> Iterator[Any]:
    """A page, which asks for nothing and complains of nothing."""
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        offline=True,
        java_script_enabled=script,
        reduced_motion="reduce",
    )
    context.set_default_timeout(1000 * HANG)
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert [url for url in asked if not url.startswith(("data:image/", "blob:"))] == [path.as_uri()]
    assert said == []


def a_report(folder: Path, K: int, images: int, splits: int = 0) -> Path:
    """Of K classes, with images thumbnails at hand; alike in each of several splits."""
    rng = np.random.default_rng(0)
    classes = [f"class_of_the_number_{k}" for k in range(K - 1)] + [NASTY + "-" * 60]
    labels = (np.arange(max(K, 40)) % K).astype(np.int32)
    rows = np.arange(len(labels))
    scores = rng.standard_normal((len(labels), K)) + 2 * (np.arange(K) == labels[:, None])
    curve = {
        "C_grid": [0.5, 2.0, 8.0],
        "C_curve": [0.5, 0.6, 0.55],
        "selected_by": "mean_class_recall",
    }
    results = results_of(
        mean_class_recall=0.6,
        per_class={name: {"recall": float(rng.random())} for name in classes},
        command="vggfeat svm " + "x" * 300,
        **curve,
    )
    features = features_of(folder / f"{K}.h5", labels, classes)
    parts = [f"split{i}" for i in range(splits)] or ["test"]
    model = model_of(classes, {part: Scored(rows, scores) for part in parts}, results)
    pixels = np.stack([photograph(i, 40, 50) for i in range(images)]) if images else None
    items = Items(
        "folder", "single-label", folder, list(features.names[:images]), None, [], images=pixels
    )
    page, _ = write_report(
        results, [features], model, items if images else None, "the images are not at hand"
    )
    path = folder / f"{K}.html"
    path.write_text(page)
    assert path.stat().st_size < 2_000_000
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    write_log(folder, "A-256", 30, 1.0, True)
    write_log(folder, "D-256-512", 40, 2.0, False)
    write_training_report(folder, folder / "training.html")
    with pytest.MonkeyPatch.context() as patch:  # t-SNE takes long
        patch.setattr(exhibits, "_plane", lambda X: (X[:, :2], "Two values"))
        made = {
            f"{K} classes": a_report(folder, K, images)
            for K, images in ((1, 0), (10, 40), (300, 40), (1000, 0))
        }
    return {**made, "training": folder / "training.html"}


PHONE_DARK, PHONE, DESK_DARK, DESK = (
    (width, scheme) for width in (390, 1440) for scheme in ("dark", "light")
)


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        *(("10 classes", *each) for each in (PHONE_DARK, PHONE, DESK_DARK, DESK)),
        *(("1 classes", *each) for each in (PHONE_DARK, DESK)),
        *(("300 classes", *each) for each in (PHONE, DESK_DARK)),
        *(("training", *each) for each in (PHONE_DARK, PHONE, DESK)),
    ],
)
def test_readable(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    with opened(browser, pages[name], width, scheme) as page:
        facts = page.evaluate(FACTS)
    assert facts["overflow"] <= 0  # nothing to scroll sideways
    assert facts["broken"] == []
    assert (facts["ground"] > 0.8) if scheme == "light" else (facts["ground"] < 0.05)
    assert facts["contrast"] >= 4.5  # WCAG's AA
    assert facts["gone"] == 0
    assert facts["charts"] and min(facts["charts"]) > 100
    assert min(facts["letters"]) >= 7 and facts["outside"] == []
    assert max(facts["figures"], default=0) < 40  # a figure is not broken into a column of digits
    assert facts["columns"] == (1 if width == 390 or name == "training" else 2)
    if name == "10 classes":
        assert facts["images"] >= 20
        assert "Confusions" in facts["titles"] and "Map of the descriptors" in facts["titles"]


@pytest.mark.parametrize("name", ["1 classes", "10 classes", "300 classes", "1000 classes"])
def test_charts_answer_to_pointer_and_keyboard(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    with opened(browser, pages[name], 1440) as page:
        tip, press = page.locator(".tip"), page.keyboard.press
        chart = page.locator("#c svg")
        dot = chart.locator(".dot").nth(1)
        dot.hover()
        assert tip.inner_text() == "all values\nC 2\nmean class recall, % 60"
        chart.focus()
        press("ArrowRight")
        assert tip.inner_text() == "all values\nC 8\nmean class recall, % 55"
        press("Home")
        assert "C 0.5" in tip.inner_text() and chart.locator(".mark").count() == 1
        press("Escape")
        assert tip.is_hidden() and chart.locator(".mark").count() == 0
        page.locator("#map .dot").nth(3).hover(force=True)  # another dot may lie on it
        assert ".jpg: " in tip.inner_text()
        pictured = name in ("10 classes", "300 classes")
        assert tip.locator("i").count() == pictured
        before = tip.inner_text()
        page.locator("#map svg").focus()
        moved = set()
        for key in ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"):
            press(key)
            moved.add(tip.inner_text())
        assert len(moved | {before}) > 1


@pytest.mark.parametrize("name", ["10 classes", "300 classes", "1000 classes"])
def test_a_cell_of_the_confusions_shows_its_images(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    with opened(browser, pages[name], 1440) as page:
        panel, press = page.locator(".panel"), page.keyboard.press
        data = json.loads(page.locator("#data").inner_text())
        key, image, _, k, j, *_ = data["mistakes"]["rows"][0]
        classes = data["mistakes"]["classes"]
        what = f"{classes[k]}, taken for {classes[j]}: 1 image"
        assert panel.is_hidden()
        if name == "10 classes":
            page.locator(".confusion tbody tr").nth(k).locator("td").nth(j).click()
        else:
            box = page.locator(".matrix").bounding_box()
            at = {"x": (j + 0.5) * box["width"] / len(classes)}
            at |= {"y": (k + 0.5) * box["height"] / len(classes)}
            page.locator(".matrix").hover(position=at)
            assert page.locator(".tip").inner_text().startswith(what.replace(", ", "\n"))
            page.locator(".matrix").click(position=at)
        assert panel.locator("h3").inner_text() == what and image in panel.inner_text()
        assert panel.locator("img").count() == (name != "1000 classes" and int(key) < 40)
        press("Escape")
        assert panel.is_hidden()
        if name == "10 classes":
            cells = page.locator(".confusion td")
            cells.nth(0).focus()
            press("Enter")
            right = panel.locator("h3").inner_text()
            assert re.fullmatch(rf"{classes[0]}: \d of 4 right", right)
            press("Escape")
            press("ArrowRight")
            press("ArrowDown")
            assert page.evaluate("document.activeElement.cellIndex") == 2
        else:
            page.locator(".matrix").focus()
            press("ArrowDown")
            press("Enter")
            assert panel.is_visible() and panel.locator("h3").inner_text() != ""


def test_a_cell_of_the_picture_tells_of_itself_or_of_none(browser: Any, tmp_path: Path) -> None:
    """25 classes in 3 splits: on a desk cells can be met, on a phone of 100 they can't be."""
    path = a_report(tmp_path, 25, 40, splits=3)
    with opened(browser, path, 1440) as page:
        data = json.loads(page.locator("#data").inner_text())
        matrix, tip, panel = (page.locator(each) for each in (".matrix", ".tip", ".panel"))
        side = matrix.bounding_box()["width"] / 25
        cells = {(k, j): (n, m) for k, j, n, m in data["confusions"]["cells"]}

        def at(k: int, j: int) -> dict[str, float]:
            return {"x": (j + 0.5) * side, "y": (k + 0.5) * side}

        k, j = next((k, j) for k in range(25) for j in range(25) if k != j and (k, j) not in cells)
        matrix.hover(position=at(k, j))
        assert tip.is_hidden()
        matrix.click(position=at(k, j))
        assert panel.is_hidden()
        n, N, _ = data["confusions"]["labels"][3]
        matrix.hover(position=at(3, 3))
        assert tip.inner_text() == f"class_of_the_number_3: {n} of {N} times right"
        (k, j), (n, m) = next((each, n) for each, n in cells.items() if n[0] == 3 and each[0] < 24)
        matrix.click(position=at(k, j))
        told = f"{data['mistakes']['classes'][k]}, taken for {data['mistakes']['classes'][j]}"
        assert panel.locator("h3").inner_text().startswith(told) and m == 1
        assert panel.locator("h3").inner_text().endswith(": 1 image, 3 times")
        assert panel.locator("figure").count() == panel.locator("img").count() == 1
        assert "in 3 of its 3 tests" in panel.inner_text()
    path = a_report(tmp_path, 100, 0)
    with opened(browser, path, 390) as page:
        matrix, tip = page.locator(".matrix"), page.locator(".tip")
        side = matrix.bounding_box()["width"] / 100
        data = json.loads(page.locator("#data").inner_text())
        met = {(k, j) for k, j, *_ in data["confusions"]["cells"]} | {(k, k) for k in range(100)}
        k = next(k for k in range(98) if (k, k + 1) not in met)
        matrix.hover(position={"x": (k + 1.5) * side, "y": (k + 0.5) * side})
        assert tip.inner_text().endswith("The ring marks it, the nearest.")


def test_the_list_of_mistakes_is_saved_from_the_page(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["10 classes"], 390) as page:
        with page.expect_download() as download:
            page.locator("button[data-do=csv]").click()
        rows = list(csv.reader(Path(download.value.path()).read_text().splitlines()))
        told = json.loads(page.locator("#data").inner_text())["mistakes"]
    assert tuple(rows[0]) == COLUMNS and len(rows) == 1 + len(told["rows"])
    assert rows[1][0] == told["rows"][0][1] and rows[1][2] == told["classes"][told["rows"][0][3]]


def test_without_a_script_all_is_there_and_overlays_are_switched(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    with opened(browser, pages["10 classes"], 1440, script=False) as page:
        assert page.locator("button").is_hidden() and page.locator(".panel").is_hidden()
        assert page.locator("#mistakes img").count() > 5
        assert page.locator("#c svg polyline").first.is_visible()
    uri, overlay = (thumbnail(photograph(i, 60, 80)) for i in (0, 1))
    pictures = join(overlaid(uri, overlay, name, "caption") for name in ("a.jpg", "b.jpg"))
    body = overlay_switch("Evidence") + html('<div class="pictures">{x}</div>', x=pictures)
    path = tmp_path / "overlaid.html"
    path.write_text(page_of("Overlays", "", [Section("all", "All", body)]))
    with opened(browser, path, 390, script=False) as page:
        over, photo = page.locator("img.overlay"), page.locator(".stack img").first
        assert over.first.bounding_box() == photo.bounding_box()
        page.locator(".stack").first.click()
        assert [over.nth(i).is_visible() for i in range(2)] == [False, True]
        page.locator(".stack input").first.focus()
        page.keyboard.press("Space")
        assert over.first.is_visible()
        page.get_by_label("Evidence").uncheck()
        assert [over.nth(i).is_visible() for i in range(2)] == [False, False]
