"""The web page in a real browser, over the real routes and the real detector (no Ray: how requests reach a replica is test_serve.py's)."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import uvicorn

from raypar.images import encode_jpeg, encode_png
from raypar.serve.api import Answer, build_api, digest
from raypar.serve.body import Limits
from raypar.serve.problem import BadImageError

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from raypar.detector import Detector

pytestmark = pytest.mark.browser
WAIT_S = 20
IMAGE_HW = (120, 200)
ROWS_SHOWN = 100  # of page.js
# A file dropped on the page, as a browser hands it over: made of bytes in the page, because a driver cannot drag one in from outside.
DROP = """
const [bytes, name, kind] = arguments;
const transfer = new DataTransfer();
transfer.items.add(new File([new Uint8Array(bytes)], name, {type: kind}));
document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""
PASTE = DROP.replace('new DragEvent("drop", {dataTransfer', 'new ClipboardEvent("paste", {clipboardData')
PIXEL = "return [...document.getElementById('canvas').getContext('2d').getImageData(arguments[0], arguments[1], 1, 1).data]"


@pytest.fixture(scope="module")
def detector(tiny_weights: Path) -> Detector:
    from raypar.detector import Detector

    return Detector.load(tiny_weights)


class Site:
    """The service at ``url``, answering with a detector; ``conf`` of each request is kept."""

    def __init__(self, detector: Detector, keys: tuple[str, ...] = ()) -> None:
        self.detector, self.confs = detector, list[float]()
        api = build_api(
            self.detect,
            self.detect,
            self.info,
            Limits(max_image_bytes=500_000),
            [digest(key) for key in keys],
            is_ready=self.is_ready,
        )
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        self.server = uvicorn.Server(uvicorn.Config(api, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    async def detect(self, image: bytes, conf: float, iou: float, max_det: int) -> Answer:
        self.confs.append(conf)
        try:
            (found,) = await asyncio.to_thread(
                self.detector, [image], conf=[conf], iou=[iou], max_det=[max_det]
            )
        except ValueError as error:
            raise BadImageError(str(error)) from error
        rows = zip(
            found.class_ids.tolist(), found.confidences.tolist(), found.boxes_xyxy.tolist(), strict=True
        )
        names, (height, width) = self.detector.class_names, found.image_hw
        objects = [
            {"class_id": i, "class_name": names[i], "confidence": sure, "box_xyxy": box}
            for i, sure, box in rows
        ]
        model, size = {"name": "tiny", "sha256": "0" * 64}, {"height": height, "width": width}
        return Answer({"model": model, "image": size, "detections": objects}, batch_size=1, forward_s=0.01)

    async def is_ready(self) -> bool:
        return True

    async def info(self) -> dict[str, Any]:
        names = self.detector.class_names
        return {
            "name": "tiny",
            "sha256": "0" * 64,
            "task": "detect",
            "class_names": names,
            "imgsz": self.detector.imgsz,
        }

    def __enter__(self) -> Site:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def site(detector: Detector) -> Iterator[Site]:
    with Site(detector) as site:
        yield site


@pytest.fixture
def image() -> bytes:
    """A grey PNG: every pixel of another colour on the canvas is a box."""
    return encode_png(np.full((*IMAGE_HW, 3), 128, np.uint8))


def until(condition: Callable[[], Any]) -> Any:
    """The condition's value, once it holds."""
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "the page did not get there"
        time.sleep(0.05)
    return value


def element(browser: Chrome, name: str) -> Any:
    return browser.find_element("id", name)


def open_page(browser: Chrome, site: Site) -> None:
    browser.get_log("browser")  # of the page before
    browser.get(site.url)
    until(lambda: "tiny" in element(browser, "model").text or element(browser, "key-form").is_displayed())


def num_boxes(browser: Chrome) -> int:
    return int(element(browser, "canvas").get_attribute("data-boxes") or 0)


def test_a_chosen_image_shows_the_detectors_boxes(
    browser: Chrome, site: Site, detector: Detector, image: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "grey.png"
    path.write_bytes(image)
    (expected,) = detector([image], conf=0.25)
    assert len(expected.boxes_xyxy) > 3, "the weights of this test find something everywhere"

    open_page(browser, site)
    element(browser, "file").send_keys(str(path))
    until(lambda: num_boxes(browser))

    assert num_boxes(browser) == len(expected.boxes_xyxy)
    named = zip(expected.class_ids.tolist(), expected.confidences.tolist(), strict=True)
    rows = [f"{detector.class_names[i]} {sure:.2f}" for i, sure in named]
    assert element(browser, "rows").text.splitlines() == rows[:ROWS_SHOWN]
    assert element(browser, "status").text.startswith(f"{len(expected.boxes_xyxy)} objects in ")
    assert "tiny" in element(browser, "model").text
    assert (
        element(browser, "canvas").get_property("width"),
        element(browser, "canvas").get_property("height"),
    ) == IMAGE_HW[::-1]
    assert browser.get_log("browser") == []  # no error, and nothing that the page's policy refused
    left, top, right, bottom = expected.boxes_xyxy[0].clip(0, [IMAGE_HW[1] - 1, IMAGE_HW[0] - 1] * 2)
    for x, y in ((right, (top + bottom) / 2), ((left + right) / 2, bottom)):
        near = [browser.execute_script(PIXEL, int(x) + dx, int(y) + dy) for dx in (-1, 0) for dy in (-1, 0)]
        assert any(max(colour[:3]) - min(colour[:3]) > 30 for colour in near), (
            f"no line at {x:.0f}, {y:.0f}: {near}"
        )


@pytest.mark.parametrize("script", [DROP, PASTE], ids=["drop", "paste"])
def test_a_dropped_or_pasted_image_does_too(browser: Chrome, site: Site, image: bytes, script: str) -> None:
    open_page(browser, site)
    browser.execute_script(script, list(image), "grey.png", "image/png")
    until(lambda: num_boxes(browser))


def test_the_slider_asks_again(browser: Chrome, site: Site, detector: Detector, image: bytes) -> None:
    open_page(browser, site)
    browser.execute_script(DROP, list(image), "grey.png", "image/png")
    before = until(lambda: num_boxes(browser))

    element(browser, "conf").send_keys("\ue014" * 10)  # the right arrow: usable from the keyboard

    until(lambda: site.confs[-1] == pytest.approx(0.35))
    expected = len(detector([image], conf=0.35)[0].boxes_xyxy)
    assert expected < before
    until(lambda: num_boxes(browser) == expected)
    assert element(browser, "conf-value").text == "0.35"


def test_errors_are_told_and_pass(browser: Chrome, site: Site, image: bytes, tmp_path: Path) -> None:
    open_page(browser, site)

    browser.execute_script(DROP, list(b"no image"), "note.jpg", "image/jpeg")
    assert '"note.jpg" is not an image' in until(lambda: element(browser, "error").text)

    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), np.uint8)
    (tmp_path / "large.jpg").write_bytes(encode_jpeg(noise, 100))
    element(browser, "file").send_keys(str(tmp_path / "large.jpg"))
    until(lambda: "more than 500000 bytes" in element(browser, "error").text)

    browser.execute_script(DROP, list(image), "grey.png", "image/png")
    until(lambda: num_boxes(browser))
    assert not element(browser, "error").is_displayed()


def test_a_key_is_asked_for_and_used(browser: Chrome, detector: Detector, image: bytes) -> None:
    with Site(detector, keys=("right",)) as site:
        open_page(browser, site)
        assert element(browser, "key-form").is_displayed()

        element(browser, "key").send_keys("wrong\n")
        until(lambda: "not accepted" in element(browser, "error").text)
        element(browser, "key").clear()
        element(browser, "key").send_keys("right\n")
        until(lambda: not element(browser, "key-form").is_displayed())

        assert not element(browser, "error").is_displayed()
        browser.execute_script(DROP, list(image), "grey.png", "image/png")
        until(lambda: num_boxes(browser))


def test_it_fits_a_narrow_screen(browser: Chrome, site: Site, image: bytes) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        open_page(browser, site)
        browser.execute_script(
            DROP, list(encode_png(np.full((300, 1500, 3), 128, np.uint8))), "wide.png", "image/png"
        )
        until(lambda: num_boxes(browser))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
