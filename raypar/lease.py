"""One driver at a time works on a run: ``lease.json`` in the folder says which one, and is renewed as long as that driver lives.

A second driver refuses. A lease is taken over when its driver is provably dead (its process is gone, on this machine) or has not renewed
it for ``EXPIRES_S``. Stores of objects have no rename that fails when the target exists, so a driver writes its lease, waits a moment and reads
it back: of two that start together, the one whose lease is there goes on. Whoever later finds another's lease in the place of its own stops.

Runs in: the driver, or the actor of a trial.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from raypar.storage import Folder

LEASE = "lease.json"
RENEW_EVERY_S = 10.0
EXPIRES_S = 60.0
WATCH_S = 1.5 * RENEW_EVERY_S  # before a lease is taken over that only looks old: clocks of hosts differ
LEAVE_WITHIN_S = 10.0
SETTLE_LOCAL_S, SETTLE_REMOTE_S = 0.1, 1.0  # between writing a lease and reading it back
ZOMBIE, DEAD = "Z", "X"  # states of a process in /proc
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Holder:
    """The driver that a lease belongs to.

    Attributes:
        nonce: of this lease.
        machine: the boot and the process namespace in which ``pid`` means something; empty where that is unknown.
        process_started: in clock ticks since the boot: a process id is used again.
        started, renewed: seconds since 1970, by the holder's clock.
    """

    nonce: str
    host: str
    pid: int
    user: str
    machine: str
    process_started: str
    started: float
    renewed: float

    @classmethod
    def of_this_process(cls) -> Holder:
        now, pid = time.time(), os.getpid()
        return cls(
            uuid.uuid4().hex, socket.gethostname(), pid, _user(), _machine(), _process_started(pid), now, now
        )

    @classmethod
    def read(cls, out: Folder) -> Holder | None:
        """The holder of a folder's lease; nothing when there is no lease, or no readable one."""
        if not out.exists(LEASE):
            return None
        try:
            value = out.read_json(LEASE)
            return cls(**{field.name: value[field.name] for field in fields(cls)})
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # deleted meanwhile, or not ours
            return None

    def is_dead(self) -> bool:
        """Whether its process is known to be gone."""
        if not self.machine or (self.host, self.machine) != (socket.gethostname(), _machine()):
            return False
        try:
            os.kill(self.pid, 0)  # sends nothing
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's, which /proc may hide
            pass
        return _process_started(self.pid) not in (self.process_started, UNKNOWN)

    def is_expired(self) -> bool:
        """Whether it looks as if nobody renews it; by two clocks, which may differ."""
        return abs(time.time() - self.renewed) > EXPIRES_S

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started).astimezone().isoformat(" ", "seconds")
        return f"host {self.host}, process {self.pid}, user {self.user}, since {since}"


class HeldError(ValueError):
    """Another driver works on the run."""


def refuse_if_held(out: Folder) -> None:
    """Says who works on a run, before anything is started.

    Raises:
        HeldError: another driver does.
    """
    holder = Holder.read(out)
    if holder is not None and not holder.is_dead() and not holder.is_expired():
        raise _held(out, holder)


class Lease:
    """This driver's lease of a folder, from ``with`` to its end. A thread renews it.

    Args:
        out: the folder.
        label: what its lines begin with.
        on_lost: called every few seconds once another driver has taken over.
    """

    def __init__(self, out: Folder, label: str, on_lost: Callable[[], object]):
        self.out, self.label, self.on_lost = out, label, on_lost
        self.mine = Holder.of_this_process()
        self.is_lost = False
        self.taken_by: Holder | None = None
        self._lock = threading.Lock()  # a folder that is cleared has no lease for a moment
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raypar-lease", daemon=True)

    def __enter__(self) -> Self:
        """Takes the lease.

        Raises:
            HeldError: another driver has it.
        """
        before = Holder.read(self.out)
        if before is not None:
            self._wait_for_end_of(before)
            state = "has ended" if before.is_dead() else f"has not renewed its lease for {EXPIRES_S:.0f} s"
            print(
                f"{self.label}: the driver that worked here before ({before}) {state}: taken over", flush=True
            )
        self._write()
        time.sleep(SETTLE_LOCAL_S if self.out.is_local else SETTLE_REMOTE_S)
        found = Holder.read(self.out)
        if found is not None and found.nonce != self.mine.nonce:
            raise _held(self.out, found)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the lease back, if it is still this driver's."""
        self._ended.set()
        if not self._lock.acquire(timeout=LEAVE_WITHIN_S):
            return  # the store hangs, and the lease runs out by itself
        try:
            found = Holder.read(self.out)
            if found is not None and found.nonce == self.mine.nonce:
                self.out.delete(LEASE)
        except OSError:  # it runs out by itself
            pass
        finally:
            self._lock.release()

    def clear(self) -> None:
        """Empties the folder but for the lease."""
        with self._lock:
            self.out.delete()
            self._write()

    def check(self) -> None:
        """Whether the lease is still this driver's.

        Raises:
            RuntimeError: another driver has taken over.
        """
        with suppress(OSError):  # the store is away: nobody else reaches it through this one either
            self._renew()
        if self.is_lost:
            by = f" by another driver ({self.taken_by})" if self.taken_by else ": its lease was removed"
            raise RuntimeError(
                f"training failed: {self.out.shown()} was taken over{by}, because this driver did not renew its lease for "
                f"{EXPIRES_S:.0f} s; this driver has stopped and left the run to that one"
            )

    def _wait_for_end_of(self, before: Holder) -> None:
        """Until a lease may be taken over.

        Raises:
            HeldError: its driver lives.
        """
        if before.is_dead():
            return
        if not before.is_expired():
            raise _held(self.out, before)
        time.sleep(WATCH_S)
        now = Holder.read(self.out)
        if now is not None and now != before:
            raise _held(self.out, now)

    def _write(self) -> None:
        self.mine = replace(self.mine, renewed=time.time())
        self.out.write(LEASE, json.dumps(asdict(self.mine), indent=2) + "\n")

    def _run(self) -> None:
        while not self._ended.wait(RENEW_EVERY_S):
            try:
                self._renew()
                if self.is_lost:
                    self.on_lost()
            except Exception:  # the store or the cluster is away for a while
                continue

    def _renew(self) -> None:
        with self._lock:
            if self.is_lost or self._ended.is_set():
                return
            found = Holder.read(self.out)
            if found is None or found.nonce != self.mine.nonce:
                self.is_lost, self.taken_by = True, found
                return
            self._write()


def _held(out: Folder, holder: Holder) -> HeldError:
    age_s = max(0.0, time.time() - holder.renewed)
    return HeldError(
        f"another driver works on {out.shown()}: {holder}; it renewed its lease {age_s:.0f} s ago: wait until it ends, or stop it there. "
        f"If it is dead, its lease runs out {EXPIRES_S:.0f} s after that: give the command again then"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def _machine() -> str:
    """The boot of the machine and the namespace of process ids; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_started(pid: int) -> str:
    """When a process started, in clock ticks since the boot; empty when only its remains are there, ``UNKNOWN`` when it cannot be seen."""
    try:
        # the name before it may hold blanks and brackets
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return UNKNOWN
    return "" if state in (ZOMBIE, DEAD) else rest[18]
