"""cluster.yaml is what `ray up` takes: Ray's own schema and checks, and wheels for its image, without a cloud."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
GLIBC_OF_UBUNTU = {"18.04": (2, 27), "20.04": (2, 31), "22.04": (2, 35), "24.04": (2, 39)}
# PEP 600: the older names of manylinux tags
GLIBC_OF_OLD_TAGS = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


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


def glibc_of_image(image: str) -> tuple[int, int]:
    """glibc (major, minor) of an image that is named by one of AWS's public parameters."""
    release = re.search(r"-ubuntu-(\d\d\.\d\d)/", image)
    assert release, f"{image} does not name its release of Ubuntu"
    return GLIBC_OF_UBUNTU[release[1]]


def needed_glibc(wheel_tags: list[str]) -> tuple[int, int]:
    """The oldest glibc (major, minor) on which one of a wheel's tags can be installed; (0, 0) for any."""
    found = []
    for tag in wheel_tags:
        for platform in tag.split("-")[2].split("."):
            if numbered := re.match(r"manylinux_(\d+)_(\d+)_", platform):
                found.append((int(numbered[1]), int(numbered[2])))
            elif old := re.match(r"manylinux\d+", platform):
                found.append(GLIBC_OF_OLD_TAGS[old[0]])
            else:
                found.append((0, 0))
    return min(found)


def test_every_pinned_wheel_installs_on_the_image(cluster: dict[str, Any]) -> None:
    """pip and uv refuse wheels for a newer glibc, and then build from source or fail, on every node."""
    pinned = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    needed = {}
    for name, version in pinned.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # only on another version of Python
        if distribution.version.split("+")[0] == version:
            tags = re.findall(r"^Tag: (\S+)$", distribution.read_text("WHEEL") or "", re.MULTILINE)
            needed[name] = needed_glibc(tags)
    assert needed["torch"] > (0, 0), "the pinned versions are installed here"
    for node in cluster["available_node_types"].values():
        glibc = glibc_of_image(node["node_config"]["ImageId"])
        assert not {name: version for name, version in needed.items() if version > glibc}


def test_needed_glibc() -> None:
    assert needed_glibc(["cp311-cp311-manylinux_2_27_x86_64", "cp311-cp311-manylinux_2_28_x86_64"]) == (2, 27)
    assert needed_glibc(["cp311-cp311-manylinux2014_x86_64.manylinux_2_28_x86_64"]) == (2, 17)
    assert needed_glibc(["py3-none-any"]) == (0, 0)


def test_image_is_looked_up_by_ec2(cluster: dict[str, Any]) -> None:
    """Ray passes on what it does not know as an image, and EC2 resolves a parameter when a node starts."""
    for node in cluster["available_node_types"].values():
        assert re.fullmatch(r"resolve:ssm:/aws/service/\S+/ami-id", node["node_config"]["ImageId"])
