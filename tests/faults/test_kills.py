"""Runs killed at random moments, in real processes: nothing is lost, and every run ends with the straight run's bits."""

import random
import signal
import time
from pathlib import Path

import pytest
from runs import PATIENCE, config_of, litter, outcome, start, status, unreadable


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The config of the runs below, what they end in, and how many seconds one takes."""
    config = config_of(place, "train.micro_batch_size=2", "eval.every=10")
    for name in ("first", "straight"):  # the first process pays for what the others find
        began, run_dir = time.monotonic(), tmp_path_factory.mktemp(name) / "run"
        run = start(config, run_dir)
        assert run.code == 0, run.text
    return config, outcome(run_dir), time.monotonic() - began


def test_sigkill(undisturbed, tmp_path, full, figure):
    config, expected, seconds = undisturbed
    wanted = 200 if full else 8
    kills = runs = broken = failed = equal = with_checkpoint = 0
    moments = random.Random(0)
    while kills < wanted:
        run_dir = tmp_path / f"run-{runs}"
        runs += 1
        while True:
            began, is_first = time.monotonic(), not run_dir.exists()
            run = start(config, run_dir)
            run.process.join(moments.uniform(0, 1.1 * seconds))
            run.kill(signal.SIGKILL)
            if run.code == 0:
                if is_first:  # the machine is faster now: kills would come too late
                    seconds = min(seconds, time.monotonic() - began)
                break
            if run.code != -signal.SIGKILL:
                failed += 1
                print(run.text)
                break
            kills += 1
            broken += len(unreadable(run_dir))
            with_checkpoint += any(run_dir.glob("checkpoints/step-*"))
        equal += run.code == 0 and outcome(run_dir) == expected and not litter(run_dir)
    figure(
        f"SIGKILL: {kills} kills ({with_checkpoint} with a checkpoint) in {runs} runs: {broken} unreadable, "
        f"{failed} failed to resume, {equal}/{runs} bitwise equal"
    )
    assert (broken, failed, equal) == (0, 0, runs)
    if full:  # else the moments were not where it matters
        assert with_checkpoint > kills / 5


def test_sigterm(undisturbed, tmp_path, full, figure):
    config, expected, seconds = undisturbed
    wanted = 40 if full else 2
    stopped = runs = 0
    slowest = 0.0
    moments = random.Random(1)
    while stopped < wanted:
        run_dir = tmp_path / f"run-{runs}"
        runs += 1
        run = start(config, run_dir)
        wait_for(run_dir / "metrics.jsonl")
        run.process.join(moments.uniform(0, seconds / 2))
        began = time.monotonic()
        run.kill(signal.SIGTERM)
        if run.code == 0 or status(run_dir)["state"] == "done":  # past its last step: nothing was left to stop
            assert outcome(run_dir) == expected
            continue
        slowest = max(slowest, time.monotonic() - began)
        stopped += 1
        step = status(run_dir)["step"]
        assert (run.code, status(run_dir)["state"]) == (143, "interrupted")
        assert (run_dir / "trained.json").exists() or (run_dir / f"checkpoints/step-{step:08d}").is_dir()
        assert not unreadable(run_dir)
        again = start(config, run_dir)
        assert again.code == 0, again.text
        assert outcome(run_dir) == expected and not litter(run_dir)
    figure(f"SIGTERM: {stopped} stops, each saved its step; resumed and bitwise equal; slowest {slowest:.2f} s")


def wait_for(file: Path) -> None:
    for _ in range(PATIENCE * 100):
        if file.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{file} never came")
