"""What is trained, how far it has come, and the loop: plain accelerate, read top to bottom."""

import logging
import math
import time
from collections.abc import Container
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
from torch import Tensor

from kdx.adapter import dequantise, is_adapted, merge_adapter
from kdx.causal_lm import DTYPES
from kdx.config import GENERATED, Config, TrainConfig, unmeasured
from kdx.data.batches import Batches, StepBatch
from kdx.data.encode import Data
from kdx.errors import ConfigError, DivergedError, MachineError, together
from kdx.evaluate import Judge, Means, peak_memory, to_minimise
from kdx.objective import PULLS, Objective, pulls_of
from kdx.optim import build_optimizer, build_schedule
from kdx.rollout import figures, write_samples
from kdx.run import checkpoint, launch
from kdx.run.devices import keep_memory
from kdx.run.files import fsync
from kdx.run.folder import Record, RunFolder
from kdx.run.signals import Stopped, StopRequest
from kdx.run.tracking import Tracker
from kdx.student import cast, describe, load_saved, saved_dtype
from kdx.teacher import Teacher
from kdx.tokenizer import SharedTokenizer

log = logging.getLogger("kdx")

LIBRARIES = ("kdx", "torch", "transformers", "accelerate", "tokenizers", "bitsandbytes", "peft")
HINT = "Lower optim.lr, raise optim.warmup_steps, use train.precision=fp32, or train.on_nonfinite=skip"
PULL_NAMES = ("grad_kd", "grad_ce", "grad_cosine", "effective_alpha")
TERMS = {"kd": "the distillation term", "ce": "the cross-entropy"}


@dataclass
class State:
    """Everything the loop must remember to resume, beside weights, optimizer and random numbers."""

    step: int = 0
    tokens: int = 0  # input tokens without padding
    counted_tokens: int = 0  # those in the loss
    seconds: float = 0.0  # spent in steps and on their own answers, without measuring and saving
    window: list[dict[str, Any]] = field(default_factory=list)  # steps since the last line of metrics
    best: float = math.inf  # held-out measure
    best_step: int = 0
    num_worse: int = 0  # held-out measures in a row without improvement
    measured: int = 0  # the last step with held-out measures
    num_nonfinite: int = 0  # steps that were skipped, beside those that the scaler of fp16 skips
    num_updates: int = 0  # steps that changed the weights
    lines: int = 0  # bytes of metrics.jsonl
    elapsed: float = 0.0  # seconds of all its processes until this was saved
    versions: dict[str, str] = field(default_factory=dict)
    other_versions: list[str] = field(default_factory=list)  # with which a part of the run was made
    kept: dict[str, Any] = field(default_factory=dict)  # of the batches: what the student said for the steps to come

    def count(self, batch: StepBatch, values: Means, seconds: float, *, is_skipped: bool) -> None:
        """Count one finished step. values: its terms, norm and rate; those of a skipped step count in no mean."""
        self.step += 1
        self.tokens += batch.num_input_tokens
        self.counted_tokens += batch.num_tokens
        self.seconds += seconds + batch.figures.get("generation", 0.0)
        counted = 0 if is_skipped else batch.num_tokens
        part = {"counted": counted, "tokens": batch.num_input_tokens, "seconds": seconds, "epoch": batch.epoch}
        self.window.append(part | batch.figures | values)


