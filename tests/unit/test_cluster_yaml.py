"""``cluster.yaml`` is what ``ray up`` accepts, and installs what pyproject.toml asks for."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import jsonschema
import ray
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_valid_against_rays_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)


def test_ray_fills_it_in() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(CLUSTER)
    validate_config(filled)
    assert filled["available_node_types"]["train"]["resources"] is not None


def test_head_is_a_cpu_that_takes_no_work_and_trainers_are_spot_gpus() -> None:
    types = CLUSTER["available_node_types"]
    assert types[CLUSTER["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["train"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["data"]["node_config"]["InstanceType"].startswith("c")


def test_installs_the_ranges_of_pyproject() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    command = CLUSTER["setup_commands"][0]
    for name in ("ultralytics", "albumentations"):
        (wanted,) = (d for d in dependencies if d.startswith(name))
        assert wanted in command
    assert "ray[data,train,serve,tune,default]==2.60" in command
