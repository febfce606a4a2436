"""The shape of a run: every key's name, type and range. Values live in conf/, with a comment each."""

import os
import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a name that becomes part of a path
COMMIT = re.compile(r"[0-9a-f]{40}")
GENERATED = ("on_policy_kl", "rouge_l")  # those of eval.metric that are measures of the student's answers
OPEN_GROUPS = ("data", "loss", "optim")  # their further keys are options of the source, divergence or optimizer

Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
"""Text. YAML reads a name such as 2026 as a number; it is taken as text."""
Day = Annotated[Text, BeforeValidator(str), Field(pattern=r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$")]
"""A day. YAML reads 2024-07-26 as a date; it is taken as text."""
Path = Annotated[Text, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0, le=1e6)]
Dtype = Literal["auto", "fp32", "bf16", "fp16", "fp64"]
Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial", "cosine_with_restarts",
    "cosine_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
Tree = dict[str, Any]  # plain values by name, nested or by dotted key
Fault = tuple[str, str, str]  # where, what, hint


class Group(BaseModel):
    """A group of keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class OpenGroup(Group):
    """A group whose further keys are options of the function or class that `name` chooses."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The further keys, checked against the function's signature once plug-ins are imported."""
        return dict(self.model_extra or {})


class ModelConfig(Group):
    path: Path | None  # Hub id, local folder, or pkg:NAME, a folder inside an installed package
    gguf_file: Text | None  # A GGUF file inside `path`; it is dequantised once and kept under $KDX_CACHE
    revision: Text | None  # Branch, tag or commit on the hub
    trust_remote_code: bool  # Run the model's own Python code; needs a `revision` that is a commit
    attn_implementation: Text  # auto, or any name transformers knows (eager, sdpa)
    tokenizer: Path | None  # Where the tokenizer is, if not with the model
    base_model: Text | None  # What the student's model card names as base_model; null is `path`
    license: Text | None  # The licence for the student's model card


class TeacherConfig(ModelConfig):
    adapter: Path | None  # Folder of a LoRA adapter (peft), merged into the weights when they are loaded
    precision: Dtype  # Dtype of the frozen weights; auto takes bf16 where the processor has it
    quantization: Literal["none", "8bit", "4bit"]  # bitsandbytes quantisation of the frozen weights
    device_map: Literal["auto"] | None  # auto spreads the teacher over all devices (accelerate)
    micro_batch_size: Positive | Literal["auto"]  # Its rows per forward pass; auto is the student's
    store: Literal["auto", "on", "off"]  # Cache its final hidden states on disk; auto: if rows are seen more than once
    store_dir: Path  # Folder of that cache; runs and sweeps that name the same folder share it
    store_limit_gb: Above0 | None  # Largest size of the cache, in 10⁹ bytes; null is what the disk holds, less a tenth


class StudentConfig(ModelConfig):
    init: Literal["pretrained", "cut", "random"]  # From `path`, the teacher's layers, or fresh in the shape of `path`
    layers: Positive | Annotated[list[Count], Field(min_length=1)] | None  # For init=cut: how many, or which
    save_dtype: Literal["auto", "fp32", "bf16", "fp16"]  # Auto is that of the weights it started from


class DataConfig(OpenGroup):
    name: Text  # The registered source that turns files into conversations
    path: Path | Annotated[list[Path], Field(min_length=1)] | None  # File, glob, folder, or hub data set
    subset: Text | None  # The hub data set's configuration
    split: Text  # The hub data set's split to train on
    validation: Positive | Share | Annotated[str, Field(min_length=1)] | None  # Rows, a share, a file or split:NAME
    seed: Seed  # Chooses the held-out rows and shuffles the rest before `take`; independent of train.seed
    take: Positive | None  # Train on this many rows of the shuffled rest
    shuffle: bool  # Shuffle rows each epoch (grouped by length); false keeps the file's order
    max_length: Annotated[int, Field(ge=2)] | None  # Longest row in tokens; null is what the models can read
    on_long: Literal["truncate", "split", "drop", "error"]  # What to do with a longer row
    on_bad_row: Literal["stop", "skip"]  # What to do with a row that the source or the chat template rejects
    max_bad_rows: Count | Below1 | None  # Rows, or a share; null: any number
    assistant_only: bool  # Count only the assistant's tokens and the token that ends its turn in the loss
    chat_template: Text | None  # Jinja text or a file with it, instead of the tokenizer's own template
    template_date: Day  # The day that a chat template sees which reads the clock: its rows are the same tomorrow
    template_options: dict[str, Any]  # Variables for the chat template, such as enable_thinking; a row's come first


class LossConfig(OpenGroup):
    name: Text  # A registered divergence, or cross_entropy (alpha 0)
    alpha: Fraction  # Weight of the distillation term: alpha·KD + (1−alpha)·CE
    temperature: Temperature  # Of both distributions in the distillation term; CE is at 1
    scale_by_temperature: bool  # Multiply the distillation term by temperature² (Hinton et al., 2015)
    alpha_end: Fraction | None  # What alpha moves to by the last step, in equal steps
    temperature_end: Temperature | None  # The same of the temperature


class OptimConfig(OpenGroup):
    name: Annotated[Text, Field(pattern=r"^(torch|bitsandbytes)\.[A-Za-z]\w*$")]  # A class of that library's optim
    lr: Above0  # Peak learning rate
    weight_decay: AtLeast0  # Decay of matrices; norms and biases have none
    schedule: Schedule  # Learning-rate schedule (transformers' get_scheduler)
    schedule_options: dict[str, Any]  # Further arguments of that schedule (scheduler_specific_kwargs)
    warmup_steps: Count | Below1  # Steps of linear warm-up; below 1, a share of all steps


class AdapterConfig(Group):
    name: Literal["none", "lora"]  # Train all weights, or small matrices added to frozen ones (peft's LoraConfig)
    r: Positive  # Rank of each adapter
    lora_alpha: Above0  # An adapter's output is multiplied by lora_alpha / r
    lora_dropout: Below1  # Dropout of an adapter's input
    target_modules: Text | Annotated[list[Text], Field(min_length=1)]  # As peft reads it: all-linear, names, a pattern
    quantization: Literal["none", "8bit", "4bit"]  # bitsandbytes quantisation of the frozen base; needs a GPU
    save: Literal["merged", "adapter"]  # The student: an ordinary model folder, or peft's, without the base


class RolloutConfig(Group):
    name: Literal["none", "student", "teacher"]  # Who writes the answers that the student trains on
    share: Fraction  # The share of a step's rows that get the student's own answer
    max_new_tokens: Positive  # Most tokens of an answer
    temperature: Annotated[float, Field(ge=0, le=1e6)]  # Temperature of sampling; 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)]  # Sample from the likeliest tokens that have this much probability
    reuse_steps: Positive  # Answers for so many steps are sampled at once, from the weights of the first
    batch_size: Positive  # Prompts answered at once
    sampler: Text | None  # A sampler registered with @register_sampler, in place of kdx's own

    @property
    def is_on_policy(self) -> bool:
        return self.name == "student" and self.share > 0


class EarlyStoppingConfig(Group):
    patience: Positive | None  # Evaluations without improvement before stopping; null is off
    min_delta: AtLeast0  # What counts as improvement of the held-out measure


class TrainConfig(Group):
    batch_size: Positive  # Rows in one optimizer step, over all processes
    micro_batch_size: Positive | Literal["auto"]  # Rows per forward pass on one device; auto is batch_size ÷ processes
    micro_batch_tokens: Positive | None  # Or as many rows of similar length as fit into so many tokens
    max_steps: Annotated[int, Field(ge=0, le=10**9)] | None  # Optimizer steps; 0 measures and trains nothing
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None  # Passes over the training rows, instead of max_steps
    max_grad_norm: Above0 | None  # Gradients are clipped to this norm; null is off
    precision: Dtype  # Compute precision over fp32 weights; auto takes accelerate's config, else what the hardware has
    gradient_checkpointing: bool  # Recompute activations in the backward pass: less memory, about a third slower
    compile: bool  # torch.compile the bodies of student and teacher
    use_liger_kernel: bool  # Norms, rotary embeddings and MLPs of the student by Liger's kernels, on a CUDA GPU
    log_every: Positive  # Steps between log lines
    save_every: Count  # Steps between checkpoints; 0 leaves it to save_minutes
    save_minutes: AtLeast0 | None  # Minutes between checkpoints; null or 0 is off
    keep_checkpoints: bool  # Keep the checkpoints of a finished run, and write one at its last step
    early_stopping: EarlyStoppingConfig
    keep: Literal["last", "best"]  # Which weights become the student: the last step's, or the best held-out measure's
    on_nonfinite: Literal["stop", "skip"]  # At a step whose loss or gradient is not finite
    max_nonfinite: Positive  # Most steps that on_nonfinite=skip skips; one more stops the run
    seed: Seed  # Order of rows, dropout, fresh weights


class EvalConfig(Group):
    every: Count | Literal["auto"]  # Steps between held-out measures; 0: at the end only; auto: up to five
    metric: Literal["kl", "ce", "on_policy_kl", "rouge_l"]  # What keep=best, early stopping and a sweep compare
    num_prompts: Count | Literal["auto"]  # Held-out prompts that all models answer; auto: 8 to 64
    on_policy_kl: Literal["auto"] | bool  # KL to the teacher on its own answers; true loads the teacher for it


class TrackingConfig(Group):
    mode: Literal["auto", "online", "offline", "disabled"]  # W&B: auto is WANDB_MODE, then online if there is a login
    project: Text | None  # W&B project; null takes WANDB_PROJECT, then kdx
    entity: Text | None  # W&B entity; null takes WANDB_ENTITY
    name: Text | None  # Name of the run; null takes WANDB_NAME, then its point in a sweep, else models and loss
    group: Text | None  # W&B group; null takes the sweep's name, then WANDB_RUN_GROUP
    tags: list[Text]  # W&B tags, besides those that kdx gives; an empty list takes WANDB_TAGS
    notes: Text | None  # W&B notes; null takes WANDB_NOTES
    samples: bool  # Have teacher, untouched student and student answer a few held-out prompts
    log_model: Literal["none", "end"]  # Upload the student with its card as a W&B artifact when the run ends
    alerts: bool  # W&B sends an alert if the run diverges or fails


class RunConfig(Group):
    resume: Text | None  # A run folder, or `last`: resume that run with its own config and what is typed now
    like: Text | None  # A run folder: start a new run from its words and what is typed now


class SweepConfig(Group):
    name: Annotated[Text, Field(pattern=f"^{SAFE_NAME.pattern}$")] | None  # Null: the swept keys and a short hash
    baseline: bool  # Also run alpha=0, once for each setting of what is swept besides the loss
    workers: Positive  # Jobs that run at once on this machine, each on a GPU of its own or its share of the cores


class Config(Group):
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    adapter: AdapterConfig
    rollout: RolloutConfig
    train: TrainConfig
    eval: EvalConfig
    tracking: TrackingConfig
    run: RunConfig
    sweep: SweepConfig
    _words: list[str] = PrivateAttr(default_factory=list)  # it was composed from, for the record of a run from Python


def replaced(config: Any, **changes: Any) -> Any:
    """Return a copy of a config, or of one of its groups, with some fields changed."""
    return config.model_copy(update=changes)


def leaves(tree: Tree, prefix: str = "") -> Tree:
    """Flatten a nested dict to its values by dotted key."""
    flat: Tree = {}
    for name, value in tree.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def short_key(key: str, keys: list[str]) -> str:
    """Return the shortest tail of a dotted key that no other of these keys ends in: `temperature`, but `train.seed`."""
    parts = key.split(".")
    tails = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((t for t in tails if sum(k == t or k.endswith(f".{t}") for k in {*keys, key}) == 1), key)


def contradictions(config: Config, typed: Collection[str]) -> Iterator[Fault]:
    """Find values that are fine alone and wrong together → where, what, hint for each. typed: keys."""
    teacher, student, loss, train, rollout = config.teacher, config.student, config.loss, config.train, config.rollout
    yield from _of_code(config, typed)
    yield from _without_effect(config, typed)
    if student.init == "cut" and teacher.path is None:
        yield "student", "is cut from the teacher, and there is none", "Choose student=hf"
    if student.init == "cut" and student.layers is None:
        yield "student.layers", "is null", "Set how many or which: student.layers=10"
    if student.init != "cut" and student.path is None:
        yield "student.path", "is null", "Set the model: student.path=FOLDER or a hub id"
    if teacher.path is None and loss.alpha > 0:
        what = f"is {loss.alpha:g}, but without a teacher there is nothing to distil from"
        yield "loss.alpha", what, "Choose loss=cross_entropy, or a teacher"
    if loss.name == "cross_entropy" and loss.alpha > 0:
        yield "loss.alpha", f"is {loss.alpha:g}, but cross_entropy is alpha 0", "Set loss.alpha=0"
    if loss.alpha == 0 and loss.alpha_end:
        yield "loss.alpha_end", "is set, but alpha 0 is a run without a teacher", "Begin with loss.alpha=0.01"
    if rollout.name != "none" and teacher.path is None:
        yield "rollout", "needs a teacher", "Choose a teacher, or rollout=none"
    elif rollout.is_on_policy and 0 in (loss.alpha, loss.alpha_end):
        what = "is 0, and cross-entropy teaches nothing on the student's own answers"
        yield "loss.alpha" if loss.alpha == 0 else "loss.alpha_end", what, "Raise it, or choose rollout=none"
    if rollout.name != "none" and not config.data.assistant_only:
        what = "is false, so there are no prompts to answer"
        yield "data.assistant_only", what, "Set it to true, or choose rollout=none"
    asked, metric = config.eval, config.eval.metric
    needs = {
        "a teacher": metric == "on_policy_kl" and teacher.path is None,
        "eval.on_policy_kl": metric == "on_policy_kl" and asked.on_policy_kl is False,
        "eval.num_prompts": metric in GENERATED and asked.num_prompts == 0,
    }
    for what in (what for what, is_off in needs.items() if is_off):
        yield "eval.metric", f"is {metric}, which needs {what}", "Set that, or choose eval.metric=ce"
    if (train.max_steps is None) == (train.epochs is None):
        both = "are both set" if train.epochs else "are both null"
        yield "train.max_steps and train.epochs", both, "Set exactly one of them, the other to null"
    if config.adapter.name != "none" and student.init != "pretrained":
        what = f"needs a pretrained student, but student.init is {student.init}"
        for key, only in (("quantization", "none"), ("save", "merged")):
            if getattr(config.adapter, key) != only:
                yield f"adapter.{key}", what, f"Set adapter.{key}={only}"
    if teacher.adapter and (teacher.path is None or teacher.quantization != "none" or student.init == "cut"):
        what = "cannot be merged: there is no teacher, it is quantised, or the student is cut from it"
        yield "teacher.adapter", what, "Merge it into a folder first, and name that as teacher.path"
    micro = train.micro_batch_size
    if isinstance(micro, int) and train.micro_batch_tokens:
        what = "cannot be combined with train.micro_batch_size"
        yield "train.micro_batch_tokens", what, "Set one of them"
    if isinstance(micro, int) and train.batch_size % micro:
        what = f"is {train.batch_size}, not a multiple of train.micro_batch_size={micro}"
        yield "train.batch_size", what, f"Try {max(micro, train.batch_size // micro * micro)}"
    if train.max_steps and config.optim.warmup_steps > train.max_steps:
        what = f"is {config.optim.warmup_steps}, more than train.max_steps={train.max_steps}"
        yield "optim.warmup_steps", what, f"It should be at most {train.max_steps}, or a share below 1"
    if config.data.validation is None or config.eval.every == 0:
        yield from unmeasured(config)


def _of_code(config: Config, typed: Collection[str]) -> Iterator[Fault]:
    """A model's own Python code that is to run: that must be typed, and of the hub it must be one commit's."""
    for group, model in (("teacher", config.teacher), ("student", config.student)):
        key, path = f"{group}.trust_remote_code", model.path or ""
        is_local = not path or path.startswith("pkg:") or os.path.isdir(path)
        if model.trust_remote_code and key not in typed:
            yield key, "runs the model's own code, so set it on the command line, not only in YAML", f"Add {key}=true"
        elif model.trust_remote_code and not is_local and not COMMIT.fullmatch(model.revision or ""):
            what = "runs code from the hub, so it needs a revision that is a commit (40 hex digits)"
            yield key, what, f"Pin it: {group}.revision=COMMIT"


def _without_effect(config: Config, typed: Collection[str]) -> Iterator[Fault]:
    """Typed keys that change nothing, because of a choice that was not typed."""
    for choice, of, is_off, why in (
        ("adapter=lora", "adapter.", config.adapter.name == "none", "the student has no adapter"),
        ("rollout=student", "rollout.", config.rollout.name == "none", "nothing is generated"),
        ("data=pairs or data=messages", "data.path", config.data.name == "chitchat", "chitchat has rows of its own"),
        ("student=hf", "student.path", config.student.init == "cut" and config.student.path, "the student is cut"),
    ):
        if is_off and choice.split("=")[0] not in typed:
            keys = sorted(key for key in typed if key.startswith(of) and not key.endswith(".name"))
            yield from ((key, f"has no effect: {why}", f"Add {choice}") for key in keys)


def unmeasured(config: Config) -> list[Fault]:
    """Say what needs held-out measures during training, where there are none → where, what, hint for each."""
    train = config.train
    needs = {"train.keep=best": train.keep == "best", "train.early_stopping.patience": train.early_stopping.patience}
    what, hint = "needs held-out measures during training", "Set eval.every and data.validation"
    return [(key, what, hint) for key, is_on in needs.items() if is_on]
