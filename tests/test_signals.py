"""Signals to a process that joblib started: born with them held back, which what it starts must not be."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdx.run import signals

BORN = """
import multiprocessing, os, signal, subprocess, time
from pathlib import Path
from kdx.run import signals
signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPS)  # as it is born
"""


def told(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BORN + script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_it_starts_ends_by_them() -> None:
    """One that it executes, and one that it forks."""
    assert (
        told("""
signals.note()
executed = subprocess.Popen(["sleep", "600"])
executed.terminate()
forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
forked.start()
forked.terminate()
forked.join()
print(executed.wait(), forked.exitcode)
""")
        == "-15 -15"
    )


def test_one_from_before_its_first_run_ends_that_and_not_the_process() -> None:
    assert (
        told("""
os.kill(os.getpid(), signal.SIGINT)
signals.note()
signals.note()  # with every job
for _ in range(2):
    try:
        with signals.StopRequest(Path("run")):
            print("never")
    except SystemExit as error:
        print(error.code)
os.kill(os.getpid(), signal.SIGTERM)  # between two jobs
""")
        == "130\n130"
    )


def test_while_it_runs_they_come_once() -> None:
    """From who tells all processes, and from the command, however much later."""
    assert (
        told("""
signals.note()
with signals.StopRequest(Path("run")) as stop:
    stop.is_deferred, signals.SAME = True, 0.0
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    print(stop.exit_code)
""")
        == "143"
    )


def test_in_a_run_of_its_own_the_second_ends_at_once_but_not_one_said_twice() -> None:
    """`timeout` tells a command and then all its group."""
    assert (
        told("""
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOPS)
signals.note()
try:
    with signals.StopRequest(Path("run")) as stop:
        stop.is_deferred = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        print("goes on", stop.exit_code)
        time.sleep(2 * signals.SAME)
        os.kill(os.getpid(), signal.SIGINT)
        print("never")
except SystemExit as error:
    print(error.code)
""")
        == "goes on 143\n130"
    )


@pytest.mark.parametrize(
    ("is_deferred", "number", "lost"),
    [(False, 1, "nothing is lost"), (True, 2, "what was done since the newest checkpoint is lost")],
)
def test_what_a_stop_costs_is_said(
    capfd: pytest.CaptureFixture[str], is_deferred: bool, number: int, lost: str
) -> None:
    """Before the first step, and where a second one would not wait for the save."""

    def tell(stop: signals.StopRequest) -> None:
        stop.is_deferred = is_deferred
        for _ in range(number):
            os.kill(os.getpid(), signal.SIGTERM)
            stop.since = 0.0  # a while ago

    with signals.StopRequest(Path("run")) as stop, pytest.raises(signals.Stopped):
        tell(stop)
    (*_, said) = capfd.readouterr().err.splitlines()
    assert said == f"kdx: stopped at once: {lost}; to go on: the same call of distill, in run"


def test_what_nohup_ignores_stays_ignored() -> None:
    assert (
        told("""
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOPS)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with signals.StopRequest(Path("run")) as stop:
    stop.is_deferred = True
    os.kill(os.getpid(), signal.SIGHUP)
    print(stop.signal)
""")
        == "None"
    )
