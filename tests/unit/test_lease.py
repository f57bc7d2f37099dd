"""One driver at a time works on a run: who refuses, who takes over, and who stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import raypar.train
import raypar.tune
from raypar import cli, lease
from raypar.config import RunConfig
from raypar.lease import LEASE, HeldError, Holder, Lease, refuse_if_held
from raypar.storage import Folder


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.01)
    monkeypatch.setattr(lease, "WATCH_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRES_S", 3600.0)  # however slow the machine is


def take(out: Folder, on_lost: Any = lambda: None) -> Lease:
    return Lease(out, "train", on_lost)


def of_another_host(**other: Any) -> Holder:
    return replace(Holder.of_this_process(), host="elsewhere", user="somebody", **other)


def wait_until(what: Any) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_a_second_driver_refuses_until_the_first_one_ends(tmp_path: Path) -> None:
    out = Folder.at(tmp_path / "train")
    with take(out) as first:
        begun = first.mine.renewed
        wait_until(lambda: (found := Holder.read(out)) is not None and found.renewed > begun)
        for attempt in (lambda: take(out).__enter__(), lambda: refuse_if_held(out)):
            with pytest.raises(HeldError) as caught:
                attempt()
            said = str(caught.value)
            assert f"host {first.mine.host}, process {os.getpid()}, user {first.mine.user}, since 2" in said
            assert "wait until it ends" in said
            assert "If it is dead, its lease runs out 3600 s after that" in said
            assert "\n" not in said
        out.write("best.pt", b"weights")
        first.clear()
        assert out.list() == [LEASE], "empty, and held"
        first.check()
    assert out.list() == []
    with take(out):
        pass


def test_of_many_that_start_together_one_goes_on(tmp_path: Path) -> None:
    """At once, or where a machine is so slow that several did not see each other, at the next renewal."""
    out, start, done = Folder.at(tmp_path / "train"), threading.Barrier(8), threading.Event()
    leases = [take(out) for _ in range(8)]
    refused: list[Lease] = []

    def drive(mine: Lease) -> None:
        start.wait()
        try:
            with mine:
                done.wait(60)
        except HeldError:
            refused.append(mine)

    threads = [threading.Thread(target=drive, args=(each,)) for each in leases]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(refused) + sum(each.is_lost for each in leases) == len(leases) - 1)
    (winner,) = [each for each in leases if each not in refused and not each.is_lost]
    wait_until(lambda: winner._thread.is_alive())
    winner.check()
    done.set()
    for thread in threads:
        thread.join()


def test_a_driver_that_was_killed_leaves_its_run_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Folder.at(tmp_path / "train")
    code = (
        "import sys, time\nfrom raypar.lease import Lease\nfrom raypar.storage import Folder\n"
        "with Lease(Folder.at(sys.argv[1]), 'train', print):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, out.uri], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(HeldError, match=f"process {process.pid}"):
            refuse_if_held(out)
        process.send_signal(signal.SIGKILL)
        # nobody has asked for its end: it is a zombie
        wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        for _ in range(2):  # as a zombie, and when even that is gone
            refuse_if_held(out)
            holder = Holder.read(out)
            assert holder is not None
            with take(out):
                assert f"process {process.pid}" in (said := capsys.readouterr().out)
                assert "has ended: taken over" in said
            out.write_json(LEASE, asdict(holder))
            process.wait()


def test_a_process_id_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    out = Folder.at(tmp_path)
    out.write_json(LEASE, asdict(replace(Holder.of_this_process(), process_started="1")))
    refuse_if_held(out)
    with take(out):
        pass
    for other in ({"host": "elsewhere"}, {"machine": "another boot"}, {"machine": ""}):
        out.write_json(LEASE, asdict(replace(Holder.of_this_process(), **{"process_started": "1", **other})))
        with pytest.raises(HeldError):
            refuse_if_held(out)


def test_a_lease_of_another_host_runs_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Folder.at(tmp_path)
    out.write_json(LEASE, asdict(of_another_host(renewed=time.time() - lease.EXPIRES_S + 60)))
    with pytest.raises(HeldError, match=r"host elsewhere, process .*, user somebody"):
        take(out).__enter__()
    out.write_json(LEASE, asdict(of_another_host(renewed=time.time() - lease.EXPIRES_S - 5)))
    refuse_if_held(out)
    with take(out):
        assert "has not renewed its lease for 3600 s: taken over" in capsys.readouterr().out


@pytest.mark.parametrize("skew_s", [-7200.0, 7200.0])
def test_a_lease_that_only_looks_old_is_renewed_while_it_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    """The clocks of two hosts differ by hours."""
    out, holder = Folder.at(tmp_path), of_another_host(renewed=time.time() + skew_s)
    out.write_json(LEASE, asdict(holder))
    renewed = asdict(replace(holder, renewed=holder.renewed + 10))
    monkeypatch.setattr(lease.time, "sleep", lambda _: out.write_json(LEASE, renewed))
    with pytest.raises(HeldError, match="host elsewhere"):
        take(out).__enter__()


def test_a_damaged_lease_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"nonce": "x"}', "null"):
        (tmp_path / LEASE).write_text(text)
        with take(Folder.at(tmp_path)):
            pass


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_driver_that_was_taken_over_stops_and_leaves_the_others_lease(
    tmp_path: Path, is_removed: bool
) -> None:
    out, told = Folder.at(tmp_path), threading.Event()
    thief = of_another_host()
    with take(out, told.set) as mine:
        mine.check()
        if is_removed:
            out.delete(LEASE)
        else:
            out.write_json(LEASE, asdict(thief))
        assert told.wait(20)
        with pytest.raises(RuntimeError, match="its lease was removed" if is_removed else "host elsewhere"):
            mine.check()
    assert Holder.read(out) == (None if is_removed else thief)


def config_of(storage: Path, **train: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "run", "storage": str(storage), "train": train})


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_a_run_that_is_held_is_refused_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    (tmp_path / "run.yaml").write_text(f"name: run\nstorage: {tmp_path}\n")
    folder = Folder.at(tmp_path / "run" / verb)
    folder.write("best.pt", b"weights")
    with take(folder):
        for overwrite in ("false", "true"):
            arguments = [verb, str(tmp_path / "run.yaml"), f"{verb}.overwrite={overwrite}"]
            assert cli.main(arguments) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: another driver works on {folder.uri}: host ")
    assert folder.read("best.pt") == b"weights"


def test_what_was_asked_of_the_workers_of_a_lost_run_ends_as_an_error(tmp_path: Path) -> None:
    """The driver asks them to stop, and does not say that its run was stopped on demand."""
    out, asked = Folder.at(tmp_path / "run" / "train"), threading.Event()

    class Trainer:
        run_id = "x"

        def fit(self) -> Any:
            out.write_json(LEASE, asdict(of_another_host()))
            assert asked.wait(20)
            return SimpleNamespace(return_value={"stopped": 8})

    with (
        take(out, asked.set) as mine,
        pytest.raises(RuntimeError, match=r"training failed: .*elsewhere.*has stopped"),
    ):
        raypar.train._fit(Trainer(), "run", mine)  # type: ignore[arg-type]
    assert out.list() == [LEASE], "nothing is written into the folder of another driver"
