"""`kdx check`: read config, data and models as a run would, say what it would be, and train nothing."""

import time
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from kdx import plugins
from kdx.causal_lm import head_of
from kdx.config import Config
from kdx.data.batches import Row, collate
from kdx.distill import prepared
from kdx.errors import MEMORY, printable, shortened
from kdx.objective import chunk_size_of
from kdx.optim import state_bytes
from kdx.run import checkpoint, report, results
from kdx.run.files import in_bytes, usage_of
from kdx.run.folder import Record
from kdx.run.launch import build_accelerator
from kdx.run.tracking import CONSOLE, log, logging_to, quiet_libraries
from kdx.teacher import Answer
from kdx.train import Training

MOST_READ = 1000  # rows among which the one with most turns is looked for
LONGEST_SHOWN = 1200  # characters of the row that is shown


def check(config: Config, path: Path, record: Record | None = None) -> None:
    """Say what a run of this config in a folder would be. Raises KdxError for all that the run would refuse."""
    quiet_libraries()
    plugins.load()
    machine, record = build_accelerator(config), record or Record()
    with logging_to(None, machine.is_main_process), prepared(config, record, machine) as training:
        if not machine.is_main_process:
            return
        for line in report.header(config, record, training.data, training):
            log.info(line)
        for what, row in rows_to_show(training).items():
            log.info("the %s row as the student sees it, counted tokens between ⟦ and ⟧ (%s):", what, row.where)
            text = printable(marked(training.tokenizer, row))
            CONSOLE.print(shortened(text, LONGEST_SHOWN), markup=False, style="dim")
        activation_bytes, seconds = cost_of_a_token(training)
        parts = memory_of_a_step(training, activation_bytes)
        log.info("memory of a step:")
        for name, size in [*parts.items(), ("total", sum(parts.values()))]:
            log.info(f"  {name:<22}{in_bytes(round(size)):>10}")
        log.info(f"to save memory: {MEMORY}")
        for line in [*disk_lines(training, path), time_line(training, seconds)]:
            log.info(line)
        results.check_room(training, path)  # may raise, so everything else is printed first


def rows_to_show(training: Training) -> dict[str, Row]:
    """Choose the rows that show most: the shortest, the longest, and the one with most counted turns."""
    rows = training.data.train
    some = rows.lengths.argsort(kind="stable")
    turns = [sum(is_counted for is_counted, _ in groupby(rows[int(i)].counted)) for i in some[-MOST_READ:]]
    numbers = {some[-MOST_READ:][turns.index(max(turns))]: "most varied", some[0]: "shortest", some[-1]: "longest"}
    return {what: rows[int(i)] for i, what in numbers.items()}


def marked(tokenizer: Any, row: Row) -> str:
    """Return a row's text with the tokens that count between ⟦ and ⟧."""
    pairs = groupby(zip(row.tokens, row.counted, strict=True), key=lambda pair: pair[1])
    texts = [(tokenizer.decode([token for token, _ in part]), is_counted) for is_counted, part in pairs]
    return "".join(f"⟦{text}⟧" if is_counted else text for text, is_counted in texts)


def cost_of_a_token(training: Training) -> tuple[float, float]:
    """Run teacher and student on the longest row, without a step → bytes kept for the backward pass, and seconds."""
    teacher, machine, rows = training.teacher, training.machine, training.data.train
    row = rows[int(rows.lengths.argmax())]
    batch = collate([row], training.batches.pad_id).to(machine.device)
    own = {p.untyped_storage().data_ptr() for p in training.student.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    training.objective.train()
    for _ in range(2):  # the first is to warm up
        saved.clear()
        started, answer = time.perf_counter(), None
        if teacher is not None and training.objective.mix.alpha > 0:  # nothing is written to its store
            answer = Answer(teacher.live(batch), teacher.head) if teacher.is_loaded else teacher.answer(batch)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), machine.autocast():
            total, _ = training.objective(batch, answer)
        total.backward()
        if machine.device.type != "cpu":  # wait until it has done what it was asked to
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - started
    return sum(saved.values()) / len(row.tokens), seconds / len(row.tokens)


def memory_of_a_step(training: Training, activation_bytes: float) -> dict[str, float]:
    """Estimate what is in memory at the peak of a step, part by part."""
    student, teacher, batches = training.student, training.teacher, training.batches
    lengths = sorted(training.data.train.lengths.tolist(), reverse=True)
    lengths = lengths[: max(1, (batches.micro_batch_tokens or 0) // lengths[0]) or batches.micro_batch_size]
    tokens, num = lengths[0] * len(lengths), student.num_parameters()
    parts = {
        "activations": activation_bytes * tokens,
        "weights and gradients": 2.0 * num * student.dtype.itemsize,
        "optimizer": num * state_bytes(training.config.optim, next(student.parameters())),
    }
    if teacher is not None:
        parts["teacher"] = teacher.model.get_memory_footprint() if teacher.is_loaded else teacher.head.weight.nbytes
    if training.config.rollout.is_on_policy:
        shape, rollout = student.config.get_text_config(), training.config.rollout
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        width = heads * (getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
        length = min(lengths[0] + rollout.max_new_tokens, training.max_length)
        parts["cache of generation"] = 2.0 * shape.num_hidden_layers * width * length * rollout.batch_size * 4
    with training.machine.autocast():
        head = head_of(student)
        rows = min(tokens, chunk_size_of(head))
        parts["logits of a chunk"] = 2.0 * rows * head.num_ids * head.compute_dtype.itemsize  # of student and teacher
    return parts


def disk_lines(training: Training, path: Path) -> list[str]:
    """Say what the run writes, and what is free."""
    student, best, one = results.bytes_on_disk(training)
    what = "the student" + (" and its best weights" if best else "")
    lines = [f"  disk            {what} {in_bytes(student + best)}; {in_bytes(usage_of(path).free)} free"]
    if one:
        most = in_bytes((checkpoint.KEPT + 1) * one)
        lines.append(f"                  checkpoints {in_bytes(one)} each, at most {most} until the run is done")
    return lines


def time_line(training: Training, seconds: float) -> str:
    """Estimate how long the steps would take, from what a token of one row took."""
    batches, max_steps = training.batches, training.max_steps
    tokens = int(max_steps / batches.steps_per_epoch * batches.rows.lengths.sum())
    total = timedelta(seconds=round(seconds * tokens / training.machine.num_processes))
    return f"  time            about {total} for {tokens:,} tokens in {max_steps} steps, held-out measures aside"
