"""Ray Train's controller in a Ray that its driver started. Runs in: the controller. Imports no torch: the controller starts fast."""

from __future__ import annotations

import os
from typing import Any

from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup


class Group(WorkerGroup):  # type: ignore[misc]
    """Workers in the environment of Ray's processes."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env


class Controller(TrainController):  # type: ignore[misc]
    """Ray Train's controller, which is given its variables and hands none on."""

    worker_group_cls = Group

    def __init__(self, variables: dict[str, str], **arguments: Any):
        os.environ.update(variables)
        super().__init__(**arguments)
