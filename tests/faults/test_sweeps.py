"""Sweeps that several processes share, that are killed, stopped and typed again, and whose jobs fail."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import environment
from runs import PATIENCE, Run, litter, start_command, status, steps_of, words_of

PLUGIN = '''
import os, time
from pathlib import Path
from kdx.loss import forward_kl, register

@register
def shared(student, teacher, most: float = 9.0):
    """Forward KL that fails for some points of a sweep, and waits for a file at others."""
    if len(student) > 2:  # not where it is tried on two rows
        if most < 1:
            raise RuntimeError("most is too small")
        if Path(f"hold-{most:g}").exists():
            Path(f"held-{most:g}").touch()
            while not Path("go").exists():
                time.sleep(0.01)
    return forward_kl(student, teacher)
'''
NO_LOCKS = """
import fcntl
from kdx.run import claim

def flock(*_):
    raise OSError("No locks available")

fcntl.flock = flock
claim.SETTLE = 0.3
"""  # from the first job that a process really does: a plug-in is imported then


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Path:
    """A folder to type commands in, with models, data and a plug-in of its own."""
    shutil.copytree(place, tmp_path / "own")
    (tmp_path / "own" / "shared_loss.py").write_text(PLUGIN)
    (tmp_path / "own" / "no_locks.py").write_text(NO_LOCKS)
    return tmp_path / "own"


def words(*more: str) -> list[str]:
    base = ["sweep.name=s", "sweep.baseline=false", "loss.name=shared", "train.max_steps=2"]
    said = {word.split("=")[0] for word in more}
    return ["-m", *words_of(Path(), *(word for word in base if word.split("=")[0] not in said), *more)]


def sweep(folder: Path, *more: str, log: str = "sweep.log", plugins: str = "shared_loss") -> Run:
    """The same command every time, in a process."""
    return start_command(words(*more), folder, folder / log, KDX_PLUGINS=plugins, KDX_CACHE=str(folder / "cache"))


def jobs(folder: Path) -> dict[str, Path]:
    """The job folders by the point in their names."""
    return {file.parent.name.rpartition("_")[0]: file.parent for file in folder.glob("outputs/sweeps/s/*/status.json")}


def states(folder: Path) -> dict[str, str]:
    return {name: status(job)["state"] for name, job in sorted(jobs(folder).items())}


def num_tried(folder: Path) -> dict[str, int]:
    """How often each job was started."""
    return {name: (job / "kdx.log").read_text().count("  writes to ") for name, job in sorted(jobs(folder).items())}


def whole(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file of a folder: what it holds, and when it was written."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in files}


def until(is_so: Callable[[], bool], *runs: Run) -> None:
    """Look until something is so, as long as these live."""
    for _ in range(100 * PATIENCE):
        if is_so():
            return
        assert all(run.process.is_alive() for run in runs), [run.text[-2000:] for run in runs]
        time.sleep(0.01)
    raise AssertionError("stuck")


@pytest.mark.parametrize("locks", ["no locks", "locks"])
def test_two_terminals_share_a_sweep_and_once_it_is_done_nothing_is_repeated(own: Path, locks: str, full: bool) -> None:
    """Each of seven jobs is done once; typed again, no byte of them changes and torch is not imported."""
    if locks == "locks" and not full:
        pytest.skip("tests/test_claim.py has both")
    plugins = "shared_loss,no_locks" if locks == "no locks" else "shared_loss"
    own_words = ["+loss.most=2,3,4,5,6,7", "sweep.baseline=true"]
    terminals = [sweep(own, *own_words, log=f"{i}.log", plugins=plugins) for i in range(2)]
    assert [run.code for run in terminals] == [0, 0], [run.text[-2000:] for run in terminals]
    names = ["baseline", *(f"most-{i}" for i in range(2, 8))]
    assert states(own) == dict.fromkeys(names, "done")
    assert num_tried(own) == dict.fromkeys(names, 1)
    assert not litter(own / "outputs")
    assert sum("compare.html" in run.text for run in terminals) == 1
    students = json.loads((own / "outputs/sweeps/s/compare.json").read_text())["tables"][0]["students"]
    assert len(students) == 7

    before = {name: whole(job) for name, job in jobs(own).items()}
    command = [sys.executable, "-X", "importtime", "-m", "kdx", *words(*own_words)]
    env = environment(KDX_PLUGINS=plugins, KDX_CACHE=str(own / "cache"))
    again = subprocess.run(command, cwd=own, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count(": already done") == 7
    assert again.stdout.count("compare.html") == 1
    imported = {line.rpartition("|")[2].strip() for line in again.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "datasets", "wandb"}
    assert {name: whole(job) for name, job in jobs(own).items()} == before


def test_a_terminal_that_is_killed_leaves_its_job_to_the_next_command(own: Path) -> None:
    (own / "hold-2").touch()
    (own / "hold-4").touch()
    first = sweep(own, "+loss.most=2,3,4", log="first.log")
    until((own / "held-2").exists, first)
    second = sweep(own, "+loss.most=2,3,4", log="second.log")
    until((own / "held-4").exists, first, second)
    first.kill(signal.SIGKILL)
    first.process.join()
    (own / "go").touch()
    assert second.code == 0, second.text
    assert "most-2_" in second.text.split("in use by pid ")[0].splitlines()[-1]
    assert "kdx: 1 of 3 jobs left:" in second.text
    assert "compare.html" not in second.text
    assert states(own) == {"most-2": "running", "most-3": "done", "most-4": "done"}
    third = sweep(own, "+loss.most=2,3,4")
    assert third.code == 0, third.text
    assert num_tried(own) == {"most-2": 2, "most-3": 1, "most-4": 1}
    assert "compare.html" in third.text


def test_workers_that_are_stopped_save_and_jobs_that_fail_are_tried_once_by_each_command(own: Path) -> None:
    for most in (2, 3):
        (own / f"hold-{most}").touch()
    own_words = ["+loss.most=0,0.1,0.2,2,3,4", "sweep.workers=2", "train.save_every=0", "train.max_steps=3"]
    parent = sweep(own, *own_words)
    until(lambda: (own / "held-2").exists() and (own / "held-3").exists(), parent)
    parent.kill(signal.SIGTERM)
    until(lambda: parent.text.count("stopping after this step and saving") == 2, parent)
    (own / "go").touch()
    assert parent.code == 143, parent.text
    failed = ["most-0", "most-0.1", "most-0.2"]
    assert states(own) == dict.fromkeys(failed, "failed") | dict.fromkeys(["most-2", "most-3"], "interrupted")
    assert num_tried(own) == dict.fromkeys([*failed, "most-2", "most-3"], 1)
    again = sweep(own, *own_words)
    assert again.code == 5, again.text
    assert num_tried(own) == dict.fromkeys([*failed, "most-2", "most-3"], 2) | {"most-4": 1}
    assert [steps_of(jobs(own)[f"most-{i}"]) for i in (2, 3, 4)] == [[1, 2, 3]] * 3
    table = again.text.split("kdx: 3 of 6 jobs failed:\n")[1].splitlines()
    assert [line.split("  failed: ")[1] for line in table] == ["RuntimeError: most is too small"] * 3
