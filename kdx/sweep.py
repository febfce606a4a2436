"""The points of a sweep: what they are, and the names of their folders."""

import hashlib
import itertools
import json
import math
import re
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from kdx.config import Config, as_dict
from kdx.errors import ConfigError

# What cannot change the student is not part of a job's or a sweep's identity.
NOT_IDENTITY = ("run", "sweep", "tracking")
NOT_IDENTITY_IN = {
    "train": ("log_every", "save_every", "keep_checkpoints"),
    "teacher": ("store", "store_dir", "store_limit_gb"),
}
MOST_POINTS = 10_000
LONGEST_PART = 60  # letters of a value in a folder's name; the hash tells long ones apart


def swept_keys(words: list[Override]) -> list[str]:
    """The keys that have several values, in the order typed; of a key typed twice the last counts."""
    last = {word.get_key_element(): word for word in words}
    return [key.lstrip("+~") for key, word in last.items() if word.is_sweep_override()]


def is_empty(word: Override) -> bool:
    """Whether a word sweeps over nothing, as a pattern that no option fits."""
    is_some = not word.is_sweep_override() or isinstance(word.value(), IntervalSweep)
    return not is_some and next(word.sweep_string_iterator(), None) is None


def points(words: list[Override]) -> list[list[str]]:
    """Every combination of the swept values as the words of a single run; of an interval, its ends.

    Raises ConfigError if they are more than anybody runs.
    """
    values: dict[str, list[str]] = {}
    for word in words:
        key = word.get_key_element()
        if isinstance(interval := word.value(), IntervalSweep):
            values[key] = [f"{key}={interval.start}", f"{key}={interval.end}"]
        elif word.is_sweep_override():
            some = itertools.islice(word.sweep_string_iterator(), MOST_POINTS + 1)
            values[key] = [f"{key}={value}" for value in some]
        else:
            values[key] = [str(word.input_line)]
    if math.prod(map(len, values.values())) > MOST_POINTS:
        what = f"has more than {MOST_POINTS:,} points"
        raise ConfigError("sweep", what, "Sweep over fewer values, or in parts under one sweep.name")
    return [list(point) for point in itertools.product(*values.values())]


def sweep_name(keys: list[str], configs: list[Config]) -> str:
    """A sweep's name: its keys and a short hash of what its points have in common, the same on any day."""
    common = _identity(configs[0])
    for config in configs[1:]:
        common = _common(common, _identity(config))
    for key in keys:  # a swept group's options differ by themselves
        if "." in key:
            _drop(common, key.split("."))
    return "-".join([*(_safe(_short(key)) for key in keys), _digest(common)])


def job_name(keys: list[str], config: Config) -> str:
    """A job's name: its point and a short hash of its typed config, as temperature-2_alpha-0.7_1a2b3c."""
    tree = as_dict(config)
    parts = ["baseline"] if config.loss.alpha == 0 and "loss.alpha" not in keys else []
    for key in keys:
        if config.loss.alpha == 0 and key.startswith("loss") and key != "loss.alpha":
            continue  # without a distillation term the rest of `loss` says nothing
        value = _find(tree, key.split("."))
        if isinstance(value, dict):  # a group: named by what sets its options apart
            value = next((value[k] for k in ("name", "path", "init") if value.get(k)), key)
        is_part = key.split(".")[0] in tree  # an experiment is told by the hash
        parts.append(f"{_short(key)}-{_safe(str(_whole(value)))}" if is_part else _safe(key))
    return "_".join([*parts, _digest(identity(config))])


def baseline_words(words: list[Override]) -> list[str]:
    """The same sweep without a teacher: what is typed of the loss gives way to alpha = 0."""
    return [*(str(w.input_line) for w in words if w.key_or_group.split(".")[0] != "loss"), "loss.alpha=0"]


def missing_baselines(points: list[Config], baselines: list[Config]) -> int:
    """How many distinct baselines are not among the points themselves."""
    return len({_digest(identity(config)) for config in baselines} - {_digest(identity(c)) for c in points})


def identity(config: Config) -> dict[str, Any]:
    """The part of a config that decides which student comes out."""
    tree = _identity(config)
    if tree["loss"]["alpha"] == 0:  # whatever the rest of `loss` says
        tree["loss"] = "cross_entropy"
    return tree


def _identity(config: Config) -> dict[str, Any]:
    tree = {k: v for k, v in as_dict(config).items() if k not in NOT_IDENTITY}
    for group, keys in NOT_IDENTITY_IN.items():
        tree[group] = {k: v for k, v in tree[group].items() if k not in keys}
    return tree


def _find(node: Any, parts: list[str]) -> Any:
    """A value of a config as a tree; an option of an open group stands in its `options`."""
    for part in parts:
        if not isinstance(node, dict):
            return None
        node = node[part] if part in node else node.get("options", {}).get(part)
    return node


def _drop(node: dict[str, Any], parts: list[str]) -> None:
    for part in parts[:-1]:
        node = node.get(part, {})
    for holder in (node, node.get("options", {})):
        holder.pop(parts[-1], None)


def _common(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What two trees agree on."""
    both = {k: (v, other[k]) for k, v in one.items() if k in other}
    nested = {k: _common(v, w) for k, (v, w) in both.items() if isinstance(v, dict) and isinstance(w, dict)}
    return {k: v for k, (v, w) in both.items() if v == w} | nested


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _safe(text: str) -> str:
    """A part of a folder's name: letters, digits, . and -."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text)[:LONGEST_PART].strip("-.") or "x"


def _digest(tree: Any) -> str:
    """Six hex digits, the same for equal trees; 1 and 1.0 are equal."""
    return hashlib.sha256(json.dumps(_whole(tree), sort_keys=True, default=str).encode()).hexdigest()[:6]


def _whole(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _whole(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_whole(value) for value in node]
    return int(node) if isinstance(node, float) and node.is_integer() else node
