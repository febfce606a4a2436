"""All that a run is made of, built from its config before anything is trained: text first, then models, then steps."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kdx import causal_lm, loss, plugins
from kdx.config import Config, LossConfig, StudentConfig, TeacherConfig, as_dict
from kdx.data.batches import Row, StepBatches, fingerprint, pad_id_of
from kdx.data.encode import Encoder, prepare_tokenizer
from kdx.data.files import at_home
from kdx.data.sources import Dataset, check_source, load_data
from kdx.errors import ConfigError, DataError, KdxError, MachineError, ModelError, did_you_mean, together
from kdx.objective import Objective, StudentObjective
from kdx.optim import optimizer_class, state_bytes
from kdx.plugins import option_faults
from kdx.run import checkpoint
from kdx.run.tracking import log
from kdx.store import Identity, TeacherStore, bytes_of, room
from kdx.student import answer_greedily, load_student
from kdx.teacher import Teacher, load_teacher, precision_of

CHECKPOINTS = 3  # on disk at once while the third is written
NUM_SAMPLES, MAX_NEW_TOKENS = 3, 48  # of sample answers; the student's answers too are so long by default


@dataclass
class Text:
    """The rows of a run, and what made them."""

    tokenizer: Any
    max_length: int
    template: str
    data: Dataset
    encoder: Encoder
    rows: list[Row]
    held_out_rows: list[Row]
    prompts: list[dict[str, Any]]  # of the sample answers


@dataclass
class Prepared(Text):
    """A run that is ready to start."""

    config: Config
    accelerator: Accelerator
    teacher: Teacher | None
    student: Any
    num_ids: int
    objective: StudentObjective
    batches: StepBatches
    max_steps: int
    store_words: str
    origin: dict[str, Any]

    def counts(self) -> dict[str, Any]:
        """Rows, counted tokens, and how many rows fell to which rule."""
        return {
            "num_rows": len(self.rows),
            "num_validation_rows": len(self.held_out_rows),
            "counted_tokens": sum(row.num_counted for row in self.rows),
            "counted_validation_tokens": sum(row.num_counted for row in self.held_out_rows),
            "num_dropped": dict(self.data.dropped + self.encoder.dropped),
            "num_truncated": dict(self.data.changed + self.encoder.truncated),
        }

    def precision(self) -> str:
        """What the student computes in."""
        if self.accelerator.mixed_precision in ("bf16", "fp16"):
            return f"{self.accelerator.mixed_precision} autocast over fp32 weights"
        return "fp64" if self.config.train.precision == "fp64" else "fp32"


def check_names(config: Config) -> None:
    """Check the names and options that only registries know, before any data or model is read. Raises ConfigError."""
    found: list[KdxError] = []
    for check in (
        lambda: _check_loss(config.loss),
        lambda: optimizer_class(config.optim),
        lambda: check_source(config.data),
    ):
        try:
            check()
        except ConfigError as error:
            found.append(error)
    if found:
        raise together(found)


def _check_loss(config: LossConfig) -> None:
    """Refuse a divergence or options that the registry does not know. Raises ConfigError."""
    own = "One's own: KDX_PLUGINS=module, with the function under @register"
    if config.name == "cross_entropy":
        problems = option_faults(lambda: None, config.options, "loss.")
    elif config.name not in loss.names():
        mend = did_you_mean(config.name, [*loss.names(), "cross_entropy"])
        raise ConfigError("loss.name", f"no divergence is named {config.name!r}", f"{mend}. {own}")
    else:
        problems = option_faults(loss.get(config.name), config.options, "loss.", num_given=2)
    if problems:
        raise together(problems)
    if config.name != "cross_entropy":
        try:
            loss.check_options(config.name, config.options)  # ranges
        except ValueError as error:
            module = loss.get(config.name).__module__
            where = f"conf/loss/{config.name}.yaml, or" if module == loss.__name__ else f"{module}.{config.name},"
            raise ConfigError("loss", str(error), f"See {where} the function itself") from None


_shared: dict[str, Text] = {}  # of the sweep that this process does, the last one read


def read_text(config: Config) -> Text:
    """Read and encode the data; the jobs of a sweep that name the same data and models do it once. Raises KdxError."""
    if not config.sweep.name:
        return _read_text(config)
    key = what_is_read(config)
    if key not in _shared:
        text = _read_text(config)
        _shared.clear()
        _shared[key] = text
    return _shared[key]


def what_is_read(config: Config) -> str:
    """What the text of a run, and its teacher, depend on: equal for the jobs of a sweep that can share them."""
    return json.dumps([as_dict(part) for part in (config.teacher, config.student, config.data)], default=str)


def _read_text(config: Config) -> Text:
    tokenizer, max_length = load_tokenizers(config)
    template = prepare_tokenizer(tokenizer, config.data)
    encoder = Encoder(tokenizer, max_length, config.data.on_long, config.data.assistant_only)
    data = load_data(config.data, also=encoder.faults, refused=encoder.refused)
    rows, held_out_rows = encoder.encode(data.train, data.validation)
    for what, left, given in (("training", rows, data.train), ("held-out", held_out_rows, data.validation)):
        if given and not left:
            rules = "; ".join(f"{number} {rule}" for rule, number in encoder.dropped.items())
            raise DataError("data", f"no {what} row is left ({rules})", "Raise data.max_length, or give other data")
    prompts = encoder.prompts(data.validation or data.train, NUM_SAMPLES, MAX_NEW_TOKENS)
    return Text(tokenizer, max_length, template, data, encoder, rows, held_out_rows, prompts)


def origin(text: Text, identity: Identity | None, student: StudentConfig) -> dict[str, Any]:
    """What besides the config decides which student comes out."""
    return {
        "fingerprint": fingerprint(text.rows),
        "validation_fingerprint": fingerprint(text.held_out_rows),
        "tokenizer_digest": causal_lm.tokenizer_digest(text.tokenizer),
        "teacher_digest": identity.model if identity else None,
        "teacher_precision": identity.precision if identity else None,
        "student_digest": causal_lm.weights_digest(student, "student") if student.init != "cut" else None,
        "plugins_digest": plugins.digest(),
    }


def identity_of(teacher: TeacherConfig, tokenizer: Any, device: torch.device) -> Identity | None:
    """What decides the teacher's answers, if there is one. Raises ModelError."""
    if teacher.path is None:
        return None
    return Identity(
        causal_lm.weights_digest(teacher, "teacher"),
        causal_lm.tokenizer_digest(tokenizer),
        precision_of(teacher, device)[0],
        teacher.quantization,
    )


