"""What is trained, how far it has come, and the loop: plain accelerate, read top to bottom."""

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from kdx.build import num_steps
from kdx.config import Config, TrainConfig
from kdx.data.batches import Batches, StepBatch
from kdx.errors import DivergedError, MachineError
from kdx.evaluate import Judge, Measures, peak_memory
from kdx.objective import Objective
from kdx.optim import build_optimizer, build_schedule
from kdx.run import checkpoint, sharding
from kdx.run.devices import keep_memory
from kdx.run.files import fsync
from kdx.run.folder import RunFolder
from kdx.run.signals import Stopped, StopRequest
from kdx.run.tracking import Tracker
from kdx.student import describe, load_saved, saved_dtype
from kdx.teacher import Teacher

log = logging.getLogger("kdx")

LIBRARIES = ("kdx", "torch", "transformers", "accelerate", "tokenizers", "bitsandbytes")
HINT = "Lower optim.lr, raise optim.warmup_steps, use train.precision=fp32, or train.on_nonfinite=skip"


@dataclass
class State:
    """Everything the loop must remember to resume, beside weights, optimizer and random numbers."""

    step: int = 0
    tokens: int = 0  # input tokens without padding
    counted_tokens: int = 0  # those in the loss
    best: float | None = None  # held-out measure
    best_step: int = 0
    num_worse: int = 0  # held-out measures in a row without improvement
    measured: int = 0  # the last step with held-out measures
    saved: int = 0  # the last step with a checkpoint
    lines: int = 0  # bytes of metrics.jsonl
    stopped_by: str = "max_steps"
    kept_step: int = 0  # whose weights became the student
    seconds: float = 0.0  # spent in steps, without measuring and saving
    step_seconds: list[float] = field(default_factory=list)
    window: list[dict[str, Any]] = field(default_factory=list)  # steps since the last line of metrics
    num_nonfinite: int = 0  # steps that were skipped
    versions: dict[str, str] = field(default_factory=dict)
    other_versions: list[str] = field(default_factory=list)  # with which a part of the run was made

    def count(self, batch: StepBatch, values: dict[str, float], lr: float, seconds: float, *, is_skipped: bool) -> None:
        """Count one finished step. values: its terms and grad_norm; those of a skipped step count in no mean."""
        self.step += 1
        self.tokens += batch.num_input_tokens
        self.counted_tokens += batch.num_tokens
        self.seconds += seconds
        self.step_seconds = [*self.step_seconds[-199:], seconds]  # enough for a median
        part: dict[str, Any] = {
            "counted": batch.num_tokens,
            "tokens": batch.num_input_tokens,
            "seconds": seconds,
            **values,
        }
        if is_skipped:
            part = dict.fromkeys(part, 0) | {"grad_norm": None}
        elif not math.isfinite(part["grad_norm"]):  # of fp16, whose scaler skips such a step by itself
            part["grad_norm"] = None
        self.window.append(part | {"lr": lr, "epoch": batch.epoch})

    def is_out_of_patience(self, config: TrainConfig) -> bool:
        """Return whether the held-out measure has not improved for `train.early_stopping.patience` measures."""
        patience = config.early_stopping.patience
        return patience is not None and self.num_worse >= patience


