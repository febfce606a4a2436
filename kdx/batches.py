"""Conversations → tokens and labels → batches.

B rows of a batch, T positions, N counted positions: those whose next token counts in the loss.
"""

import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from kdx.config import DataConfig
from kdx.data import Conversation
from kdx.errors import DataError

log = logging.getLogger(__name__)

IGNORED = -100  # the label of a position that does not count, as everywhere in the field
WINDOW = 16  # batches that are grouped by length together: enough for little padding, few enough to stay shuffled
JOINED_BY_END_OF_TEXT = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"


@dataclass(frozen=True)
class Row:
    """A tokenised conversation. counted[i] tells whether token i is one the student must learn to say."""

    id: str
    tokens: list[int]
    counted: list[bool]

    @property
    def num_counted(self) -> int:
        """Counted positions; the first token has nothing before it that could predict it."""
        return sum(self.counted[1:])


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded to one length, and where in them the loss is taken."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T], 1 where there is a token; never made from ids: end of text may be the pad token
    positions: Tensor  # [N] indices into B·T, the positions whose next token counts
    counted_labels: Tensor  # [N] those next tokens
    row_of: Tensor  # [N] the row of the batch that each position belongs to
    row_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "MicroBatch":
        tensors = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MicroBatch(**tensors, row_ids=self.row_ids)


@dataclass
class Encoder:
    """Turns a conversation into a Row under one tokenizer and chat template."""

    tokenizer: Any
    max_length: int
    on_long: str
    assistant_only: bool

    def __post_init__(self) -> None:
        # The end of a turn is a special token in most templates; ids, not text, so that content cannot fake one.
        self.end_ids = set(self.tokenizer.all_special_ids) | {
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()

    def encode(self, conversations: Sequence[Conversation]) -> list[Row]:
        """Tokenise, and count what was dropped or truncated under which rule."""
        rows = []
        for conversation in conversations:
            text, spans = self._render(conversation)
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            tokens = encoding["input_ids"]
            counted = self._count(tokens, encoding["offset_mapping"], spans)
            if len(tokens) > self.max_length:
                if self.on_long == "error":
                    what = f"the row has {len(tokens)} tokens, data.max_length is {self.max_length}"
                    raise DataError(conversation.where, what, "Raise data.max_length, or set data.on_long=truncate")
                if self.on_long == "drop":
                    self.dropped["longer than data.max_length"] += 1
                    continue
                self.truncated["longer than data.max_length"] += 1
                tokens, counted = tokens[: self.max_length], counted[: self.max_length]
            row = Row(conversation.id, tokens, counted)
            if row.num_counted == 0:
                self.dropped["no counted token left"] += 1
                continue
            rows.append(row)
        return rows

    def _render(self, conversation: Conversation) -> tuple[str, list[tuple[int, int, int]]]:
        """The text under the chat template, and (start, end of content, end) of each assistant turn in it."""
        messages = conversation.messages
        text = self._template(conversation, messages)
        if not self.assistant_only:
            return text, [(0, len(text), len(text))]
        spans, cursor = [], 0
        for i, message in enumerate(messages):
            content = message["content"].strip()
            if message["role"] == "assistant":
                before = self._template(conversation, messages[:i], add_generation_prompt=True)
                after = self._template(conversation, messages[: i + 1])
                if text.startswith(before) and text.startswith(after) and len(before) < len(after):
                    start, end = len(before), len(after)
                    content_end = max(text.rfind(content, start, end), start) + len(content)
                else:  # a template that writes earlier turns differently: find the content, the turn ends before the next
                    start = text.find(content, cursor)
                    if start < 0:
                        what = "the chat template leaves out or rewrites what the assistant says"
                        mend = "Set data.assistant_only=false, or give a data.chat_template"
                        raise DataError(conversation.where, what, mend)
                    content_end = start + len(content)
                    following = messages[i + 1]["content"].strip() if i + 1 < len(messages) else None
                    end = text.find(following, content_end) if following else len(text)
                spans.append((start, content_end, end))
                cursor = content_end
            elif (found := text.find(content, cursor)) >= 0:
                cursor = found + len(content)
        return text, spans

    def _template(self, conversation: Conversation, messages: list[dict[str, str]], **options: Any) -> str:
        if not messages and options:  # some templates cannot render an empty conversation
            return ""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            what = f"the chat template refuses the conversation: {error}"
            raise DataError(conversation.where, what, "Mend the row, or give a data.chat_template") from None

    def _count(
        self, tokens: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int, int]]
    ) -> list[bool]:
        """Mark each assistant turn's tokens up to and with the special token that ends it.

        A turn that no special token ends is counted whole: its last characters are what ends it.
        """
        counted = [False] * len(tokens)
        at = 0
        for start, content_end, end in spans:
            while at < len(tokens) and offsets[at][0] < start:
                at += 1
            first = at
            while at < len(tokens) and offsets[at][0] < end:
                at += 1
                if self.assistant_only and offsets[at - 1][0] >= content_end and tokens[at - 1] in self.end_ids:
                    break
            counted[first:at] = [True] * (at - first)
        return counted


