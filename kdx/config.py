"""The shape of a run: every knob's name, type, range and meaning. Values live in conf/, never here.

A field's range stands in its metadata and is checked by `kdx.check`, before torch is imported.
`Any` marks a key that takes one or several types (OmegaConf has no `str | list`); `allows` says which.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a name that kdx puts into a path
COMMIT = re.compile(r"[0-9a-f]{40}")


def one_of(*choices: str) -> Any:
    return field(metadata={"test": lambda v: v in choices, "range": "one of " + ", ".join(choices), "choices": choices})


def above(low: float, most: float = math.inf) -> Any:
    words = f"above {low:g}" + (f", at most {most:g}" if most < math.inf else "")
    return field(metadata={"test": lambda v: low < v <= most, "range": words})


def at_least(low: float, most: float = math.inf) -> Any:
    words = f"{low:g} or more" + (f", at most {most:g}" if most < math.inf else "")
    return field(metadata={"test": lambda v: low <= v <= most, "range": words})


def between(low: float, high: float) -> Any:
    return field(metadata={"test": lambda v: low <= v <= high, "range": f"between {low:g} and {high:g}"})


def seed() -> Any:
    return field(metadata={"test": lambda v: 0 <= v < 2**63, "range": "0 or more, and below 2^63"})


def matching(pattern: re.Pattern[str], words: str) -> Any:
    return field(metadata={"test": lambda v: pattern.fullmatch(v) is not None, "range": words})


def allows(*kinds: Any, test: Callable[[Any], bool] = lambda v: True, words: str) -> Any:
    return field(metadata={"kinds": kinds, "test": test, "range": words})


@dataclass(kw_only=True)
class ModelConfig:
    path: str | None
    """Hub id, local folder, or pkg:NAME, a folder inside an installed package."""
    gguf_file: str | None
    """A GGUF file inside `path`; it is dequantised once and kept under $KDX_CACHE."""
    revision: str | None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool
    """Run the model's own Python code; needs a `revision` that is a commit."""
    attn_implementation: str
    """auto, or any name transformers knows (eager, sdpa, flash_attention_2)."""
    tokenizer: str | None
    """Where the tokenizer is, if not with the model."""
    base_model: str | None
    """What the student's model card names as base_model; null is `path`."""
    license: str | None
    """The licence for the student's model card."""


@dataclass(kw_only=True)
class TeacherConfig(ModelConfig):
    precision: str = one_of("auto", "fp32", "bf16", "fp16", "fp64")
    """Dtype of the frozen weights; auto takes bf16 where the processor has it."""
    quantization: str = one_of("none", "8bit", "4bit")
    """bitsandbytes quantisation of the frozen weights."""
    device_map: str | None = one_of("auto")
    """auto spreads the teacher over all devices (accelerate)."""
    micro_batch_size: Any = allows(
        int, str, test=lambda v: v == "auto" if isinstance(v, str) else v >= 1, words="auto or a number of rows"
    )
    """Rows at once in the teacher's pass, which needs less memory than training; auto is the student's."""
    store: str = one_of("auto", "on", "off")
    """Keep its hidden states on disk for every run that can use them; auto: if rows are seen more than once."""
    store_dir: str = matching(re.compile(r".*\S.*", re.DOTALL), "a folder")
    """Where; runs and sweeps that share a folder share what the teacher said."""
    store_limit_gb: float | None = above(0)
    """Most the store may grow to, in 10⁹ bytes; null is what the disk holds, less a tenth."""


@dataclass(kw_only=True)
class StudentConfig(ModelConfig):
    init: str = one_of("pretrained", "cut", "random")
    """Where the weights come from: `path`, the teacher's own layers, or fresh ones in the shape of `path`."""
    layers: Any = allows(
        int,
        list,
        None,
        test=lambda v: v > 0 if isinstance(v, int) else bool(v) and all(type(i) is int and i >= 0 for i in v),
        words="a number of layers above 0, or a list of the teacher's layer numbers such as [0,3,29]",
    )
    """For init=cut: how many of the teacher's layers (evenly spread, first and last kept), or which."""
    save_dtype: str = one_of("fp32", "bf16")
    """Dtype of the saved student; training always holds fp32 master weights."""


