"""A number of workers that follows the cluster: ``train.num_workers: {min, max}``.

Runs in: Ray Train's controller. Ray's own elastic policy counts what can be had; this one takes only numbers that share the batch
equally, leaves a CPU to the data, forgets lost nodes at once, and grows only after a checkpoint.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from raypar.train import pulse
from raypar.train.failure import UnplaceableError, missing

DATA_CPUS = 1.0  # for at least one task that decodes


class Elastic(ElasticScalingPolicy):  # type: ignore[misc]  # Ray is untyped here
    """Ray Train's scaling policy for ``{min, max}``.

    Args:
        scaling_config: Ray Train's.
        world_sizes: numbers of workers that are allowed, ascending.
        run_id: of this start of the run.
        placement_timeout_s: how long to wait for the smallest of them.
    """

    def __init__(self, scaling_config: Any, world_sizes: list[int], run_id: str, placement_timeout_s: float):
        super().__init__(scaling_config)
        self.world_sizes, self.run_id, self.placement_timeout_s = world_sizes, run_id, placement_timeout_s
        self.waiting_since: float | None = None

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        draining = ray._private.state.state.get_draining_nodes()
        there = {
            node: resources
            for node, resources in reserved_resources.items()
            if node in alive and node not in draining
        }
        return largest(
            self.world_sizes,
            super()._count_possible_workers(there),
            cpus=sum(resources.get("CPU", 0.0) for node, resources in alive.items() if node not in draining),
            cpus_per_worker=self.scaling_config._resources_per_worker_not_none.get("CPU", 0.0),
        )

    def make_decision_for_non_running_worker_group(self) -> Any:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self.waiting_since = None
            return decision
        self.waiting_since = self.waiting_since or time.monotonic()
        if time.monotonic() - self.waiting_since > self.placement_timeout_s:
            raise UnplaceableError(
                missing(self.placement_timeout_s, f"at least {self.world_sizes[0]} worker(s) are needed")
            )
        time.sleep(0.5)  # the controller asks again at once
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Grows by asking the workers to save and leave. Shrinks at once, when what is left cannot feed so many; lost workers are the
        failure policy's."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision):
            return decision
        if decision.num_workers > worker_group_state.num_workers:
            pulse.post(self.run_id, "grow", "asked")
            return NoopDecision()
        print(f"train: the cluster has room for {decision.num_workers} workers now and not for {worker_group_state.num_workers}: "
              "they start again from the newest checkpoint", flush=True)  # fmt: skip
        return decision


def largest(world_sizes: list[int], possible: int, *, cpus: float, cpus_per_worker: float) -> int:
    """The largest allowed number of workers that there is room for, with a CPU left over for the data; 0 when there is none."""
    if cpus_per_worker:
        possible = min(possible, int((cpus - DATA_CPUS) // cpus_per_worker))
    return max((n for n in world_sizes if n <= possible), default=0)
