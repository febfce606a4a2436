"""`kdx check`: read config, data and models as a run would, say what it would be, and train nothing."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kdx import weigh
from kdx.adapter import trained
from kdx.config import Config
from kdx.data.batches import Row, collate
from kdx.distill import prepared
from kdx.errors import MEMORY, printable, shortened
from kdx.objective import check_loss
from kdx.optim import state_bytes
from kdx.run import checkpoint, report, results
from kdx.run.files import Lines, in_bytes, usage_of
from kdx.run.folder import Record
from kdx.run.identity import canonical, config_identity
from kdx.run.launch import build_accelerator
from kdx.run.tracking import CONSOLE, log, logging_to
from kdx.teacher import Answer
from kdx.train import Training
from kdx.words import key_of

if TYPE_CHECKING:
    from kdx.compose import Plan, Point

MOST_READ = 1000  # rows among which the one with most turns is looked for
LONGEST_SHOWN = 1200  # characters of the row that is shown


def check_points(plan: "Plan") -> None:
    """Check every point that a command line asks for; of those that differ in the loss alone, the first."""
    groups: dict[str, list[Point]] = {}
    for point in plan.points:  # the loss changes neither data nor time, and memory little, but for having a teacher
        same = {k: v for k, v in config_identity(point.config).items() if not k.startswith("loss.")}
        groups.setdefault(canonical([same, point.config.loss.alpha > 0]), []).append(point)
    is_loss_swept, rows, weighed = any(key.split(".")[0] == "loss" for key in plan.swept), Lines(), set[str]()
    for points in groups.values():
        first = points[0]
        swept = [word for word in first.words if key_of(word) in plan.swept]
        print("", *swept, flush=True)
        known = canonical([word for word in swept if not word.startswith("loss") and weigh.makes_rows(word)])
        taught = [p for p in points if is_loss_swept and p.config.loss.alpha > 0 and known not in weighed]
        weighed |= {known} if taught else set()
        rows += check(first.config, plan.folder, Record(first.words, plan.swept, first.sources), taught)
    if rows:
        more = list(plan.flags)
        for key in (key for key in plan.swept if key != "loss.alpha" and not weigh.makes_rows(key)):
            values = (word.partition("=")[2] for point in plan.points for word in point.words if key_of(word) == key)
            more.append(f"{key}={','.join(dict.fromkeys(values))}")
        alphas = sorted({point.config.loss.alpha for point in plan.points} - {0.0})
        weigh.show(rows, alphas, Path("outputs/check") / str(plan.points[0].config.sweep.name), more)


def check(config: Config, path: Path, record: Record, points: Sequence["Point"]) -> Lines:
    """Say what a run of this config in a folder would be. Raises KdxError for all that the run would refuse.

    points: those of a sweep that differ from it in the loss: what alpha weighs there.
    """
    machine = build_accelerator(config)
    for point in points:
        check_loss(point.config.loss)
    with logging_to(), prepared(config, record, machine) as training:
        if not machine.is_main_process:
            return []
        for line in report.header(training):
            log.info(line)
        for what, row in rows_to_show(training).items():
            log.info("the %s row as the student sees it, counted tokens between ⟦ and ⟧ (%s):", what, row.where)
            text = printable(marked(training.tokenizer, row))
            CONSOLE.print(shortened(text, LONGEST_SHOWN), markup=False, style="dim")
        rise(training, 1)  # to warm up
        memory, size = memory_lines(training)
        lines = [*memory, f"to save memory: {MEMORY}", *disk_lines(training, path)]
        for line in [*lines, time_line(training, a_pass(training, size))]:
            log.info(line)
        results.check_room(training, path)  # may raise, so everything else is printed first
        if points and config.rollout.is_on_policy:  # whose own answers pull alike at any alpha
            log.info("no table of effective alpha with rollout=student: see train/effective_alpha of a run")
            return []
        return weigh.weighed(training, points, record.swept) if points else []


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


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block that are alive at the same time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.made = 0  # made: since the dead were last left out
        self.alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                size = x.untyped_storage().nbytes()
                self.made += size - self.alive.get(ref := StorageWeakRef(x.untyped_storage()), 0)
                self.alive[ref] = size
        if self.made > self.peak:
            self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
            self.made = sum(self.alive.values())
            self.peak = max(self.peak, self.made)
        return result


def a_pass(training: Training, num_rows: int, *, with_pulls: bool = False) -> float:
    """Run teacher and student, forwards and backwards, on the longest rows → seconds a token. Gradients add up."""
    started = time.perf_counter()
    teacher, machine, rows = training.teacher, training.machine, training.data.train
    training.objective.train()
    longest = [rows[int(i)] for i in rows.lengths.argsort(kind="stable")[-num_rows:]]
    batch, answer = collate(longest, training.batches.pad_id).to(machine.device), None
    if teacher is not None and training.objective.mix.alpha > 0:  # nothing is written to its store
        answer = Answer(teacher.live(batch), teacher.head) if teacher.is_loaded else teacher.answer(batch)
    with machine.autocast():
        total, _ = training.objective(batch, answer, with_pulls=with_pulls)
    total.backward()
    if machine.device.type != "cpu":  # wait until it has done what it was asked to
        torch.accelerator.synchronize()
    return (time.perf_counter() - started) / sum(len(row.tokens) for row in longest)


def rise(training: Training, num_rows: int) -> int:
    """Measure by how many bytes a step of micro-batches of so many of the longest rows rises above what is kept."""
    num_micro = math.ceil(training.batches.batch_size / (num_rows * training.machine.num_processes))
    is_cuda = training.machine.device.type == "cuda"
    training.optimizer.zero_grad(set_to_none=True)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if is_cuda else 0
    with nullcontext() if is_cuda else PeakBytes() as counted:
        for _ in range(min(2, num_micro)):  # the second runs with the gradients of the first in memory
            a_pass(training, num_rows, with_pulls=True)  # as steps that are logged: they need most
    training.optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before if counted is None else counted.peak


def rises(training: Training, micro: int, free: float) -> dict[int, int]:
    """Measure it for micro-batches of 1, 2, 4, … rows and of the run's own `micro`, as far as what is free allows."""
    measured: dict[int, int] = {}
    for size in sorted({1, 2, micro, *(2**i for i in range(micro.bit_length()))}):
        if len(measured) > 1 and predicted(measured, size) > free:
            break
        try:
            measured[size] = rise(training, size)
        except torch.OutOfMemoryError:
            if not measured:
                raise
            break
    return measured


