"""Killed and stopped at random moments: nothing is lost, and every run ends with the bits of the straight one."""

import random
import signal
import time
from pathlib import Path

import pytest
from runs import PATIENCE, config_of, litter, outcome, start, status, straight, unreadable


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The words of the runs below, what they end in, and how long one takes."""
    config = config_of(place, "train.micro_batch_size=2")
    straight(config, tmp_path_factory.mktemp("first") / "run")  # the first process pays for what the others find
    return config, *straight(config, tmp_path_factory.mktemp("straight") / "run")


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
        f"SIGKILL: {kills} kills ({with_checkpoint} with a checkpoint there) in {runs} runs: {broken} unreadable, "
        f"{failed} failed to go on, {equal}/{runs} bitwise equal"
    )
    assert (broken, failed, equal) == (0, 0, runs)
    assert with_checkpoint > kills / 5  # else the moments were not where it matters


def test_sigterm(undisturbed, tmp_path, full, figure):
    config, expected, seconds = undisturbed
    wanted = 40 if full else 4
    stopped = code_143 = equal = kept = runs = 0
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
        if run.code == 0 or status(run_dir)["state"] == "done":  # it was past its last step: nothing was left to stop
            assert outcome(run_dir) == expected
            assert not litter(run_dir)
            continue
        slowest = max(slowest, time.monotonic() - began)
        stopped += 1
        code_143 += run.code == 143
        step = status(run_dir)["step"]
        kept += (run_dir / "checkpoints" / f"step-{step:08d}").is_dir() and not unreadable(run_dir)
        assert status(run_dir)["state"] == "interrupted"
        again = start(config, run_dir)
        equal += again.code == 0 and outcome(run_dir) == expected and not litter(run_dir)
    figure(
        f"SIGTERM: {stopped} stops: {code_143} exit 143, {kept} saved the step they were at, "
        f"{equal} bitwise equal, slowest {slowest:.2f} s"
    )
    assert (code_143, kept, equal) == (stopped, stopped, stopped)


def wait_for(file: Path) -> None:
    for _ in range(PATIENCE * 100):
        if file.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{file} never came")