def prepare_tokenizer(tokenizer: Any, config: DataConfig) -> str:
    """Give the tokenizer the chat template of the run, so that it is saved with the student; say where it is from."""
    if config.chat_template:
        path = Path(config.chat_template).expanduser()
        is_file = "{" not in config.chat_template
        if is_file and not path.is_file():
            raise DataError("data.chat_template", f"{path} does not exist", "Give a file, or Jinja text with {{ }}")
        tokenizer.chat_template = path.read_text(encoding="utf-8") if is_file else config.chat_template
        return "data.chat_template"
    if tokenizer.chat_template:
        return "the tokenizer's own"
    if tokenizer.eos_token is None:
        raise DataError("data.chat_template", "the tokenizer has neither template nor end-of-text token", "Give one")
    tokenizer.chat_template = JOINED_BY_END_OF_TEXT
    return "turns joined by the end-of-text token"


def collate(rows: Sequence[Row], pad_id: int) -> MicroBatch:
    """Pad rows to the longest, on the right; labels are shifted here and nowhere else."""
    length = max((len(row.tokens) for row in rows), default=1)
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    positions: list[int] = []
    labels: list[int] = []
    row_of: list[int] = []
    for i, row in enumerate(rows):
        input_ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        attention_mask[i, : len(row.tokens)] = 1
        predicting = [t for t in range(len(row.tokens) - 1) if row.counted[t + 1]]  # logits at t predict token t+1
        positions += [i * length + t for t in predicting]
        labels += [row.tokens[t + 1] for t in predicting]
        row_of += [i] * len(predicting)
    return MicroBatch(
        input_ids,
        attention_mask,
        torch.tensor(positions, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(row_of, dtype=torch.long),
        tuple(row.id for row in rows),
    )


def pad_id_of(tokenizer: Any) -> int:
    """Any valid id does, since padding is masked; many tokenizers have no pad token."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def epoch_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """Order one epoch → a list of row numbers for each optimizer step; the last may be smaller.

    Shuffled from seed and epoch alone; within windows of a few batches rows of like length stand together, so that
    there is hardly any padding, and the batches of a window are shuffled again.
    """
    order = list(range(len(lengths)))
    if not shuffle:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng = random.Random(f"{seed}:{epoch}")
    rng.shuffle(order)
    rest = order[len(order) // batch_size * batch_size :]  # the small batch stays last, whatever its lengths
    batches = []
    for start in range(0, len(order) - len(rest), WINDOW * batch_size):
        window = order[start : min(start + WINDOW * batch_size, len(order) - len(rest))]
        window.sort(key=lambda row: lengths[row])
        grouped = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(grouped)
        batches += grouped
    return batches + ([rest] if rest else [])


@dataclass(frozen=True)
class StepBatch:
    """What one process does in one optimizer step."""

    epoch: float
    micro_batches: list[MicroBatch]
    num_tokens: int  # counted positions of the whole step, over all processes
    num_input_tokens: int  # tokens without padding of the whole step, over all processes


class StepBatches:
    """The batches of a run, step by step: any step can be reached without going through those before it."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        shuffle: bool,
        pad_id: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.rows, self.batch_size, self.micro_batch_size = rows, batch_size, micro_batch_size
        self.seed, self.shuffle, self.pad_id = seed, shuffle, pad_id
        self.rank, self.num_processes = rank, num_processes
        self.steps_per_epoch = -(-len(rows) // batch_size)

    def plan(self, first_step: int, max_steps: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (step, row numbers) for steps first_step … max_steps − 1."""
        lengths = [len(row.tokens) for row in self.rows]
        step = first_step
        while step < max_steps:
            epoch, within = divmod(step, self.steps_per_epoch)
            batches = epoch_batches(lengths, self.batch_size, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
            for batch in batches[within : within + max_steps - step]:
                yield step, batch
                step += 1

    def steps(self, first_step: int, max_steps: int) -> Iterator[StepBatch]:
        """Yield the batches of steps first_step … max_steps − 1, this process's share of each."""
        for step, numbers in self.plan(first_step, max_steps):
            rows = [self.rows[i] for i in numbers]
            mine = sorted(rows[self.rank :: self.num_processes], key=lambda row: len(row.tokens), reverse=True)
            size = self.micro_batch_size
            # every process runs the same number of micro-batches, an empty one if need be: collectives must match
            num_micro = -(-(-(-len(rows) // self.num_processes)) // size)
            parts = [mine[i * size : (i + 1) * size] or [dummy(self.pad_id)] for i in range(num_micro)]
            yield StepBatch(
                epoch=(step + 1) / self.steps_per_epoch,
                micro_batches=[collate(part, self.pad_id) for part in parts],
                num_tokens=sum(row.num_counted for row in rows),
                num_input_tokens=sum(len(row.tokens) for row in rows),
            )

    def padding(self, max_steps: int) -> float:
        """Share of padding among the positions that the run computes."""
        real = padded = 0
        for _, numbers in self.plan(0, min(max_steps, self.steps_per_epoch)):
            mine = sorted((len(self.rows[i].tokens) for i in numbers), reverse=True)
            for i in range(0, len(mine), self.micro_batch_size):
                part = mine[i : i + self.micro_batch_size]
                real, padded = real + sum(part), padded + len(part) * part[0]
        return 1 - real / padded if padded else 0.0


def dummy(pad_id: int) -> Row:
    """A row without a counted token, for a process that a small last batch leaves without rows."""
    return Row("", [pad_id, pad_id], [False, False])


def by_length(rows: Sequence[Row], batch_size: int) -> list[list[int]]:
    """Group row numbers into batches of like length, longest first, for passes where order does not matter."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens), reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def fingerprint(rows: Sequence[Row]) -> str:
    """A digest of rows as the models see them: ids, tokens and what counts, in order."""
    import hashlib

    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.tokens, [int(c) for c in row.counted]]).encode())
    return digest.hexdigest()[:16]
