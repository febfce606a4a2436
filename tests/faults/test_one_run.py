"""One process at a time in a run's folder, however two of them meet; and what a process leaves that dies as it ends."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runs import config_of, litter, outcome, start, status, straight
from test_kills import wait_for

from kdx.run import folder as run_folder
from kdx.run.folder import RunFolder

WORDS = ("train.max_steps=6", "train.save_every=2", "train.micro_batch_size=4")


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The words of the runs below, and what they end in."""
    config = config_of(place, *WORDS)
    return config, straight(config, tmp_path_factory.mktemp("straight") / "run")[0]


def test_one_that_begins_while_another_has_written_no_status(undisturbed, tmp_path):
    config, expected = undisturbed
    first = start(config, tmp_path / "run", partial(_wait_to_write, tmp_path))
    wait_for(tmp_path / "waits")
    second = start(config, tmp_path / "run", log=tmp_path / "second.log")
    code = second.code
    (tmp_path / "go").touch()  # before anything can fail: the first would wait
    assert code == 3, second.text
    assert f"{tmp_path / 'run'}: in use by another process. Wait for it, or choose another folder" in second.text
    assert first.code == 0, first.text
    assert outcome(tmp_path / "run") == expected


def test_one_that_begins_while_another_ends(undisturbed, tmp_path):
    """It saw a run that was not done, and finds it done: what is there stays as it is."""
    config, expected = undisturbed
    late = start(config, tmp_path / "run", partial(_wait_to_open, tmp_path), tmp_path / "late.log")
    wait_for(tmp_path / "waits")
    run = start(config, tmp_path / "run")
    code, before = run.code, files(tmp_path / "run")
    (tmp_path / "go").touch()  # before anything can fail: the late one would wait
    assert code == 0, run.text
    assert late.code == 3, late.text
    assert "another process has done this run just now" in late.text
    assert files(tmp_path / "run") == before
    assert outcome(tmp_path / "run") == expected


def test_a_killed_one_holds_nothing_though_its_fork_lives_on(undisturbed, tmp_path):
    config, expected = undisturbed
    run = start(config, tmp_path / "run", partial(_fork_and_wait, tmp_path))
    wait_for(tmp_path / "fork")
    pid = int((tmp_path / "fork").read_text())
    try:
        other = start(config, tmp_path / "run", log=tmp_path / "other.log")
        assert other.code == 3, other.text
        assert f"in use by pid {run.process.pid} on host " in other.text
        run.kill(signal.SIGKILL)
        assert run.code == -signal.SIGKILL
        again = start(config, tmp_path / "run")
        assert again.code == 0, again.text
        os.kill(pid, 0)  # it lived all the time
    finally:
        os.kill(pid, signal.SIGKILL)
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize("name", ["eval_rows", "samples.json", "samples.md", "summary.json", "status.json"])
def test_killed_before_it_writes_a_result(undisturbed, tmp_path, name):
    """`done` is written when all else is: a run that dies before is not done, and goes on."""
    config, expected = undisturbed
    run = start(config, tmp_path / "run", partial(_die_before, name))
    assert run.code == 9, run.text
    assert status(tmp_path / "run")["state"] == "running"
    assert (tmp_path / "run" / "summary.json").exists() == (name == "status.json")
    again = start(config, tmp_path / "run")
    assert again.code == 0, again.text
    assert "going on from" in again.text
    assert status(tmp_path / "run")["state"] == "done"
    assert outcome(tmp_path / "run") == expected
    assert not litter(tmp_path / "run")


def files(run_dir: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run_dir.rglob("*") if p.is_file()}


# What can be planted.


def _wait(folder: Path) -> None:
    (folder / "waits").touch()
    wait_for(folder / "go")


def _wait_to_write(folder: Path) -> None:
    """Wait when the folder is held, before the first status."""
    known = RunFolder.write_status

    def write_status(self: RunFolder, *given: Any, **named: Any) -> None:
        if not (folder / "waits").exists():
            _wait(folder)
        known(self, *given, **named)

    RunFolder.write_status = write_status  # type: ignore[method-assign]


def _wait_to_open(folder: Path) -> None:
    known = RunFolder.open

    @contextmanager
    def opened(self: RunFolder, *given: Any) -> Iterator[None]:
        _wait(folder)
        with known(self, *given):
            yield

    RunFolder.open = opened  # type: ignore[method-assign]


def _fork_and_wait(folder: Path) -> None:
    """After a step, fork a process that does nothing, and wait for good."""
    known = RunFolder.at

    def at(self: RunFolder, now: int, is_main: bool) -> None:
        known(self, now, is_main)
        if now == 3:
            pid = os.fork()
            if pid:
                (folder / "pid").write_text(str(pid))
                (folder / "pid").rename(folder / "fork")
            while True:
                time.sleep(1)

    RunFolder.at = at  # type: ignore[method-assign]


def _die_before(name: str) -> None:
    """End at once when a result is about to be written; of status.json: when it would say that the run is done."""
    write, write_results = run_folder.write_beside, RunFolder.write_results

    def write_beside(file: Path, text: Any) -> None:
        if file.name == name and (name != "status.json" or '"done"' in text):
            os._exit(9)
        write(file, text)

    def results(self: RunFolder, *words: Any) -> None:
        if name == "eval_rows":
            os._exit(9)
        write_results(self, *words)

    run_folder.write_beside, RunFolder.write_results = write_beside, results  # type: ignore[method-assign]
