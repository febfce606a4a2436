"""What the teacher says about a batch: its last hidden states at the counted positions, and the head that reads them.

They come from the teacher's store where it has every row of the batch; else the whole batch is computed live, in one
layout, and kept. The body is loaded when it is first needed.

N counted positions, D width of the teacher.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kdx.causal_lm import DTYPES, Head, attention_for, counted_hidden, device_dtype, head_of, load_causal_lm
from kdx.config import TeacherConfig
from kdx.data.batches import MicroBatch, merged
from kdx.store import Identity, Kept, TeacherStore


class Teacher:
    """A frozen model. Its hidden states give exact logits at any temperature, with its head alone in memory.

    load: loads the whole model. precision: in words. device: where its head works if it comes from the store.
    rows_at_once: of its pass, by default the student's.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        precision: str,
        identity: Identity,
        *,
        store: TeacherStore | None = None,
        device: torch.device | None = None,
        rows_at_once: int | None = None,
    ) -> None:
        self.precision, self.identity, self.store, self.rows_at_once = precision, identity, store, rows_at_once
        self._load = load
        self._model: Any = None
        kept = store.kept() if store else None
        if kept is not None:
            self.head: Head = kept.head.to(device)
        else:
            kept = _kept(self.model)
            self.head = kept.head
            if store:
                store.keep(kept)
        self.num_parameters, self.num_bytes = kept.num_parameters, kept.num_bytes

    @property
    def model(self) -> Any:
        """The whole model, loaded when it is first asked for."""
        if self._model is None:
            self._model = self._load().requires_grad_(False).eval()
        return self._model

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    def load(self) -> None:
        """Load the body now. Raises ModelError or MachineError."""
        _ = self.model

    def free(self) -> None:
        """Let go of the body; the head stays."""
        self._model = None

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Return the last hidden states [N, D] at the batch's counted positions, in the teacher's dtype."""
        if self.store is None:
            return self.live(batch)
        kept = self.store.read(batch.row_digests)
        if kept is not None:
            return torch.cat(kept)
        began = time.perf_counter()
        hidden = self.live(batch)
        per_row = hidden.cpu().split(batch.num_counted)
        self.store.write(batch.row_digests, per_row, time.perf_counter() - began)
        return hidden

    def settled(self, batch: MicroBatch) -> Tensor:
        """The same as `hidden` says now and after any stop: what is kept of rows, where it is, and not what was live."""
        hidden = self.hidden(batch)
        kept = self.store.peek(batch.row_digests) if self.store else None
        return hidden if kept is None else torch.cat(kept)

    @torch.no_grad()
    def live(self, batch: MicroBatch) -> Tensor:
        """The same, from the model itself."""
        device = self.model.device
        with torch.autocast(device.type, enabled=False):  # the teacher computes in its own dtype, always
            return counted_hidden(self.model, batch.to(device))

    def position(self) -> dict[str, int]:
        """How far what this run keeps in the store reaches, for a checkpoint."""
        return self.store.rows.position() if self.store else {}

    def answers(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """Yield the hidden states of each micro-batch; several are read together if `rows_at_once` allows."""
        size = max(len(batch.row_ids) for batch in micro_batches)
        together = max(1, (self.rows_at_once or size) // size)
        for start in range(0, len(micro_batches), together):
            group = micro_batches[start : start + together]
            yield from self.hidden(merged(group)).split([len(batch.counted_labels) for batch in group])


def _kept(model: Any) -> Kept:
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return Kept(head_of(model), model.num_parameters(), num_bytes)


def precision_of(config: TeacherConfig, device: torch.device) -> tuple[str, str]:
    """The dtype of the frozen weights on a device, and the choice in words."""
    if config.precision == "auto":
        dtype, why = device_dtype(device)
        name = next(k for k, v in DTYPES.items() if v == dtype)
        words = f"{name} ({why})"
    else:
        name = words = config.precision
    return name, words if config.quantization == "none" else f"{config.quantization}, {words}"


def load_teacher(
    config: TeacherConfig,
    device: torch.device,
    max_length: int,
    identity: Identity,
    store: TeacherStore | None = None,
) -> Teacher:
    """Return the frozen teacher on a device, or on all of them. Raises ModelError or MachineError.

    Its body is loaded only if the store lacks its head; else when a row is asked for that is not there.
    """
    name, words = precision_of(config, device)
    quantised = config.quantization != "none"

    def load() -> Any:
        model = load_causal_lm(
            config,
            "teacher",
            dtype=DTYPES[name],
            attn_implementation=attention_for(config, device, max_length),
            quantization=config.quantization,
            device_map=config.device_map or (str(device) if quantised else None),
        )
        return model if config.device_map or quantised else model.to(device)

    rows_at_once = None if config.micro_batch_size == "auto" else int(config.micro_batch_size)
    return Teacher(load, words, identity, store=store, device=device, rows_at_once=rows_at_once)
