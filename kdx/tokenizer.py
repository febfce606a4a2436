"""The one tokenizer that teacher and student share: loaded, compared, and how long a row both models can read."""

import logging
from dataclasses import dataclass
from typing import Any

from kdx import causal_lm
from kdx.config import Config, ModelConfig
from kdx.errors import ConfigError, ModelError

log = logging.getLogger("kdx")


@dataclass(frozen=True)
class SharedTokenizer:
    """The student's tokenizer, and what both models know of it."""

    tokenizer: Any
    max_length: int  # the longest row in tokens
    template: str = "the tokenizer's own"  # whose chat template it has, in words
    num_ids: int = 0  # ids that both models know: rows of a head past them are cut before the softmax
    foreign: frozenset[int] = frozenset()  # ids that only one of them knows; no row may have them

    @property
    def pad_id(self) -> int:
        """An id to pad with: any valid one, since nothing looks at padding; many tokenizers have no pad token."""
        return next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)


def load_tokenizer(config: Config) -> SharedTokenizer:
    """Load the tokenizer of a run. Raises KdxError if the two models' differ."""
    teacher, student, is_cut = config.teacher, config.student, config.student.init == "cut"
    models: dict[str, ModelConfig] = {"teacher": teacher} if teacher.path is not None else {}
    models |= {} if is_cut else {"student": student}
    key, why = ("path", "is cut from the teacher") if is_cut else ("layers", "is not cut")
    if getattr(student, key) is not None:
        log.warning("student.%s=%s is not used: the student %s", key, getattr(student, key), why)
    is_teachers = student.tokenizer == "teacher" and "teacher" in models
    own = {name: model for name, model in models.items() if name == "teacher" or not is_teachers}
    found = [causal_lm.load_tokenizer(model, name) for name, model in own.items()]
    limits = [causal_lm.num_positions(causal_lm.load_config(model, name)) for name, model in models.items()]
    known = [limit for limit in (config.data.max_length, *limits) if limit is not None]
    if not known:
        what = "is null, and the models' configs do not say how long a row they can read"
        raise ConfigError("data.max_length", what, "Give a number")
    teachers, tokenizer = found[0], found[-1]  # the same without a teacher, or where the student has no other
    num_ids, foreign = common_ids(teachers, tokenizer)
    template = "the tokenizer's own"
    if not tokenizer.chat_template and teachers.chat_template:
        tokenizer.chat_template, template = teachers.chat_template, "the teacher's (saved with the student)"
        for name in ("bos_token", "eos_token"):  # it means the teacher's
            if name in str(teachers.chat_template) and getattr(teachers, name) in tokenizer.get_vocab():
                setattr(tokenizer, name, getattr(teachers, name))
    elif teachers.chat_template not in (None, tokenizer.chat_template):
        template = "the student's; the teacher has another"
    return SharedTokenizer(tokenizer, min(known), template, num_ids, foreign)


def common_ids(teacher: Any, student: Any) -> tuple[int, frozenset[int]]:
    """Compare two tokenizers → the number of ids that both models need, and those below it that only one has.

    An id that one side only adds is usable as long as no row has it. Raises ModelError if any id is two tokens.
    """
    theirs, ours = ({i: token for token, i in each.get_vocab().items()} for each in (teacher, student))
    if differ := sorted(i for i in theirs.keys() & ours.keys() if theirs[i] != ours[i]):
        first, num = differ[0], f"{len(differ)} of {len(theirs.keys() | ours.keys())} ids"
        what = f"teacher and student differ at {num}, the first is {first}: {theirs[first]!r} and {ours[first]!r}"
        hint = "Choose a teacher and a student with the same tokenizer"
        if all(i in student.added_tokens_decoder and i in teacher.added_tokens_decoder for i in differ):
            hint = "Only added tokens differ: student.tokenizer=teacher uses the teacher's for both"
        raise ModelError("tokenizer", what, hint)
    return max(theirs.keys() & ours.keys()) + 1, frozenset(theirs.keys() ^ ours.keys())


def check_heads(num_ids: int, heads: dict[str, causal_lm.Head]) -> int:
    """Check that each head has a row for every id → the number of ids. Raises ModelError."""
    for group, head in heads.items():
        if head.num_ids < num_ids:
            what = f"its head has {head.num_ids} rows, and its tokenizer {num_ids} ids"
            raise ModelError(f"{group}.path", what, "Resize the model's embeddings, or use its own tokenizer")
    return num_ids
