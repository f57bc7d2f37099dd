"""The RayJob in docs/operations.md: KubeRay's schema, where it is on this machine, and what a job of raypar needs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMAS = REPOSITORY.parent / "shared" / "k8s"


@pytest.fixture
def job() -> dict[str, Any]:
    text = (REPOSITORY / "docs/operations.md").read_text()
    block = re.search(r"```yaml\n(apiVersion: ray.io/v1\nkind: RayJob\n.*?)```", text, re.DOTALL)
    assert block, "operations.md has no RayJob"
    return yaml.safe_load(block[1])


def strict(schema: Any) -> Any:
    """The same schema, in which a property that it does not name is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(
        schema
    ):
        found["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    if "required" in schema:  # what has a default may be left out
        found["required"] = [key for key in schema["required"] if "default" not in schema["properties"][key]]
    return found


def test_job_has_a_working_directory_and_a_run_file(job: dict[str, Any]) -> None:
    runtime_env = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert runtime_env["working_dir"].endswith(".zip")
    assert runtime_env["env_vars"]["YOLO_AUTOINSTALL"] == "0"
    run_file = job["spec"]["entrypoint"].split()[-1]
    assert (REPOSITORY / run_file).is_file()


def test_workers_have_shared_memory(job: dict[str, Any]) -> None:
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        mounted = {
            mount["name"]
            for c in pod["containers"]
            for mount in c["volumeMounts"]
            if mount["mountPath"] == "/dev/shm"
        }
        in_memory = {volume["name"] for volume in pod["volumes"] if volume["emptyDir"]["medium"] == "Memory"}
        assert mounted & in_memory


def test_valid_against_kuberays_schema(job: dict[str, Any]) -> None:
    import jsonschema

    if not (SCHEMAS / "rayjobs.v1.json").is_file():
        pytest.skip(f"KubeRay's schemas are not in {SCHEMAS}")
    schema = strict(json.loads((SCHEMAS / "rayjobs.v1.json").read_text())["openAPIV3Schema"])
    jsonschema.validate(job, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**job, "spec": {**job["spec"], "entryPoint": "x"}}, schema)
