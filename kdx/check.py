"""`kdx check`: read config, data and models as a run would, say what it would be, and train nothing."""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from kdx import plugins
from kdx.build import (
    build_batches,
    build_objective,
    build_student,
    build_teacher,
    check_names,
    is_repeated,
    rows_to_ask,
)
from kdx.config import Config
from kdx.data.batches import MicroBatch, Row, collate
from kdx.data.encode import Data, load_data
from kdx.errors import printable
from kdx.evaluate import MAX_NEW_TOKENS, NUM_SAMPLES, HeldOut
from kdx.objective import BLOCK_BYTES, chunk_bytes
from kdx.optim import state_bytes
from kdx.run import checkpoint, report, results
from kdx.run.files import in_bytes, usage_of
from kdx.run.folder import Record
from kdx.run.launch import build_accelerator
from kdx.run.tracking import CONSOLE, log, logging_to, quiet_libraries
from kdx.student import teach_to_stop
from kdx.teacher import Answer
from kdx.tokenizer import load_tokenizer
from kdx.train import Training

SOFTMAXES = 6  # float32 tensors of a block at once: both logits, log-probabilities, gradients
LONGEST_SHOWN = 1200  # characters of the row that is shown


def check(config: Config, path: Path, record: Record | None = None) -> None:
    """Say what a run of this config in a folder would be. Raises KdxError for all that the run would refuse."""
    quiet_libraries()
    plugins.load()
    machine, record = build_accelerator(config), record or Record()
    with logging_to(None, machine.is_main_process):
        check_names(config)
        shared = load_tokenizer(config)
        tokenizer, max_length = shared.tokenizer, shared.max_length
        data = load_data(config.data, shared, NUM_SAMPLES, MAX_NEW_TOKENS)
        batches = build_batches(config, data.train, tokenizer, machine)
        rows, repeats = rows_to_ask(config, data, batches), is_repeated(config, record, batches)
        teacher = build_teacher(config, machine.device, max_length, rows, is_repeated=repeats)
        student = build_student(config, machine.device, max_length)
        teach_to_stop(student, tokenizer, data.stops)
        objective = build_objective(config, student, teacher, shared.num_ids)
        training = Training(config, objective, teacher, batches, tokenizer, max_length, machine)
        if not machine.is_main_process:
            return
        for line in report.header(config, record, data, training):
            log.info(line)
        first = next(batches.plan(0, 1))[1][0] if training.max_steps else 0
        log.info("a row as the student sees it, counted tokens between ⟦ and ⟧:")
        CONSOLE.print(printable(marked(tokenizer, data.train[first]))[:LONGEST_SHOWN], markup=False, style="dim")
        cost = measure(training, data)
        CONSOLE.print(memory_table(training, cost))
        for line in [*disk_lines(training, path), time_line(training, data, cost)]:
            log.info(line)
        results.check_room(training, path)  # may raise, so everything else is printed first


def marked(tokenizer: Any, row: Row) -> str:
    """Return a row's text with the tokens that count between ⟦ and ⟧."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(row.tokens) + 1):
        if i == len(row.tokens) or row.counted[i] != row.counted[start]:
            text = tokenizer.decode(row.tokens[start:i])
            parts.append(f"⟦{text}⟧" if row.counted[start] else text)
            start = i
    return "".join(parts)


@dataclass
class Cost:
    """What a token costs, measured on the longest row."""

    activation_bytes: float  # kept for the backward pass
    teacher_seconds: float
    step_seconds: float  # of the student, forward and backward
    measure_seconds: float  # of the student, as a held-out row


def measure(training: Training, data: Data) -> Cost:
    """Run teacher and student on the longest row, without a step of the optimizer."""
    row = data.train[int(data.train.lengths.argmax())]
    batch = collate([row], training.batches.pad_id).to(training.machine.device)
    own = {p.untyped_storage().data_ptr() for p in training.student.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    training.objective.train()
    _seconds(training, batch)  # once to warm up
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        seconds = _seconds(training, batch)
    training.student.zero_grad(set_to_none=True)
    return Cost(sum(saved.values()) / len(row.tokens), *(s / len(row.tokens) for s in seconds))


def _seconds(training: Training, batch: MicroBatch) -> tuple[float, float, float]:
    """Time the teacher's answer, the student forward and backward, and the student as it is measured."""
    teacher, machine, objective = training.teacher, training.machine, training.objective
    times = [_now(machine.device)]
    answer = None
    if teacher is not None:
        # From the store if it has the row, as the run would; nothing is written.
        is_stored = teacher.store is not None and not teacher.store.missing(batch.row_digests)
        answer = teacher.answer(batch) if is_stored else Answer(teacher.live(batch), teacher.head)
    times.append(_now(machine.device))
    with machine.autocast():
        total, _ = objective(batch, answer if objective.mix.alpha > 0 else None)
    total.backward()
    times.append(_now(machine.device))
    held_out = HeldOut([batch], machine.device, objective.num_ids)
    if answer is not None:
        held_out.answers = [Answer(answer.hidden.cpu(), answer.head.cut(objective.num_ids))]
    held_out.measure(training.student, machine.autocast())
    times.append(_now(machine.device))
    asked, stepped, measured = (after - before for before, after in pairwise(times))
    return asked, stepped, measured


