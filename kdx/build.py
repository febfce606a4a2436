"""From a config to the parts of a run: names checked, then batches, teacher, student and objective."""

import math
import uuid
from typing import Any

import torch
from accelerate import Accelerator

from kdx.causal_lm import attention_for, checkpoint_activations, head_of
from kdx.config import Config, TrainConfig
from kdx.data.batches import Batches, Rows
from kdx.data.encode import Data
from kdx.data.sources import check_source
from kdx.errors import ConfigError, KdxError, together
from kdx.objective import Objective, check_loss, mix_of
from kdx.optim import optimizer_class
from kdx.run.folder import Record
from kdx.run.identity import model_digest
from kdx.store import Identity, open_store
from kdx.student import load_student
from kdx.teacher import Teacher, dtype_of, load_teacher
from kdx.tokenizer import check_heads, pad_id_of


def check_names(config: Config) -> None:
    """Check the names and options that only registries know, before data or models are read. Raises ConfigError."""
    errors: list[KdxError] = []
    for check in (
        lambda: check_loss(config.loss),
        lambda: optimizer_class(config.optim),
        lambda: check_source(config.data),
    ):
        try:
            check()
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise together(errors)


def build_batches(config: Config, rows: Rows, tokenizer: Any, machine: Accelerator) -> Batches:
    """Build the training batches of one process. Raises ConfigError if they cannot be shared out evenly."""
    return Batches(
        rows,
        batch_size=config.train.batch_size,
        micro_batch_size=micro_batch_size(config.train, machine.num_processes),
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        pad_id=pad_id_of(tokenizer),
        rank=machine.process_index,
        num_processes=machine.num_processes,
    )


def rows_to_ask(config: Config, data: Data, batches: Batches) -> dict[str, int]:
    """Return digest → counted positions of each row that a run asks the teacher about.

    These are the rows held out, and with a distillation term those trained on.
    """
    asked = dict(zip(data.held_out.digests, data.held_out.num_counted.tolist(), strict=True))
    if config.loss.alpha > 0:
        digests, num_counted = data.train.digests, data.train.num_counted.tolist()
        asked |= {digests[i]: num_counted[i] for i in batches.rows_seen(num_steps(config.train, batches))}
    return asked


def is_repeated(config: Config, record: Record, batches: Batches) -> bool:
    """Return whether the teacher is asked about a row more than once: over several epochs, or by a sweep's runs."""
    return bool(record.swept) or num_steps(config.train, batches) > batches.steps_per_epoch


def build_teacher(
    config: Config, device: torch.device, max_length: int, rows: dict[str, int], *, is_repeated: bool
) -> Teacher | None:
    """Open the teacher's store for these rows, and load the teacher if it lacks one; None without a teacher.

    rows: digest → counted positions. is_repeated: whether rows are asked for more than once. Raises ModelError, or
    MachineError if the store must be on and has no room.
    """
    if config.teacher.path is None:
        return None
    digest = model_digest(config.teacher, "teacher") or uuid.uuid4().hex  # unknown: equal to nothing
    identity = Identity(digest, dtype_of(config.teacher, device), config.teacher.quantization)
    store, words = open_store(config.teacher, identity, rows, is_repeated=is_repeated)
    teacher = load_teacher(config.teacher, device, max_length, identity, store)
    teacher.store_words = words
    if store and store.missing(list(rows)):
        teacher.load()  # what is wrong with the model shows now, not in the middle of the run
    return teacher


def build_student(config: Config, device: torch.device, max_length: int) -> Any:
    """Load the student with its master weights on a device. Raises ConfigError or ModelError."""
    student: Any = load_student(
        config.student,
        config.teacher,
        dtype=torch.float64 if config.train.precision == "fp64" else torch.float32,
        attn_implementation=attention_for(config.student, device, max_length),
        seed=config.train.seed,
    )
    student = student.to(device)
    if config.train.gradient_checkpointing:
        checkpoint_activations(student)
    if config.train.compile:
        student.base_model.compile()
    return student


def build_objective(config: Config, student: Any, teacher: Teacher | None, num_ids: int) -> Objective:
    """Join student and loss. Raises ModelError if a head has fewer rows than the tokenizer ids."""
    heads = {"student": head_of(student)} | ({"teacher": teacher.head} if teacher else {})
    return Objective(student, check_heads(num_ids, heads), mix_of(config.loss))


def num_steps(config: TrainConfig, batches: Batches) -> int:
    """Return the number of optimizer steps of a run."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None
    return math.ceil(config.epochs * batches.steps_per_epoch - 1e-9)  # 0.07 · 100 is 7 steps


def micro_batch_size(config: TrainConfig, num_processes: int) -> int:
    """Return the rows at once on one device. Raises ConfigError if the batch cannot be shared out evenly."""
    size, asked = config.batch_size, config.micro_batch_size
    share = num_processes if asked == "auto" else asked * num_processes
    if size % share:
        times = "" if asked == "auto" else f" × train.micro_batch_size={asked}"
        what = f"is {size}, not a multiple of {num_processes} processes{times}"
        raise ConfigError("train.batch_size", what, f"Try {max(share, size // share * share)}")
    return size // num_processes if asked == "auto" else int(asked)
