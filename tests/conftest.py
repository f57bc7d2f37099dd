"""Fixtures that every test may use, and the markers, which follow from the folder a test is in.

Ray is started once a module (``ray_4_cpus``) and never joined from outside: a bare ``ray.init()`` might find somebody else's cluster.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from raypar.config import RunConfig

# Machines are shared: how long an example takes says nothing.
settings.register_profile("raypar", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raypar")

FOLDERS = ("unit", "integration", "attack", "multinode", "gpu", "browser")
REPOSITORY = Path(__file__).resolve().parent.parent
BCCD = REPOSITORY.parent / "shared" / "data" / "bccd"

# Set at import: Ultralytics and Ray read most of these once, when they are imported, and workers inherit them.
ENVIRONMENT = {
    "YOLO_OFFLINE": "1",
    "YOLO_AUTOINSTALL": "0",
    "ULTRALYTICS_SAFE_LOAD": "1",
    "YOLO_CONFIG_DIR": tempfile.mkdtemp(prefix="raypar-yolo-"),
    "YOLO_VERBOSE": "false",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "MPLBACKEND": "Agg",
    "RAY_AUTH_MODE": "disabled",  # a token left in ~/.ray must not decide whether tests pass
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Ray's workers import raypar
    "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
}
os.environ.update(ENVIRONMENT)
for variable in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
    os.environ.pop(variable, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test with the name of its folder; skips those that this machine cannot run."""
    for item in items:
        for folder in FOLDERS:
            if folder in item.path.relative_to(REPOSITORY).parts:
                item.add_marker(getattr(pytest.mark, folder))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins with the same variables, whatever an earlier one set."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def start_ray(num_cpus: int = 4) -> None:
    """A Ray of this process alone, with more logical CPUs than a small machine has: Train must not starve Data."""
    import ray

    # as raypar does when it starts a Ray on one machine
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=True,
        logging_level="warning",
        object_store_memory=512 << 20,
    )


@pytest.fixture(scope="module")
def ray_4_cpus() -> Iterator[None]:
    """A local Ray with 4 logical CPUs, for one test module."""
    import ray

    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def bccd() -> Path:
    """BCCD blood cells, Pascal VOC: 364 images, when they are on this machine."""
    if not (BCCD / "Annotations").is_dir():
        pytest.skip(f"BCCD is not in {BCCD}")
    return BCCD


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """Headless Chromium, with its console and its requests logged (``get_log("browser")``, ``get_log("performance")``)."""
    paths = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if None in paths:
        if os.environ.get("CI"):
            pytest.fail(
                "tests of pages need Chromium and chromedriver: apt-get install chromium chromium-driver"
            )
        pytest.skip("needs Chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(paths[0])
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1100,760",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(paths[1])))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was prepared and trained: 48 + 16 images of ``shapes``, yolov8n for two epochs at 96 px.

    Made once a session, under the Ray that is up or one of its own.
    """
    import ray

    import raypar.prepare
    import raypar.train
    from raypar.config import RunConfig

    config = RunConfig.model_validate(
        {
            "name": "trained",
            "storage": str(tmp_path_factory.mktemp("runs")),
            "prepare": {
                "format": "shapes",
                "shapes": {"train": 48, "val": 16, "height": 120, "width": 160},
                "rows_per_group": 16,
            },
            "train": {
                "model": "yolov8n.yaml",
                "num_workers": 1,
                "use_gpu": False,
                "batch": 8,
                "yolo": {"epochs": 2, "imgsz": 96},
            },
        }
    )
    is_mine = not ray.is_initialized()
    if is_mine:
        start_ray()
    try:
        raypar.prepare.run(config)
        raypar.train.run(config)
    finally:
        if is_mine:
            ray.shutdown()
    return config


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained yolov8n (4 classes) whose confidences are spread over (0, 1), so that it detects things; no download, no training."""
    import torch
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=4, verbose=False)
    model.names = dict(enumerate(("circle", "square", "triangle", "star")))
    model.args = {"imgsz": 160, "task": "detect"}
    _spread_confidences(model)
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(
        {
            "model": model,
            "ema": None,
            "epoch": -1,
            "train_args": {"imgsz": 160, "task": "detect"},
            "version": "8.4.190",
        },
        path,
    )
    return path


def _spread_confidences(model: object) -> None:
    """Settles the batch norms on noise, then shifts and scales the class logits to mean -2, deviation 1.5."""
    import torch

    model.train()  # type: ignore[attr-defined]
    images = torch.rand(4, 3, 160, 160)
    with torch.no_grad():
        for _ in range(20):
            model(images)  # type: ignore[operator]
        model.eval()  # type: ignore[attr-defined]
        head = model.model[-1]  # type: ignore[attr-defined]
        outputs: dict[int, torch.Tensor] = {}
        hooks = [
            b[-1].register_forward_hook(lambda _m, _i, out, level=i: outputs.__setitem__(level, out))
            for i, b in enumerate(head.cv3)
        ]
        model(images)  # type: ignore[operator]
        for hook in hooks:
            hook.remove()
        for level, branch in enumerate(head.cv3):
            scale = 1.5 / outputs[level].std().clamp(min=1e-6)
            branch[-1].weight.mul_(scale)
            branch[-1].bias.add_(-outputs[level].mean()).mul_(scale).sub_(2)
