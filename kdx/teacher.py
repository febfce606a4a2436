"""The teacher: what it answers about a batch, from its store where every row is there, else computed live."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdx.causal_lm import DTYPES, Head, attention_for, counted_hidden, device_dtype, head_of, load_causal_lm
from kdx.config import TeacherConfig
from kdx.data.batches import MicroBatch, merged
from kdx.store import Identity, TeacherStore, load_head


@dataclass(frozen=True)
class Answer:
    """What a teacher of width D says at N counted positions: exact logits at any temperature."""

    hidden: Tensor  # [N, D], last hidden states in the teacher's dtype
    head: Head


class Teacher:
    """A frozen model whose body is loaded only when a row is asked for that its store lacks.

    load: loads the whole model. device: where its head works if it comes from the store. rows_at_once: of its pass, by
    default the student's.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        identity: Identity,
        *,
        store: TeacherStore | None = None,
        device: torch.device | None = None,
        rows_at_once: int | None = None,
    ) -> None:
        self.identity, self.store, self.rows_at_once = identity, store, rows_at_once
        self.store_words = "off"  # where the store is, or why there is none
        self._load = load
        self._model: Any = None
        stored = load_head(store.folder) if store else None
        if stored:
            self.head, self.num_parameters = stored[0].to(device), stored[1]
        else:
            self.head, self.num_parameters = head_of(self.model), self.model.num_parameters()
            if store:
                store.save_head(self.head, self.num_parameters)

    @property
    def model(self) -> Any:
        """The whole model, loaded when it is first asked for. Raises ModelError or MachineError."""
        if self._model is None:
            self._model = self._load().requires_grad_(False).eval()
        return self._model

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    def load(self) -> None:
        """Load the body now, so that what is wrong with it shows before training. Raises ModelError or MachineError."""
        _ = self.model

    def free(self) -> None:
        """Let go of the body; the head stays."""
        self._model = None

    def close(self) -> None:
        """Flush the store."""
        if self.store is not None:
            self.store.close()

    def answers(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Answer]:
        """Yield the answer to each micro-batch; several are computed in one pass if `rows_at_once` allows."""
        size = max(len(batch.row_ids) for batch in micro_batches)
        at_once = max(1, (self.rows_at_once or size) // size)
        for start in range(0, len(micro_batches), at_once):
            group = micro_batches[start : start + at_once]
            hidden = self.answer(merged(group)).hidden
            for part in hidden.split([len(batch.counted_labels) for batch in group]):
                yield Answer(part, self.head)

    def answer(self, batch: MicroBatch) -> Answer:
        """Answer a batch; if the store lacks one of its rows all are computed, in one layout, and stored."""
        if self.store is None:
            return Answer(self.live(batch), self.head)
        if (rows := self.store.read(batch.row_digests)) is not None:
            return Answer(joined(rows, self.head.weight.device), self.head)
        hidden = self.live(batch)
        computed = hidden.cpu().split(batch.num_counted)
        settled = self.store.write(batch.row_digests, computed)
        is_as_computed = all(one is other for one, other in zip(settled, computed, strict=True))
        return Answer(hidden if is_as_computed else torch.cat(settled), self.head)

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


def dtype_of(config: TeacherConfig, device: torch.device) -> str:
    """Choose the dtype of the frozen weights on a device."""
    return device_dtype(device) if config.precision == "auto" else config.precision


def load_teacher(
    config: TeacherConfig, device: torch.device, max_length: int, identity: Identity, store: TeacherStore | None = None
) -> Teacher:
    """Return the frozen teacher on a device, or spread over all. Raises ModelError or MachineError."""

    def load() -> Any:
        device_map = config.device_map or (None if config.quantization == "none" else str(device))
        model = load_causal_lm(
            config,
            "teacher",
            dtype=DTYPES[identity.dtype],
            attn_implementation=attention_for(config, device, max_length),
            quantization=config.quantization,
            device_map=device_map,
        )
        return model if device_map else model.to(device)

    rows_at_once = None if config.micro_batch_size == "auto" else int(config.micro_batch_size)
    return Teacher(load, identity, store=store, device=device, rows_at_once=rows_at_once)
