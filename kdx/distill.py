"""One run, from config to saved student: the architecture as code."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from kdx.adapter import add_adapter
from kdx.causal_lm import DTYPES, attention_for, check_split, head_of, stop_ids
from kdx.config import GENERATED, Config, TrainConfig, Tree
from kdx.data.batches import Batches
from kdx.data.encode import MAX_NEW_TOKENS, Data, load_data
from kdx.data.sources import check_source
from kdx.errors import ConfigError, DataError, MachineError, together
from kdx.evaluate import Judge, num_prompts, to_minimise
from kdx.objective import Objective, check_loss, mix_of
from kdx.optim import optimizer_class
from kdx.rollout import Rollouts, check_rollout, warn_about, with_teachers_answers
from kdx.run import report, results
from kdx.run.files import write_json
from kdx.run.folder import Record, RunFolder
from kdx.run.identity import adapter_base
from kdx.run.launch import build_accelerator
from kdx.run.signals import StopRequest
from kdx.run.tracking import CONSOLE, Tracker, log, logging_to
from kdx.student import load_student, teach_to_stop
from kdx.teacher import load_teacher
from kdx.tokenizer import check_heads, load_tokenizer
from kdx.train import Training, num_steps, steps_to_measure, train


@dataclass(frozen=True)
class Summary:
    """What a run leaves in summary.json."""

    student: Tree
    untouched: Tree
    teacher: Tree
    run: Tree
    data: Tree
    environment: Tree
    tasks: dict[str, float] = field(default_factory=dict)  # by kdx evaluate
    metric: str = "kl"  # eval.metric; not in the file

    @property
    def measure(self) -> float:
        """What a sweep minimises: eval.metric, or CE without a teacher; infinity if it was not taken."""
        value = to_minimise(self.student, self.metric)
        return math.inf if value is None else float(value)


def distill(config: Config, path: Path, record: Record | None = None) -> Summary:
    """Run one distillation in a folder of its own, or resume the one that is there.

    record: what was typed; None for a run that is started from Python. A folder whose run is done is left as it is,
    and its summary returned. Raises KdxError for what a user can correct, Stopped after a signal.
    """
    machine = build_accelerator(config)
    (path,) = map(Path, broadcast_object_list([str(path)]))  # every process works in rank 0's folder
    folder = RunFolder(path)
    record = record or Record(words=config._words, command=config._words)
    if folder.is_done(config):
        CONSOLE.print(f"{path} is already done", markup=False)
        return Summary(**folder.kept("summary.json"), metric=config.eval.metric)
    machine.wait_for_everyone()  # all have looked before rank 0 writes
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(path))
        stack.enter_context(folder.claim(config, record))
        stack.enter_context(logging_to(path / "kdx.log"))
        training = stack.enter_context(prepared(config, record, machine))
        judge = Judge(training, stop)
        folder.max_steps = training.max_steps
        folder.begin(config, results.facts(training))  # refused if it is another run's
        if not training.restore(folder):
            results.check_room(training, path)
            with training.whole():
                untouched = judge.before_training()
            if machine.is_main_process:
                write_json(path / "untouched.json", untouched)
        with Tracker(folder, training) as tracker:
            tracker.header(report.header(training))
            results.warn_about(folder, training.data)
            if not training.is_finished:
                with tracker.training():
                    train(training, judge, tracker, folder, stop)
            results.keep_student(training, folder)  # before it is measured: nothing there can cost training
            summary = results.finish(training, judge, folder, tracker)
            (summary,) = broadcast_object_list([summary])  # the main process made it
    return Summary(**summary, metric=config.eval.metric)


@contextmanager
def prepared(config: Config, record: Record, machine: Accelerator) -> Iterator[Training]:
    """Build all parts of a run; the teacher's store is closed at the end. Raises KdxError."""
    started = time.time()
    check_names(config)
    if config.adapter.quantization != "none" and machine.device.type == "cpu":
        what = f"is {config.adapter.quantization}, which needs a GPU"
        raise MachineError("adapter.quantization", what, "Use adapter=lora")
    shared = load_tokenizer(config)
    data = load_data(config.data, shared, num_prompts(config))
    if config.eval.metric in GENERATED and not data.prompts:
        what = f"is {config.eval.metric}, but no held-out prompt leaves room for an answer of {MAX_NEW_TOKENS} tokens"
        raise DataError("eval.metric", what, "Raise data.max_length, or choose kl or ce")
    batches = Batches(
        data.train,
        batch_size=config.train.batch_size,
        micro_batch_size=micro_batch_size(config.train, machine.num_processes),
        micro_batch_tokens=config.train.micro_batch_tokens,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        pad_id=shared.pad_id,
        rank=machine.process_index,
        num_processes=machine.num_processes,
    )
    max_steps = num_steps(config.train, batches)
    if config.rollout.name == "teacher":
        numbers = batches.rows_seen(batches.end_of_window(max_steps))
        data = with_teachers_answers(config, data, shared, machine, numbers)
        batches = replace(batches, rows=data.train)
    measured_at = steps_to_measure(config, data, batches, max_steps)
    is_repeated = bool(record.swept) or max_steps > batches.steps_per_epoch
    rows = rows_to_ask(config, data, batches, max_steps)
    how = {"is_repeated": is_repeated, "is_compiled": config.train.compile}
    teacher = load_teacher(config.teacher, machine.device, shared.max_length, rows, **how)
    with closing(teacher.store) if teacher and teacher.store else nullcontext():
        student = build_student(config, machine, shared.max_length)
        teach_to_stop(student, shared.tokenizer, data.stops)
        heads = {"student": head_of(student)} | ({"teacher": teacher.head} if teacher else {})
        objective = Objective(student, check_heads(shared.num_ids, heads), mix_of(config.loss))
        is_on_policy = config.rollout.is_on_policy
        if teacher and (is_on_policy or config.eval.metric == "on_policy_kl"):
            _ = teacher.model  # nothing that the student says is in the store
        if teacher and is_on_policy:
            own = {"objective": objective, "words": config.rollout, "shared": shared, "machine": machine}
            batches = Rollouts(**vars(batches), **own, max_steps=max_steps)
            warn_about(config, student, stop_ids(teacher.model.generation_config))
        given = (config, record, shared, data, batches)
        yield Training(*given, max_steps, measured_at, teacher, objective, machine, started)


