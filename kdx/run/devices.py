"""One job, one device: the GPU that a job takes, and threads and memory on a processor. Imports no torch."""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdx.run import signals

LOCKS = Path(tempfile.gettempdir()) / "kdx-devices"  # one file a GPU, for all kdx jobs of this machine
PATIENCE = 2.0  # seconds between two looks for a free GPU
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_home: list[FileLock] = []  # held for the life of this process: that its next jobs will want this GPU


@contextmanager
def one_device(is_parallel: bool) -> Iterator[None]:
    """Hold a GPU for the life of a job, before torch looks for one.

    A parallel job takes one of those listed that no other kdx job of this machine holds, waits for it if it must, and
    shows torch no other. Any other job runs where torch puts it, free or not, and holds that one against the rest.
    """
    names = listed()
    lock = None
    if names and is_parallel:
        name, lock = _free(names)
        os.environ["CUDA_VISIBLE_DEVICES"] = name  # for good: CUDA reads it once, so the next job here takes it again
    elif names:
        with suppress(Timeout, OSError):
            lock = _lock(names[int(os.environ.get("LOCAL_RANK", "0")) % len(names)])
            lock.acquire(timeout=0)
    try:
        yield
    finally:
        if lock:
            lock.release()


def listed() -> list[str]:
    """The GPUs to choose from: those in CUDA_VISIBLE_DEVICES, else all of the machine."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return [str(i) for i in range(_num_gpus())]
    names = [name.strip() for name in asked.split(",")]
    end = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))  # CUDA reads no further
    return names[:end]


def _num_gpus() -> int:
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in told.splitlines())


def _lock(name: str) -> FileLock:
    """The lock of a GPU. Within a Slurm allocation GPUs are numbered anew, so its locks are its own."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    owner = os.environ.get("SLURM_JOB_ID", "")
    return FileLock(LOCKS / re.sub(r"[^A-Za-z0-9-]", "-", f"{owner}-{name}".lstrip("-")), mode=0o666)


def _free(names: list[str]) -> tuple[str, FileLock]:
    """The first GPU that nobody holds, and its lock, acquired; says so if it must wait."""
    is_told = False
    while True:
        for name in names:  # rather one that no process will come back to
            home, lock = _lock(f"{name}-home"), _lock(name)
            if (_home or _taken(home)) and _taken(lock):
                _home[:] = _home or [home]
                return name, lock
            home.release()
        for name in names:
            lock = _lock(name)
            if _taken(lock):
                return name, lock
        if not is_told:
            print(f"kdx: other jobs hold GPU {', '.join(names)}; waiting for one", flush=True)
        is_told = True
        signals.end_if_noted()
        time.sleep(PATIENCE)


def _taken(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def num_at_once(launcher: dict[str, Any], num_points: int) -> int:
    """How many jobs of a sweep a Hydra launcher runs at once on this machine."""
    kind = str(launcher.get("_target_", "")).rsplit(".", 1)[-1]
    if kind == "LocalLauncher":  # submitit's: it starts all of them
        return num_points
    if kind != "JoblibLauncher":
        return 1
    asked = int(launcher["n_jobs"])
    return max(1, min(num_points, asked if asked > 0 else num_cores() + 1 + asked))


def share_cores(jobs_at_once: int) -> None:
    """Have each of several jobs use its share of the cores, unless OMP_NUM_THREADS says otherwise.

    To be called before they start: torch reads it when it is imported.
    """
    if jobs_at_once > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // jobs_at_once)))


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory(device_type: str) -> None:
    """Where a processor trains, have glibc keep from here on what a step frees, for the next one.

    It would give the largest tensors of each step back to the system, which then clears every page of them anew: a
    tenth of a step. Costs memory where batches differ much; MALLOC_... or GLIBC_TUNABLES in the environment go before.
    """
    is_chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device_type != "cpu" or sys.platform != "linux" or is_chosen:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):  # it is glibc
        libc.malloc_trim(0)  # what loading left
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_MMAP_MAX, 0)
