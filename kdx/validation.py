"""Values against the shape of a run: every wrong key, type, range and contradiction at once, without torch."""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kdx.config import COMMIT, Config
from kdx.folders import OPTIONAL

# What other tools call it → what it is here.
ALIASES = {
    "distillation_weight": "loss.alpha",
    "kd_alpha": "loss.alpha",
    "kd_weight": "loss.alpha",
    "lmbda": "nothing: kdx trains off-policy",
    "beta": "loss.beta, with loss=jsd",
    "teacher=null": "teacher=none",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "adam_epsilon": "+optim.eps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size with train.micro_batch_size, from which it is derived",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=fp16",
    "optim=adamw_bnb_8bit": "optim=adamw_8bit",
    "optim=paged_adamw_8bit": "optim=adamw_8bit",
    "optim=adamw_torch": "optim=adamw",
    "optim=adamw_torch_fused": "optim=adamw",
    "adamw_bnb_8bit": "optim=adamw_8bit",
    "warmup_ratio": "optim.warmup_steps, below 1 a share of all steps",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "dataset_name": "data.path",
    "teacher_model_name_or_path": "teacher=hf teacher.path",
    "model_name_or_path": "student=hf student.path",
    "load_in_8bit": "teacher.quantization=8bit",
    "load_in_4bit": "teacher.quantization=4bit",
    "report_to": "tracking.mode",
    "run_name": "tracking.name",
}
GROUPS = ("teacher.", "student.", "data.", "loss.", "optim.")  # the values of each stand in an option's YAML


class Problem(typing.NamedTuple):
    """One wrong value: the dotted key, what is wrong, and the mend."""

    key: str
    what: str
    mend: str


