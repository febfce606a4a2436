"""A sweep under submitit, in real processes: what the basic launcher promises holds there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment
from standins import write_place

PLUGIN = '''
import os, signal
from pathlib import Path
from kdx.data.sources import register_source
from kdx.loss import forward_kl, register

calls = 0

@register
def own(student, teacher, most: float = 9.0):
    """Forward KL that breaks for one point of a sweep, and is preempted once at another."""
    global calls
    calls += 1
    if most == 0:
        raise RuntimeError("most is too small")
    if most == 2 and calls == 6 and "SUBMITIT_FOLDER" in os.environ and not Path("preempted").exists():
        Path("preempted").touch()
        os.kill(os.getpid(), signal.SIGTERM)  # as Slurm does, and submitit passes over
        os.kill(os.getpid(), signal.SIGUSR2)
    return forward_kl(student, teacher)

@register_source
def asks(path, password: str):
    """Rows for whoever has the password."""
    assert password == "open" + "sesame"
    for i in range(40):
        yield {"source": f"What is {i}?", "target": f"It is {i}, I am sure."}
'''
EXPERIMENT = """# @package _global_
defaults: [{override /data: custom}]
data: {name: asks, path: nowhere, password: '${oc.env:DB_PW}'}
"""
WORDS = ["-m", "--config-dir", "mine", "experiment=own", "teacher=hf", "teacher.path=medium", "student=hf"]
WORDS += ["student.path=small", "loss.name=own", "+loss.most=0,2", "train.max_steps=5", "train.log_every=1"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_place(tmp_path)
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_text(EXPERIMENT)
    return tmp_path


def kdx(place: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m kdx` with the sweep's words and these."""
    env = environment(KDX_PLUGINS="my_plugin", DB_PW="opensesame", **more)
    command = [sys.executable, "-m", "kdx", *WORDS, *words]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)


def test_submitit_with_a_job_that_is_preempted(place: Path) -> None:
    """One job fails, the others are compared. One is preempted, saves, is started again by submitit, and resumes.

    The rows need a password from the environment: the jobs have it, and no file.
    """
    done = kdx(place, "hydra/launcher=submitit_local", "sweep.name=s", "tracking.mode=offline")
    assert done.returncode == 5, done.stderr
    assert "2 points + 1 baseline (alpha=0)" in done.stdout
    sweep = place / "outputs/sweeps/s"
    jobs = {file.parent.name.split("_")[0]: file.parent for file in sweep.glob("*/status.json")}
    states = {name: json.loads((job / "status.json").read_text())["state"] for name, job in jobs.items()}
    assert states == {"baseline": "done", "most-0": "failed", "most-2": "done"}
    table = done.stderr.splitlines()[-2:]
    assert table[0] == "kdx: 1 of 3 jobs failed:"
    assert table[1].endswith(f"{jobs['most-0'].name}  failed: RuntimeError: most is too small")
    (compared,) = json.loads((sweep / "compare.json").read_text())["tables"]
    assert len(compared["students"]) == 2
    for job in jobs.values():
        assert (job / "command.txt").read_text().startswith("python -m kdx -m --config-dir mine experiment=own ")
        assert (job / "plugins" / "my_plugin.py").read_text() == PLUGIN

    assert (place / "preempted").exists()
    job = jobs["most-2"]
    assert (job / "kdx.log").read_text().count("  writes to ") == 2
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5]
    run_id = (job / "wandb_id.txt").read_text().strip()
    assert len(list((sweep / "wandb").glob(f"offline-run-*-{run_id}"))) == 1  # with all its steps

    assert len(list(sweep.rglob("*.pkl"))) >= 3
    files = [file for file in (place / "outputs").rglob("*") if file.is_file()]
    assert not [file for file in files if b"opensesame" in file.read_bytes()]


def test_a_launcher_that_can_start_nothing_is_the_machines_fault(place: Path) -> None:
    done = kdx(place, "hydra/launcher=slurm", "sweep.name=nowhere", PATH="")
    assert done.returncode == 3
    assert "hydra/launcher: slurm needs srun. Run it on a node" in done.stderr.splitlines()[-1]
    assert not list(place.glob("outputs/sweeps/nowhere/*/status.json"))
