"""Where decoding and augmenting run: on nodes without GPUs while there are any. Runs in: rank 0, when a stream starts."""

from __future__ import annotations

from typing import Any


def away_from_gpus() -> dict[str, Any]:
    """Arguments for Ray Data's tasks: not on nodes with GPUs, whose cores feed their GPUs; anywhere when no other node can take them.

    Nodes without GPUs that join later are taken too.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    with_gpus = [node["NodeID"] for node in nodes if node["Resources"].get("GPU", 0)]
    if not with_gpus or len(with_gpus) == len(nodes):
        return {}
    return {
        "label_selector": {"ray.io/node-id": f"!in({', '.join(with_gpus)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }
