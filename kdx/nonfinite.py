"""Losses and gradients that are not finite: which term and which rows, and whether the run may pass over the step."""

import logging
import math
from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from kdx.causal_lm import counted_hidden, head_of
from kdx.config import TrainConfig
from kdx.data.batches import Row, StepBatch
from kdx.errors import DivergedError
from kdx.objective import StudentObjective, summed_loss
from kdx.teacher import Answer, Teacher

log = logging.getLogger(__name__)

MEND = "Lower optim.lr, raise optim.warmup_steps, use train.precision=fp32, or train.on_nonfinite=skip"
TEACHER, KD, CE = "what the teacher says", "the distillation term", "the cross-entropy"


class Counted(Protocol):
    """A run's state: the steps done, and how many of them were passed over."""

    step: int
    num_nonfinite: int


def is_finite(accelerator: Accelerator, kd: float, ce: float, grad_norm: float) -> bool:
    """Whether a step may be written into the weights. fp16's scaler passes over overflowing gradients itself."""
    return math.isfinite(kd) and math.isfinite(ce) and (accelerator.scaler is not None or math.isfinite(grad_norm))


def stop_or_skip(
    config: TrainConfig,
    state: Counted,
    accelerator: Accelerator,
    student: Any,
    objective: StudentObjective,
    batch: StepBatch,
    teacher: Teacher | None,
    terms: tuple[float, float],
    rows: Sequence[Row],
) -> None:
    """Say what of a step is not finite, and count it. Raises DivergedError unless such steps are skipped.

    terms: the step's kd and ce. rows: all of the run, to say where those of the step stand.
    """
    wrong, ids = _blamed(accelerator, student, objective, batch, teacher, terms)
    where = {row.id: row.where for row in rows}
    named = [f"{name} at {where[name]}" if where.get(name) else name for name in ids]
    what = f"{wrong} is not finite; the weights are still those of step {state.step} (rows: {_some(named)})"
    if config.on_nonfinite == "skip" and state.num_nonfinite < config.max_nonfinite:
        state.num_nonfinite += 1
        if accelerator.scaler is not None:  # fp16's: it has unscaled the gradients, and waits for the step
            accelerator.scaler.update()
        log.warning("step %d is skipped: %s", state.step + 1, what)
        return
    if config.on_nonfinite == "skip":
        what += f"; {state.num_nonfinite} steps were skipped before, train.max_nonfinite is {config.max_nonfinite}"
    raise DivergedError(f"step {state.step + 1}", what, MEND)


def _some(rows: list[str]) -> str:
    """The first rows, by their whole names, and how many more there are."""
    fit = sum(length <= 600 for length in accumulate(len(row) + 2 for row in rows)) or 1
    return ", ".join(rows[:fit]) + (f" and {len(rows) - fit} more" if len(rows) > fit else "")


@torch.no_grad()
def _blamed(
    accelerator: Accelerator,
    student: Any,
    objective: StudentObjective,
    batch: StepBatch,
    teacher: Teacher | None,
    terms: tuple,
) -> tuple[str, list[str]]:
    """Compute the step again, row by row → the first term that is not finite, and its rows, of all processes.

    Where no row repeats the fault (a gradient's, or one that dropout made), all rows of the step are named.
    """
    found: dict[str, list[str]] = {TEACHER: [], KD: [], CE: []}
    head = head_of(student).cut(objective.num_ids)
    answers = teacher.answers(batch.micro_batches) if teacher else repeat(None)
    for micro_batch, answer in zip(batch.micro_batches, answers, strict=False):
        hidden = answer.hidden if isinstance(answer, Answer) else None
        micro_batch = micro_batch.to(accelerator.device)
        ours = counted_hidden(student, micro_batch)
        for i, row in enumerate(micro_batch.row_ids):
            mine = micro_batch.row_of == i
            theirs = hidden[mine.to(hidden.device)] if hidden is not None else None
            their_head = teacher.head if teacher else None
            _, kd, ce = summed_loss(
                ours[mine], head, theirs, their_head, micro_batch.counted_labels[mine], objective.objective
            )
            if theirs is not None and their_head is not None and not _says_something(their_head.logits(theirs)):
                found[TEACHER].append(row)
            elif not math.isfinite(kd.item()):
                found[KD].append(row)
            elif not math.isfinite(ce.item()):
                found[CE].append(row)
    everyones: list[dict[str, list[str]]] = gather_object([found])
    for name in found:
        rows = [row for one in everyones for row in one[name]]
        if rows:
            return name, rows
    ids = [row for micro_batch in batch.micro_batches for row in micro_batch.row_ids]
    kd_sum, ce_sum = terms
    name = "the gradient" if math.isfinite(kd_sum) and math.isfinite(ce_sum) else CE if math.isfinite(kd_sum) else KD
    return name, gather_object(ids)


def _says_something(logits: Any) -> bool:
    """Whether logits make distributions: −inf for some ids is fine."""
    return bool(logits.logsumexp(-1).isfinite().all())