def check_names(config: Config) -> None:
    """Check the names and options that only registries know, before data or models are read. Raises ConfigError."""
    groups: dict[Callable[[Any], Any], Any] = {check_loss: config.loss, optimizer_class: config.optim}
    groups |= {check_source: config.data, check_rollout: config}
    errors = []
    for check, group in groups.items():
        try:
            check(group)
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise together(errors)


def rows_to_ask(config: Config, data: Data, batches: Batches, max_steps: int) -> dict[str, int]:
    """Return digest → counted positions of each row held out and, with a distillation term, trained on."""
    asked = dict(zip(data.held_out.digests, data.held_out.num_counted.tolist(), strict=True))
    if config.loss.alpha > 0:
        digests, num_counted = data.train.digests, data.train.num_counted.tolist()
        asked |= {digests[i]: num_counted[i] for i in batches.rows_seen(max_steps)}
    return asked


def build_student(config: Config, machine: Accelerator, max_length: int) -> Any:
    """Load the student with what is trained in fp32 (or fp64) on its device. Raises KdxError.

    A base that is frozen beside adapters is in the dtype that it computes in, or quantised.
    """
    adapter, device = config.adapter, machine.device
    is_adapted = adapter.name != "none"
    quantised = {"quantization": adapter.quantization} if adapter.quantization != "none" else {}
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    if is_adapted and config.student.init != "pretrained":
        log.warning("student.init=%s needs larger changes than LoRA allows; try adapter=none", config.student.init)
    student: Any = load_student(
        config.student,
        config.teacher,
        dtype=DTYPES.get(machine.mixed_precision, dtype) if is_adapted else dtype,
        seed=config.train.seed,
        device=device,
        attn_implementation=attention_for(config.student, device, max_length),
        **quantised,
    )
    if is_adapted:
        add_adapter(student, adapter, config.train.seed)
    elif adapter_base(config.student.path):
        what = f"{config.student.path} is a LoRA adapter"
        raise ConfigError("student.path", what, "Add adapter=lora to load it with its base and train it further")
    if config.train.use_liger_kernel:
        with_liger_kernels(student, device)
    if config.train.gradient_checkpointing:
        student.activation_checkpointing_enable()
    student.is_compiled = config.train.compile
    return student


def with_liger_kernels(student: Any, device: torch.device) -> None:
    """Replace layers of a model by Liger's kernels, but not its loss, which is kdx's own. Raises MachineError."""
    where, hint = "train.use_liger_kernel", "Leave it out, or: pip install liger-kernel"
    if device.type != "cuda" or not is_liger_kernel_available():
        raise MachineError(where, "needs a CUDA GPU and the package liger-kernel", hint)
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if (kind := student.config.model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise MachineError(where, f"Liger has no kernels for {kind}", "Leave it out")
    apply_liger_kernel(student, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    check_split(student, "student")


def micro_batch_size(config: TrainConfig, num_processes: int) -> int:
    """Return the rows at once on one device. Raises ConfigError if the batch cannot be shared out evenly."""
    size, asked = config.batch_size, config.micro_batch_size
    share = num_processes * (1 if asked == "auto" else asked)
    if size % share:
        what = f"is {size}, not a multiple of {share} (processes × train.micro_batch_size)"
        raise ConfigError("train.batch_size", what, f"Try {max(share, size // share * share)}")
    return size // num_processes if asked == "auto" else asked
