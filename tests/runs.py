"""Small runs, in this process or in one of their own, the faults that are planted in them, and what they must leave.

A fault is a function of a pytest.MonkeyPatch: in this process what it changes is undone after the run.
"""

import hashlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SERVER
from processes import environment as clean_environment
from standins import write_dialogpt, write_pairs

from kdx import loss
from kdx.cli import compose, guarded, main
from kdx.config import Config
from kdx.distill import distill
from kdx.run import checkpoint
from kdx.run.folder import RunFolder
from kdx.teacher import Answer, Teacher

Fault = Callable[[pytest.MonkeyPatch], None]

torch.set_num_threads(1)
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # Python 3.11's fork server finds what it preloads only there
VARYING = ("speed/tokens_per_second", "speed/generation_seconds", "speed/training_seconds", "memory/peak_bytes")
PATIENCE = 600  # seconds that a small run may take before it counts as stuck
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}


def make_place(folder: Path) -> Path:
    """Write a teacher, a student with dropout, and data, all small."""
    write_dialogpt(folder / "teacher", 2, 16, pickled=False)
    write_dialogpt(folder / "student", 2, 16, pickled=False, seed=1, **DROPOUT)
    write_pairs(folder / "pairs.jsonl")
    return folder


def words_of(place: Path, *words: str) -> list[str]:
    """Return the words of a short run with dropout and 4 micro-batches a step; a test's own words replace them."""
    base = [
        "teacher=hf", f"teacher.path={place / 'teacher'}", "student=hf", f"student.path={place / 'student'}",
        "data=pairs", f"data.path={place / 'pairs.jsonl'}", "data.validation=4", "teacher.store=off",
        "teacher.precision=fp32", "train.precision=fp32", "train.max_steps=30", "train.batch_size=4",
        "train.micro_batch_size=1", "train.log_every=1", "train.save_every=5", "optim.lr=1e-2",
        "tracking.mode=disabled", "tracking.samples=false", "eval.num_prompts=0",
    ]  # fmt: skip
    keys = {word.split("=")[0] for word in words}
    keys |= {"train.max_steps"} if "train.epochs" in keys else set()
    return [word for word in base if word.split("=")[0] not in keys] + list(words)


def config_of(place: Path, *words: str) -> Config:
    return compose(words_of(place, *words))


def run_here(config: Config, run_dir: Path, fault: Fault | None = None) -> int:
    """Run, or resume, in this process → the exit code of the command."""

    def work() -> int:
        distill(config, run_dir)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        if fault:
            fault(patch)
        return guarded(work, run_dir)