def _now(device: torch.device) -> float:
    if device.type != "cpu":  # wait until it has done what it was asked to
        torch.accelerator.synchronize()
    return time.perf_counter()


def memory_table(training: Training, cost: Cost) -> Table:
    """Lay out what is in memory at the peak of a step, and what each option would save."""
    config, student, teacher, machine = training.config, training.student, training.teacher, training.machine
    num, weight, num_ids = student.num_parameters(), student.dtype.itemsize, training.objective.num_ids
    lengths = sorted(training.batches.rows.lengths.tolist(), reverse=True)[: training.batches.micro_batch_size]
    tokens = lengths[0] * len(lengths)
    activations = cost.activation_bytes * tokens
    is_8bit = config.optim.name.endswith("8bit")
    states = num * state_bytes(config.optim, next(student.parameters()))
    teacher_bytes = head_bytes = 0
    if teacher is not None and config.loss.alpha > 0:
        head_bytes = teacher.head.weight.nbytes
        teacher_bytes = teacher.model.get_memory_footprint() if teacher.is_loaded else head_bytes
    logits = tokens * num_ids * (2 if machine.mixed_precision == "bf16" else 4)
    chunk = 2 * min(chunk_bytes(machine.device), logits)  # the student's and the teacher's
    if machine.device.type != "cpu":  # where a block is not small beside a chunk
        chunk += SOFTMAXES * min(BLOCK_BYTES, logits)
    shape = student.config.get_text_config()
    checkpointed = tokens * shape.num_hidden_layers * shape.hidden_size * 4
    is_checkpointed = config.train.gradient_checkpointing
    rows: list[tuple[str, float, str, float]] = [
        ("activations", activations, "train.micro_batch_size=1", activations * (1 - 1 / len(lengths))),
        ("", 0, "train.gradient_checkpointing=true", 0 if is_checkpointed else max(0.0, activations - checkpointed)),
        ("", 0, "train.precision=bf16", activations / 3 if machine.mixed_precision == "no" else 0),
        ("weights, gradients", 2 * weight * num, "", 0),
        ("optimizer", states, "optim=adamw_8bit", 0 if is_8bit else max(0, states - 2 * num)),
        ("teacher", teacher_bytes, "teacher.quantization=8bit",
         teacher_bytes / 2 if config.teacher.quantization == "none" else 0),
        ("", 0, "teacher.store=on, once filled", teacher_bytes - head_bytes),
        ("logits of a chunk", chunk, "", 0),
    ]  # fmt: skip
    table = Table(title="memory of a step, in the order of what to save first", title_justify="left")
    table.add_column("")
    table.add_column("bytes", justify="right")
    table.add_column("saving", min_width=len("train.gradient_checkpointing=true"))
    table.add_column("saves", justify="right")
    for what, size, saving, saves in rows:
        if size or saves:
            used, saved = in_bytes(round(size)) if size else "", in_bytes(round(saves)) if saves else ""
            table.add_row(what, used, saving if saves else "", saved)
    table.add_row("total", in_bytes(round(activations + 2 * weight * num + states + teacher_bytes + chunk)))
    return table


def disk_lines(training: Training, path: Path) -> list[str]:
    """Say what the run writes, and what is free."""
    student, best, one = results.bytes_on_disk(training)
    what = "the student" + (" and its best weights" if best else "")
    lines = [f"  disk            {what} {in_bytes(student + best)}; {in_bytes(usage_of(path).free)} free"]
    if one:
        most = in_bytes((checkpoint.KEPT + 1) * one)
        lines.append(f"                  checkpoints {in_bytes(one)} each, at most {most} until the run is done")
    return lines


def time_line(training: Training, data: Data, cost: Cost) -> str:
    """Estimate how long steps and measures would take, from the one row that was measured."""
    config, processes, max_steps = training.config, training.machine.num_processes, training.max_steps
    batches = training.batches
    tokens = int(max_steps / batches.steps_per_epoch * batches.rows.lengths.sum())
    per_token = cost.step_seconds + (cost.teacher_seconds if config.loss.alpha > 0 else 0)
    held_out = int(data.held_out.lengths.sum())
    num_measures = 2 + ((max_steps - 1) // config.train.eval_every if config.train.eval_every else 0)
    measures = (cost.teacher_seconds + num_measures * cost.measure_seconds) * held_out / processes
    what = f"{minutes(per_token * tokens / processes)} for {tokens:,} tokens in {max_steps} steps"
    return f"  time            about {what}, {minutes(measures)} for {num_measures} held-out measures (from one row)"


def minutes(seconds: float) -> str:
    """Format a time to plan by."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
