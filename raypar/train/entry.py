"""Where a training worker begins: its sign of life comes before everything that can fail or wait.

Runs in: every Ray Train worker. Ultralytics' import waits for the other ranks; so it is done under the pulse, and named when it takes too long.
"""

from __future__ import annotations

import logging
from typing import Any

import ray.train

from raypar.train import failure
from raypar.train.pulse import Pulse


def train_loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """Trains to the end. Rank 0 returns the last epoch's line of ``metrics.jsonl``, or ``{"stopped": images seen}`` when asked to stop.

    Args:
        config: plain values only: ``folder`` (the run's URI), ``run_id``, ``label``, ``dataset``, ``seed``, ``model``, ``train`` (TrainConfig as a dict),
            ``plan`` (Plan's arguments but the epochs), ``cache``.

    Raises:
        Exception: one of :mod:`raypar.train.failure`, which says who failed, where and in which stage.
    """
    context = ray.train.get_context()
    pulse = Pulse(
        config["run_id"], context.get_world_rank(), context.get_world_size(), context.get_local_rank()
    )
    try:
        # here: Ultralytics must be imported after Ray has set the rank
        from raypar.train.worker import Worker

        return Worker(config, pulse).run()
    except Exception as error:
        explained = failure.explained(error, pulse)
        # the message says it all; a traceback would bury it
        if isinstance(explained, (*failure.TOLD, ValueError)):
            logging.getLogger("ray.train.v2._internal.util").setLevel(logging.CRITICAL)
        if explained is error:
            raise
        raise explained from error
    finally:
        pulse.end()
