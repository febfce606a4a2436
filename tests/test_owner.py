"""Whose word in status.json counts: that of a process which still runs, here or elsewhere."""

import errno
import fcntl
import os
import platform
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from processes import forked, wait

from kdx.errors import MachineError
from kdx.run import owner
from kdx.run.folder import RunFolder


def said(ago: float = 0, hours: int = 0, **of: Any) -> dict[str, Any]:
    """A status that says `running`, by this process but for `of`, as a clock so many hours east shows the time."""
    when = datetime.fromtimestamp(time.time() - ago, timezone(timedelta(hours=hours)))
    return {
        "state": "running",
        "updated": when.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "owner": {**owner.this_process(), **of},
    }


def another(ago: float = 0) -> dict[str, Any]:
    """A status that says `running`, by the process that started this one."""
    return said(ago, pid=os.getppid(), began=owner._began(os.getppid()))


def dead() -> int:
    """The pid of a process that has ended."""
    pid = forked(lambda: None)
    wait(pid)
    return pid


def test_on_this_host_the_process_must_live() -> None:
    assert owner.is_another_alive(another(10**6))
    assert not owner.is_another_alive(another(10**6), is_locked=True)  # this process has what that one would hold
    assert owner.is_another_alive(said(host="another"), is_locked=True)  # maybe a lock does not reach so far
    assert not owner.is_another_alive(said(pid=dead()))
    assert not owner.is_another_alive(said())  # it is this one
    assert not owner.is_another_alive(said(pid=os.getppid(), began=5))  # its pid was given to another
    assert owner.is_another_alive(said(pid=os.getppid(), began=None))  # where there is no /proc


def test_an_owner_of_an_earlier_boot_is_dead_though_its_pid_lives() -> None:
    assert not owner.is_another_alive(said(pid=os.getppid(), boot_id="an earlier one"))
    assert not owner.is_another_alive(said(boot_id="an earlier one"))


@pytest.mark.parametrize("hours", [-11, 0, 13])
def test_on_another_host_it_must_have_written_lately_by_any_clock(hours: int) -> None:
    for pid in (os.getppid(), dead(), os.getpid()):  # a pid says nothing there: all containers have a process 1
        assert owner.is_another_alive(said(1, hours, pid=pid, host="another"))
        assert owner.is_another_alive(said(owner.SILENCE - 60, hours, pid=pid, host="another"))
        assert not owner.is_another_alive(said(owner.SILENCE + 60, hours, pid=pid, host="another"))


@pytest.mark.parametrize(
    "status",
    [{}, {"owner": None}, {"owner": {"host": "another"}, "updated": "lately"}, {"owner": {"host": platform.node()}}],
)
def test_what_names_nobody_is_nobody(status: dict[str, Any]) -> None:
    assert not owner.is_another_alive(status)


def test_what_a_run_writes_is_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_status("running", "", is_main=True)
    status = folder.status()
    assert status["owner"] == owner.this_process()
    written = datetime.strptime(status["updated"], "%Y-%m-%dT%H:%M:%S%z")
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60


def test_a_folder_of_another_host_is_refused_whatever_the_pid(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep("status.json", said(host="another"))
    match = f"in use by pid {os.getpid()} on host another since .*, or, if that process is gone, remove status.json"
    with pytest.raises(MachineError, match=match), folder.open({}, is_main=True):
        pass


def test_a_dead_owner_whose_pid_another_process_has_now_is_dead(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep("status.json", another() | {"step": 3})  # it lives, and does not hold the folder
    with folder.open({}, is_main=True):
        assert folder.before["step"] == 3


def test_one_run_at_a_time_and_the_next_in_the_same_process(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        with folder.open({}, is_main=True):
            with pytest.raises(MachineError, match="in use by another process"), folder.open({}, is_main=True):
                pass
            with folder.open({}, is_main=False):  # another rank of the run
                pass
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.yaml", "status.json"]


def test_a_lock_ends_with_the_run_whatever_ends_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), folder.open({}, is_main=True):
        raise ZeroDivisionError
    with folder.open({}, is_main=True):
        pass


def test_where_there_are_no_locks_the_status_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.EBADF, "as NFS says of a folder")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = RunFolder(tmp_path)
    with folder.open({}, is_main=True):
        folder.keep("status.json", another())
        with pytest.raises(MachineError, match=f"in use by pid {os.getppid()}"), folder.open({}, is_main=True):
            pass