@dataclass(kw_only=True)
class DataConfig:
    name: str
    """The registered source that turns files into conversations."""
    path: Any = allows(
        str,
        list,
        None,
        test=lambda v: bool(v) and (isinstance(v, str) or all(isinstance(p, str) and p for p in v)),
        words="a file, glob, folder, hub data set, or a list of them",
    )
    """A file (jsonl, json, csv, parquet), glob, folder, a list of them, or a hub data set."""
    subset: str | None
    """The hub data set's configuration."""
    split: str
    """The hub data set's split to train on."""
    validation: Any = allows(
        int,
        float,
        str,
        None,
        test=lambda v: bool(v) if isinstance(v, str) else v > 0 and (isinstance(v, int) or v < 1),
        words="a number of rows, a share below 1, a file, split:NAME, or null",
    )
    """Held-out rows: rows (int), a share (below 1), a file, `split:NAME`, or null for none."""
    seed: int = seed()
    """Chooses the held-out rows and shuffles the rest before `take`; never follows train.seed."""
    take: int | None = at_least(1)
    """Train on this many rows of the shuffled rest."""
    shuffle: bool
    """Shuffle rows anew each epoch (grouped by length); false keeps the file's order."""
    max_length: int | None = at_least(2)
    """Longest row in tokens; null is what the models can read."""
    on_long: str = one_of("truncate", "drop", "error")
    """What becomes of a longer row."""
    on_bad_row: str = one_of("stop", "skip")
    """What becomes of a row that is not as the source or the chat template expects; skipped rows are counted."""
    max_bad_rows: Any = allows(
        int,
        float,
        None,
        test=lambda v: v >= 0 and (isinstance(v, int) or v < 1),
        words="a number of rows, a share below 1, or null",
    )
    """Most rows that on_bad_row=skip leaves out: rows (int), a share of all rows (below 1), or null for any number."""
    assistant_only: bool
    """Count only the assistant's tokens and the token that ends its turn in the loss."""
    chat_template: str | None
    """Jinja text or a file with it, instead of the tokenizer's own template."""
    options: dict[str, Any]
    """What the named source takes besides; on the command line and in YAML these stand beside the keys above."""


@dataclass(kw_only=True)
class LossConfig:
    name: str
    """A registered divergence, or cross_entropy (alpha 0)."""
    alpha: float = between(0, 1)
    """Weight of the distillation term: alpha·KD + (1−alpha)·CE."""
    temperature: float = above(0, most=1e6)
    """Softens both distributions in the distillation term; CE is always at 1."""
    scale_by_temperature: bool
    """Multiply the distillation term by temperature² (Hinton et al., 2015)."""
    options: dict[str, Any]
    """The divergence's own options; on the command line they stand beside the keys above (loss.beta=0.3)."""


@dataclass(kw_only=True)
class OptimConfig:
    name: str = matching(re.compile(r"(torch|bitsandbytes)\.[A-Za-z]\w*"), "torch.CLASS or bitsandbytes.CLASS")
    """An optimizer class of torch.optim or bitsandbytes.optim."""
    lr: float = above(0)
    """Peak learning rate."""
    weight_decay: float = at_least(0)
    """Decay of matrices; norms and biases have none."""
    schedule: str = one_of(
        "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial", "cosine_with_restarts",
        "cosine_with_min_lr", "warmup_stable_decay",
    )  # fmt: skip
    """Learning-rate schedule (transformers' get_scheduler)."""
    schedule_options: dict[str, Any]
    """What that schedule takes besides (scheduler_specific_kwargs)."""
    warmup_steps: Any = allows(
        int,
        float,
        test=lambda v: v >= 0 and (isinstance(v, int) or v < 1),
        words="a number of steps, or a share of all steps below 1",
    )
    """Steps of linear warm-up; below 1, a share of all steps."""
    options: dict[str, Any]
    """What the optimizer class takes besides; on the command line they stand beside the keys above (optim.eps=1e-6)."""


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    patience: int | None = at_least(1)
    """Evaluations without improvement before stopping; null is off."""
    min_delta: float = at_least(0)
    """What counts as improvement of the held-out measure."""


