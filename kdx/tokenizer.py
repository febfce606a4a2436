"""The one tokenizer that teacher and student share: loaded, compared, and how long a row both models can read."""

import logging
from typing import Any

from kdx import causal_lm
from kdx.config import Config
from kdx.errors import ConfigError, ModelError

log = logging.getLogger("kdx")


def load_tokenizer(config: Config) -> tuple[Any, int]:
    """Load the tokenizer of a run → it, and the longest row in tokens. Raises KdxError if the two models' differ."""
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
        what = "is null, and the models' configs do not say how long a row they can read"
        raise ConfigError("data.max_length", what, "Give a number")
    asked = config.data.max_length
    if asked is not None and min(known) < asked:
        who = " and ".join(name for name, limit in limits.items() if limit == min(known))
        log.warning("data.max_length=%d is more than the %s can read: using %d", asked, who, min(known))
    key, why = ("path", "is cut from the teacher") if config.student.init == "cut" else ("layers", "is not cut")
    if getattr(config.student, key) is not None:
        log.warning("student.%s=%s is not used: the student %s", key, getattr(config.student, key), why)
    return tokenizers[-1], min(known)


def count_ids(tokenizer: Any, heads: dict[str, causal_lm.Head]) -> int:
    """Count the tokenizer's real ids: rows of a head past them are padding, cut before the softmax. Raises ModelError."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    for group, head in heads.items():
        if head.num_ids < num_ids:
            what = f"its head has {head.num_ids} rows, and its tokenizer {num_ids} ids"
            raise ModelError(f"{group}.path", what, "Resize the model's embeddings, or use its own tokenizer")
    return num_ids


def pad_id_of(tokenizer: Any) -> int:
    """Choose an id to pad with: any valid one, since nothing looks at padding; many tokenizers have no pad token."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
