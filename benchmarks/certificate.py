"""How exact a teacher's store is: stored rows against a live pass, beside two live passes against each other.

    python benchmarks/certificate.py KEY=VALUE ...        the words of a run whose store is filled (kdx store fill ...)

In bf16 the hidden states of a row differ a little with the rows that are batched with it. A stored row comes from one
such batch, so it should differ from a live pass as much as two live passes differ, and no more.
"""

import sys
from collections.abc import Sequence

from torch import Tensor

from kdx import loss
from kdx.causal_lm import Head
from kdx.cli import compose
from kdx.data.batches import Row, collate
from kdx.data.encode import load_data
from kdx.run.launch import build_accelerator
from kdx.teacher import Teacher, load_teacher
from kdx.tokenizer import load_tokenizer

NUM_ROWS = 8
TEMPERATURES = (1.0, 2.0, 4.0)


def certify(teacher: Teacher, rows: Sequence[Row], pad_id: int) -> dict[str, dict[float, float]]:
    """Return by temperature the largest mean KL a token of any row, stored to live and live to live.

    The two live passes take the rows one by one and all at once.
    """
    sample = [row for row in rows if row.num_counted]
    sample = sample[:: max(1, len(sample) // NUM_ROWS)][:NUM_ROWS]
    stored = teacher.store.read([row.digest for row in sample]) if teacher.store else None
    if stored is None:
        sys.exit("not all rows are stored: run kdx store fill with the same words first")
    alone, joined = (live(teacher, sample, size, pad_id) for size in (1, len(sample)))
    return {
        "stored to live": {t: furthest(teacher.head, stored, alone, t) for t in TEMPERATURES},
        "live to live": {t: furthest(teacher.head, joined, alone, t) for t in TEMPERATURES},
    }


def live(teacher: Teacher, rows: Sequence[Row], size: int, pad_id: int) -> list[Tensor]:
    """Return the rows' hidden states from live passes over `size` rows each."""
    hidden: list[Tensor] = []
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size], pad_id)
        hidden += teacher.live(batch).cpu().split(batch.num_counted)
    return hidden


def furthest(head: Head, ones: Sequence[Tensor], others: Sequence[Tensor], temperature: float) -> float:
    """Return the largest mean KL a token of any row."""
    means = []
    for one, other in zip(ones, others, strict=True):
        p, q = (loss.log_probabilities(head.logits(hidden), temperature) for hidden in (one, other))
        means.append(loss.forward_kl(q, p).mean().item())
    return max(means)


if __name__ == "__main__":
    config = compose([*sys.argv[1:], "teacher.store=on"])
    machine = build_accelerator(config)
    shared = load_tokenizer(config)
    data = load_data(config.data, shared)
    rows = dict(zip(data.held_out.digests, data.held_out.num_counted.tolist(), strict=True))
    teacher = load_teacher(config.teacher, machine.device, shared.max_length, rows, is_repeated=True)
    assert teacher is not None
    for name, by_temperature in certify(teacher, [*data.held_out], shared.pad_id).items():
        print(f"{name:15}", *(f"τ={t:g}: KL {value:.2g}" for t, value in by_temperature.items()), sep="   ")