@dataclass(kw_only=True)
class TrainConfig:
    batch_size: int = at_least(1)
    """Rows in one optimizer step, over all processes."""
    micro_batch_size: Any = allows(
        int, str, test=lambda v: v == "auto" if isinstance(v, str) else v >= 1, words="auto or a number of rows"
    )
    """Rows at once on one device; auto is batch_size ÷ processes. Accumulation is derived."""
    max_steps: int | None = at_least(0, most=1e9)
    """Optimizer steps; exactly one of max_steps and epochs. 0 measures and trains nothing."""
    epochs: float | None = above(0, most=1e9)
    """Passes over the training rows; exactly one of max_steps and epochs."""
    max_grad_norm: float | None = above(0)
    """Gradients are clipped to this norm; null is off."""
    precision: str = one_of("auto", "fp32", "bf16", "fp16", "fp64")
    """Compute precision over fp32 weights; auto takes accelerate's config, else what the hardware has."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third slower."""
    compile: bool
    """torch.compile the student."""
    log_every: int = at_least(1)
    """Steps between log lines."""
    eval_every: int = at_least(0)
    """Steps between held-out measures during training; 0 measures at the end only."""
    save_every: int = at_least(0)
    """Steps between checkpoints; 0 is none."""
    keep_checkpoints: bool
    """Keep checkpoints of a run that is done."""
    early_stopping: EarlyStoppingConfig
    keep: str = one_of("last", "best")
    """Which weights become the student: the last step's, or the best held-out measure's."""
    on_nonfinite: str = one_of("stop", "skip")
    """What becomes of a step whose loss or gradient is not finite: the run stops before it, or leaves it out."""
    max_nonfinite: int = at_least(1)
    """Most steps that on_nonfinite=skip leaves out; one more stops the run."""
    seed: int = seed()
    """Order of rows, dropout, fresh weights."""


@dataclass(kw_only=True)
class TrackingConfig:
    mode: str = one_of("auto", "online", "offline", "disabled")
    """W&B: auto is WANDB_MODE, then online with a login, else offline."""
    project: str | None
    """W&B project; null takes WANDB_PROJECT, then kdx."""
    entity: str | None
    """W&B entity; null takes WANDB_ENTITY."""
    name: str | None
    """Name of the run; null takes WANDB_NAME, then what was typed."""
    tags: list[str]
    """W&B tags, besides WANDB_TAGS."""
    notes: str | None
    """W&B notes; null takes WANDB_NOTES."""
    samples: bool
    """Let teacher, untouched student and student answer a few held-out prompts."""


@dataclass(kw_only=True)
class RunConfig:
    resume: str | None
    """A run folder, or `last`: go on in that folder, with its own words and what is typed now."""
    like: str | None
    """A run folder: start a new run with its words and what is typed now."""
    origins: dict[str, str]
    """Where lr, steps and max_length came from; filled in by kdx for the header."""


@dataclass(kw_only=True)
class SweepConfig:
    name: str | None = matching(SAFE_NAME, "letters, digits and . _ -, beginning with a letter or digit")
    """Name of the sweep; null is made of the swept keys and a short hash of the rest."""
    baseline: bool
    """Run alpha = 0 too, once for each setting of what is swept besides the loss."""
    workers: int = at_least(1)
    """Jobs that run at once on this machine, each on a GPU of its own or its share of the cores."""
    keys: list[str]
    """The swept keys; filled in by kdx."""


@dataclass(kw_only=True)
class Config:
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    train: TrainConfig
    tracking: TrackingConfig
    run: RunConfig
    sweep: SweepConfig


def as_dict(config: Any) -> dict[str, Any]:
    """A config, or one of its groups, as plain nested values."""
    return dataclasses.asdict(config)


def replaced(config: Any, **changes: Any) -> Any:
    """A copy of a config, or of one of its groups, with some fields changed."""
    return dataclasses.replace(config, **changes)
