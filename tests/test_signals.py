"""A signal asks a run to stop: at once while there is nothing to save, else after the step."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdx.run import signals
from kdx.run.signals import Stopped, StopRequest


@pytest.fixture
def send() -> Callable[[int], None]:
    return lambda number: os.kill(os.getpid(), number)


def run(work: Callable[[StopRequest], None]) -> None:
    """A run that does this before it sees that it should stop."""
    with StopRequest(Path("run")) as stop:
        work(stop)
        raise stop.stopped()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 143)],
)
def test_the_step_is_finished_and_the_exit_code_names_the_signal(
    number: int, code: int, send: Callable[[int], None], capfd: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(n) for n in signals.STOPS]

    def work(stop: StopRequest) -> None:
        assert not stop.is_asked
        send(number)
        send(number)  # `timeout` sends it to a command, and then to its group
        assert stop.is_asked
        (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)

    with pytest.raises(Stopped) as stopped:
        run(work)
    assert stopped.value.code == code
    assert capfd.readouterr().err.splitlines() == [
        "",
        "kdx: stopping after this step and saving. Press Ctrl-C again to quit now",
        "kdx: stopped. Resume with: python -m kdx run.resume=run",
    ]
    assert [signal.getsignal(n) for n in signals.STOPS] == before


def test_before_the_first_step_it_stops_at_once(send: Callable[[int], None], capfd: pytest.CaptureFixture[str]) -> None:
    def load(_: StopRequest) -> None:
        send(signal.SIGTERM)
        raise AssertionError("it loads a model")

    with pytest.raises(Stopped) as stopped:
        run(load)
    assert stopped.value.code == 143
    assert "Nothing was saved yet. Start again with: python -m kdx run.like=run" in capfd.readouterr().err


def test_measuring_is_left_unless_other_processes_would_wait(
    send: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(stop: StopRequest) -> None:
        stop.check()
        send(signal.SIGTERM)
        monkeypatch.setenv("WORLD_SIZE", "2")
        stop.check()
        assert not stop.is_asked  # until the reduction of a step says so in all processes
        stop.is_agreed = True
        assert stop.is_asked
        monkeypatch.setenv("WORLD_SIZE", "1")
        stop.check()
        raise AssertionError("it measures the next batch")

    with pytest.raises(Stopped):
        run(measure)


def test_a_second_signal_ends_the_process_at_once() -> None:
    script = """
import os, signal
from pathlib import Path
from kdx.run import signals
signals.SAME = 0.0
with signals.StopRequest(Path("run")) as stop:
    stop.check()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.endswith("kdx: quit; steps since the last checkpoint are lost\n")


def test_what_nohup_ignores_stays_ignored(send: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(Path("run")) as stop:
            stop.check()
            send(signal.SIGHUP)
            assert not stop.is_asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_submitits_handler_is_called_when_all_is_saved(send: Callable[[int], None]) -> None:
    calls: list[str] = []

    def requeue(number: int, _: Any) -> None:
        calls.append("requeued")
        raise RuntimeError("timed-out too many times")

    def work(stop: StopRequest) -> None:
        stop.check()
        send(signal.SIGTERM)  # as Slurm does a moment before
        assert not stop.is_asked
        send(signal.SIGUSR2)
        assert stop.is_asked
        calls.append("saved")

    before = [signal.signal(signal.SIGUSR2, requeue), signal.signal(signal.SIGTERM, lambda *_: calls.append("passed"))]
    try:
        with pytest.raises(RuntimeError, match="timed-out too many times"):
            run(work)
    finally:
        signal.signal(signal.SIGUSR2, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert calls == ["passed", "saved", "requeued"]
