"""Sweeps that are killed: every job is done once, what is done stays as it is, and what has changed since runs again."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from processes import environment
from runs import PATIENCE, litter, outcome, start_command, status, words_of, write_dialogpt, write_pairs
from standins import FUSSY


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Path:
    """A folder to type commands in, with models and data of its own."""
    shutil.copytree(place, tmp_path / "own")
    (tmp_path / "own" / "fussy_loss.py").write_text(FUSSY)
    return tmp_path / "own"


def sweep(folder: Path, *words: str):
    """The same command every time: its run in a process."""
    base = ["-m", "sweep.name=s", "train.micro_batch_size=4", *words]
    return start_command(
        [*base[:1], *words_of(Path(), *base[1:])],
        folder, folder / "told.log", KDX_PLUGINS="fussy_loss", KDX_STORE=str(folder / "store"),
    )  # fmt: skip


def jobs(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.glob("outputs/sweeps/s/*/status.json"))


def whole(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file of a folder: what it holds, and when it was written."""
    return {
        str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file() and ".tmp-" not in str(file)  # what a kill left of a removal is removed
    }


def test_a_sweep_that_is_killed_again_and_again(own, tmp_path, full, figure):
    words = (
        "loss.temperature=1,2,4" if full else "loss.temperature=1,2",
        f"sweep.baseline={'true' if full else 'false'}",
        "train.max_steps=15",
        "train.save_every=3",
    )
    shutil.copytree(own, tmp_path / "straight")
    straight = sweep(tmp_path / "straight", *words)
    assert straight.code == 0, straight.text
    expected = {job.name: outcome(job) for job in jobs(tmp_path / "straight")}
    number = len(expected)
    assert number == (4 if full else 2)
    wanted, kills, touched, resumed, num_due, equal, sweeps = 20 if full else 2, 0, 0, 0, 0, 0, 0
    moments = random.Random(0)
    while kills < wanted or not num_due:  # where the machine is slow, kills may come before any checkpoint
        sweeps += 1
        assert sweeps < 10
        due = set()  # jobs to be gone on with, and how often they had been before
        shutil.rmtree(own / "outputs", ignore_errors=True)
        while True:
            done = [job for job in jobs(own) if status(job)["state"] == "done"]
            known = {job: whole(job) for job in done}
            due |= {(j, times_resumed(j)) for j in jobs(own) if j not in done and any(j.glob("checkpoints/step-*"))}
            run = sweep(own, *words)
            wait_for_more(own, run, moments.randrange(1, 20))
            # A fast machine is past the job in half a second: every other kill comes while steps are done.
            run.process.join(moments.uniform(0, 0.5) * moments.randrange(2))
            run.kill(signal.SIGKILL)
            code = run.code
            touched += sum(whole(job) != known[job] for job in done)
            if code == 0:
                break
            assert code == -signal.SIGKILL, run.text
            kills += 1
        assert {job.name for job in jobs(own)} == expected.keys()
        num_due += len(due)
        resumed += sum(times_resumed(job) > before for job, before in due)
        equal += sum(outcome(job) == expected[job.name] and not litter(job) for job in jobs(own))
    figure(
        f"sweeps of {number} jobs: {kills} kills in {sweeps} sweeps: {touched} done folders touched, {resumed}/{num_due} gone on "
        f"with from a checkpoint, {equal}/{number * sweeps} jobs done once and bitwise equal"
    )
    assert (touched, resumed, equal) == (0, num_due, number * sweeps)


def test_a_parallel_sweep_whose_processes_are_all_told_to_stop(own, tmp_path, full, figure):
    """As by Ctrl-C, Slurm or a container, at any moment from the imports on: no job dies, none is lost."""
    if not full:
        pytest.skip("tests/test_launchers.py stops such sweeps at chosen moments")
    words = ["sweep.name=s", "sweep.baseline=false", "hydra/launcher=parallel", "hydra.launcher.n_jobs=2"]
    words += ["loss.temperature=1,2,4", "train.max_steps=15", "train.save_every=0", "train.micro_batch_size=4"]
    command = [sys.executable, "-m", "kdx", "-m", *words_of(Path(), *words)]
    env = environment(KDX_STORE=str(own / "store"))
    shutil.copytree(own, tmp_path / "straight")
    began = time.monotonic()
    subprocess.run(command, cwd=tmp_path / "straight", env=env, check=True, capture_output=True)
    seconds = time.monotonic() - began
    expected = {job.name: outcome(job) for job in jobs(tmp_path / "straight")}
    stops, resumed, equal, sweeps = 0, 0, 0, 0
    moments = random.Random(2)
    while stops < 20:
        sweeps += 1
        shutil.rmtree(own / "outputs", ignore_errors=True)
        while True:
            known = {job: whole(job) for job in jobs(own) if status(job)["state"] == "done"}
            number = moments.choice([signal.SIGTERM, signal.SIGINT])
            with (own / "told.log").open("w") as log:
                process = subprocess.Popen(command, cwd=own, env=env, stdout=log, stderr=log, start_new_session=True)
            if stops % 2:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(moments.uniform(0, seconds))
            else:  # while they train
                steps = num_steps(own) + moments.randrange(1, 20)
                while process.poll() is None and num_steps(own) < steps:
                    time.sleep(0.01)
            if process.poll() is None:
                os.killpg(process.pid, number)
            code, told = process.wait(), (own / "told.log").read_text()
            assert all(whole(job) == files for job, files in known.items())
            assert not list(own.glob("outputs/sweeps/s/.notes-*"))
            if code == 0:
                break
            stops += 1
            assert code in (128 + number, -number), told  # the latter before kdx is there, or when all is done
            assert {status(job)["state"] for job in jobs(own)} <= {"done", "interrupted"}, told
        resumed += sum(map(times_resumed, jobs(own)))
        equal += sum(outcome(job) == expected[job.name] and not litter(job) for job in jobs(own))
    figure(
        f"parallel sweeps of 3 jobs, all processes told to stop: {stops} stops, {resumed} jobs gone on with, "
        f"{equal}/{3 * sweeps} done once and bitwise equal"
    )
    assert equal == 3 * sweeps
    assert resumed


