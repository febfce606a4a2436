"""Which process runs in a folder: one at a time. A lock tells on this machine, status.json where locks do not reach."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

SILENCE = 3600  # seconds without a word after which an owner on another host counts as dead
_held: set[int] = set()  # descriptors of locked folders


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder for as long as this is open → whether it is free; None where locks tell nothing.

    The folder itself is locked: that leaves no trace in it, and ends with the process, however it ends.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        yield _locks(descriptor)
    finally:
        if descriptor in _held:  # not in a fork
            _held.remove(descriptor)
            os.close(descriptor)


def _locks(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, or NFS, which locks no folders: status.json alone decides
        return None
    return True


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)  # a fork that outlives its run would hold the folder


def this_process() -> dict[str, Any]:
    """The name of this process: containers on one machine have the same pids, and pids come again after a boot."""
    return {"pid": os.getpid(), "began": _began(os.getpid()), "host": platform.node(), "boot_id": _boot_id()}


def _began(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the boot: a pid is given again to another. None: unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _boot_id() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else ""


def owner_of(status: dict[str, Any]) -> dict[str, Any]:
    """Who wrote a status; empty if it does not say."""
    return status["owner"] if isinstance(status.get("owner"), dict) else {}


def is_another_alive(status: dict[str, Any], is_locked: bool = False) -> bool:
    """Whether a process other than this one wrote a status and still runs; on another host: whether it wrote lately.

    is_locked: this process holds the folder's lock, so no other of this machine does.
    """
    owner, here = owner_of(status), this_process()
    if owner == here or (is_locked and owner.get("host") == here["host"]):
        return False
    if owner.get("host") != here["host"]:
        try:
            written = datetime.strptime(str(status.get("updated")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
        except ValueError:
            return False
        return time.time() - written < SILENCE
    if owner.get("boot_id") != here["boot_id"]:
        return False
    try:
        pid = int(owner["pid"])
        os.kill(pid, 0)
    except (ProcessLookupError, ValueError, KeyError, TypeError, OverflowError):
        return False
    except PermissionError:
        pass
    return owner.get("began") in (None, _began(pid))
