"""Memory that runs out, in real processes: exit 3, what saves memory in order, and the last checkpoint stands."""

import json
import resource
from pathlib import Path

from runs import config_of, start, start_command
from standins import write_dialogpt, write_pairs

from kdx.run import checkpoint

ORDER = [
    "train.micro_batch_size", "train.gradient_checkpointing=true", "train.precision=bf16", "optim=adamw_8bit",
    "teacher.quantization=8bit", "teacher.store=on",
]  # fmt: skip
LOSS = """
import os
import torch
from kdx.loss import forward_kl, register

calls = 0

@register
def greedy(student, teacher):
    global calls
    calls += 1
    if calls > int(os.environ["GREEDY_FROM"]):
        torch.empty(2**50)
    return forward_kl(student, teacher)
"""


def words_of(place: Path) -> list[str]:
    write_dialogpt(place / "teacher", 2, 16, pickled=False)
    write_dialogpt(place / "student", 1, 16, pickled=False)
    write_pairs(place / "pairs.jsonl")
    words = ["teacher=hf", "teacher.path=teacher", "student=hf", "student.path=student", "data=pairs"]
    return [*words, "data.path=pairs.jsonl", "data.validation=4", "tracking.mode=disabled", "teacher.store=off"]


def check(code: int, text: str) -> None:
    assert code == 3, text
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("kdx: error: ")]
    assert line.startswith("kdx: error: memory: ran out of memory (")
    assert [line.index(word) for word in ORDER] == sorted(line.index(word) for word in ORDER)


def test_in_training(tmp_path: Path, figure) -> None:
    words = [*words_of(tmp_path), "train.max_steps=6", "train.save_every=1", "hydra.run.dir=run", "loss.name=greedy"]
    (tmp_path / "greedy.py").write_text(LOSS)
    stopped = start_command(words, tmp_path, tmp_path / "log", KDX_PLUGINS="greedy", GREEDY_FROM="4")
    check(stopped.code, stopped.text)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"].startswith("memory: ran out of memory (")
    newest, skipped = checkpoint.newest(tmp_path / "run")
    assert newest is not None
    assert skipped == []
    again = start_command(["run.resume=run"], tmp_path, tmp_path / "log", KDX_PLUGINS="greedy", GREEDY_FROM="400")
    assert (again.code, json.loads((tmp_path / "run/status.json").read_text())["step"]) == (0, 6), again.text
    figure(f"memory ran out in training: exit 3, {newest.name} verifies, resumed to the end")


def test_under_a_limit_of_the_address_space(place: Path, tmp_path: Path) -> None:
    """A model of 1.6 GB where 600 MB are left."""
    write_dialogpt(tmp_path / "wide", 1, 16, pickled=False)
    shape = json.loads((tmp_path / "wide/config.json").read_text())
    (tmp_path / "wide/config.json").write_text(json.dumps(shape | {"n_embd": 8192, "n_inner": 8192}))
    run = start(config_of(place, "student=random", f"student.path={tmp_path / 'wide'}"), tmp_path / "run", limit_memory)
    check(run.code, run.text)


def limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 600 * 2**20,) * 2)