@dataclass(eq=False)
class Training:
    """The parts of a run: the student with its optimizer, schedule and batches, and the state of its training.

    student: the whole model, to be measured and saved; the same as objective.model, but under FSDP.
    versions: of what decides the last bits of a run; a run that is resumed with others says so.
    is_finished: whether the student was trained, and saved, before this process started.
    """

    config: Config
    record: Record
    shared: SharedTokenizer
    data: Data
    batches: Batches
    max_steps: int
    measured_at: Container[int]  # steps
    teacher: Teacher | None
    objective: Objective
    machine: Accelerator
    started: float  # when this process began; of a run that is resumed, earlier by the time of those before it

    def __post_init__(self) -> None:
        config, objective, machine = self.config, self.objective, self.machine
        self.tokenizer, self.max_length = self.shared.tokenizer, self.shared.max_length
        optimizer = build_optimizer(config.optim, objective)
        self.schedule = build_schedule(config.optim, optimizer, self.max_steps)
        self.module, self.optimizer, self.student = launch.prepare(machine, objective, optimizer)
        self.whole = partial(launch.whole, objective, self.student)
        torch.manual_seed(config.train.seed + machine.process_index)  # dropout; fresh weights are drawn by now
        plain = "fp64" if config.train.precision == "fp64" else "fp32"
        mixed = machine.mixed_precision
        self.versions = {name: version(name) for name in LIBRARIES}
        self.versions["teacher.store"] = "on" if self.teacher and self.teacher.store else "off"
        self.versions["precision"] = plain if mixed == "no" else f"{mixed} autocast over fp32 weights"
        if is_adapted(self.student):
            base = config.adapter.quantization if config.adapter.quantization != "none" else str(self.student.dtype)[6:]
            self.versions["precision"] += f", beside a frozen base in {base}"
        self.save_dtype = saved_dtype(config.student, config.teacher)
        self.state = State(versions=self.versions, kept=self.batches.kept)
        self.is_finished = False
        self.is_save_due = False  # by train.save_minutes
        self._saved_step, self._saved_at = 0, time.monotonic()

    def restore(self, folder: RunFolder) -> bool:
        """Load a finished training, or the newest whole checkpoint → False at step 0. Raises KdxError."""
        trained, saved = folder.kept("trained.json"), folder.path / "student"
        if trained and saved.is_dir():
            self._take_up(trained["state"], folder.path / "trained.json")
            self.is_finished = True
            if is_adapted(self.student) and self.config.adapter.save == "merged":
                self.as_saved()
            load_saved(saved, self.student)
            log.info("training is finished: %s", saved)
        else:
            newest, skipped = checkpoint.newest(folder.path)
            for fault in skipped:
                log.warning("skipped a damaged checkpoint, %s", fault)
            if newest is None:
                folder.begin_again()
                return False
            state, optimizer, rest = checkpoint.load(newest, self.student, self.machine.process_index)
            launch.set_optimizer_state(self.objective, self.optimizer, optimizer)
            self.schedule.load_state_dict(rest["schedule"])
            if self.machine.scaler:
                self.machine.scaler.load_state_dict(rest["scaler"])
            self._take_up(state, newest / "state.json")
            self._note_versions()
            self._saved_step = self.state.step
            self.machine.wait_for_everyone()  # all may read the best weights at once, if no step is left
            log.info("resuming from %s", newest)
        launch.spread(self.student, self.objective)
        folder.step = self.state.step
        return True

    def _take_up(self, kept: dict[str, Any], file: Path) -> None:
        """Go on from a state that was saved."""
        if kept.keys() != asdict(State()).keys():
            raise MachineError(str(file), "was written by another version of kdx", "Resume with that version")
        self.batches.kept.update(kept["kept"])
        self.state = State(**kept | {"kept": self.batches.kept})
        self.started -= self.state.elapsed

    def _note_versions(self) -> None:
        """Note, and warn, if a part of the run was made with other versions."""
        state, now = self.state, self.versions
        pairs = [(name, was, now.get(name)) for name, was in state.versions.items()]
        notes = [f"{name} {was} up to step {state.step}, then {new}" for name, was, new in pairs if was != new]
        if notes:
            log.warning("this run can no longer be reproduced bit for bit: %s", "; ".join(notes))
        state.versions, state.other_versions = now, [*state.other_versions, *notes]

    def saved_state(self, folder: RunFolder) -> dict[str, Any]:
        self.state.lines = num_bytes(folder.path / "metrics.jsonl")
        self.state.elapsed = time.time() - self.started
        return asdict(self.state)

    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint of this step unless it is there. All processes must call it. Raises MachineError."""
        if self._saved_step == self.state.step:
            return
        if self.teacher and self.teacher.store:
            self.teacher.store.flush()  # a resumed run reads the same rows
        scaler = self.machine.scaler
        rest = {"schedule": self.schedule.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        rest["random"] = gather_object([checkpoint.random_state()])
        optimizer = launch.optimizer_state(self.objective, self.optimizer)
        with self.whole():
            if self.machine.is_main_process:
                described = partial(describe, self.student, self.tokenizer)
                checkpoint.save(folder.path, self.student, self.saved_state(folder), optimizer, rest, described)
        self.machine.wait_for_everyone()
        self._saved_step, self._saved_at, self.is_save_due = self.state.step, time.monotonic(), False

    def measure(self, judge: Judge, folder: RunFolder) -> Means:
        """Take the held-out measures of the student as it is, and keep its weights if they are the best so far."""
        state, config = self.state, self.config.train
        with self.whole():
            means = judge(self.student).means()
            if self.config.eval.metric in GENERATED:
                means |= judge.answered(self.student).means()
            value = to_minimise(means, self.config.eval.metric)
            state.measured, state.num_worse = state.step, state.num_worse + 1
            if value is not None and value < state.best - config.early_stopping.min_delta:
                state.best, state.best_step, state.num_worse = value, state.step, 0
                if config.keep == "best" and self.machine.is_main_process:
                    checkpoint.save_weights(checkpoint.best_file(folder.path), self.student)
        self.objective.train()
        return means

    def free(self) -> None:
        """Drop gradients and moments: no step is left."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()

    def forward_backward(self, batch: StepBatch, stop: StopRequest) -> tuple[dict[str, float], float]:
        """Accumulate one step's gradient and clip it → each term's mean over the step's counted positions, and the norm.

        One reduction over processes carries the terms and whether any process was asked to stop; one read waits for it.
        """
        machine, config = self.machine, self.config.train
        factor = machine.num_processes / max(batch.num_tokens, 1)  # DDP and FSDP average gradients over processes
        mix, step = self.objective.mix.at(self.state.step, self.max_steps), self.state.step + 1
        with_pulls = step % config.log_every == 0 or step == self.max_steps  # of steps that are logged
        is_taught = self.objective.mix.alpha > 0
        answers = self.teacher.answers(batch.micro_batches) if self.teacher and is_taught else repeat(None)
        self._parts: list[dict[str, Tensor]] = []  # the sum of each term, by micro-batch
        for i, (micro_batch, answer) in enumerate(zip(batch.micro_batches, answers, strict=False), 1):
            # FSDP reduces each time: it would keep whole gradients otherwise, and saving memory is what it is for.
            is_reduced = i == len(batch.micro_batches) or machine.is_fsdp2
            with nullcontext() if is_reduced else machine.no_sync(self.module):
                total, terms = self.module(micro_batch.to(machine.device), answer, factor, mix, with_pulls=with_pulls)
                machine.backward(total)
            self._parts.append(terms)
        sums = torch.stack([torch.stack([*terms.values()]) for terms in self._parts]).sum(0)
        is_late = time.monotonic() - self._saved_at > 60 * (config.save_minutes or math.inf)
        flags = (stop.signal is not None, is_late and machine.is_main_process)  # filled in: a copy would wait for a GPU
        reduced = machine.reduce(torch.cat([sums, *(sums.new_full((1,), flag) for flag in flags)]), reduction="sum")
        clipped: Any = machine.clip_grad_norm_(self.objective.parameters(), config.max_grad_norm or math.inf)
        clipped = clipped.full_tensor() if machine.is_fsdp2 else clipped
        *values, asked, is_late, norm = torch.cat([reduced, clipped.to(reduced)[None]]).tolist()
        stop.is_agreed = bool(asked)
        self.is_save_due = bool(is_late)
        found = dict(zip(terms, values, strict=True))
        means = {name: value / max(batch.num_tokens, 1) for name, value in found.items() if name not in PULLS}
        self.loss, self.pulls = float(mix.loss(means)), pulls_of(found, batch.num_tokens) if with_pulls else {}
        return means, norm

    def update(self, batch: StepBatch, terms: dict[str, float], norm: float) -> bool:
        """Step optimizer and schedule → False if the step is not finite and was skipped. Raises DivergedError."""
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        if not math.isfinite(norm) and self.machine.scaler is None:  # the scaler of fp16 skips such a step by itself
            bad.append("gradient")
        if bad:
            self._skip_or_stop(batch, bad[0])
        else:
            self.optimizer.step()
            self.state.num_updates += math.isfinite(norm)  # else the scaler of fp16 skips it
        if bad or not self.machine.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return not bad

    def _skip_or_stop(self, batch: StepBatch, name: str) -> None:
        """Skip a step that is not finite, and say which rows it had. Raises DivergedError unless steps may be skipped."""
        state, config = self.state, self.config.train
        parts = zip(batch.micro_batches, self._parts, strict=True)  # of a term, those where its sum is not finite
        is_bad = [micro for micro, terms in parts if name not in terms or not terms[name].isfinite()]
        rows = gather_object([where for micro in is_bad for row in micro.rows if (where := row.where or row.id)])
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        what = f"{TERMS.get(name, f'the {name}')} is not finite; the weights are still those of step {state.step}"
        what += f" (rows: {', '.join(rows[:8])}{more})"
        if config.on_nonfinite == "stop" or state.num_nonfinite >= config.max_nonfinite:
            if config.on_nonfinite == "skip":
                what += f"; {state.num_nonfinite} steps were skipped before (train.max_nonfinite)"
            raise DivergedError(f"step {state.step + 1}", what, HINT)
        state.num_nonfinite += 1
        if self.machine.scaler is not None:  # it has unscaled the gradients, and waits for the step
            self.machine.scaler.update()
        log.warning("step %d is skipped: %s", state.step + 1, what)

    def as_saved(self) -> None:
        """Give the whole student the form it is saved in: its dtype, and adapters merged unless they are saved alone."""
        student, dtype, adapter = self.student, DTYPES[self.save_dtype], self.config.adapter
        if is_adapted(student) and adapter.save == "merged":
            if adapter.quantization != "none":
                dequantise(student, adapter, self.config.student)
            merge_adapter(student, torch.float32 if dtype == torch.float16 else dtype)
        cast(student, dtype)

    @property
    def kept_step(self) -> int:
        """The step whose weights become the student."""
        return self.state.step if self.config.train.keep == "last" else self.state.best_step

    def choose_weights(self, folder: RunFolder) -> None:
        """Leave the last or the best weights in the whole student. Raises DivergedError if no measure was finite."""
        step = self.state.step
        if self.kept_step == 0 < step:
            hint = "Lower optim.lr, or set train.keep=last"
            raise DivergedError(f"step {step}", "no held-out measure was finite, so there is no best step", hint)
        with self.whole():
            if self.kept_step < step:
                checkpoint.load_weights(checkpoint.best_file(folder.path), self.student)


