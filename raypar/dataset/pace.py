"""Keeps Ray Data's scheduling loop from spinning. Runs in: the process that executes a stream.

When every running task has a finished block that back-pressure forbids to fetch (the normal state of a stream that is faster than
its training), ``ray.wait`` in ``process_completed_tasks`` returns at once and the loop turns without pause: on two cores it took
three quarters of one (Ray 2.60.0, ``ray/data/_internal/execution/streaming_executor_state.py``). A short sleep a turn costs a
block at most that long and gives the core back.
"""

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from raypar.quiet import quiet_ray

TURN_S = 0.02
quiet_ray()  # this module comes to Ray's process with the stream, before the stream starts


class Pace(ExecutionCallback):
    def on_execution_step(self, executor: StreamingExecutor) -> None:
        time.sleep(TURN_S)
