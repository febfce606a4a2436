"""One process at a time works in a folder: a lock file, and a heartbeat for file systems and hosts that no lock reaches.

A folder is held if its lock cannot be taken, or if its heartbeat is fresh and comes from another host or from a living
process of this one. Everything else is free at once.
"""

import fcntl
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from kdx.errors import InUseError
from kdx.run.files import read_json, write_json

LOCK, BEAT = ".lock", "heartbeat.json"
HEARTBEAT = 30.0  # seconds between two heartbeats
STALE = 300.0  # seconds after which a heartbeat counts as that of a dead process
SETTLE = 2.0  # seconds in which processes that saw no heartbeat have written theirs; the last one counts
_held: dict[Path, Any] = {}  # folders that this process holds → their locks


def _release() -> None:
    while _held:
        _held.popitem()[1].close()


os.register_at_fork(after_in_child=_release)  # else a worker that outlives a killed run would keep its folder locked


def holder(folder: Path) -> str | None:
    """Describe the process that holds a folder ("pid 12 on host a"); None if the folder is free."""
    is_free = True
    with suppress(FileNotFoundError), open(folder / LOCK, "r+b") as lock:
        is_free = _take(lock) is not False
    return None if is_free and not _is_fresh(folder / BEAT) else _describe(folder / BEAT)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a folder while this is open; make it if it is missing. A process may claim again what it holds.

    Raises InUseError.
    """
    if folder.absolute() in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    beat, done = folder / BEAT, threading.Event()
    me = {"pid": os.getpid(), "started": _started(os.getpid()), "host": platform.node()}
    with open(folder / LOCK, "ab") as lock:
        is_locked = _take(lock)
        if is_locked is not False and not _is_fresh(beat):
            write_json(beat, me)
            time.sleep(0 if is_locked else SETTLE)
        if read_json(beat) != me:
            raise InUseError(str(folder), f"in use by {_describe(beat)}", "Wait for it, or choose another folder")
        _held[folder.absolute()] = lock
        thread = threading.Thread(target=_keep_beating, args=(beat, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            beat.unlink(missing_ok=True)
            _held.pop(folder.absolute(), None)


def _take(lock: Any) -> bool | None:
    """Take a lock → whether that could be done; None where the file system has no locks (NFS and Lustre may not)."""
    for _ in range(5):  # another process may hold it for a moment, only to see whether it is free
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return None
        else:
            return True
    return False


def _keep_beating(beat: Path, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT):
        with suppress(OSError):  # a file server that is away for a moment
            os.utime(beat)


def _is_fresh(beat: Path) -> bool:
    """Whether a heartbeat is that of a process that still runs, as far as this host can tell."""
    owner = read_json(beat)
    with suppress(FileNotFoundError):
        if owner and time.time() - beat.stat().st_mtime <= STALE:
            # Clocks are corrected, by less than two seconds.
            return owner["host"] != platform.node() or abs(_started(owner["pid"]) - owner["started"]) < 2
    return False


def _started(pid: int) -> float:
    """When a process of this host started, in seconds since 1970; 0 if it has ended."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    return 0.0


def _describe(beat: Path) -> str:
    owner = read_json(beat)
    return f"pid {owner['pid']} on host {owner['host']}" if owner else "another process"