def train(run: Training, judge: Judge, tracker: Tracker, folder: RunFolder, stop: StopRequest) -> None:
    """Train until the last step, early stopping or a signal. Raises Stopped once a checkpoint is written.

    The loop runs once more than there are steps, so that the last step is logged and measured like any other.
    """
    state, config = run.state, run.config.train
    patience = config.early_stopping.patience or math.inf
    keep_memory(run.machine.device.type)
    run.objective.train()
    try:
        for batch in run.batches.steps(state.step, run.max_steps):
            if state.window and state.step % config.log_every == 0:
                tracker.log(state, means(run))
            if stop.is_asked:  # before any measuring: the time until the process is killed may be short
                raise stop.stopped()
            if state.step in run.measured_at and state.measured < state.step < run.max_steps:
                measures = run.measure(judge, folder)
                tracker.log(state, {f"eval/{name}": value for name, value in measures.items()})
                write_samples(run, folder.path)
            is_due = config.save_every and state.step % config.save_every == 0
            if (is_due or run.is_save_due) and state.step < run.max_steps:
                run.save(folder)
            if batch is None or state.num_worse >= patience:
                break

            # One step: sums over micro-batches and processes, one division by the counted tokens of the whole step.
            started, lr = time.perf_counter(), float(run.schedule.get_last_lr()[0])
            terms, norm = run.forward_backward(batch, stop)
            is_finite = run.update(batch, terms, norm)
            seconds = time.perf_counter() - started
            values = terms | run.pulls | {"loss": run.loss, "grad_norm": norm, "lr": lr}
            state.count(batch, values, seconds, is_skipped=not is_finite)
            tracker.advance(run.loss, batch.num_input_tokens / seconds)
            folder.at(state.step)

        write_samples(run, folder.path)

        # The weights of the last step may be the best. They are saved first: nothing is lost if measuring fails.
        if config.keep == "best" and state.measured < state.step:
            run.save(folder)
            run.measure(judge, folder)
        if config.keep_checkpoints:
            run.save(folder)
        if state.window:
            tracker.log(state, means(run))
    except Stopped:
        run.save(folder)
        raise


