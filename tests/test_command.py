"""The command as people type it, in processes of its own: the documented run, the hub, W&B, a stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from standins import put_on_hub, write_chats, write_dialogpt, write_pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to type commands in, with a stand-in for the hub client's cache."""
    folder = tmp_path_factory.mktemp("command")
    medium = write_dialogpt(folder / "medium", 4, 32, pickled=True)
    small = write_dialogpt(folder / "small", 2, 16, pickled=False, seed=1)
    put_on_hub(folder / "hub", "microsoft/DialoGPT-medium", medium)
    put_on_hub(folder / "hub", "microsoft/DialoGPT-small", small)
    write_pairs(folder / "pairs.jsonl")
    write_chats(folder / "chats.jsonl")
    return folder


def kdx(place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m kdx` with words, offline and without a W&B login."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HF_", "KDX_"))}
    clean |= {
        "HF_HUB_CACHE": str(place / "hub"),
        "KDX_CACHE": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "NETRC": "none",
    }
    command = [sys.executable, "-m", "kdx", *words]
    return subprocess.run(command, cwd=place, env=clean | environment, capture_output=True, text=True, check=False)


def test_the_documented_run(place: Path) -> None:
    """Models from the hub's cache, one of them pickled; W&B's own client keeps the run offline and reads it back."""
    words = ("teacher=dialogpt_medium", "student=dialogpt_small", "data=messages", "data.path=chats.jsonl")
    told = kdx(place, *words, "train.max_steps=3", "train.log_every=1", "tracking.tags=[one,two]", WANDB_NOTES="noted")
    assert told.returncode == 0, told.stderr
    assert "microsoft/DialoGPT-medium" in told.stdout
    assert "lr 2e-05 (optim/adamw)" in told.stdout
    assert "Traceback" not in told.stderr
    (run_dir,) = (p.parent for p in place.glob("outputs/*/*/summary.json"))
    summary = json.loads((run_dir / "summary.json").read_text())
    (kept,) = place.glob("outputs/*/wandb/offline-run-*")
    assert "wandb sync " in told.stdout and kept.name in told.stdout
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(kept)]
    record = json.loads(subprocess.run(inspect, capture_output=True, text=True, check=True).stdout)
    assert record["config"]["loss"]["temperature"] == 2
    values = record["summary"]
    flat = (
        values
        if "eval/kl" in values
        else {f"{k}/{name}": v for k, part in values.items() if isinstance(part, dict) for name, v in part.items()}
    )
    assert flat["eval/kl"] == pytest.approx(summary["student"]["kl"])
    assert flat["untouched/kl"] == pytest.approx(summary["untouched"]["kl"])


def test_a_stopped_run_says_how_to_resume(place: Path) -> None:
    """A real SIGTERM; the command it names goes on to the end."""
    (place / "stops.py").write_text(
        "import os, signal\nfrom kdx.loss import forward_kl, register\ncalls = 0\n"
        "@register\ndef stops(student, teacher):\n    global calls\n    calls += 1\n"
        "    if calls == 6:\n        os.kill(os.getpid(), signal.SIGTERM)\n    return forward_kl(student, teacher)\n"
    )
    words = ["teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=pairs"]
    words += ["data.path=pairs.jsonl", "loss.name=stops", "train.max_steps=8", "hydra.run.dir=outputs/stopped"]
    told = kdx(place, *words, "tracking.mode=disabled", KDX_PLUGINS="stops")
    assert told.returncode == 143, told.stderr
    resume = next(word for word in told.stderr.split() if word.startswith("run.resume="))
    resumed = kdx(place, resume, KDX_PLUGINS="stops")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert json.loads((place / "outputs/stopped/summary.json").read_text())["run"]["steps"] == 8
