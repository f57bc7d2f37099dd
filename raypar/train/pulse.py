"""Signs of life of the workers, and words to them: a few small keys in the cluster's own store (Ray's GCS).

Runs in: every training worker (:class:`Pulse`, a thread), the controller and the driver (the functions). No clock is compared:
a process that reads signs of life twice sees which have stopped.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# that rank 0 listens for; each has a key of its own, so that none takes another's place
WORDS = ("stop", "grow")
ENDED = "ended"  # asked to stop, a run ended without its workers, which were to be placed anew
BEAT_S = 1.0
COMPLAIN_EVERY_S = 60.0
NAMESPACE = b"raypar"


@dataclass(frozen=True)
class Beat:
    """What a worker says of itself.

    Attributes:
        host: name and address.
        stage: what it is doing; since_s: for how long.
        cursor: images seen by all ranks.
        count: of beats.
        memory_gb: the most that the process has held.
        total: images of the whole run, when that is known.
        local_rank: among the ranks on its host.
        num_epochs: that the checkpoint knows which this start goes on from.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    stage: str
    since_s: float
    cursor: int
    count: int
    memory_gb: float
    total: int = 0
    local_rank: int = 0
    num_epochs: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} in stage '{self.stage}' for {self.since_s:.0f} s, after {self.cursor} images"


def post(run_id: str, name: str, value: str) -> None:
    """Leaves a word under a name."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{run_id}:{name}".encode(), value.encode(), overwrite=True, namespace=NAMESPACE)


def read(run_id: str, name: str) -> str | None:
    """The word under a name."""
    from ray.experimental.internal_kv import _internal_kv_get

    value = _internal_kv_get(f"{run_id}:{name}".encode(), namespace=NAMESPACE)
    return None if value is None else value.decode()


def clear(run_id: str, name: str = "") -> None:
    """Removes every word whose name begins so."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(f"{run_id}:{name}".encode(), del_by_prefix=True, namespace=NAMESPACE)


def words(run_id: str, prefix: str) -> list[str]:
    """The words under all names that begin so, by name."""
    from ray.experimental.internal_kv import _internal_kv_list

    keys = _internal_kv_list(f"{run_id}:{prefix}".encode(), namespace=NAMESPACE)
    names = sorted(key.decode().removeprefix(f"{run_id}:") for key in keys)
    return [text for name in names if (text := read(run_id, name)) is not None]


def beats(run_id: str) -> list[Beat]:
    """The last sign of life of each rank, by rank."""
    return sorted((Beat(**json.loads(text)) for text in words(run_id, "beat:")), key=lambda beat: beat.rank)


def silent(run_id: str, *, wait_s: float = 3 * BEAT_S) -> list[Beat]:
    """The last sign of life of ranks that give none any more; it takes ``wait_s`` to know."""
    before = {beat.rank: beat.count for beat in beats(run_id)}
    time.sleep(wait_s)
    return [beat for beat in beats(run_id) if before.get(beat.rank) == beat.count]


class Pulse:
    """A worker's thread that gives signs of life and listens.

    Args:
        run_id: of this start of the run.
        rank: of the worker.
        world_size: ranks.
        local_rank: among the ranks on this host.
    """

    def __init__(self, run_id: str, rank: int, world_size: int, local_rank: int = 0):
        import ray.util

        self.run_id, self.rank, self.world_size, self.local_rank = run_id, rank, world_size, local_rank
        self.host = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        self.cursor = self.total = self.num_epochs = self._count = 0
        self.on_beat: Callable[[Pulse], None] | None = None  # called once a second, in the pulse's own thread
        self._stage, self._since, self._complaints = "start", time.monotonic(), 0
        self._seconds: dict[str, float] = {}  # by the first word of the stage
        self._wishes: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raypar-pulse", daemon=True)
        self._beat()
        self._thread.start()

    @property
    def stage(self) -> str:
        """What the worker is doing."""
        return self._stage

    @stage.setter
    def stage(self, stage: str) -> None:
        now, kind = time.monotonic(), self._stage.split(" ", 1)[0]
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._since
        self._stage, self._since, self._complaints = stage, now, 0

    def seconds(self) -> dict[str, float]:
        """Time by the first word of the stage: ``wait``, ``step``, ``validation``, ``checkpoint`` ...; of stages that ended."""
        return dict(self._seconds)

    def memory_gb(self) -> float:
        """The most that the process has held."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    def wishes(self) -> set[str]:
        """What was asked of the run (on rank 0: ``stop``, ``grow``, ``save``), and ``preempted`` when a node is to be taken away."""
        return self._wishes

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} in stage '{self.stage}', after {self.cursor} images"

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._beat()
                self._listen()
                self._complain()
                if self.on_beat is not None:
                    self.on_beat(self)
            # the store is away for a while; what matters fails elsewhere, with a better reason
            except Exception:
                continue

    def _beat(self) -> None:
        self._count += 1
        beat = Beat(self.rank, self.world_size, self.host, os.getpid(), self._stage, time.monotonic() - self._since, self.cursor,
                    self._count, self.memory_gb(), self.total, self.local_rank, self.num_epochs)  # fmt: skip
        post(self.run_id, f"beat:{self.rank}", json.dumps(asdict(beat)))

    def _complain(self) -> None:
        """A line a minute while nothing moves: no hang is silent."""
        waited_s = time.monotonic() - self._since
        if self.rank == 0 and waited_s > COMPLAIN_EVERY_S * (self._complaints + 1):
            self._complaints += 1
            print(f"train: nothing moved for {waited_s:.0f} s: {self}", flush=True)

    def _listen(self) -> None:
        if _preemption() is not None:
            self._wishes = {*self._wishes, "preempted"}
        if self.rank == 0:
            self._wishes = {*self._wishes, *(word for word in WORDS if read(self.run_id, word) is not None)}


def _preemption() -> Any:
    """What Ray Train knows of nodes that are to be taken away.

    ``ray.train.get_preemption_info`` is a barrier of all ranks, which is no thing to do at each step: this is the value that it
    sends round (Ray 2.60.0).
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info
