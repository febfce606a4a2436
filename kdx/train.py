"""The training loop: plain accelerate, read top to bottom."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from kdx import nonfinite
from kdx.config import TrainConfig
from kdx.data.batches import StepBatch, StepBatches, ahead
from kdx.errors import MachineError
from kdx.evaluate import MEASURES, peak_memory
from kdx.objective import StudentObjective
from kdx.run import checkpoint
from kdx.run import sharding as shards
from kdx.run.files import digest_of
from kdx.run.tracking import Tracker
from kdx.state import State
from kdx.teacher import Teacher

log = logging.getLogger(__name__)


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
    measure: Callable[[], dict[str, float | None] | None],
    stop_asked: Callable[[], bool],
    run_dir: Path,
    describe: Callable[[Path], None],
) -> State:
    """Train to max_steps, or until stopped early or asked to stop. Weights end up in `objective.model`.

    module, optimizer, student: of shards.prepare. measure: takes the held-out measures of the student as it is; None
    if it was asked to stop meanwhile. describe: writes beside the weights what makes a folder with them a model's.
    Raises DivergedError before a step that would write a loss or gradient that is not finite into the weights.
    """
    best_file = checkpoint.folder_of(run_dir) / "best.safetensors"
    alpha = objective.objective.alpha
    asked = teacher if alpha > 0 else None
    objective.train()

    def evaluate() -> bool:
        """Take the held-out measures if they are due, and remember the best → False if there was no time for it."""
        due = config.eval_every and state.step % config.eval_every == 0 and state.measured < state.step < max_steps
        if due:
            with shards.whole(objective, student):
                measures = measure()
                if measures is None:
                    return False
                keep_best(config, state, measures, accelerator, student, best_file)
            state.measured = state.step
            tracker.log(state, {f"eval/{name}": measures[name] for name in MEASURES})
        return True

    def save(is_needed: bool) -> None:
        if teacher and teacher.store:
            teacher.store.flush()
        random_states = gather_object([checkpoint.random_state()])
        state.store = teacher.store.position() if teacher and teacher.store else []
        moments = shards.state_of(optimizer, accelerator.is_main_process)
        with shards.whole(objective, student):
            if accelerator.is_main_process:
                kept = {"best": best_file if config.keep == "best" else None, "scaler": accelerator.scaler}
                try:
                    state.lines = tracker.keep_lines()
                    checkpoint.save(run_dir, student, moments, schedule, asdict(state), random_states, describe, **kept)
                except MachineError as error:
                    if is_needed:
                        raise
                    log.warning("%s. A stop while the last measures are taken would lose the run", error.args[1])

    # A stop may have cut measures short, and the end of a run that is longer now has left them out.
    is_interrupted = not evaluate()
    is_over = state.step == max_steps or state.is_worn_out(config)
    for batch in ahead(batches.steps(state.step, state.step if is_over or is_interrupted else max_steps)):
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
        part = {"kd": kd, "ce": ce, "counted": batch.num_tokens, "tokens": batch.num_input_tokens, "s": seconds}
        skipped = dict.fromkeys(part, 0)
        about = {"lr": lr, "epoch": batch.epoch, "grad_norm": grad_norm if is_finite else None}
        state.window.append((part if is_finite else skipped) | about)
        tracker.advance(state.step, alpha * kd + (1 - alpha) * ce, batch.num_input_tokens / seconds)

        # Log once in a while: means over the steps since the last line, weighted by their counted tokens.
        if state.step % config.log_every == 0:
            tracker.log(state, means(state.window, alpha, peak_memory(accelerator.device)))
            state.window.clear()

        # Evaluate once in a while; stop when it no longer gets better. Save once in a while, at the end, since the
        # last measures take their time, and when asked to stop, at a whole step.
        is_interrupted = not evaluate() or stop_asked()
        is_over = state.step == max_steps or state.is_worn_out(config)
        is_due = config.save_every and state.step % config.save_every == 0
        if is_due or is_over or is_interrupted:
            save(is_needed=is_interrupted or not is_over)
        accelerator.wait_for_everyone()
        if is_over or is_interrupted:
            break

    if is_interrupted:
        state.stopped_by = "signal"
    elif is_over and state.step < max_steps:
        state.stopped_by = "early_stopping"
    if state.window and not is_interrupted:  # not in the checkpoint: a longer run would log at other steps
        tracker.log(state, means(state.window, alpha, peak_memory(accelerator.device)))
        state.window.clear()
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
    for i, (micro_batch, answer) in enumerate(zip(batch.micro_batches, answers, strict=False), 1):
        micro_batch = micro_batch.to(accelerator.device)
        # FSDP sums up in shards every time: it would keep whole gradients else, and memory is what it is for.
        is_synced = i == len(batch.micro_batches) or accelerator.is_fsdp2
        with nullcontext() if is_synced else accelerator.no_sync(module):
            total, kd, ce = module(micro_batch, answer and answer.hidden, answer and answer.head, factor)
            accelerator.backward(total)
        sums.append(torch.stack([kd, ce]))
    return accelerator.reduce(torch.stack(sums).sum(0), reduction="sum")


def means(window: list[dict[str, Any]], alpha: float, peak_bytes: int) -> dict[str, float | None]:
    """What is logged of the steps since the last line; those that were skipped count in none of the means."""
    counted, seconds = (sum(part[name] for part in window) for name in ("counted", "s"))
    kd, ce = (sum(part[name] * part["counted"] for part in window) / max(counted, 1) for name in ("kd", "ce"))
    return {
        "train/loss": alpha * kd + (1 - alpha) * ce if counted else None,
        "train/kd": kd if alpha > 0 and counted else None,
        "train/ce": ce if counted else None,
        "speed/tokens_per_second": sum(part["tokens"] for part in window) / seconds if counted else None,
        **{f"train/{name}": window[-1][name] for name in ("lr", "grad_norm", "epoch")},
        "memory/peak_bytes": peak_bytes,
    }
