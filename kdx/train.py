"""The training loop: plain accelerate, read top to bottom."""

import logging
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kdx import checkpoint
from kdx.batches import StepBatch, StepBatches
from kdx.config import TrainConfig
from kdx.errors import DivergedError
from kdx.evaluate import MEASURES
from kdx.objective import StudentObjective
from kdx.teacher import Teacher
from kdx.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass
class State:
    """All that the loop must remember to go on after a stop, besides weights, optimizer and random numbers."""

    step: int = 0
    tokens: int = 0  # input tokens without padding
    counted_tokens: int = 0  # those in the loss
    best: float = math.inf
    best_step: int = 0
    num_worse: int = 0  # held-out measures in a row without improvement
    stopped_by: str = "max_steps"
    seconds: float = 0.0  # spent in steps; evaluation and saving not counted
    step_seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float | None:
        return statistics.median(self.step_seconds) if self.step_seconds else None


def train(
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    objective: StudentObjective,
    optimizer: Any,
    schedule: Any,
    batches: StepBatches,
    teacher: Teacher | None,
    max_steps: int,
    state: State,
    tracker: Tracker,
    measure: Callable[[], dict[str, float | None]],
    stop_asked: Callable[[], bool],
    run_dir: Path,
) -> State:
    """Train to max_steps, or until stopped early or asked to stop. Weights end up in `objective.model`.

    measure: takes the held-out measures of the student as it is. Raises DivergedError before a step that would
    write a loss or gradient that is not finite into the weights.
    """
    module, optimizer = accelerator.prepare(objective, optimizer)
    best_file = checkpoint.folder_of(run_dir) / "best.safetensors"
    alpha = objective.objective.alpha
    objective.train()
    window: list[dict[str, float]] = []

    for batch in batches.steps(state.step, max_steps):
        # One step: sums over micro-batches and processes, one division by the counted tokens of the whole step.
        started = time.perf_counter()
        kd, ce = _forward_backward(accelerator, module, batch, teacher if alpha > 0 else None)
        grad_norm = _clip(accelerator, objective, config.max_grad_norm)
        _check_finite(accelerator, batch, state.step + 1, grad_norm, kd, ce)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += batch.num_input_tokens
        state.counted_tokens += batch.num_tokens
        seconds = time.perf_counter() - started
        state.seconds += seconds
        state.step_seconds = [*state.step_seconds[-199:], seconds]
        window.append({"kd": kd, "ce": ce, "counted": batch.num_tokens, "tokens": batch.num_input_tokens, "s": seconds})
        tracker.advance(state.step, alpha * kd + (1 - alpha) * ce, batch.num_input_tokens / seconds)

        # Log once in a while: means over the steps since the last line, weighted by their counted tokens.
        if state.step % config.log_every == 0 or state.step == max_steps:
            tracker.log(state, _means(window, alpha) | {
                "train/lr": lr, "train/grad_norm": grad_norm, "train/epoch": batch.epoch,
                "memory/peak_bytes": peak_memory(accelerator.device),
            })  # fmt: skip
            window.clear()

        # Evaluate once in a while, remember the best, stop when it no longer gets better.
        if config.eval_every and state.step % config.eval_every == 0 and state.step < max_steps:
            measures = measure()
            tracker.log(state, {f"eval/{name}": measures[name] for name in MEASURES})
            keep_best(config, state, measures, accelerator, objective, best_file)
            patience = config.early_stopping.patience
            if patience is not None and state.num_worse >= patience:
                state.stopped_by = "early_stopping"

        # Save once in a while, and when asked to stop; stop at a whole step.
        stopping = state.stopped_by != "max_steps"
        interrupted = stop_asked()
        if interrupted:
            state.stopped_by = "signal"
        due = config.save_every and state.step % config.save_every == 0 and state.step < max_steps and not stopping
        if (due or interrupted) and accelerator.is_main_process:
            best = best_file if config.keep == "best" else None
            checkpoint.save(run_dir, objective.model, optimizer, schedule, asdict(state), best)
        accelerator.wait_for_everyone()
        if stopping or interrupted:
            break

    return state


def keep_best(
    config: TrainConfig,
    state: State,
    measures: dict[str, float | None],
    accelerator: Accelerator,
    objective: StudentObjective,
    best_file: Path,
) -> None:
    """Note whether the held-out measure improved, and keep the weights if they may become the student."""
    value = measures["kl"] if measures["kl"] is not None else measures["ce"]
    if value is not None and value < state.best - config.early_stopping.min_delta:
        state.best, state.best_step, state.num_worse = value, state.step, 0
        if config.keep == "best" and accelerator.is_main_process:
            checkpoint.save_weights(best_file, objective.model)
    else:
        state.num_worse += 1


def _forward_backward(
    accelerator: Accelerator, module: Any, batch: StepBatch, teacher: Teacher | None
) -> tuple[float, float]:
    """Accumulate one step's gradient → mean kd and ce over the step's counted positions, all processes."""
    sums = []
    for i, micro_batch in enumerate(batch.micro_batches):
        micro_batch = micro_batch.to(accelerator.device)
        hidden = teacher.hidden(micro_batch) if teacher else None
        is_last = i == len(batch.micro_batches) - 1
        context = nullcontext() if is_last else accelerator.no_sync(module)
        with context:
            total, kd, ce = module(micro_batch, hidden, teacher.head if teacher else None)
            # DDP averages gradients over processes: undone here, once.
            accelerator.backward(total * (accelerator.num_processes / max(batch.num_tokens, 1)))
        sums.append(torch.stack([kd, ce]))
    summed = accelerator.reduce(torch.stack(sums).sum(0), reduction="sum")
    kd_sum, ce_sum = summed.tolist()
    return kd_sum / max(batch.num_tokens, 1), ce_sum / max(batch.num_tokens, 1)


def _clip(accelerator: Accelerator, objective: StudentObjective, max_norm: float | None) -> float:
    norm = accelerator.clip_grad_norm_(objective.parameters(), math.inf if max_norm is None else max_norm)
    return float(norm)


def _check_finite(
    accelerator: Accelerator, batch: StepBatch, step: int, grad_norm: float, kd: float, ce: float
) -> None:
    """Stop before the optimizer writes what is not finite into the weights (fp16's scaler may skip a step itself)."""
    if math.isfinite(kd) and math.isfinite(ce) and (math.isfinite(grad_norm) or accelerator.scaler is not None):
        return
    term = (
        "the distillation term"
        if not math.isfinite(kd)
        else "the cross-entropy"
        if not math.isfinite(ce)
        else "the gradient"
    )
    rows = ", ".join(row for micro_batch in batch.micro_batches for row in micro_batch.row_ids)[:200]
    mend = "Lower optim.lr, raise optim.warmup_steps, or use train.precision=fp32"
    raise DivergedError(
        f"step {step}", f"{term} is not finite; the weights are those of step {step - 1} (rows: {rows})", mend
    )


def _means(window: list[dict[str, float]], alpha: float) -> dict[str, float | None]:
    counted = sum(part["counted"] for part in window)
    kd, ce = (sum(part[name] * part["counted"] for part in window) / max(counted, 1) for name in ("kd", "ce"))
    speed = sum(part["tokens"] for part in window) / sum(part["s"] for part in window)
    return {
        "train/loss": alpha * kd + (1 - alpha) * ce,
        "train/kd": kd if alpha > 0 else None,
        "train/ce": ce,
        "speed/tokens_per_second": speed,
    }


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU's allocator, or of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