def predicted(measured: dict[int, int], num_rows: int) -> float:
    """Return the rise of a micro-batch, where it was not measured on the line through the two largest that were."""
    if num_rows in measured:
        return measured[num_rows]
    (small, low), (large, high) = [(0, 0), *sorted(measured.items())][-2:]
    line = high + (high - low) / (large - small) * (num_rows - large)
    return max(line, *(bytes for size, bytes in measured.items() if size <= num_rows))


def memory_lines(training: Training) -> tuple[list[str], int]:
    """Say what is in memory at the peak of a step, and the largest micro-batch that fits → lines, the largest tried."""
    batches, parts, longest = training.batches, kept_in_memory(training), int(training.data.train.lengths.max())
    share, by_tokens = batches.batch_size // training.machine.num_processes, batches.micro_batch_tokens
    micro = min(share, max(1, by_tokens // longest)) if by_tokens else batches.micro_batch_size
    free = free_bytes(training.machine.device) - parts["optimizer"]  # the rest is there
    measured = rises(training, micro, free)
    gradients = sum(tensor.nbytes for tensor in trained(training.student).values())
    parts |= {"gradients": gradients, "activations, logits": predicted(measured, micro) - gradients}
    parts["total"] = sum(parts.values())
    lines = [f"  {name:<22}{in_bytes(round(size)):>10}" for name, size in parts.items()]
    best, sizes = "no micro-batch", [size for size in range(1, share + 1) if by_tokens or share % size == 0]
    if fits := [size for size in sizes if predicted(measured, size) <= free]:
        best = f"train.micro_batch_tokens={fits[-1] * longest}" if by_tokens else f"train.micro_batch_size={fits[-1]}"
        best += " (the whole batch)" * (fits[-1] == share)
    lines.append(f"  largest fit     {best}, with {in_bytes(round(free))} free for a step")
    return ["memory of a step:", *lines], max(measured)


def kept_in_memory(training: Training) -> dict[str, float]:
    """Return the bytes that are there from one step to the next."""
    student, teacher = training.student, training.teacher
    tensors = list(trained(student).values())
    moments = sum(tensor.numel() for tensor in tensors) * state_bytes(training.config.optim, tensors[0])
    parts = {"weights": bytes_of(student), "optimizer": moments}
    if teacher is not None:
        parts["teacher"] = bytes_of(teacher.model) if teacher.is_loaded else teacher.head.weight.nbytes
    if training.config.rollout.is_on_policy:
        shape, rollout = student.config.get_text_config(), training.config.rollout
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        width = heads * (getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
        length = min(int(training.data.train.lengths.max()) + rollout.max_new_tokens, training.max_length)
        parts["cache of generation"] = 2.0 * shape.num_hidden_layers * width * length * rollout.batch_size * 4
    return parts


def bytes_of(model: torch.nn.Module) -> float:
    """Sum the bytes of a model's tensors, tied ones once, and those that quantised ones are scaled by."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def free_bytes(device: torch.device) -> float:
    """Return the bytes of a device that this process can still take."""
    if device.type != "cuda":
        return float(psutil.virtual_memory().available)
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def disk_lines(training: Training, path: Path) -> list[str]:
    student, best, one = results.bytes_on_disk(training)
    what = "the student" + (" and its best weights" if best else "")
    lines = [f"  disk            {what} {in_bytes(student + best)}; {in_bytes(usage_of(path).free)} free"]
    if one:
        most = in_bytes((checkpoint.KEPT + 1) * one)
        lines.append(f"                  checkpoints {in_bytes(one)} each, at most {most} until the run is done")
    return lines


def time_line(training: Training, seconds: float) -> str:
    """Estimate how long the steps would take, from what a token of a micro-batch took."""
    batches, max_steps = training.batches, training.max_steps
    tokens = int(max_steps / batches.steps_per_epoch * batches.rows.lengths.sum())
    total = timedelta(seconds=round(seconds * tokens / training.machine.num_processes))
    return f"  time            about {total} for {tokens:,} tokens in {max_steps} steps, plus held-out evaluation"