class Training:
    """The student with its optimizer, schedule and batches, and the state of its training.

    student: the whole model, to be measured and saved; the same as objective.model, but under FSDP.
    versions: of what decides the last bits of a run; a run that is resumed with others says so.
    is_finished: whether the student was trained, and saved, before this process started.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        teacher: Teacher | None,
        batches: Batches,
        tokenizer: Any,
        max_length: int,
        machine: Accelerator,
    ) -> None:
        self.config, self.objective, self.teacher, self.batches = config, objective, teacher, batches
        self.tokenizer, self.max_length, self.machine = tokenizer, max_length, machine
        self.max_steps = num_steps(config.train, batches)
        optimizer = build_optimizer(config.optim, objective)
        self.schedule = build_schedule(config.optim, optimizer, self.max_steps)
        self.module, self.optimizer, self.student = sharding.prepare(machine, objective, optimizer)
        self.whole = partial(sharding.whole, objective, self.student)
        torch.manual_seed(config.train.seed + machine.process_index)  # dropout; fresh weights are drawn by now
        stored = "on" if teacher and teacher.store else "off"
        self.versions = {name: version(name) for name in LIBRARIES}
        self.versions |= {"teacher.store": stored, "precision": precision_of(config, machine)}
        self.save_dtype = saved_dtype(config.student, config.teacher)
        self.state = State(versions=self.versions)
        self.is_finished = False
        self.is_save_due = False  # by train.save_minutes
        self._saved_at = time.monotonic()

    def restore(self, folder: RunFolder) -> bool:
        """Load a finished training, or the newest whole checkpoint → False at step 0. Raises KdxError."""
        trained, saved = folder.kept("trained.json"), folder.path / "student"
        if trained and trained["max_steps"] == self.max_steps and saved.is_dir():
            self.state, self.is_finished = self._read_state(trained["state"], folder.path / "trained.json"), True
            load_saved(saved, self.student)
            log.info("training is finished: %s", saved)
        else:
            newest, skipped = checkpoint.newest(folder.path)
            for fault in skipped:
                log.warning("skipped a damaged checkpoint, %s", fault)
            if newest is None:
                folder.begin_again()
                return False
            self._resume(folder, newest)
        sharding.spread(self.student, self.objective)
        folder.step = self.state.step
        return True

    def _resume(self, folder: RunFolder, newest: Path) -> None:
        def set_state(state: Any) -> None:
            sharding.set_optimizer_state(self.objective, self.optimizer, state)

        rank, scaler = self.machine.process_index, self.machine.scaler
        kept = checkpoint.load(newest, self.student, set_state, self.schedule, rank=rank, scaler=scaler)
        self.state = state = self._read_state(kept, newest / "state.json")
        notes = [
            f"{name} {was} up to step {state.step}, then {self.versions[name]}"
            for name, was in state.versions.items()
            if was != self.versions.get(name)
        ]
        if notes:
            log.warning("this run no longer repeats bit for bit: %s", "; ".join(notes))
        state.other_versions += notes
        state.versions, state.stopped_by = self.versions, "max_steps"
        self.machine.wait_for_everyone()  # all may read the best weights at once, if no step is left
        log.info("resuming from %s", newest)

    def _read_state(self, kept: dict[str, Any], file: Path) -> State:
        if kept.keys() != asdict(State()).keys():
            raise MachineError(str(file), "was written by another version of kdx", "Resume with that version")
        return State(**kept)

    def save(self, folder: RunFolder, *, unless_there: bool = False) -> None:
        """Write a checkpoint of this step. All processes must call it. Raises MachineError."""
        if unless_there and self.state.saved == self.state.step:
            return
        if self.teacher and self.teacher.store:
            self.teacher.store.flush()  # a resumed run reads the same rows
        random_states = gather_object([checkpoint.random_state()])
        self.state.saved = self.state.step
        optimizer = sharding.optimizer_state(self.objective, self.optimizer)
        with self.whole():
            if self.machine.is_main_process:
                self.state.lines = num_bytes(folder.path / "metrics.jsonl")
                checkpoint.save(
                    folder.path,
                    self.student,
                    optimizer,
                    self.schedule,
                    asdict(self.state),
                    random_states,
                    lambda path: describe(self.student, self.tokenizer, path),
                    scaler=self.machine.scaler,
                )
        self.machine.wait_for_everyone()
        self._saved_at, self.is_save_due = time.monotonic(), False

    def measure(self, judge: Judge) -> Measures:
        """Take the held-out measures of the student as it is."""
        with self.whole():
            return judge(self.student)

    def keep_if_best(self, measures: Measures, folder: RunFolder) -> None:
        """Note whether the held-out measure improved, and keep the weights if they may become the student."""
        means, state, config = measures.means(), self.state, self.config.train
        value = means["kl"] if means["kl"] is not None else means["ce"]
        best = math.inf if state.best is None else state.best
        if value is not None and value < best - config.early_stopping.min_delta:
            state.best, state.best_step, state.num_worse = value, state.step, 0
            if config.keep == "best":
                with self.whole():
                    if self.machine.is_main_process:
                        checkpoint.save_weights(checkpoint.best_file(folder.path), self.student)
        else:
            state.num_worse += 1

    def forward_backward(self, batch: StepBatch, stop: StopRequest) -> tuple[dict[str, float], float]:
        """Accumulate one step's gradient and clip it → each term's mean over the step's counted positions, and the norm.

        One reduction over processes carries the terms and whether any process was asked to stop; one read waits for it.
        """
        machine, config = self.machine, self.config.train
        factor = machine.num_processes / max(batch.num_tokens, 1)  # DDP and FSDP average gradients over processes
        asks = self.teacher is not None and self.objective.mix.alpha > 0
        answers = self.teacher.answers(batch.micro_batches) if self.teacher and asks else repeat(None)
        sums, names = [], []
        for i, (micro_batch, answer) in enumerate(zip(batch.micro_batches, answers, strict=False), 1):
            # FSDP reduces each time: it would keep whole gradients otherwise, and saving memory is what it is for.
            is_reduced = i == len(batch.micro_batches) or machine.is_fsdp2
            with nullcontext() if is_reduced else machine.no_sync(self.module):
                total, terms = self.module(micro_batch.to(machine.device), answer, factor)
                machine.backward(total)
            names = [*terms]
            sums.append(torch.stack([*terms.values()]))
        self._sums = torch.stack(sums)  # [micro-batches, terms]
        is_late = time.monotonic() - self._saved_at > 60 * (config.save_minutes or math.inf)
        flags = sums[0].new_tensor([stop.signal is not None, is_late and machine.is_main_process])
        reduced = machine.reduce(torch.cat([self._sums.sum(0), flags]), reduction="sum")
        clipped = machine.clip_grad_norm_(self.objective.parameters(), config.max_grad_norm or math.inf)
        *values, asked, is_late, norm = torch.cat([reduced, sharding.plain(clipped).to(reduced)[None]]).tolist()
        stop.is_agreed = bool(asked)
        self.is_save_due = bool(is_late)
        return {name: value / max(batch.num_tokens, 1) for name, value in zip(names, values, strict=True)}, norm

    def update(self, batch: StepBatch, terms: dict[str, float], norm: float) -> bool:
        """Step optimizer and schedule → False if the step is not finite and was skipped. Raises DivergedError."""
        is_finite = self.is_finite(terms, norm)
        if is_finite:
            self.optimizer.step()
        else:
            self._skip_or_stop(batch, terms)
        if not (is_finite and self.machine.optimizer_step_was_skipped):
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return is_finite

    def is_finite(self, terms: dict[str, float], norm: float) -> bool:
        """Return whether a step may change the weights. The scaler of fp16 skips gradients that overflow by itself."""
        return all(map(math.isfinite, terms.values())) and (self.machine.scaler is not None or math.isfinite(norm))

    def _skip_or_stop(self, batch: StepBatch, terms: dict[str, float]) -> None:
        """Skip a step that is not finite, and say which rows it had. Raises DivergedError unless steps may be skipped."""
        state, config = self.state, self.config.train
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        names = {"kd": "the distillation term", "ce": "the cross-entropy"}
        what = names.get(bad[0], bad[0]) if bad else "the gradient"
        rows = batch.where
        if bad:  # name the rows of the micro-batches whose sum is not finite
            is_bad = (~self._sums[:, [*terms].index(bad[0])].isfinite()).tolist()
            parts = zip(batch.micro_batches, is_bad, strict=True)
            rows = [where for micro_batch, is_one in parts if is_one for where in micro_batch.where if where]
        rows = gather_object(rows)
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        what += f" is not finite; the weights are still those of step {state.step} (rows: {', '.join(rows[:8])}{more})"
        if config.on_nonfinite == "stop" or state.num_nonfinite >= config.max_nonfinite:
            if config.on_nonfinite == "skip":
                what += f"; {state.num_nonfinite} steps were skipped before (train.max_nonfinite)"
            raise DivergedError(f"step {state.step + 1}", what, HINT)
        state.num_nonfinite += 1
        if self.machine.scaler is not None:  # it has unscaled the gradients, and waits for the step
            self.machine.scaler.update()
        log.warning("step %d is skipped: %s", state.step + 1, what)

    def choose_weights(self, folder: RunFolder) -> None:
        """Leave the last or the best weights in the whole student. Raises DivergedError if no measure was finite."""
        sharding.gather(self.objective, self.student)
        state = self.state
        state.kept_step = state.step
        if self.config.train.keep == "last" or state.step == 0:
            return
        state.kept_step = state.best_step
        if state.best_step == 0:
            hint = "Lower optim.lr, or set train.keep=last"
            raise DivergedError(f"step {state.step}", "no held-out measure was finite, so there is no best step", hint)
        if state.best_step != state.step:
            checkpoint.load_weights(checkpoint.best_file(folder.path), self.student)


def train(run: Training, judge: Judge, tracker: Tracker, folder: RunFolder, stop: StopRequest) -> None:
    """Train until the last step, early stopping or a signal. Raises Stopped once a checkpoint is written.

    The loop runs once more than there are steps, so that the last step is logged and measured like any other.
    """
    state, config = run.state, run.config.train
    keep_memory(run.machine.device.type)
    run.objective.train()
    try:
        for batch in run.batches.steps(state.step, run.max_steps):
            # Log once in a while.
            if state.window and state.step % config.log_every == 0:
                tracker.log(state, means(run))

            # A stop comes before any measuring: the time until the process is killed may be short.
            if stop.is_asked:
                raise stop.stopped()

            # Measure once in a while. The end of the run is measured after the student is saved.
            is_due = config.eval_every and state.step % config.eval_every == 0
            if is_due and state.measured < state.step < run.max_steps:
                measures = run.measure(judge)
                run.keep_if_best(measures, folder)
                state.measured = state.step
                tracker.log(state, {f"eval/{name}": value for name, value in measures.named().items()})

            # Save once in a while.
            is_due = config.save_every and state.step % config.save_every == 0
            if (is_due or run.is_save_due) and state.saved < state.step < run.max_steps:
                run.save(folder)

            # Stop at the end, or when the held-out measure no longer improves.
            if batch is None or state.is_out_of_patience(config):
                break

            # One step: sums over micro-batches and processes, one division by the counted tokens of the whole step.
            started, lr = time.perf_counter(), float(run.schedule.get_last_lr()[0])
            terms, norm = run.forward_backward(batch, stop)
            is_finite = run.update(batch, terms, norm)
            seconds = time.perf_counter() - started
            state.count(batch, terms | {"grad_norm": norm}, lr, seconds, is_skipped=not is_finite)
            tracker.advance(state.step, run.objective.mix.loss(terms), batch.num_input_tokens / seconds)
            folder.at(state.step)
        finish(run, judge, folder)
        if state.window:  # after the last checkpoint: a longer run from there logs at other steps
            tracker.log(state, means(run))
    except Stopped:
        run.save(folder, unless_there=True)
        raise


def finish(run: Training, judge: Judge, folder: RunFolder) -> None:
    """Measure the last step if its weights may be the best, and write a last checkpoint if checkpoints are kept."""
    state, config = run.state, run.config.train
    if state.step < run.max_steps:
        state.stopped_by = "early_stopping"
    elif config.keep == "best" and state.step > 0:
        run.save(folder, unless_there=True)  # nothing is lost if measuring fails
        run.keep_if_best(run.measure(judge), folder)
    if config.keep_checkpoints:
        run.save(folder, unless_there=True)


def means(run: Training) -> dict[str, float | None]:
    """Average the steps since the last line of metrics, weighted by their counted tokens, and start anew."""
    window, mix = run.state.window, run.objective.mix
    counted, seconds = (sum(part[name] for part in window) for name in ("counted", "seconds"))
    terms = {name: sum(part[name] * part["counted"] for part in window) / max(counted, 1) for name in mix.weights}
    is_used = {name: bool(counted) and (name == "ce" or weight > 0) for name, weight in mix.weights.items()}
    tokens, last = sum(part["tokens"] for part in window), window[-1]
    window.clear()
    return {
        "train/loss": mix.loss(terms) if counted else None,
        **{f"train/{name}": value if is_used[name] else None for name, value in terms.items()},
        "speed/tokens_per_second": tokens / seconds if counted else None,
        **{f"train/{name}": last[name] for name in ("lr", "grad_norm", "epoch")},
        "memory/peak_bytes": peak_memory(run.machine.device),
    }


def precision_of(config: Config, machine: Accelerator) -> str:
    """Say what the student computes in."""
    if machine.mixed_precision in ("bf16", "fp16"):
        return f"{machine.mixed_precision} autocast over fp32 weights"
    return "fp64" if config.train.precision == "fp64" else "fp32"


def num_bytes(file: Path) -> int:
    """Return the size of a file whose content is on the disk."""
    if not file.exists():
        return 0
    fsync(file)
    return file.stat().st_size
