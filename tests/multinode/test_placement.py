"""Several Ray nodes on this machine, some with (pretended) GPUs: where the tasks of a stream run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from raypar.dataset.placement import away_from_gpus


class Where(Datasource):  # type: ignore[misc]
    """Each of its tasks says on which node it ran."""

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        import pyarrow as pa

        def read() -> list[Any]:
            return [pa.table({"node": [ray.get_runtime_context().get_node_id()]})]

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown) for _ in range(parallelism)]


def nodes_of_tasks() -> set[str]:
    dataset = ray.data.read_datasource(Where(), override_num_blocks=12, **away_from_gpus())
    dataset.context.enable_progress_bars = False
    return {row["node"] for row in dataset.take_all()}


def schedulable(node: str) -> None:
    """Returns when tasks can go to that node: the GCS lists a node a moment before the scheduler of the head knows it."""
    strict = {"label_selector": {"ray.io/node-id": node}, "num_cpus": 1}
    assert (
        ray.get(ray.remote(lambda: ray.get_runtime_context().get_node_id()).options(**strict).remote())
        == node
    )


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that takes no work, and a node with a GPU."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    made.add_node(num_cpus=2, num_gpus=1)
    ray.init(address=made.address, logging_level="warning")
    yield made
    ray.shutdown()
    made.shutdown()


def test_tasks_run_beside_the_gpus_while_there_is_room_there(cluster: Cluster) -> None:
    gpu_nodes = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")}
    assert nodes_of_tasks() == gpu_nodes  # the head has no CPUs to offer: better there than nowhere
    added = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    without = {
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and not node["Resources"].get("GPU") and node["Resources"].get("CPU")
    }
    schedulable(*without)
    assert nodes_of_tasks() == without
    cluster.remove_node(added)
    assert nodes_of_tasks() == gpu_nodes
