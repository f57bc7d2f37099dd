"""Keeps Ray Data's scheduling loop from spinning. Runs in: the process that executes a stream.

When every running task has a finished block that back-pressure forbids to fetch (the normal state of a stream that is faster than
its training), ``ray.wait`` in ``process_completed_tasks`` returns at once and the loop turns without pause: on two cores it took
three quarters of one (Ray 2.60.0, ``ray/data/_internal/execution/streaming_executor_state.py``). A turn costs a millisecond, so after
each there is a pause, longer and longer while blocks neither come nor go. A block waits for one pause at most.
"""

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from raypar.quiet import quiet_ray

SHORTEST_S, LONGEST_S = 0.02, 0.16
quiet_ray()  # this module comes to Ray's process with the stream, before the stream starts


class Pace(ExecutionCallback):
    def __init__(self) -> None:
        self.pause_s, self.moved = SHORTEST_S, 0

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        moved = sum(
            op.metrics.num_task_outputs_generated + op.metrics.num_outputs_taken
            for op in executor._topology or ()
        )
        self.pause_s = SHORTEST_S if moved != self.moved else min(2 * self.pause_s, LONGEST_S)
        self.moved = moved
        time.sleep(self.pause_s)
