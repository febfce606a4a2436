"""The GPU and the cores of a process, chosen before torch is imported."""

import ctypes
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCKS = Path(tempfile.gettempdir()) / f"kdx-devices-{os.getuid()}"  # a file per share of a GPU
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_held: list[Any] = []  # for the life of this process


def take_gpu(*, is_own: bool) -> None:
    """Mark a GPU as taken for as long as this process lives.

    is_own: choose the GPU that fewest kdx processes of this user have taken, and hide the others from torch. Else it is
    the one that torch will choose, taken or not.
    """
    names = visible_gpus()
    if _held or not names:
        return
    names = names if is_own else [names[int(os.environ.get("LOCAL_RANK", "0")) % len(names)]]
    from filelock import FileLock, Timeout  # not for whoever only asks what is done

    LOCKS.mkdir(parents=True, exist_ok=True)
    for share, name in ((share, name) for share in itertools.count() for name in names):
        # GPUs are numbered anew in each job of Slurm.
        lock = FileLock(LOCKS / re.sub(r"[^\w-]", "-", f"{os.environ.get('SLURM_JOB_ID', '')}-{name}-{share}"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        if is_own:
            os.environ["CUDA_VISIBLE_DEVICES"] = name
        return


def visible_gpus() -> list[str]:
    """List the GPUs to choose from: those in CUDA_VISIBLE_DEVICES, else all of the machine."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        try:
            listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return []
        return [str(i) for i in range(len(re.findall("^GPU ", listing, re.MULTILINE)))]
    names = (name.strip() for name in listed.split(","))
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))  # CUDA reads no further


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory(device_type: str) -> None:
    """When training on a CPU, let glibc keep the memory that a step frees for the next step.

    By default it returns the largest tensors to the system after each step, and clearing their pages again takes a tenth
    of the next one. This needs more memory where batches differ much; MALLOC_... or GLIBC_TUNABLES turn it off.
    """
    is_set = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device_type == "cpu" and sys.platform == "linux" and not is_set:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_MMAP_MAX, 0)
