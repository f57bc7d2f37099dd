"""cluster.yaml is what `ray up` takes: Ray's own schema and its own checks, without a cloud."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


def test_valid_against_rays_schema(cluster: dict[str, Any]) -> None:
    import jsonschema
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "no_such_key": 1}, schema)


def test_ray_prepares_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"


def test_roles(cluster: dict[str, Any]) -> None:
    nodes = cluster["available_node_types"]
    assert nodes["head"]["resources"]["CPU"] == 0, "the head runs no tasks"
    assert "GPU" not in nodes["data"]["resources"]
    assert nodes["gpu"]["resources"]["GPU"] > 0
    assert nodes["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert {name: node["labels"]["raypar"] for name, node in nodes.items()} == {
        "head": "head",
        "data": "data",
        "gpu": "gpu",
    }
    assert "file_mounts" not in cluster
    assert any("constraints.txt" in command for command in cluster["setup_commands"])