def has_type(value: Any, wanted: Any) -> bool:
    """Tell whether a plain value (from YAML) fits a type, counting an int as a float and a number as text."""
    origin = typing.get_origin(wanted)
    if wanted is Any or wanted is inspect.Parameter.empty:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, part) for part in typing.get_args(wanted))
    if wanted in (None, type(None)):
        return value is None
    if wanted is bool:
        return isinstance(value, bool)
    if isinstance(value, bool) or value is None:
        return False
    if wanted is float:
        return isinstance(value, int | float)
    if wanted is str:
        return isinstance(value, str | int | float)
    if origin in (list, tuple) or wanted in (list, tuple):
        inner = (typing.get_args(wanted) or (Any,))[0]
        return isinstance(value, list | tuple) and all(has_type(item, inner) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    return not isinstance(wanted, type) or isinstance(value, wanted)


def type_words(wanted: Any) -> str:
    """Say a type as a person would."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(type_words(part) for part in typing.get_args(wanted))
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
    names |= {list: "a list", dict: "a mapping"}
    return names.get(typing.get_origin(wanted) or wanted, str(wanted))


def show(value: Any) -> str:
    """A value as it would stand in YAML, and its type where that could mislead."""
    if value is None:
        return "null"
    return f"{value!r} ({type(value).__name__})"


def problems(tree: dict[str, Any], shape: Any = Config, prefix: str = "") -> list[Problem]:
    """Check a composed tree of plain values against the dataclasses; return every problem, not the first.

    `???` is a missing value. Keys that no dataclass knows are the caller's to move into `options` or to refuse.
    """
    found = []
    hints = typing.get_type_hints(shape)
    unset = [part.name for part in dataclasses.fields(shape) if part.name not in tree]
    if prefix in GROUPS and len(unset) > 2:
        mend = "Build the option on one of kdx's own: defaults: [NAME, _self_]"
        found.append(Problem(prefix.rstrip("."), f"has no {', '.join(unset)}", mend))
    else:
        found += [Problem(prefix + name, "is not set", "Every YAML of the group needs it; see conf/") for name in unset]
    for part in dataclasses.fields(shape):
        key = prefix + part.name
        if part.name not in tree:
            continue
        value, wanted = tree[part.name], hints[part.name]
        if dataclasses.is_dataclass(wanted):
            if isinstance(value, dict):
                found += problems(value, wanted, key + ".")
            else:
                found.append(Problem(key, f"is {show(value)}, but holds keys of its own", f"Set those: {key}.NAME=..."))
            continue
        if value == "???":
            found.append(Problem(key, "is missing", f"Give it: {key}=..."))
            continue
        if isinstance(value, float) and not math.isfinite(value):
            found.append(Problem(key, f"is {value}", "Give a finite number"))
            continue
        if isinstance(value, str) and "\0" in value:
            found.append(Problem(key, "holds a zero byte", "Take it out"))
            continue
        kinds = part.metadata.get("kinds")
        words = part.metadata.get("range") or type_words(wanted)
        if kinds:  # nothing turns a number into text there
            fits = any(isinstance(value, str) if kind is str else has_type(value, kind) for kind in kinds)
            wanted_words = words
        else:
            fits, wanted_words = has_type(value, wanted), type_words(wanted)
            if fits and value is not None and wanted in (str, str | None):
                value = str(value)  # as composition makes it
        if not fits:
            expected = "" if wanted_words == words else f", expected {wanted_words}"
            found.append(Problem(key, f"is {show(value)}{expected}", f"Allowed: {words}"))
        elif value is not None and "test" in part.metadata and not part.metadata["test"](value):
            mend = f"Allowed: {words}"
            if "choices" in part.metadata:
                mend = _nearest(str(value), part.metadata["choices"]) + mend
            found.append(Problem(key, f"is {value!r}", mend))
    known = tuple(part.name for part in dataclasses.fields(shape))
    for name in tree:
        if name not in known:
            mend = _nearest(name, known) + "Take it out"
            if name in OPTIONAL and not prefix:
                mend = f'Begin the file of {name}=... with the line "# @package _global_"'
            found.append(Problem(f"{prefix}{name}", "is not a key of kdx", mend))
    return found


def _nearest(word: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    meant = ALIASES.get(word) or (near[0] if near else "")
    return f"Did you mean {meant}? " if meant else ""


def dotted(tree: Any, prefix: str = "") -> list[str]:
    """Every key of a tree but Hydra's and those that kdx fills in."""
    keys = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in ("hydra", "run.origins", "sweep.keys"):
            keys += [key, *(dotted(value, f"{key}.") if isinstance(value, dict) else [])]
    return keys


def nearest_key(key: str, known: list[str]) -> str:
    """A mend for a dotted key that is not known: other tools' word for it, the same name elsewhere, or the nearest."""
    last = key.rsplit(".", 1)[-1]
    if ALIASES.get(last, "").startswith(f"{key}, "):
        return f"It is one {ALIASES[last].removeprefix(f'{key}, ')}"
    if last in ALIASES:
        return f"Did you mean {ALIASES[last]}?"
    same = [k for k in known if k.rsplit(".", 1)[-1] == last]
    near = difflib.get_close_matches(key, same, n=1) or same or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if not near:  # a short name: compare with the last parts
        names = difflib.get_close_matches(last, [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.7)
        near = [k for k in known if k.rsplit(".", 1)[-1] in names]
    return f"Did you mean {' or '.join(near)}?" if near else "See `python -m kdx --cfg job` for all keys"


def has_near_name(key: str, known: list[str]) -> bool:
    """Whether the last part of a dotted key is nearly that of a known one, or other tools' word for it."""
    last = key.rsplit(".", 1)[-1]
    return last in ALIASES or bool(difflib.get_close_matches(last, [k.rsplit(".", 1)[-1] for k in known], 1, 0.7))


def contradictions(tree: dict[str, Any]) -> list[Problem]:
    """Values that are fine alone and wrong together; for a tree without other problems."""
    found = []
    teacher, student, data, loss = tree["teacher"], tree["student"], tree["data"], tree["loss"]
    train, optim = tree["train"], tree["optim"]
    for group, model in (("teacher", teacher), ("student", student)):
        if model["trust_remote_code"] and not COMMIT.fullmatch(str(model["revision"])):
            what = "runs code from the hub, so it needs a revision that is a commit (40 hex digits)"
            found.append(Problem(f"{group}.trust_remote_code", what, f"Pin it: {group}.revision=COMMIT"))
    if student["init"] != "cut" and not student["path"]:
        found.append(Problem("student.path", "is null", "Say which model: student.path=FOLDER or a hub id"))
    if student["init"] == "cut":
        if not teacher["path"]:
            found.append(Problem("student", "is cut from the teacher, and there is none", "Choose student=hf"))
        if student["layers"] is None:
            found.append(Problem("student.layers", "is null", "Say how many or which: student.layers=10"))
    if not teacher["path"] and loss["alpha"] > 0:
        what = f"is {loss['alpha']} but teacher=none leaves nothing to distil from"
        found.append(Problem("loss.alpha", what, "Set loss=cross_entropy, or choose a teacher"))
    if loss["name"] == "cross_entropy" and loss["alpha"] > 0:
        found.append(Problem("loss.alpha", f"is {loss['alpha']}; cross_entropy is alpha 0", "Set loss.alpha=0"))
    if (train["max_steps"] is None) == (train["epochs"] is None):
        both = "are both set" if train["epochs"] else "are both null"
        found.append(Problem("train.max_steps and train.epochs", both, "Set exactly one of them, the other to null"))
    micro = train["micro_batch_size"]
    if micro != "auto" and train["batch_size"] % micro:
        what = f"is {train['batch_size']}, not a multiple of train.micro_batch_size={micro}"
        found.append(Problem("train.batch_size", what, f"Try {max(micro, train['batch_size'] // micro * micro)}"))
    if train["max_steps"] and (optim["warmup_steps"] or 0) > train["max_steps"]:
        what = f"is {optim['warmup_steps']}, more than train.max_steps={train['max_steps']}"
        found.append(Problem("optim.warmup_steps", what, f"Allowed: 0 to {train['max_steps']}"))
    needs_rows = [("train.keep=best", train["keep"] == "best")]
    needs_rows += [("train.early_stopping.patience", train["early_stopping"]["patience"] is not None)]
    for key, asked in needs_rows:
        if asked and (data["validation"] is None or not train["eval_every"]):
            what = "needs held-out measures during training"
            found.append(Problem(key, what, "Set train.eval_every above 0 and data.validation"))
    return found


def binding_problems(function: Callable[..., Any], options: dict[str, Any], prefix: str, skip: int) -> list[Problem]:
    """Check options against a function's signature, past its first `skip` parameters: names, types, what is missing."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    known = {p.name: p for p in parameters}
    hints: dict[str, Any] = {}
    with suppress(Exception):  # a name in one's own annotations need not be known
        hints = typing.get_type_hints(function) if inspect.isfunction(function) else {}
    found = []
    for name, value in options.items():
        if name not in known:
            takes, near = f"It takes: {', '.join(known) or 'none'}", _nearest(name, tuple(known))
            takes = near + takes if near else f"{takes}. To leave it out: ~{prefix}{name}"
            found.append(Problem(prefix + name, "is not an option here", takes))
        elif value == "???":
            found.append(Problem(prefix + name, "is missing", f"Give it: {prefix}{name}=..."))
        elif not has_type(value, hints.get(name, Any)):
            what = f"is {show(value)}, expected {type_words(hints[name])}"
            found.append(Problem(prefix + name, what, "Mend the value"))
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            found.append(Problem(prefix + name, "is missing", f"Give it: +{prefix}{name}=..."))
    return found
