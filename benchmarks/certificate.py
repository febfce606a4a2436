"""How exact the rows of a teacher's store are: measured once, beside the live teacher's own wandering.

In bf16 the hidden states of a row differ a little with the rows that are batched with it. What is kept comes from one
such batch, so it may differ from a live pass as much as two live passes differ, and not more.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kdx import loss
from kdx.causal_lm import Head
from kdx.data.batches import Row, collate
from kdx.teacher import Teacher

NUM_ROWS = 8
TEMPERATURES = (1.0, 2.0, 4.0)


def certify(teacher: Teacher, rows: Sequence[Row], pad_id: int) -> dict[str, Any] | None:
    """Return the store's certificate, measured now if there is none; None if it cannot be measured.

    Over a sample of rows, at each temperature: the largest mean KL a token of a row between what is kept and a live
    pass, and between two live passes, over the same rows one by one and all at once.
    """
    if teacher.store is None or (known := teacher.store.certificate()):
        return known if teacher.store else None
    counting = [row for row in rows if row.num_counted]
    sample = counting[:: max(1, len(counting) // NUM_ROWS)][:NUM_ROWS]
    stored = teacher.store.peek([row.digest for row in sample])
    if not sample or stored is None or not teacher.is_loaded:
        return None
    alone, together = (_live(teacher, sample, size, pad_id) for size in (1, len(sample)))
    certificate = {
        "rows": len(sample),
        "positions": sum(row.num_counted for row in sample),
        "stored_to_live": {f"{t:g}": _furthest(teacher.head, stored, alone, t) for t in TEMPERATURES},
        "live_to_live": {f"{t:g}": _furthest(teacher.head, together, alone, t) for t in TEMPERATURES},
    }
    teacher.store.certify(certificate)
    return certificate


def words_of(certificate: dict[str, Any]) -> str:
    """The certificate in one line."""

    def all_of(part: str) -> str:
        return ", ".join(f"{value:.2g} at τ={t}" for t, value in certificate[part].items())

    return (
        f"certificate ({certificate['rows']} rows): KL a token between kept and live teacher {all_of('stored_to_live')}; "
        f"between two live passes {all_of('live_to_live')}"
    )


def _live(teacher: Teacher, rows: Sequence[Row], size: int, pad_id: int) -> list[Tensor]:
    """The rows' hidden states from live passes over `size` rows each."""
    found: list[Tensor] = []
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size], pad_id)
        found += teacher.live(batch).cpu().split(batch.num_counted)
    return found


def _furthest(head: Head, ones: Sequence[Tensor], others: Sequence[Tensor], temperature: float) -> float:
    """The largest mean KL a token of a row."""
    furthest = 0.0
    for one, other in zip(ones, others, strict=True):
        p, q = (loss.log_probabilities(head.logits(hidden), temperature) for hidden in (one, other))
        furthest = max(furthest, loss.forward_kl(q, p).mean().item())
    return furthest