def means(run: Training) -> Means:
    """Average the steps since the last line of metrics, weighted by their counted tokens, and start anew."""
    window, mix, last = run.state.window, run.objective.mix, run.state.window[-1]
    used = [part for part in window if part["counted"]]
    of_rollouts = figures(window)
    window.clear()
    counted, tokens, seconds = (sum(part[name] for part in used) for name in ("counted", "tokens", "seconds"))
    terms = {name: sum(part[name] * part["counted"] for part in used) / max(counted, 1) for name in mix.weights}
    is_scheduled = mix != mix.at(1, 2)  # each step has its own weights
    loss = sum(part["loss"] * part["counted"] for part in used) / max(counted, 1) if is_scheduled else mix.loss(terms)
    return {
        "train/loss": loss if used else None,
        **{f"train/{k}": value if used and (k == "ce" or mix.weights[k] > 0) else None for k, value in terms.items()},
        "speed/tokens_per_second": tokens / seconds if used else None,
        "train/lr": last["lr"],
        "train/grad_norm": last["grad_norm"] if math.isfinite(last["grad_norm"]) else None,
        **{f"train/{name}": last.get(name) if last in used else None for name in PULL_NAMES},
        "train/epoch": last["epoch"],
        "memory/peak_bytes": peak_memory(run.machine.device),
        **of_rollouts,
    }


def num_steps(config: TrainConfig, batches: Batches) -> int:
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None
    return math.ceil(config.epochs * batches.steps_per_epoch - 1e-9)  # 0.07 · 100 is 7 steps


def steps_to_measure(config: Config, data: Data, batches: Batches, max_steps: int) -> Container[int]:
    """Return the steps with held-out measures, the end aside. Raises ConfigError if they are needed and there are none.

    eval.every=auto takes n evenly spaced ones, n = min(5, ⌊0.3 · training tokens ÷ held-out tokens⌋).
    """
    if config.eval.every != "auto":
        return range(config.eval.every, max_steps, config.eval.every) if config.eval.every else ()
    read, held_out = max_steps * int(data.train.lengths.sum()), int(data.held_out.lengths.sum())
    num = min(5, 3 * read // (10 * batches.steps_per_epoch * held_out)) if held_out else 0
    steps = {max_steps * i // (num + 1) for i in range(1, num + 1)} - {0}
    if max_steps and not steps and (errors := [ConfigError(*fault) for fault in unmeasured(config)]):
        raise together(errors)
    return steps


def num_bytes(file: Path) -> int:
    """Return the size of a file whose content is on the disk."""
    if not file.exists():
        return 0
    fsync(file)
    return file.stat().st_size
