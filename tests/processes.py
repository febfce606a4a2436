"""Processes of their own, to be killed or to share files."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import kdx


def environment(**more: str) -> dict[str, str]:
    """That of a process that imports the kdx which is tested, offline, with one thread and without a W&B login."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "KDX_"))}
    clean |= {"PYTHONPATH": str(Path(kdx.__file__ or "").parents[1]), "OMP_NUM_THREADS": "1"}
    return clean | {"HF_HUB_OFFLINE": "1", "NETRC": "none"} | more


def forked(work: Callable[[], object]) -> int:
    """Do something in a process of its own, without the seconds that importing torch takes → its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking beside threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