def times_resumed(job: Path) -> int:
    return (job / "kdx.log").read_text().count("going on from")


def wait_for_more(folder: Path, run, steps: int) -> None:
    """Wait until a sweep has done some steps more, or has ended."""
    begun = num_steps(folder)
    for _ in range(PATIENCE * 100):
        run.process.join(0.01)
        if run.process.exitcode is not None or num_steps(folder) >= begun + steps:
            return


def num_steps(folder: Path) -> int:
    return sum(file.read_bytes().count(b"train/loss") for file in folder.glob("outputs/sweeps/s/*/metrics.jsonl"))


def test_what_was_never_tried_comes_before_what_failed(own, full, figure):
    """Of six points (three in short) the first fails and the third is killed: those never tried come first, then that one, then the first."""
    values = "0,2,3,4,5,6" if full else "0,2,3"
    number = len(values.split(","))
    words = ("loss.name=fussy", f"+loss.most={values}", "sweep.baseline=false", "train.max_steps=2")
    first = sweep(own, *words)
    for _ in range(PATIENCE * 100):
        first.process.join(0.01)
        if sum(status(job)["state"] == "done" for job in jobs(own)) >= 1 or first.process.exitcode is not None:
            break
    first.kill(signal.SIGKILL)
    assert first.code == -signal.SIGKILL
    done = [job.name for job in jobs(own) if status(job)["state"] == "done"]
    cut_off = [job.name for job in jobs(own) if status(job)["state"] == "running"]
    again = sweep(own, *words)
    assert again.code == 5, again.text
    order = [line.rsplit("/", 1)[-1] for line in again.text.splitlines() if line.startswith("kdx: job ")]
    assert order[-1].startswith("most-0_")
    assert not cut_off or order[-2] == cut_off[0]
    assert len(order) == number
    states = [status(job)["state"] for job in jobs(own)]
    assert sorted(states) == ["done"] * (number - 1) + ["failed"]
    (failed,) = (job for job in jobs(own) if status(job)["state"] == "failed")
    assert "most is too small" in status(failed)["reason"]
    assert "most is too small" in (own / "outputs/sweeps/s/compare.md").read_text()
    last = sweep(own, *words)
    assert last.code == 5
    assert last.text.count("is done already") == number - 1
    figure(
        f"a sweep with a job that raises, killed with {len(done)} done: the rest first, {number - 1} done, exit 5; again: 1 starts"
    )


def other_plugin(folder: Path) -> None:
    (folder / "fussy_loss.py").write_text(FUSSY + "# mended\n")


def other_data(folder: Path) -> None:
    write_pairs(folder / "pairs.jsonl", 41)


def other_teacher(folder: Path) -> None:
    shutil.rmtree(folder / "teacher")
    write_dialogpt(folder / "teacher", 2, 16, pickled=False, seed=7)


def test_what_changed_since_makes_a_done_job_stale(own, full, figure):
    num_jobs = 2 if full else 1
    temperature = "1,2" if full else "1"
    words = (f"loss.temperature={temperature}", "sweep.baseline=false", "train.max_steps=2")
    assert sweep(own, *words).code == 0
    kept = {job: whole(job) for job in jobs(own)}
    changes = ((other_plugin, "plugins_digest"), (other_data, "fingerprint"), (other_teacher, "teacher_digest"))
    changes = changes if full else changes[:1]
    for number, (change, key) in enumerate(changes, 2):
        change(own)
        again = sweep(own, *words)
        assert again.code == 0, again.text
        assert again.text.count(" is stale (") == num_jobs
        assert key in again.text
        new = set(jobs(own)) - kept.keys()
        assert [job.name.rsplit("-", 1)[1] for job in sorted(new)] == [str(number)] * num_jobs
        assert {job: whole(job) for job in kept} == kept
        kept |= {job: whole(job) for job in new}
    once_more = sweep(own, *words)
    assert once_more.code == 0
    assert once_more.text.count("is done already") == num_jobs, once_more.text
    assert {job: whole(job) for job in jobs(own)} == kept
    (table,) = json.loads((own / "outputs/sweeps/s/compare.json").read_text())["tables"]
    assert len(table["students"]) == num_jobs
    assert "is stale" in (own / "outputs/sweeps/s/compare.md").read_text()
    figure(
        f"stale: {', '.join(key for _, key in changes)} changed in place: all listed and run in new folders, the old ones untouched"
    )
