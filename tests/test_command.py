"""The command as people type it, in processes of its own: the mission's two commands, plug-ins, the hub, W&B."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from standins import FUSSY, put_on_hub, write_chats, write_dialogpt, write_pairs

PLUGIN = (
    FUSSY
    + """
from kdx.data.sources import register_source

@register_source
def tickets(path, min_turns=2):
    for i in range(30):
        yield {"source": f"What is ticket {i}?", "target": f"It is ticket {i} of {path}, of {min_turns} turns."}
"""
)


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
    (folder / "my_plugin.py").write_text(PLUGIN)
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


def states(sweep: Path) -> dict[str, str]:
    return {f.parent.name: json.loads(f.read_text())["state"] for f in sorted(sweep.glob("*/status.json"))}


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


def test_a_sweep_with_a_loss_and_a_source_of_ones_own(place: Path) -> None:
    """A job that fails does not stop the rest; the same command tries only that one again."""
    words = ["-m", "teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=custom"]
    words += ["data.name=tickets", "data.path=t.db", "data.min_turns=3", "loss.name=fussy", "loss.most=0,2"]
    words += ["train.max_steps=2", "sweep.name=own", "tracking.mode=disabled"]
    told = kdx(place, *words, KDX_PLUGINS="my_plugin")
    assert told.returncode == 5, told.stderr
    assert "2 points + 1 baseline (alpha=0); sweep.baseline=false leaves them out" in told.stdout
    folder = place / "outputs" / "sweeps" / "own"
    done = states(folder)
    assert sorted(done.values()) == ["done", "done", "failed"]
    (failed,) = (name for name, state in done.items() if state == "failed")
    assert failed.startswith("most-0_")
    assert json.loads((folder / failed / "status.json").read_text())["reason"] == "RuntimeError: most is too small"
    assert "your own code" in told.stderr
    assert (folder / failed / "plugins" / "my_plugin.py").read_text() == PLUGIN
    whole = [folder / name for name, state in done.items() if state == "done"]
    before = {p: p.stat().st_mtime_ns for job in whole for p in job.rglob("*") if p.is_file()}
    assert kdx(place, *words, KDX_PLUGINS="my_plugin").returncode == 5
    assert before == {p: p.stat().st_mtime_ns for job in whole for p in job.rglob("*") if p.is_file()}
    assert json.loads((folder / "compare.json").read_text())["tables"]


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
