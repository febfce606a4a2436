"""The softmaxes of a chunk and the gradient by its logits as one compiled function, on GPUs.

Step by step they pass over float32 copies of the chunk some thirty times; compiled, they read the products of the
heads two or three times and write the gradient once. What is not compiled is computed in blocks, in objective.py.
"""

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdx import loss
from kdx.causal_lm import Head

if TYPE_CHECKING:
    from kdx.objective import Mix

log = logging.getLogger(__name__)

DEVICES = {"cuda"}  # where it is compiled; emptied if that fails


class Chunk(NamedTuple):
    """What the loss reads at n positions; a student that is not taught there has no `theirs` and no `teacher_head`."""

    product: Tensor  # [n, V], h·Wᵀ of the student
    head: Head
    theirs: Tensor | None  # [n, V], of the teacher
    teacher_head: Head | None
    labels: Tensor  # [n]
    weights: dict[str, Tensor]  # by term, [n]


@functools.cache
def compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """Compile `gradient_in_place`, some seconds when it is first called; sizes are fixed, but for the positions."""
    return torch.compile(gradient_in_place, dynamic=False)


def terms(chunk: Chunk, mix: "Mix") -> tuple[Tensor, Tensor] | None:
    """Replace a chunk's product by its gradient on a GPU → kd (without τ²) and ce of each position.

    None, with nothing changed: on other devices, for a divergence without a closed form, if it cannot be compiled.
    """
    product, head, theirs, teacher_head, labels, weights = chunk
    if product.device.type not in DEVICES or (teacher_head is not None and mix.name not in loss.CLOSED_FORMS):
        return None
    dtype = torch.float64 if product.dtype == torch.float64 else torch.float32
    ones = torch.ones(len(labels), dtype=dtype, device=product.device)
    kd_weights, ce_weights = weights.get("kd", ones), weights.get("ce", ones)
    # Numbers come as tensors and positions as a dynamic size: nothing is compiled anew for a batch or a point of a sweep.
    inverse_temperature = torch.full((), 1 / mix.temperature, dtype=dtype, device=product.device)
    of_kd, of_ce = kd_weights * (mix.alpha * mix.factor / mix.temperature), ce_weights * (1 - mix.alpha)
    for tensor in (product, theirs, labels, of_kd, of_ce):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    parts = (product, theirs, labels, head, teacher_head, inverse_temperature, of_kd, of_ce)
    try:
        with torch._dynamo.config.patch(recompile_limit=64):  # of a process: a sweep may try every divergence
            kd, ce = compiled()(*parts, mix.name, mix.options)
    except torch._dynamo.exc.TorchDynamoException as error:
        DEVICES.clear()
        log.warning("the loss cannot be compiled here, and is slower without: %s", str(error).strip().split("\n")[0])
        return None
    return kd * kd_weights, ce * ce_weights


def gradient_in_place(
    product: Tensor,
    theirs: Tensor | None,
    labels: Tensor,
    head: Head,
    teacher_head: Head | None,
    inverse_temperature: Tensor,
    kd_weights: Tensor,
    ce_weights: Tensor,
    name: str,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Write the gradient of Σ kd_weights·kd + ce_weights·ce over the product → kd and ce of each position."""
    logits = head.finish(product)
    s1 = loss.log_probabilities(logits)
    ce = -s1.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    is_label = torch.arange(product.shape[1], device=labels.device) == labels.unsqueeze(-1)
    grad = (s1.exp() - is_label.to(s1.dtype)) * ce_weights.unsqueeze(-1)
    kd = torch.zeros_like(ce)
    if teacher_head is not None and theirs is not None:
        s = loss.log_probabilities(logits * inverse_temperature)
        t = loss.log_probabilities(teacher_head.finish(theirs) * inverse_temperature)
        kd, by_kd = loss.value_and_gradient(name, s, t, options)
        grad = grad + by_kd * kd_weights.unsqueeze(-1)
    product.copy_(head.through(logits, grad))
    return kd, ce
