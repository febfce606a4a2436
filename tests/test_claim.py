"""One process at a time in a folder: by its lock, and by its heartbeat where locks do not reach."""

import fcntl
import json
import os
import platform
import time
from pathlib import Path

import pytest
from processes import forked, wait

from kdx.errors import InUseError
from kdx.run import claim as claims
from kdx.run.claim import claim, holder


@pytest.fixture(params=["locks", "no locks"])
def locking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without file locks: NFS and Lustre may have none."""
    if request.param == "no locks":

        def refuse(*_: object) -> None:
            raise OSError("No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        monkeypatch.setattr(claims, "SETTLE", 0.5)
    return bool(request.param == "locks")


def leave_heartbeat(folder: Path, *, host: str, pid: int, age: float = 0, started: float = 0) -> None:
    folder.mkdir(exist_ok=True)
    beat = folder / claims.BEAT
    beat.write_text(json.dumps({"pid": pid, "started": started, "host": host}))
    os.utime(beat, (time.time() - age,) * 2)


def test_a_folder_is_held_by_one_process_and_free_again_after(tmp_path: Path, locking: bool) -> None:
    folder = tmp_path / "job"
    assert holder(folder) is None
    with claim(folder):
        me = f"pid {os.getpid()} on host {platform.node()}"
        assert holder(folder) == me

        def another() -> None:
            assert holder(folder) == me
            with pytest.raises(InUseError, match=f"in use by {me}"), claim(folder):
                pass

        assert wait(forked(another)) == 0
        with claim(folder):  # a sweep claims a job, and so does its run
            pass
        assert wait(forked(another)) == 0
    assert holder(folder) is None
    assert [file.name for file in folder.iterdir()] == [claims.LOCK]


def test_what_a_killed_process_held_is_free_at_once(tmp_path: Path, locking: bool) -> None:
    def work() -> None:
        with claim(tmp_path / "job"):
            os._exit(9)

    pid = forked(work)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody has read its exit code yet
    assert holder(tmp_path / "job") is None
    assert wait(pid) == 9
    with claim(tmp_path / "job"):
        assert holder(tmp_path / "job")


def test_a_forked_child_does_not_hold_its_parents_folder(tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()

    def child() -> None:
        os.write(ready[1], b"x")
        os.read(go[0], 1)

    with claim(tmp_path):
        pid = forked(child)
        os.read(ready[0], 1)
    assert holder(tmp_path) is None
    os.write(go[1], b"x")
    assert wait(pid) == 0


def test_another_hosts_heartbeat_counts_until_it_is_stale(tmp_path: Path, locking: bool) -> None:
    leave_heartbeat(tmp_path, host="elsewhere", pid=7, age=claims.STALE - 60)
    assert holder(tmp_path) == "pid 7 on host elsewhere"
    with pytest.raises(InUseError, match="pid 7 on host elsewhere"), claim(tmp_path):
        pass
    leave_heartbeat(tmp_path, host="elsewhere", pid=7, age=claims.STALE + 60)
    assert holder(tmp_path) is None
    with claim(tmp_path):
        assert str(os.getpid()) in str(holder(tmp_path))


def test_a_pid_that_was_given_to_another_process_holds_nothing(tmp_path: Path, locking: bool) -> None:
    leave_heartbeat(tmp_path, host=platform.node(), pid=os.getpid(), started=1.0)
    assert holder(tmp_path) is None


def test_the_heartbeat_goes_on_while_the_folder_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT", 0.01)
    with claim(tmp_path):
        os.utime(tmp_path / claims.BEAT, (0, 0))
        for _ in range(1000):
            if (tmp_path / claims.BEAT).stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert (tmp_path / claims.BEAT).stat().st_mtime > 0


@pytest.mark.parametrize("locking", ["no locks"], indirect=True)
def test_without_locks_one_of_many_processes_takes_over_what_is_stale(tmp_path: Path, locking: bool) -> None:
    leave_heartbeat(tmp_path, host="elsewhere", pid=7, age=claims.STALE + 60)

    def take() -> None:
        try:
            with claim(tmp_path):
                for _ in range(6000):
                    if len(list(tmp_path.glob("lost-*"))) == 7:
                        return
                    time.sleep(0.01)
        except InUseError:
            (tmp_path / f"lost-{os.getpid()}").touch()
            raise

    codes = [wait(pid) for pid in [forked(take) for _ in range(8)]]
    assert codes.count(0) == 1
    assert len(list(tmp_path.glob("lost-*"))) == 7
