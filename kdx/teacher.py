"""The teacher: what it answers about a batch, from its store where every row is there, else computed live."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from kdx.adapter import merge_adapter
from kdx.causal_lm import DTYPES, Head, attention_for, counted_hidden, device_dtype, head_of, load_causal_lm
from kdx.config import TeacherConfig
from kdx.data.batches import MicroBatch, collate, in_groups, merged
from kdx.run.identity import model_digest
from kdx.store import Identity, TeacherStore, load_head, open_store


@dataclass(frozen=True)
class Answer:
    """What a teacher of width D says at N counted positions: exact logits at any temperature."""

    hidden: Tensor  # [N, D], last hidden states in the teacher's dtype
    head: Head


@dataclass(eq=False)
class Teacher:
    """A frozen model whose body is loaded only when a row is asked for that its store lacks."""

    load: Callable[[], Any]  # the whole model
    identity: Identity
    store: TeacherStore | None = None
    device: torch.device | None = None  # where its head works if it comes from the store
    rows_at_once: int | None = None  # of its pass; None: as many as the student's
    store_words: str = "off"  # where the store is, or why there is none

    def __post_init__(self) -> None:
        if self.store and (stored := load_head(self.store.folder, self.device)):
            self.head, self.num_parameters = stored
            return
        self.head, self.num_parameters = head_of(self.model), self.model.num_parameters()
        if self.store:
            self.store.save_head(self.head, self.num_parameters)

    @cached_property
    def model(self) -> Any:
        """The whole model, loaded when it is first asked for. Raises ModelError or MachineError."""
        return self.load().requires_grad_(False).eval()

    @property
    def is_loaded(self) -> bool:
        return "model" in vars(self)

    def answers(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Answer]:
        """Yield the answer to each micro-batch; several are computed in one pass if `rows_at_once` allows."""
        size = max(len(batch.row_ids) for batch in micro_batches)
        at_once = max(1, (self.rows_at_once or size) // size)
        for group in in_groups(micro_batches, at_once):
            hidden = self.answer(merged(group)).hidden
            for part in hidden.split([len(batch.counted_labels) for batch in group]):
                yield Answer(part, self.head)

    def answer(self, batch: MicroBatch, *, is_kept: bool = True) -> Answer:
        """Answer a batch; if the store lacks one of its rows all are computed, in one layout, and stored if is_kept."""
        if (most := self.rows_at_once) and len(batch.rows) > most:
            parts = [collate(some, pad_id=0) for some in in_groups(batch.rows, most)]
            return Answer(torch.cat([self.answer(part, is_kept=is_kept).hidden for part in parts]), self.head)
        store = None if "" in batch.row_digests else self.store  # what the student said is never stored
        if (rows := store.read(batch.row_digests) if store else None) is None:
            hidden = self.live(batch)
            if store is None or not is_kept:
                return Answer(hidden, self.head)
            rows = store.write(batch.row_digests, hidden.cpu().split(batch.num_counted))
        return Answer(joined(rows, self.head.weight.device), self.head)

    @torch.no_grad()
    def live(self, batch: MicroBatch) -> Tensor:
        """Run the body → the last hidden states [N, D] at the batch's counted positions. The store is not asked."""
        device = self.model.device
        with torch.autocast(device.type, enabled=False):  # the teacher computes in its own dtype, always
            return counted_hidden(self.model, batch.to(device))


def joined(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Join rows in memory; for a GPU in pinned memory, from where they are on their way before it is waited for."""
    if device.type != "cuda":
        return torch.cat(list(rows))
    size = (sum(len(row) for row in rows), *rows[0].shape[1:])
    pinned = torch.empty(size, dtype=rows[0].dtype, pin_memory=True)
    return torch.cat(list(rows), out=pinned).to(device, non_blocking=True)


def identity_of(config: TeacherConfig, device: torch.device) -> Identity:
    """Identify a teacher by what decides its answers."""
    digest = model_digest(config, "teacher") or uuid.uuid4().hex  # unknown: equal to nothing
    dtype = device_dtype(device) if config.precision == "auto" else config.precision
    return Identity(digest, dtype, config.quantization)


def load_body(
    config: TeacherConfig, dtype: torch.dtype, device: torch.device, max_length: int, *, is_compiled: bool
) -> Any:
    """Load the whole model onto its device, or spread over all, with its adapter merged. Raises ModelError."""
    attention = attention_for(config, device, max_length)
    how: dict[str, Any] = {"attn_implementation": attention, "device_map": config.device_map or device}
    model: Any = load_causal_lm(config, "teacher", dtype=dtype, quantization=config.quantization, **how)
    if config.adapter:
        merge_adapter(model, dtype)
    model.is_compiled = is_compiled
    return model


def load_teacher(
    config: TeacherConfig,
    device: torch.device,
    max_length: int,
    rows: dict[str, int] | None = None,
    *,
    is_repeated: bool = False,
    is_compiled: bool = False,
) -> Teacher | None:
    """Open the teacher's store for these rows, and load the teacher if it lacks one; None without a teacher.

    rows: digest → counted positions; without them no store is used. is_repeated: whether rows are asked for more than
    once. Raises ModelError, or MachineError if the store must be on and has no room.
    """
    if config.path is None:
        return None
    identity = identity_of(config, device)
    store, store_words = open_store(config, identity, rows, is_repeated=is_repeated) if rows else (None, "off")
    load = partial(load_body, config, DTYPES[identity.dtype], device, max_length, is_compiled=is_compiled)
    rows_at_once = None if config.micro_batch_size == "auto" else int(config.micro_batch_size)
    teacher = Teacher(load, identity, store, device, rows_at_once, store_words)
    if rows and store and store.missing(list(rows)):
        _ = teacher.model  # what is wrong with the model shows now, not in the middle of the run
    return teacher
