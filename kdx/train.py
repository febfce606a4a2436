"""The training loop: plain accelerate, read top to bottom."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from kdx import checkpoint, drift, nonfinite, shards
from kdx.batches import StepBatch, StepBatches, ahead
from kdx.config import TrainConfig
from kdx.durable import digest_of
from kdx.evaluate import MEASURES, peak_memory
from kdx.objective import StudentObjective
from kdx.teacher import Teacher
from kdx.tracking import Tracker


@dataclass
class State:
    """All that the loop must remember to go on after a stop, besides weights, optimizer and random numbers."""

    of: str = ""  # drift.digest: a checkpoint says whose it is
    step: int = 0
    tokens: int = 0  # input tokens without padding
    counted_tokens: int = 0  # those in the loss
    best: float = math.inf
    best_step: int = 0
    best_digest: str = ""  # of the file with the best weights
    num_worse: int = 0  # held-out measures in a row without improvement
    stopped_by: str = "max_steps"
    seconds: float = 0.0  # spent in steps; evaluation and saving not counted
    step_seconds: list[float] = field(default_factory=list)
    window: list[dict[str, float]] = field(default_factory=list)  # steps since the last log line
    store: dict[str, int] = field(default_factory=dict)  # how far what the run keeps of the teacher reaches
    num_nonfinite: int = 0  # steps that were skipped
    versions: dict[str, str] = field(default_factory=drift.versions)
    other_versions: list[str] = field(default_factory=list)  # that a part of the run was made with

    def add(self, batch: StepBatch, seconds: float) -> None:
        """Count one step that is done."""
        self.step += 1
        self.tokens += batch.num_input_tokens
        self.counted_tokens += batch.num_tokens
        self.seconds += seconds
        self.step_seconds = [*self.step_seconds[-199:], seconds]  # enough for a median


def train(
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    objective: StudentObjective,
    module: Any,
    optimizer: Any,
    student: Any,
    schedule: Any,
    batches: StepBatches,
    teacher: Teacher | None,
    max_steps: int,
    state: State,
    tracker: Tracker,
    measure: Callable[[], dict[str, float | None]],
    stop_asked: Callable[[], bool],
    run_dir: Path,
    describe: Callable[[Path], None],
) -> State:
    """Train to max_steps, or until stopped early or asked to stop. Weights end up in `objective.model`.

    module, optimizer, student: of shards.prepare. measure: takes the held-out measures of the student as it is.
    describe: writes beside the weights what makes a folder with them a model's.
    Raises DivergedError before a step that would write a loss or gradient that is not finite into the weights.
    """
    best_file = checkpoint.folder_of(run_dir) / "best.safetensors"
    alpha = objective.objective.alpha
    asked = teacher if alpha > 0 else None
    objective.train()

    for batch in ahead(batches.steps(state.step, max_steps)):
        # One step: sums over micro-batches and processes, one division by the counted tokens of the whole step.
        started = time.perf_counter()
        sums = forward_backward(accelerator, module, batch, asked)
        norm = shards.plain(accelerator.clip_grad_norm_(objective.parameters(), config.max_grad_norm or math.inf))
        kd, ce, grad_norm = torch.stack([*(sums / max(batch.num_tokens, 1)), norm.to(sums)]).tolist()  # the one read
        is_finite = nonfinite.is_finite(accelerator, kd, ce, grad_norm)
        if not is_finite:  # before the optimizer writes it into the weights
            with shards.whole(objective, student):
                step = (batch, asked, (kd, ce), batches.rows)
                nonfinite.stop_or_skip(config, state, accelerator, student, objective, *step)
        lr = schedule.get_last_lr()[0]
        if is_finite:
            optimizer.step()
        if not (is_finite and accelerator.optimizer_step_was_skipped):
            schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        state.add(batch, seconds)
        if is_finite:
            part = {"kd": kd, "ce": ce, "counted": batch.num_tokens, "tokens": batch.num_input_tokens, "s": seconds}
            state.window.append(part)
        tracker.advance(state.step, alpha * kd + (1 - alpha) * ce, batch.num_input_tokens / seconds)

        # Log once in a while: means over the steps since the last line, weighted by their counted tokens.
        if state.step % config.log_every == 0 or state.step == max_steps:
            tracker.log(state, _means(state.window, alpha) | {
                "train/lr": lr, "train/grad_norm": grad_norm if is_finite else None, "train/epoch": batch.epoch,
                "memory/peak_bytes": peak_memory(accelerator.device),
            })  # fmt: skip
            state.window.clear()

        # Evaluate once in a while, remember the best, stop when it no longer gets better.
        if config.eval_every and state.step % config.eval_every == 0 and state.step < max_steps:
            with shards.whole(objective, student):
                measures = measure()
                keep_best(config, state, measures, accelerator, student, best_file)
            tracker.log(state, {f"eval/{name}": measures[name] for name in MEASURES})
            patience = config.early_stopping.patience
            if patience is not None and state.num_worse >= patience:
                state.stopped_by = "early_stopping"

        # Save once in a while, and when asked to stop; stop at a whole step.
        stopping = state.stopped_by != "max_steps"
        interrupted = stop_asked() and not stopping
        if interrupted:
            state.stopped_by = "signal"
        due = config.save_every and state.step % config.save_every == 0 and state.step < max_steps and not stopping
        if due or interrupted:
            random_states = gather_object([checkpoint.random_state()])
            state.store = teacher.position() if teacher else {}
            moments = shards.state_of(optimizer, accelerator.is_main_process)
            tracker.keep_lines()
            with shards.whole(objective, student):
                if accelerator.is_main_process:
                    kept = {"best": best_file if config.keep == "best" else None, "scaler": accelerator.scaler}
                    checkpoint.save(run_dir, student, moments, schedule, asdict(state), random_states, describe, **kept)
        accelerator.wait_for_everyone()
        if stopping or interrupted:
            break

    return state


def keep_best(
    config: TrainConfig,
    state: State,
    measures: dict[str, float | None],
    accelerator: Accelerator,
    student: Any,
    best_file: Path,
) -> None:
    """Note whether the held-out measure improved, and keep the weights if they may become the student."""
    value = measures["kl"] if measures["kl"] is not None else measures["ce"]
    if value is not None and value < state.best - config.early_stopping.min_delta:
        state.best, state.best_step, state.num_worse = value, state.step, 0
        if config.keep == "best" and accelerator.is_main_process:
            checkpoint.save_weights(best_file, student)
            state.best_digest = digest_of(best_file)
    else:
        state.num_worse += 1


def forward_backward(accelerator: Accelerator, module: Any, batch: StepBatch, teacher: Teacher | None) -> Tensor:
    """Accumulate one step's gradient → the sums [2] of kd and ce over its counted positions, of all processes."""
    sums = []
    # DDP and FSDP average gradients over processes: undone here, once.
    factor = accelerator.num_processes / max(batch.num_tokens, 1)
    answers = teacher.answers(batch.micro_batches) if teacher else repeat(None)
    for i, (micro_batch, hidden) in enumerate(zip(batch.micro_batches, answers, strict=False), 1):
        micro_batch = micro_batch.to(accelerator.device)
        # FSDP sums up in shards every time: it would keep whole gradients else, and memory is what it is for.
        is_synced = i == len(batch.micro_batches) or accelerator.is_fsdp2
        with nullcontext() if is_synced else accelerator.no_sync(module):
            total, kd, ce = module(micro_batch, hidden, teacher.head if teacher else None, factor)
            accelerator.backward(total)
        sums.append(torch.stack([kd, ce]))
    return accelerator.reduce(torch.stack(sums).sum(0), reduction="sum")


def _means(window: list[dict[str, float]], alpha: float) -> dict[str, float | None]:
    if not window:  # every step was skipped
        return dict.fromkeys(("train/loss", "train/kd", "train/ce", "speed/tokens_per_second"))
    counted = sum(part["counted"] for part in window)
    kd, ce = (sum(part[name] * part["counted"] for part in window) / max(counted, 1) for name in ("kd", "ce"))
    speed = sum(part["tokens"] for part in window) / sum(part["s"] for part in window)
    return {
        "train/loss": alpha * kd + (1 - alpha) * ce,
        "train/kd": kd if alpha > 0 else None,
        "train/ce": ce,
        "speed/tokens_per_second": speed,
    }
