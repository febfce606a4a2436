"""What may differ when a run goes on: nothing that can change the student."""

import hashlib
import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

log = logging.getLogger("kdx")

# Keys, and what begins so, that cannot change the student.
FREE = (
    "run.",
    "sweep.",
    "tracking.",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "teacher.store",  # to the last bits of what it says: `mark` tells
)
LIBRARIES = ("kdx", "torch", "transformers", "accelerate", "tokenizers", "bitsandbytes")

Drift = list[tuple[str, Any, Any]]  # key, was, now


def drift(was: dict[str, Any], now: dict[str, Any]) -> Drift:
    """The keys of two configs that differ and matter."""
    free = tuple(key for key in _free(now) if key in _free(was))
    return [d for d in differences(was, now) if not d[0].startswith(free) and not _is_more_lenient(*d)]


def _free(config: dict[str, Any]) -> tuple[str, ...]:
    """The keys that cannot change this config's student: a teacher, or measures, may decide nothing."""
    loss, train = (node if isinstance(node := config.get(name), dict) else {} for name in ("loss", "train"))
    stopping = train.get("early_stopping")
    is_measured = train.get("keep") != "last" or not isinstance(stopping, dict) or stopping.get("patience") is not None
    return (*FREE, *(["loss."] if loss.get("alpha") == 0 else []), *([] if is_measured else ["train.eval_every"]))


def _is_more_lenient(key: str, was: Any, now: Any) -> bool:
    """Whether a run that stopped at a number that is not finite may pass over it now: all before is the same."""
    return (key, was, now) == ("train.on_nonfinite", "stop", "skip") or (
        key == "train.max_nonfinite" and _is_above(now, was)
    )


def _is_above(now: Any, was: Any) -> bool:
    """Whether both are numbers, which a damaged config need not have, and the first is greater."""
    return isinstance(now, int | float) and isinstance(was, int | float) and now > was


def differences(was: Any, now: Any, prefix: str = "") -> Drift:
    """Every leaf in which two trees differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*was, *now])
        return [d for k in keys for d in differences(was.get(k), now.get(k), f"{prefix}.{k}" if prefix else str(k))]
    return [] if was == now else [(prefix, was, now)]


def digest(config: dict[str, Any], origin: dict[str, Any]) -> str:
    """What a checkpoint is of: all that may not differ when a run goes on, of its config and beside it."""
    lenient = ("train.max_steps", "train.epochs", "train.on_nonfinite", "train.max_nonfinite")
    free = (*_free(config), *lenient)
    fixed = sorted((key, value) for key, value in _leaves(config) if not key.startswith(free))
    return hashlib.sha256(json.dumps([fixed, origin], default=str, sort_keys=True).encode()).hexdigest()[:16]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def only_longer(found: Drift, config: dict[str, Any]) -> bool:
    """Whether a run only has more steps to do, under a rate that does not know how many: the first are the same."""
    if len(found) != 1 or found[0][0] not in ("train.max_steps", "train.epochs"):
        return False
    _, was, now = found[0]
    optim = config["optim"]
    warmup = optim["warmup_steps"]
    is_constant = optim["schedule"] == "constant" or (
        optim["schedule"] == "constant_with_warmup" and not 0 < (warmup or 0) < 1
    )
    return bool(is_constant and _is_above(now, was))


def table(found: Drift) -> list[str]:
    """Key, was and now in three columns."""
    rows = [("key", "was", "now"), *((key, _short(was), _short(now)) for key, was, now in found)]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f"  {key:{widths[0]}}  {was:{widths[1]}}  {now}" for key, was, now in rows]


def _short(value: Any) -> str:
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 60 else text[:28] + " … " + text[-28:]


def versions(**more: str) -> dict[str, str]:
    """The libraries whose arithmetic a run repeats exactly, and no other version's; and what else decides last bits."""
    return {name: version(name) for name in LIBRARIES} | more


def mark(marks: list[str], why: list[str]) -> None:
    """Note, and tell, that a run does not go on to the last bit as it would have."""
    marks += why
    if why:
        log.warning("this run is no longer exact: %s", "; ".join(marks))