@dataclass
class Run:
    """A run in a process of its own."""

    process: Any
    log: Path

    @property
    def code(self) -> int:
        """Wait for its end → its exit code, or minus the signal that killed it."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"stuck: {self.text[-2000:]}"
        return int(self.process.exitcode)

    @property
    def text(self) -> str:
        """What it printed."""
        return self.log.read_text()

    def kill(self, number: signal.Signals) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)


def start(config: Config, run_dir: Path, fault: Fault | None = None, log: Path | None = None) -> Run:
    """Start or resume a run in a process that is forked after the imports; what it prints goes to `log`."""
    log = log or run_dir.with_name(f"{run_dir.name}.log")
    process = SERVER.Process(target=_child, args=(config, run_dir, log, fault))
    process.start()
    return Run(process, log)


def _child(config: Config, run_dir: Path, log: Path, fault: Fault | None) -> None:
    _print_to(log)
    sys.exit(run_here(config, run_dir, fault))


def start_command(words: list[str], folder: Path, log: Path, **environment: str) -> Run:
    """Start `python -m kdx` with words in a folder; what it prints goes to `log`."""
    process = SERVER.Process(target=_command, args=(words, folder, log, environment))
    process.start()
    return Run(process, log)


def _command(words: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    os.chdir(folder)
    kept = {name: os.environ[name] for name in ("KDX_STORE", "KDX_CACHE")}
    clean = clean_environment(**kept | environment)
    os.environ.clear()  # it was forked from whatever the first test of the session had set
    os.environ.update(clean)
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # whatever it does, the machine is not in danger
    _print_to(log)
    sys.argv = ["kdx", *words]
    main()


def _print_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # A forked torch makes its thread pool anew when it is first asked: two threads that ask at once would race.
    torch.set_num_threads(torch.get_num_threads())


# ---- faults


def at_step(step: int, act: Callable[[], object]) -> Fault:
    """Do something when a step is done."""
    return partial(_at_step, step, act)


def _at_step(step: int, act: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    known = RunFolder.at

    def at(self: RunFolder, now: int) -> None:
        known(self, now)
        if now == step:
            act()

    patch.setattr(RunFolder, "at", at)


def signal_self(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def signal_at(step: int, number: signal.Signals = signal.SIGTERM) -> Fault:
    """Send a signal to the run itself when a step is done."""
    return at_step(step, partial(signal_self, number))


def both(*faults: Fault) -> Fault:
    return partial(_all, faults)


def _all(faults: tuple[Fault, ...], patch: pytest.MonkeyPatch) -> None:
    for fault in faults:
        fault(patch)


def nan_in_gradient(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make the gradient of the divergence `planted` NaN in the second micro-batch of a step."""
    calls = 0

    def planted(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += len(student) > 2  # options are checked with two positions
        nought = (0 * student).sum(-1)
        return loss.forward_kl(student, teacher) + (nought.abs().sqrt() if calls == 2 * step else nought)

    patch.setitem(loss._REGISTRY, "planted", planted)


def nan_in_teacher(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make the teacher's answer to the first row of a step NaN, then and whenever the row is asked for again."""
    known = Teacher.answers
    calls = 0
    broken: list[str] = []

    def answers(self: Teacher, micro_batches: Any) -> Iterator[Answer]:
        nonlocal calls
        calls += 1
        for i, (batch, answer) in enumerate(zip(micro_batches, known(self, micro_batches), strict=True)):
            if calls == step and i == 0:
                broken.append(batch.row_ids[0])
            if broken and broken[0] in batch.row_ids:
                hidden = answer.hidden.clone()
                hidden[batch.row_of == batch.row_ids.index(broken[0])] = float("nan")
                answer = Answer(hidden, answer.head)
            yield answer

    patch.setattr(Teacher, "answers", answers)


# ---- what a run must have left


def steps_of(run_dir: Path) -> list[int]:
    return [line["step"] for line in lines(run_dir / "metrics.jsonl") if "train/loss" in line]


def losses_of(run_dir: Path) -> list[float | None]:
    return [line["train/loss"] for line in lines(run_dir / "metrics.jsonl") if "train/loss" in line]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def status(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "status.json").read_text()))


def log_of(run_dir: Path) -> str:
    return (run_dir / "kdx.log").read_text()


def outcome(run_dir: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the sha256 of the student's weights, and every logged figure but those of speed and memory."""
    digest = hashlib.sha256((run_dir / "student" / "model.safetensors").read_bytes()).hexdigest()
    logged = lines(run_dir / "metrics.jsonl")
    return digest, [{k: v for k, v in line.items() if k not in VARYING} for line in logged]


def summary_of(run_dir: Path) -> dict[str, Any]:
    """Return the summary without what differs between two runs that are equal."""
    summary = json.loads((run_dir / "summary.json").read_text())
    for name in ("name", "seconds", "seconds_per_step", "tokens_per_second", "peak_memory_bytes"):
        del summary["run"][name]
    del summary["environment"]["command"]
    return dict(summary)


def checkpoints_of(run_dir: Path) -> list[str]:
    return [folder.name for folder in checkpoint.found(run_dir)]


def unreadable(run_dir: Path) -> list[str]:
    """Return the checkpoints in a folder that are not whole."""
    return [folder.name for folder in checkpoint.found(run_dir) if checkpoint.verify(folder) is not None]


def litter(run_dir: Path) -> list[str]:
    """Return what was begun and left."""
    return [str(path.relative_to(run_dir)) for path in run_dir.rglob(".tmp-*")]


def straight(config: Config, run_dir: Path) -> tuple[str, list[dict[str, Any]]]:
    """Run without a fault, in this process → its outcome."""
    assert run_here(config, run_dir) == 0
    return outcome(run_dir)
