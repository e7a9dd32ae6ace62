"""The pages in a real browser, headless and without a network: on a phone and a desk, light and
dark.

Needs Chromium (`apt-get install chromium`, or `playwright install chromium`); skipped without one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.report import write_report as write_training_report
from vggfeat.datasets import Items
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
  return {
    ground: ground,
    contrast: Math.min(...all('p, td, th, figcaption, h2, h3, summary, footer').map(
      element => contrast(getComputedStyle(element).color))),
    overflow: document.documentElement.scrollWidth - innerWidth,
    images: all('img').length,
    broken: all('img').filter(
      image => !image.naturalWidth || !image.getBoundingClientRect().width).length,
    charts: all('svg').map(svg => svg.getBoundingClientRect().width),
    letters: all('svg text').map(text => text.getBoundingClientRect().height),
    outside: all('svg text').filter(text => {
      const a = text.getBoundingClientRect(), b = text.ownerSVGElement.getBoundingClientRect();
      return a.left < b.left - 1 || a.right > b.right + 1
        || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(text => text.textContent),
    figures: all('td.number').map(cell => cell.getBoundingClientRect().height),
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


def looked_at(browser: Any, path: Path, width: int, scheme: str) -> dict[str, Any]:
    """What a page is like, after checking that it asks for nothing and complains of nothing."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
    )
    context.set_default_timeout(1000 * HANG)
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    facts: dict[str, Any] = page.evaluate(FACTS)
    context.close()
    assert [url for url in asked if not url.startswith("data:image/")] == [path.as_uri()]
    assert said == []
    return facts


def a_report(folder: Path, K: int, images: int) -> Path:
    """Of K classes, with images thumbnails at hand."""
    rng = np.random.default_rng(0)
    classes = [f"class {k}" for k in range(K - 1)] + [NASTY + "-" * 60]
    labels = (np.arange(max(3 * K, 12)) % K).astype(np.int32)
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
    model = model_of(classes, {"test": Scored(rows, scores)}, results)
    pixels = np.stack([photograph(i, 40, 50) for i in range(images)]) if images else None
    items = Items(
        "folder", "single-label", folder, list(features.names[:images]), None, [], images=pixels
    )
    page, _ = write_report(
        results, [features], model, items if images else None, "the images are not at hand"
    )
    path = folder / f"{K}.html"
    path.write_text(page)
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    write_log(folder, "A-256", 30, 1.0, True)
    write_log(folder, "D-256-512", 40, 2.0, False)
    write_training_report(folder, folder / "training.html")
    made = {
        f"{K} classes": a_report(folder, K, images) for K, images in ((1, 0), (4, 12), (300, 0))
    }
    return {**made, "training": folder / "training.html"}


@pytest.mark.parametrize("name", ["1 classes", "4 classes", "300 classes", "training"])
@pytest.mark.parametrize(
    ("width", "scheme"), [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")]
)
def test_readable(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    facts = looked_at(browser, pages[name], width, scheme)
    assert facts["overflow"] <= 0  # nothing to scroll sideways
    assert (facts["ground"] > 0.8) if scheme == "light" else (facts["ground"] < 0.05)
    assert facts["contrast"] >= 4.5  # WCAG's AA
    assert facts["broken"] == 0
    assert facts["charts"] and min(facts["charts"]) > 100
    assert min(facts["letters"]) >= 7 and facts["outside"] == []
    assert max(facts["figures"], default=0) < 140  # a figure is not broken into a column of digits
    if name == "4 classes":
        assert facts["images"] >= 8
        assert "Confusions" in facts["titles"] and "Map of the descriptors" in facts["titles"]
