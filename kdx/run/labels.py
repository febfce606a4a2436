"""What a run is called at W&B: name, tags, config. Nothing in a name or a tag is local or secret. No torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kdx.config import Config, ModelConfig, leaves
from kdx.run.folder import Record
from kdx.run.identity import canonical, config_identity, digest
from kdx.run.redact import redact
from kdx.words import key_of

GREEK = {"loss.temperature": "τ", "loss.alpha": "α"}
LONGEST = 64  # characters of a tag that W&B takes
NOT_SENT = ("run", "sweep", "tracking", "hydra")  # groups of keys that say where and how, not what


def short(key: str) -> str:
    """Name a key for people: τ, α, else its last part, or its group if that tells more."""
    group, _, last = key.rpartition(".")
    return GREEK.get(key) or (group if last in ("name", "path", "init") else last)


def run_name(config: Config, record: Record) -> str:
    """Name a run by the values that its sweep varies, else by teacher, student and loss."""
    loss, values = config.loss, _typed(record) | leaves(redact(config.model_dump()))
    if record.swept:
        keys = [key for key in record.swept if loss.alpha > 0 or not key.startswith("loss")]
        return " ".join([*["baseline"] * (loss.alpha == 0), *(f"{short(k)}={_public(values.get(k))}" for k in keys)])
    teacher = f"{_model(config.teacher)} → " if config.teacher.path else ""
    return redact(f"{teacher}{student_name(config)} · {_objective(config)}")


def tags(config: Config, record: Record) -> list[str]:
    """Tag a run with its divergence, teacher, student, adapter and experiment; a baseline as one."""
    chosen = {"adapter": config.adapter.name} | _typed(record)
    found = ["baseline" if config.loss.alpha == 0 else config.loss.name, student_name(config)]
    found += [_model(config.teacher)] if config.teacher.path else []
    found += [chosen[group] for group in ("adapter", "experiment") if chosen.get(group, "") not in ("", "none", "null")]
    return [tag[:LONGEST] for tag in dict.fromkeys(found)]


def config_of(training: Any, folder: Path) -> dict[str, Any]:
    """Describe a run as typed and as resolved. `point` is the same for runs that differ only in train.seed."""
    from kdx.run import report  # imports torch

    config, record = training.config, training.record
    tree = {group: dict(node) for group, node in config.model_dump().items() if group not in NOT_SENT}
    tree["data"]["max_length"] = training.max_length
    if config.loss.alpha == 0:  # the rest of the loss is not used
        tree["loss"] = {"alpha": 0.0}
    about = {"hash": digest(config_identity(config)), "steps": training.max_steps, "save_dtype": training.save_dtype}
    about["teacher_parameters"] = training.teacher and training.teacher.num_parameters
    about["student_parameters"] = training.student.num_parameters()
    return tree | {
        "typed": [word for word in record.words if not key_of(word).startswith(NOT_SENT)],
        "point": run_name(config, replace(record, swept=[key for key in record.swept if key != "train.seed"])),
        "resolved": about | report.counts(training.data) | report.environment(training, folder),
    }


def _typed(record: Record) -> dict[str, str]:
    """Return what was typed, by key, without secrets."""
    return {key_of(word): word.partition("=")[2] for word in redact(record.words)}


def _public(value: Any) -> str:
    """Write a value of a config; of a path its last part."""
    if isinstance(value, list):
        return ",".join(map(_public, value))
    text = value if isinstance(value, str) else canonical(value)
    return text.rstrip("/").rsplit("/", 1)[-1].removeprefix("pkg:")


def public_name(source: Any) -> str:
    """Name the config of a model or of data by its hub id, or by the last part of its path."""
    path = getattr(source, "base_model", None) or source.path or source.name
    name = (path if isinstance(path, str) else path[0]).removeprefix("pkg:").rstrip("/")
    is_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    return name.rpartition("/")[2] if is_local else name


def _model(model: ModelConfig) -> str:
    return public_name(model).rpartition("/")[2].removesuffix("-Instruct")


def student_name(config: Config) -> str:
    """Name a student by its layers if it is cut, else by its model."""
    if config.student.init == "cut":
        layers = config.student.layers
        return f"{len(layers) if isinstance(layers, list) else layers} layers"
    return "fresh " * (config.student.init == "random") + _model(config.student)


def _objective(config: Config) -> str:
    loss = config.loss
    options = "".join(f" {name}={_public(value)}" for name, value in redact(loss.options).items())
    ends = ((loss.alpha, loss.alpha_end), (loss.temperature, loss.temperature_end))
    alpha, temperature = ("→".join(f"{value:g}" for value in pair if value is not None) for pair in ends)
    return f"{loss.name} α{alpha} τ{temperature}{options}" if loss.alpha > 0 else "cross_entropy"
