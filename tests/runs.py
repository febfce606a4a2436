"""Real processes, forked after the imports so that hundreds of them take minutes, and what they must leave behind."""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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

torch.set_num_threads(1)
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # Python 3.11's server finds what it preloads there alone
VARYING = ("speed/tokens_per_second", "memory/peak_bytes")
PATIENCE = 600  # seconds that a small run may take before it counts as stuck
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}


def make_place(folder: Path) -> Path:
    """A teacher, a student with dropout and data, all small."""
    write_dialogpt(folder / "teacher", 2, 16, pickled=False)
    write_dialogpt(folder / "student", 2, 16, pickled=False, seed=1, **DROPOUT)
    write_pairs(folder / "pairs.jsonl")
    return folder


def words_of(place: Path, *words: str) -> list[str]:
    """The words of a short run with dropout and accumulation 4; what a test says of a key replaces it."""
    base = [
        "teacher=hf", f"teacher.path={place / 'teacher'}", "student=hf", f"student.path={place / 'student'}",
        "data=pairs", f"data.path={place / 'pairs.jsonl'}", "data.validation=4", "teacher.store=off",
        "teacher.precision=fp32", "train.precision=fp32", "train.max_steps=30", "train.batch_size=4",
        "train.micro_batch_size=1", "train.log_every=1", "train.save_every=5", "optim.lr=1e-2",
        "tracking.mode=disabled", "tracking.samples=false",
    ]  # fmt: skip
    said = {word.split("=")[0] for word in words}
    said |= {"train.max_steps"} if "train.epochs" in said else set()
    return [word for word in base if word.split("=")[0] not in said] + list(words)


def config_of(place: Path, *words: str) -> Config:
    return compose(words_of(place, *words))


@dataclass
class Run:
    """A run in a process of its own."""

    process: Any
    log: Path

    @property
    def code(self) -> int:
        """Wait for its end → its exit code; of a signal that killed it, the negative number."""
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


def start(config: Config, run_dir: Path, fault: Callable[[], None] | None = None, log: Path | None = None) -> Run:
    """Start a run, or go on with it; `fault` is planted in the process first, what it prints goes to `log`."""
    log = log or run_dir.with_name(f"{run_dir.name}.log")
    process = SERVER.Process(target=_child, args=(config, run_dir, log, fault))
    process.start()
    return Run(process, log)


def start_command(words: list[str], folder: Path, log: Path, **environment: str) -> Run:
    """Start `python -m kdx` with words in a folder; what it prints goes to `log`."""
    process = SERVER.Process(target=_command, args=(words, folder, log, environment))
    process.start()
    return Run(process, log)


def commands(each: list[tuple[list[str], Path, Path]], **environment: str) -> list[int]:
    """Type commands (words, folder, log) one after another in one process → their exit codes."""
    codes, told = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_commands, args=(each, told, environment))
    process.start()
    told.close()
    received = [codes.recv() for _ in each]
    process.join()
    return received


def _commands(each: list[tuple[list[str], Path, Path]], told: Any, environment: dict[str, str]) -> None:
    for words, folder, log in each:
        try:
            _command(words, folder, log, environment)
        except SystemExit as left:
            told.send(int(left.code or 0))


def _command(words: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    os.chdir(folder)
    clean = clean_environment(**{"KDX_STORE": os.environ["KDX_STORE"]} | environment)
    os.environ.clear()  # it was forked from whatever the first test of the session had set
    os.environ.update(clean)
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # whatever it is given, the machine is not in danger
    _print_to(log)
    sys.argv = ["kdx", *words]
    main()


def _print_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _child(config: Config, run_dir: Path, log: Path, fault: Callable[[], None] | None) -> None:
    _print_to(log)
    if fault:
        fault()

    def work() -> int:
        distill(config, run_dir)
        return 0

    sys.exit(guarded(work, run_dir))


# What can be planted.


def signal_at(step: int, number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """A signal to the run itself when a step is done."""
    return partial(_signal_at, step, number)


def _signal_at(step: int, number: signal.Signals) -> None:
    known = RunFolder.at

    def at(self: RunFolder, now: int, is_main: bool) -> None:
        known(self, now, is_main)
        if now == step:
            os.kill(os.getpid(), number)

    RunFolder.at = at  # type: ignore[method-assign]


def fill_disk_at(step: int, disk: Path, room: int) -> None:
    """Others leave only so many bytes of a disk when a step is done."""
    known = RunFolder.at

    def at(self: RunFolder, now: int, is_main: bool) -> None:
        known(self, now, is_main)
        if now == step:
            (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - room))

    RunFolder.at = at  # type: ignore[method-assign]


def _step_is(step: int) -> Callable[[], bool]:
    """Tells whether the run is in a step."""
    known, done = RunFolder.at, 0

    def at(self: RunFolder, now: int, is_main: bool) -> None:
        nonlocal done
        done = now
        known(self, now, is_main)

    RunFolder.at = at  # type: ignore[method-assign]
    return lambda: done == step - 1


def nan_in_loss(step: int) -> None:
    """The divergence is NaN at a step, in its value."""
    is_now = _step_is(step)

    @loss.register
    def planted(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return loss.forward_kl(student, teacher) * (float("nan") if is_now() else 1.0)


def nan_in_gradient(step: int) -> None:
    """The same, in its gradient alone."""
    is_now = _step_is(step)

    @loss.register
    def planted(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        nought = (0 * student).sum(-1)
        return loss.forward_kl(student, teacher) + (nought.abs().sqrt() if is_now() else nought)


def nan_in_teacher(step: int) -> None:
    """The teacher says NaN about the first row of a step, then and whenever it is asked again."""
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

    Teacher.answers = answers  # type: ignore[method-assign]


# What a run must have left.


def steps_of(run_dir: Path) -> list[int]:
    return [line["step"] for line in lines(run_dir / "metrics.jsonl") if "train/loss" in line]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def status(run_dir: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return read


def outcome(run_dir: Path) -> tuple[str, list[dict[str, Any]]]:
    """The sha256 of the student's weights, and every logged figure but those of speed and memory."""
    digest = hashlib.sha256((run_dir / "student" / "model.safetensors").read_bytes()).hexdigest()
    told = lines(run_dir / "metrics.jsonl")
    return digest, [{k: v for k, v in line.items() if k not in VARYING} for line in told]


def unreadable(run_dir: Path) -> list[str]:
    """The checkpoints in a folder that are not whole."""
    return [folder.name for folder in checkpoint.found(run_dir) if checkpoint.verify(folder) is not None]


def litter(run_dir: Path) -> list[str]:
    """What was begun and left lying."""
    return [str(path.relative_to(run_dir)) for path in run_dir.rglob(".tmp-*")]


def straight(config: Config, run_dir: Path) -> tuple[tuple[str, list[dict[str, Any]]], float]:
    """A run that nothing disturbs → its outcome, and how long it took."""
    began = time.monotonic()
    run = start(config, run_dir)
    assert run.code == 0, run.text
    return outcome(run_dir), time.monotonic() - began
