"""Slow, plain versions of what kdx computes: probabilities instead of logarithms, a Python loop over positions.

N positions, V vocabulary, d width. The tests of the losses hold kdx to these in float64, gradients by autograd.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdx.data.batches import Row


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p·log(p/q) of two rows of probabilities; a token that p excludes adds nothing."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def adaptive_kl(t: Tensor, s: Tensor, head_mass: float = 0.5) -> Tensor:
    running, tail = 0.0, set()
    for i in sorted(range(len(t)), key=lambda i: t[i].item()):
        running += t[i].item()
        if running > 1 - head_mass:
            break
        tail.add(i)
    gaps = (t - s).abs()
    g_tail = sum((gaps[i] for i in tail), torch.zeros_like(gaps[0]))
    g_head = sum((gaps[i] for i in range(len(t)) if i not in tail), torch.zeros_like(gaps[0]))
    if g_head + g_tail == 0:
        return g_head * 0
    return (g_head * kl(t, s) + g_tail * kl(s, t)) / (g_head + g_tail)


def jsd(t: Tensor, s: Tensor, beta: float = 0.5) -> Tensor:
    if beta in (0, 1):
        return kl(t, s) if beta == 0 else kl(s, t)
    m = (1 - beta) * s + beta * t
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


# (t, s: probabilities [V] of teacher and student, options) → scalar
DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda t, s: kl(s, t),
    "jsd": jsd,
    "skew_forward_kl": lambda t, s, skew=0.1: kl(t, skew * t + (1 - skew) * s),
    "skew_reverse_kl": lambda t, s, skew=0.1: kl(s, skew * s + (1 - skew) * t),
    "tvd": lambda t, s: (t - s).abs().sum() / 2,
    "adaptive_kl": adaptive_kl,
}


def divergence(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0, **options: Any) -> Tensor:
    """Logits [N, V] → τ²·D at each position [N]."""
    rows = []
    for z_s, z_t in zip(student, teacher, strict=True):
        t, s = (z_t / temperature).softmax(0), (z_s / temperature).softmax(0)
        rows.append(temperature**2 * DEFINITIONS[name](t, s, **options))
    return torch.stack(rows)


def loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    name: str,
    alpha: float,
    temperature: float,
    weights: dict[str, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """The loss of the counted positions, divided by their number: one position after the other.

    weights: by term (kd, ce), a factor [N] for each position.
    """
    ones = torch.ones(len(labels))
    kd_weights, ce_weights = ((weights or {}).get(term, ones).tolist() for term in ("kd", "ce"))
    total, counted = logits.sum() * 0, 0
    for i, (z_s, z_t, label) in enumerate(zip(logits, teacher_logits, labels.tolist(), strict=True)):
        if label == -100:
            continue
        kd = divergence(name, z_s[None], z_t[None], temperature, **options)[0] if alpha > 0 else 0.0
        ce = -z_s.log_softmax(0)[label]
        total = total + alpha * kd_weights[i] * kd + (1 - alpha) * ce_weights[i] * ce
        counted += 1
    return total / counted


class Rows(list[Row]):
    """Rows in memory, with the columns that kdx.data.batches.Rows has in its files."""

    drawn: dict[str, int] = {}  # noqa: RUF012

    def epoch(self, seed: int, epoch: int) -> range:
        return range(len(self))

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row.tokens) for row in self], np.int64)

    @property
    def num_counted(self) -> np.ndarray:
        return np.array([row.num_counted for row in self], np.int64)
