"""The command in this process, and processes of their own, to be killed or to share files."""

import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import kdx
from kdx import cli

SERVER = multiprocessing.get_context("forkserver")
# Imported once, in a process that no thread has run in; `warm` only beside the fault tests. There is one such process
# in a session: what another file asked it to import would replace this.
SERVER.set_forkserver_preload(["kdx.distill", "warm"])


def in_process(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, list[str]]:
    """The command, in this process → exit code, stdout, lines of stderr."""
    sys.argv = ["kdx", *argv]
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as left:  # it sets HYDRA_FULL_ERROR
        cli.main()
    out, err = capfd.readouterr()
    return int(left.value.code or 0), out, err.splitlines()


def environment(**more: str) -> dict[str, str]:
    """That of a process that imports the kdx which is tested, offline, with one thread and without a W&B login."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "KDX_", "HYDRA_"))}
    clean |= {"PYTHONPATH": str(Path(kdx.__file__ or "").parents[1]), "OMP_NUM_THREADS": "1"}
    return clean | {"HF_HUB_OFFLINE": "1", "NETRC": "none"} | more


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def forked(work: Callable[[], object]) -> int:
    """Do something small in a process of its own → its pid. Torch's threads do not survive a fork: load no model."""
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


def started(work: Callable[..., None], *words: Any) -> BaseProcess:
    """Start a function of a module in a process of its own that has imported kdx and done nothing else yet."""
    process = SERVER.Process(target=work, args=words)
    process.start()
    return process


def fresh(work: Callable[..., None], *words: Any) -> BaseProcess:
    """The same in a process that was not forked: what a library's threads left in the other's memory is not there."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=words)
    process.start()
    return process


def ended(process: BaseProcess, seconds: int = 60) -> int | None:
    """The exit code of what was started, or None if it does not end: it is killed then."""
    for _ in range(10 * seconds):  # looks, not the clock: the whole machine may be paused
        process.join(0.1)
        if process.exitcode is not None:
            return process.exitcode
    process.kill()
    process.join()
    return None