def prepare(config: Config, accelerator: Accelerator, owner: str = "run", *, is_fill: bool = False) -> Prepared:
    """Read data and models as the run will. Raises KdxError; all faults in the data come before any weights are read.

    owner: who writes to the teacher's store, as a name for files. is_fill: the teacher will be asked for every row.
    """
    device, train = accelerator.device, config.train
    text = read_text(config)
    tokenizer, rows, held_out_rows = text.tokenizer, text.rows, text.held_out_rows
    batches = StepBatches(
        rows,
        batch_size=train.batch_size,
        micro_batch_size=micro_batch_size(config, accelerator.num_processes),
        seed=train.seed,
        shuffle=config.data.shuffle,
        pad_id=pad_id_of(tokenizer),
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    max_steps = train.max_steps
    if max_steps is None:
        assert train.epochs is not None
        max_steps = math.ceil(train.epochs * batches.steps_per_epoch - 1e-9)  # 0.07 · 100 is 7 steps

    teacher, store, store_words = None, None, "off (no teacher)"
    identity = identity_of(config.teacher, tokenizer, device)
    if identity is not None:
        asked = list(held_out_rows)
        if is_fill or config.loss.alpha > 0:
            asked += rows if is_fill else batches.rows_seen(max_steps)
        is_repeated = bool(config.sweep.name) or max_steps * train.batch_size > len(rows)
        store, store_words = open_store(config.teacher, identity, asked, is_repeated, owner)
        teacher = load_teacher(config.teacher, device, text.max_length, identity, store)
        if store and store.missing([row.digest for row in asked]):
            teacher.load()  # what is wrong with the model comes now, not in mid-run
    student = load_student(
        config.student,
        config.teacher,
        dtype=torch.float64 if train.precision == "fp64" else torch.float32,
        attn_implementation=causal_lm.attention_for(config.student, device, text.max_length),
        seed=train.seed,
        kept=store.student_folder(config.student.layers) if store else None,
    ).to(device)
    answer_greedily(student, MAX_NEW_TOKENS)
    num_ids = count_ids(tokenizer, student, teacher)
    if train.gradient_checkpointing:
        causal_lm.checkpoint_activations(student)
    if train.compile:
        student.base_model.compile()

    objective = Objective(
        name=config.loss.name,
        alpha=config.loss.alpha,
        temperature=config.loss.temperature,
        scale_by_temperature=config.loss.scale_by_temperature,
        options=config.loss.options,
    )
    return Prepared(
        **vars(text),
        config=config,
        accelerator=accelerator,
        teacher=teacher,
        student=student,
        num_ids=num_ids,
        objective=StudentObjective(student, num_ids, objective),
        batches=batches,
        max_steps=max_steps,
        store_words=store_words,
        origin=origin(text, identity, config.student),
    )


def open_store(
    teacher: TeacherConfig, identity: Identity, asked: list[Row], is_repeated: bool, owner: str
) -> tuple[TeacherStore | None, str]:
    """Open the teacher's store for the rows it will be asked for → the store or None, and why or where in words.

    Raises MachineError if it must be on and its disk has no room.
    """
    if teacher.store == "off" or (teacher.store == "auto" and not is_repeated):
        return None, "off" if teacher.store == "off" else "off (every row is seen once; teacher.store=on keeps them)"
    root = at_home(teacher.store_dir, "teacher.store_dir").resolve()
    limit = teacher.store_limit_gb and teacher.store_limit_gb * 1e9
    name = teacher.base_model or teacher.path or ""
    store = TeacherStore(root, identity, name=name, owner=owner, limit_bytes=limit)
    missing = set(store.missing([row.digest for row in asked]))
    counted = {row.digest: row.num_counted for row in asked}
    shape, itemsize = (
        causal_lm.load_config(teacher, "teacher").get_text_config(),
        causal_lm.DTYPES[identity.dtype].itemsize,
    )
    grows = bytes_of(sum(counted[d] for d in missing), len(missing), shape.hidden_size, itemsize)
    if not store.has_head():
        grows += shape.vocab_size * shape.hidden_size * itemsize
    may_take, free = room(root)
    words = f"{len(counted) - len(missing):,} of {len(counted):,} rows are in {store.folder}"
    words += f", {in_bytes(grows)} to come ({in_bytes(free)} free)" if grows else ""
    fault = ""
    if grows > may_take:
        fault = f"needs {grows:,} bytes in {root}, where {free:,} are free, a tenth of the disk to be left"
    elif grows:
        try:
            store.check_writable()
        except OSError as error:
            fault = f"cannot be written in {root}: {error.strerror}"
    if fault and teacher.store == "on":
        raise MachineError("teacher.store", fault, "Make room, set teacher.store_dir=..., or teacher.store=off")
    return (None, f"off (it {fault})") if fault else (store, words)


def bytes_on_disk(run: Prepared) -> tuple[int, int, int]:
    """What student, best weights so far and a checkpoint take on disk; 0 for what the run need not save."""
    num, weights = run.student.num_parameters(), run.student.num_parameters() * run.student.dtype.itemsize
    student = (
        num * causal_lm.DTYPES[run.config.student.save_dtype.replace("auto", "fp32")].itemsize if run.max_steps else 0
    )
    best = weights if run.config.train.keep == "best" else 0
    one = 0
    if run.config.train.save_every:
        one = weights + best + round(num * state_bytes(run.config.optim, next(run.student.parameters())))
    return student, best, one


def check_room(run: Prepared, folder: Path) -> None:
    """Refuse a run whose student and checkpoints do not fit on the disk of its folder. Raises MachineError."""
    student, best, one = bytes_on_disk(run)
    due = min(CHECKPOINTS, (run.max_steps - 1) // max(1, run.config.train.save_every) + 1)  # 1: what a signal saves
    needed = student + best + max(0, due - len(checkpoint.found(folder))) * one
    _, free = room(folder)
    if run.max_steps and needed > free:
        what = f"the student and its checkpoints need {needed:,} bytes, and {free:,} are free"
        mend = "Make room, or choose another disk with hydra.run.dir=..."
        raise MachineError(
            str(folder), what, f"{mend}; train.save_every=0 needs no room for checkpoints" if one else mend
        )


def in_bytes(number: float) -> str:
    """A number of bytes as people say it."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def load_tokenizers(config: Config) -> tuple[Any, int]:
    """Load the tokenizer, refuse two that differ, and find the longest row both models can read."""
    limits = {"data.max_length": config.data.max_length}
    tokenizers = []
    if config.teacher.path is not None:
        tokenizers.append(causal_lm.load_tokenizer(config.teacher, "teacher"))
        limits["teacher"] = causal_lm.num_positions(causal_lm.load_config(config.teacher, "teacher"))
    if config.student.init != "cut":
        tokenizers.append(causal_lm.load_tokenizer(config.student, "student"))
        limits["student"] = causal_lm.num_positions(causal_lm.load_config(config.student, "student"))
    if len(tokenizers) == 2:
        causal_lm.common_ids(*tokenizers)
    known = [limit for limit in limits.values() if limit is not None]
    if not known:
        raise ConfigError("data.max_length", "is null, and the models do not say what they can read", "Give a number")
    asked = config.data.max_length
    if asked is not None and min(known) < asked:
        who = " and ".join(name for name, limit in limits.items() if limit == min(known))
        log.warning("data.max_length=%d, but the %s can read %d tokens: that is used", asked, who, min(known))
    key, how = ("path", "cut from the teacher") if config.student.init == "cut" else ("layers", "not cut")
    if getattr(config.student, key) is not None:
        log.warning("student.%s=%s is not used: the student is %s", key, getattr(config.student, key), how)
    return tokenizers[-1], min(known)


def count_ids(tokenizer: Any, student: Any, teacher: Teacher | None) -> int:
    """The tokenizer's real ids: head rows past them are padding and are cut before the softmax. Raises ModelError."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    heads = {"student": causal_lm.head_of(student)} | ({"teacher": teacher.head} if teacher else {})
    for group, head in heads.items():
        if head.num_ids < num_ids:
            what = f"its head has {head.num_ids} rows, its tokenizer {num_ids} ids"
            raise ModelError(f"{group}.path", what, "Resize the model's embeddings, or use its own tokenizer")
    return num_ids


def micro_batch_size(config: Config, num_processes: int) -> int:
    """Rows at once on one device. Raises ConfigError if the batch cannot be shared out evenly."""
    size, asked = config.train.batch_size, config.train.micro_batch_size
    share = num_processes if asked == "auto" else asked * num_processes
    if size % share:
        per = "" if asked == "auto" else f" × train.micro_batch_size={asked}"
        what = f"is {size}, not a multiple of {num_processes} processes{per}"
        raise ConfigError("train.batch_size", what, f"Try {max(share, size // share * share)}")
    return size // num_processes if asked == "auto" else int(asked)
