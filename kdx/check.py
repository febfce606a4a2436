"""What `kdx check …` does: read config, data and models as the run would, say what would be trained, and train nothing."""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from kdx.config import Config
from kdx.data.batches import MicroBatch, Row, collate
from kdx.errors import printable
from kdx.evaluate import HeldOut
from kdx.objective import BLOCK_BYTES, CHUNK_BYTES
from kdx.optim import build_optimizer, build_schedule, state_bytes
from kdx.prepare import (
    CHECKPOINTS,
    Prepared,
    bytes_on_disk,
    check_names,
    check_room,
    prepare,
)
from kdx.run import report
from kdx.run.files import in_bytes, room
from kdx.run.launch import build_accelerator
from kdx.run.tracking import CONSOLE, log, logging_to, quiet_libraries
from kdx.teacher import Teacher

SOFTMAXES = 6  # float32 tensors of a block at once: both logits, log-probabilities, gradients
LONGEST_SHOWN = 1200  # letters of the row that is shown


def check(config: Config, folder: Path) -> None:
    """Say what a run of this config in a folder would be. Raises KdxError for all that the run would refuse."""
    quiet_libraries()
    accelerator = build_accelerator(config)
    with logging_to(None, accelerator.is_main_process):
        check_names(config)
        run = prepare(config, accelerator, owner="check")
        build_schedule(config.optim, build_optimizer(config.optim, run.student), run.max_steps)
        if not accelerator.is_main_process:
            return
        for line in report.header(run):
            log.info(line)
        rows = [run.rows[i] for i in next(run.batches.plan(0, 1))[1]] if run.max_steps else run.rows[:1]
        log.info("a row as the model sees it, what counts in the loss between ⟦ and ⟧:")
        CONSOLE.print(printable(marked(run.tokenizer, rows[0]))[:LONGEST_SHOWN], markup=False, style="dim")
        cost = measure(run)
        CONSOLE.print(memory_table(run, cost))
        for line in disk_lines(run, folder):
            log.info(line)
        log.info(time_line(run, cost))
        check_room(run, folder)  # last, so that all else is said


def marked(tokenizer: Any, row: Row) -> str:
    """A row's text with the tokens that count between ⟦ and ⟧."""
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
    """What a token costs, measured on one row."""

    activation_bytes: float  # kept for the backward pass
    teacher_seconds: float
    step_seconds: float  # of the student, forward and backward
    measure_seconds: float  # of the student, as a held-out row


