"""A sweep under submitit, in real processes: what the basic launcher promises holds there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment
from standins import write_place

PLUGIN = '''
import os, signal
from pathlib import Path
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
'''
WORDS = ["-m", "teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=pairs"]
WORDS += ["data.path=pairs.jsonl", "loss.name=own", "train.max_steps=5", "train.log_every=1"]
OWN = environment(KDX_PLUGINS="my_plugin")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    write_place(folder)
    (folder / "my_plugin.py").write_text(PLUGIN)
    return folder


def kdx(place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m kdx` with the sweep's words and these."""
    left_out = ("WANDB_", "HF_", "KDX_", "OMP_", "MKL_", "CUDA_", "SLURM_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    clean |= {"HF_HUB_OFFLINE": "1", "NETRC": "none", "KDX_PLUGINS": "my_plugin"}
    command = [sys.executable, "-m", "kdx", *WORDS, "+loss.most=0,2", *words]
    return subprocess.run(command, cwd=place, env=clean | environment, capture_output=True, text=True, check=False)


def states(sweep: Path) -> dict[str, str]:
    return {f.parent.name: json.loads(f.read_text())["state"] for f in sorted(sweep.glob("*/status.json"))}


def check_outcome(told: subprocess.CompletedProcess[str], sweep: Path) -> None:
    """One job failed and is told of, the baseline and the other are done and compared."""
    assert told.returncode == 5, told.stderr
    assert "2 points + 1 baseline (alpha=0)" in told.stdout
    jobs = states(sweep)
    (failed,) = (name for name, state in jobs.items() if state == "failed")
    assert sorted(name.split("_")[0] for name in jobs) == ["baseline", "most-0", "most-2"]
    assert sorted(jobs.values()) == ["done", "done", "failed"]
    assert failed.startswith("most-0_")
    last = told.stderr.splitlines()[-2:]
    assert last[0] == "kdx: 1 of 3 jobs failed:"
    assert last[1].endswith(f"{failed}  failed: RuntimeError: most is too small")
    (table,) = json.loads((sweep / "compare.json").read_text())["tables"]
    assert len(table["students"]) == 2
    for job in jobs:
        assert (sweep / job / "command.txt").read_text().startswith("python -m kdx -m teacher=hf teacher.path=medium ")
        assert (sweep / job / "plugins" / "my_plugin.py").read_text() == PLUGIN


def test_submitit_with_a_job_that_is_preempted(place: Path) -> None:
    """It saves, is started again by submitit, and goes on in its folder under its W&B id, as if it had not been."""
    words = ("hydra/launcher=submitit_local", "sweep.name=submitit", "tracking.mode=offline")
    sweep = place / "outputs" / "sweeps" / "submitit"
    check_outcome(kdx(place, *words, OMP_NUM_THREADS="1"), sweep)
    assert (place / "preempted").exists()
    (job,) = sweep.glob("most-2_*")
    assert (job / "kdx.log").read_text().count("  writes to ") == 2
    steps = [
        json.loads(line)["step"] for line in (job / "metrics.jsonl").read_text().splitlines() if "train/loss" in line
    ]
    assert steps == [1, 2, 3, 4, 5]
    kept = (job / "wandb_id.txt").read_text().strip()
    assert len(list((sweep / "wandb").glob(f"offline-run-*-{kept}"))) == 2


def test_submitit_keeps_no_secret_of_the_environment(place: Path) -> None:
    """A source takes its password from the environment, by one's own YAML: the job has it, and no file."""
    (place / "asks.py").write_text(
        "from pathlib import Path\nfrom kdx.data.sources import register_source\n\n"
        "@register_source\ndef asks(path, password: str):\n    assert password == 'open' + 'sesame'\n"
        "    for i in range(20):\n        yield {'source': f'What is {i}?', 'target': f'It is {i}.'}\n"
    )
    (place / "mine/experiment").mkdir(parents=True)
    (place / "mine/experiment/own.yaml").write_text(
        "# @package _global_\ndefaults: [{override /data: custom}]\n"
        "data: {name: asks, path: nowhere, password: '${oc.env:DB_PW}'}\n"
    )
    words = ["--config-dir", "mine", "experiment=own", "hydra/launcher=submitit_local", "sweep.name=secret"]
    words += ["sweep.baseline=false", "tracking.mode=disabled", "train.max_steps=1", "loss.temperature=1"]
    base = [
        word
        for word in WORDS
        if word.split("=")[0] not in ("data", "data.path", "loss.name", "+loss.most", "train.max_steps")
    ]
    command = [sys.executable, "-m", "kdx", *base, *words]
    told = environment(KDX_PLUGINS="asks", DB_PW="opensesame")
    done = subprocess.run(command, cwd=place, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [file for file in (place / "outputs").rglob("*") if file.is_file()]
    assert not [file for file in files if b"opensesame" in file.read_bytes()]
    assert len(list((place / "outputs/sweeps/secret").rglob("*.pkl"))) == 2


def test_a_launcher_that_can_start_nothing_is_the_machines_fault(place: Path) -> None:
    told = kdx(place, "hydra/launcher=slurm", "sweep.name=nowhere", PATH="")
    assert told.returncode == 3
    assert "hydra/launcher: slurm needs srun. Run it on a node" in told.stderr.splitlines()[-1]
    assert states(place / "outputs" / "sweeps" / "nowhere") == {}
