"""``train/report.html`` and ``inspect/report.html`` in a real browser: complete, without errors, and without a request to anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import raypar.inspect.report
from raypar.config import RunConfig
from raypar.images import encode_png
from tests.runs import lines, train_folder

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = pytest.mark.browser
LOOK = """
const curves = [...document.querySelectorAll("polyline")].map(c => [c.querySelector("title").textContent, c.points.numberOfItems, c.getTotalLength()]);
const pictures = [...document.images].map(i => [i.alt, i.currentSrc.slice(0, 15), i.complete ? i.naturalWidth : 0, i.getBoundingClientRect().width]);
return {curves, pictures, width: document.documentElement.scrollWidth, text: document.body.innerText};
"""


def look(browser: Chrome, page: Path) -> tuple[dict[str, Any], list[str]]:
    """What is seen on a page, and what is wrong with it whatever it shows: errors, requests, broken pictures, parts that stick out."""
    browser.get_log("browser"), browser.get_log("performance")  # of the page before
    browser.get(page.as_uri())
    seen = browser.execute_script(LOOK)
    faults = [entry["message"] for entry in browser.get_log("browser")]
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert page.as_uri() in asked, "requests are logged"
    faults += [f"asks for {url}" for url in asked if url != page.as_uri() and not url.startswith("data:")]
    faults += [
        f"{name} is not seen"
        for name, kind, natural, shown in seen["pictures"]
        if kind != "data:image/png;" or not (natural and shown)
    ]
    if seen["width"] > browser.get_window_size()["width"]:
        faults.append(f"it is {seen['width']} px wide")
    return seen, faults


@pytest.fixture(scope="module")
def page(trained_run: RunConfig) -> Path:
    return train_folder(trained_run) / "report.html"


def test_a_trainings_report(browser: Chrome, page: Path, trained_run: RunConfig) -> None:
    history = lines(trained_run)
    seen, faults = look(browser, page)
    assert faults == []
    names = [name for name, _, _ in seen["curves"]]
    assert {"mAP 50-95", "mAP 50", "precision", "recall", "training", "validation", "images/s"} <= set(names)
    assert names.count("training") == names.count("validation") == 3, "box, cls and dfl"
    for name, num_points, length in seen["curves"]:
        assert num_points == len(history) == 2, name
        assert length > 100, f"{name} spans the axis"
    assert [name for name, *_ in seen["pictures"]] == sorted(
        path.name for path in page.parent.glob("batch_*.png")
    )
    assert seen["pictures"], "what the model saw is shown"
    for text in ("finished", "Where the time went", "star", "What happened", "yolov8n.yaml"):
        assert text in seen["text"]


@pytest.mark.parametrize(("good", "bad"), [
    ("</main>", '<img alt="far" src="http://127.0.0.1:9/far.png"></main>'),
    ("</main>", "<script>nothing.is.here()</script></main>"),
    ("data:image/png;base64,", "data:image/png;base64,AAAA"),
    ("</main>", '<div style="width:3000px">wide</div></main>'),
], ids=["request", "error", "picture", "width"])  # fmt: skip
def test_a_bad_report_is_seen(browser: Chrome, page: Path, tmp_path: Path, good: str, bad: str) -> None:
    text = page.read_text()
    assert good in text
    (tmp_path / "bad.html").write_text(text.replace(good, bad, 1))
    assert look(browser, tmp_path / "bad.html")[1]


def test_an_inspections_report(browser: Chrome, tmp_path: Path) -> None:
    picture = encode_png(np.full((40, 1600, 3), 128, np.uint8))
    verdict = "verdict: " + "the model limits " * 30
    (tmp_path / "report.html").write_text(
        raypar.inspect.report.page({"name": "a", "split": "train"}, ["first", verdict], {"Statistics": picture, "Samples": picture}))  # fmt: skip
    seen, faults = look(browser, tmp_path / "report.html")
    assert faults == []
    assert [name for name, *_ in seen["pictures"]] == ["Statistics", "Samples"]
    assert browser.execute_script(
        "const pre = document.querySelector('pre'); return pre.scrollWidth <= pre.clientWidth"
    ), "no line is cut"