def measure(run: Prepared) -> Cost:
    """Run teacher and student on the longest row, without a step of the optimizer."""
    row = max(run.rows, key=lambda r: len(r.tokens))
    batch = collate([row], run.batches.pad_id).to(run.accelerator.device)
    own = {p.untyped_storage().data_ptr() for p in run.student.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    run.objective.train()
    _seconds(run, batch)  # once to warm up
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        seconds = _seconds(run, batch)
    run.student.zero_grad(set_to_none=True)
    return Cost(sum(kept.values()) / len(row.tokens), *(s / len(row.tokens) for s in seconds))


def _seconds(run: Prepared, batch: MicroBatch) -> tuple[float, float, float]:
    """How long the teacher's answer takes, the student forward and backward, and the student as it is measured."""
    teacher, device = run.teacher, run.accelerator.device
    times = [_now(device)]
    hidden = _hidden(teacher, run.rows, batch) if teacher else None
    times.append(_now(device))
    with run.accelerator.autocast():
        is_asked = run.config.loss.alpha > 0
        total, _, _ = run.objective(batch, hidden if is_asked else None, teacher.head if teacher and is_asked else None)
    total.backward()
    times.append(_now(device))
    held_out = HeldOut([batch], device, run.num_ids)
    if teacher and hidden is not None:
        held_out.teacher_head, held_out.teacher_hidden = teacher.head.cut(run.num_ids), [hidden.cpu()]
    held_out.measure(run.student, run.accelerator.autocast())
    times.append(_now(device))
    asked, stepped, measured = (after - before for before, after in pairwise(times))
    return asked, stepped, measured


def _now(device: torch.device) -> float:
    if device.type != "cpu":  # what it was told to do is done
        torch.accelerator.synchronize()
    return time.perf_counter()


def _hidden(teacher: Teacher, rows: list[Row], batch: MicroBatch) -> torch.Tensor:
    """The teacher's answer: read if its store has every row, else live as the run would; nothing is kept."""
    is_filled = teacher.store is not None and not teacher.store.missing([row.digest for row in rows])
    return teacher.answer(batch).hidden if is_filled else teacher.live(batch)


def memory_table(run: Prepared, cost: Cost) -> Table:
    """What is in memory at the peak of a step, and what each saving would take from it."""
    config, num = run.config, run.student.num_parameters()
    longest = sorted((len(row.tokens) for row in run.rows), reverse=True)[: run.batches.micro_batch_size]
    activations = cost.activation_bytes * longest[0] * len(longest)
    is_8bit = config.optim.name.endswith("8bit")
    states = num * state_bytes(config.optim, next(run.student.parameters()))
    weight = run.student.dtype.itemsize
    teacher = head = 0
    if run.teacher is not None and config.loss.alpha > 0:
        head = run.teacher.head.weight.nbytes
        teacher = run.teacher.num_bytes if run.teacher.is_loaded else head
    logits = longest[0] * len(longest) * run.num_ids * (2 if run.accelerator.mixed_precision == "bf16" else 4)
    chunk = 2 * min(CHUNK_BYTES, logits)  # the student's and the teacher's
    if run.accelerator.device.type != "cpu":  # there a block is small
        chunk += SOFTMAXES * min(BLOCK_BYTES, logits)
    table = Table(title="memory of a step, in the order of what to save first", title_justify="left")
    table.add_column("")
    table.add_column("bytes", justify="right")
    table.add_column("saving", min_width=len("train.gradient_checkpointing=true"))  # whole, to be typed
    table.add_column("saves", justify="right")
    layers = run.student.config.get_text_config().num_hidden_layers
    width = run.student.config.get_text_config().hidden_size
    checkpointed = longest[0] * len(longest) * layers * width * 4
    kept = config.train.gradient_checkpointing
    rows: list[tuple[str, float, str, float]] = [
        ("activations", activations, "train.micro_batch_size=1", activations * (1 - 1 / len(longest))),
        ("", 0, "train.gradient_checkpointing=true", 0 if kept else max(0.0, activations - checkpointed)),
        ("", 0, "train.precision=bf16", activations / 3 if run.accelerator.mixed_precision == "no" else 0),
        ("weights, gradients", 2 * weight * num, "", 0),
        ("optimizer", states, "optim=adamw_8bit", 0 if is_8bit else max(0, states - 2 * num)),
        ("teacher", teacher, "teacher.quantization=8bit", teacher / 2 if config.teacher.quantization == "none" else 0),
        ("", 0, "teacher.store=on, once filled", teacher - head),
        ("logits of a chunk", chunk, "", 0),
    ]  # fmt: skip
    for what, size, saving, saves in rows:
        if size or saves:
            table.add_row(
                what, in_bytes(size) if size else "", saving if saves else "", in_bytes(saves) if saves else ""
            )
    table.add_row("together", in_bytes(activations + 2 * weight * num + states + teacher + chunk))
    return table


def disk_lines(run: Prepared, folder: Path) -> list[str]:
    """What the run writes, and what is free."""
    _, free = room(folder)
    student, best, one = bytes_on_disk(run)
    what = "the student" + (" and its best weights" if best else "")
    lines = [f"  disk            {what} {in_bytes(student + best)}; {in_bytes(free)} free"]
    if one:
        most = in_bytes(CHECKPOINTS * one)
        lines.append(f"                  checkpoints {most} until the run is done, {in_bytes(one)} each")
    return lines


def time_line(run: Prepared, cost: Cost) -> str:
    """How long steps and measures would take, by the one row that was measured."""
    train, processes = run.config.train, run.accelerator.num_processes
    tokens = run.batches.num_input_tokens(run.max_steps)
    per_token = cost.step_seconds + (cost.teacher_seconds if run.config.loss.alpha > 0 else 0)
    steps = per_token * tokens / processes
    held_out = sum(len(row.tokens) for row in run.held_out_rows)
    num_measures = 2 + ((run.max_steps - 1) // train.eval_every if train.eval_every else 0)  # 2: untouched and done
    measures = (cost.teacher_seconds + num_measures * cost.measure_seconds) * held_out / processes
    what = f"{minutes(steps)} for {tokens:,} tokens in {run.max_steps} steps"
    return (
        f"  time            about {what}, {minutes(measures)} for {num_measures} held-out measures, by one row measured"
    )


def minutes(seconds: float) -> str:
    """A time to plan by."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
