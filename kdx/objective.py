"""Student + divergence + cross-entropy as one module, a chunk of positions at a time.

    total = alpha · τ² · D(p_T^τ, p_S^τ) + (1 − alpha) · CE(z_S, label)        loss = Σ total / num_tokens

The logits of a whole batch are never built: the heads are applied to a chunk of counted positions, and the gradients
with respect to hidden states and head are formed inside the same chunk, in the forward pass. Memory therefore does
not grow with positions × vocabulary.

N counted positions, n positions of a chunk, V vocabulary, d / D width of student / teacher.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdx import loss
from kdx.causal_lm import Head, counted_hidden, head_of
from kdx.checked import check_options
from kdx.config import LossConfig
from kdx.data.batches import IGNORED, MicroBatch
from kdx.errors import ConfigError, did_you_mean
from kdx.teacher import Answer

CHUNK_BYTES = 2**27  # of a chunk's product h·Wᵀ: larger chunks mean fewer passes over the head's gradient
GPU_CHUNK_BYTES = 2**30  # on a GPU, or a 64th of its memory: its products are faster over thousands of rows
CACHE_BYTES = 2**19  # of one float32 tensor of a block on a CPU, per thread: what stays in its cache
BLOCK_BYTES = 2**26  # of one elsewhere: large enough to fill a GPU, small beside the chunk
# Sums over positions of the gradients of alpha·τ²·KD and (1 − alpha)·CE by the student's last hidden states.
PULLS = ("grad_kd_squared", "grad_ce_squared", "grad_kd_times_grad_ce")
HEAD_ROWS = 2**14  # rows of the head's gradient summed at once in float32, without a second matrix of the head's size
COMPILED_ON = {"cuda"}  # kinds of device where a chunk's stage is compiled; emptied if that fails

Terms = dict[str, Tensor]  # something of each term of the loss, by name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mix:
    """The numbers of the formula above: which divergence, its weight and its temperature."""

    name: str = "forward_kl"
    alpha: float = 0.5
    temperature: float = 1.0
    scale_by_temperature: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    alpha_end: float | None = None  # alpha and temperature move to these in equal steps; None: they stay
    temperature_end: float | None = None

    def at(self, step: int, max_steps: int) -> "Mix":
        """Return the mix of one step, counted from 0: the first is as given, the last as the ends say."""
        share = step / max(1, max_steps - 1)
        ends = {"alpha": self.alpha_end, "temperature": self.temperature_end}
        moved = {k: getattr(self, k) + (end - getattr(self, k)) * share for k, end in ends.items() if end is not None}
        return replace(self, **moved) if moved else self

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term in the loss; `kd` includes `factor` already."""
        return {"kd": self.alpha, "ce": 1 - self.alpha}

    @property
    def factor(self) -> float:
        """τ², or 1 without `loss.scale_by_temperature`."""
        return self.temperature**2 if self.scale_by_temperature else 1.0

    def loss(self, terms: dict[str, Any]) -> Any:
        """Combine the terms as the loss does."""
        return sum(weight * terms[name] for name, weight in self.weights.items())

    def formula(self) -> str:
        """Write the loss down with this run's numbers."""
        if self.alpha == 0:
            return "loss = CE(student, labels)"
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        if self.alpha_end is not None or self.temperature_end is not None:  # numbers that change have names
            alpha, tau = (
                f"{start:g}" if end is None else f"{start:g}→{end:g}"
                for start, end in ((self.alpha, self.alpha_end), (self.temperature, self.temperature_end))
            )
            scale = "·τ²" if self.scale_by_temperature else ""
            kd = f"α{scale}·{self.name}(teacher, student{options}; τ)"
            return f"loss = {kd} + (1−α)·CE(student, labels), α={alpha}, τ={tau}"
        at = f"{self.name}(teacher, student{options}; τ={self.temperature:g})"
        kd = "".join(f"{factor:g}·" for factor in (self.alpha, self.factor) if factor != 1) + at
        ce = f" + {1 - self.alpha:g}·CE(student, labels)" if self.alpha < 1 else ""
        return f"loss = {kd}{ce}"


def mix_of(config: LossConfig) -> Mix:
    return Mix(**{part.name: getattr(config, part.name) for part in fields(Mix)})


def check_loss(config: LossConfig) -> None:
    """Refuse a divergence or options that the registry does not know. Raises ConfigError."""
    name = config.name
    if name not in (choices := [*loss.names(), "cross_entropy"]):
        hint = f"{did_you_mean(name, choices)}. Your own: KDX_PLUGINS=module"
        raise ConfigError("loss.name", f"no divergence is named {name!r}", hint)
    function = loss.get("forward_kl" if name == "cross_entropy" else name)  # neither of these two has options
    check_options(function, config.options, "loss.", num_given=2, given=("labels",))
    if name != "cross_entropy":
        try:
            loss.check_options(name, config.options)  # ranges, and what the function returns
        except ValueError as error:
            raise ConfigError("loss", str(error), f"See the function {function.__module__}.{name}") from None


class Objective(nn.Module):
    """The student and its loss as one module: what accelerate wraps, so that the hooks of DDP and FSDP fire.

    model: the student. num_ids: the tokenizer's real ids; rows of the head past them are padding and are left out.
    """

    def __init__(self, model: nn.Module, num_ids: int, mix: Mix) -> None:
        super().__init__()
        self.model, self.num_ids, self.mix = model, num_ids, mix
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # where accelerate's FSDP wraps

    def forward(
        self,
        batch: MicroBatch,
        answer: Answer | None,
        factor: float = 1.0,
        mix: Mix | None = None,
        *,
        with_pulls: bool = False,
    ) -> tuple[Tensor, Terms]:
        """Sum the loss over the batch's counted positions → factor · total, and each term's sum without the factor.

        answer: the teacher's hidden states at the same positions; None trains on the labels alone (alpha 0). mix: that
        of this step, if it is not the run's. with_pulls: also sum PULLS.
        """
        hidden = counted_hidden(self.model, batch)
        head = head_of(self.model).cut(self.num_ids)
        how: dict[str, Any] = {"weights": batch.weights, "with_pulls": with_pulls}
        total, sums = summed_loss(hidden, head, answer, batch.counted_labels, mix or self.mix, **how)
        return factor * total, sums


def distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor,
    *,
    name: str = "forward_kl",
    alpha: float,
    temperature: float,
    scale_by_temperature: bool = True,
    num_tokens: int | None = None,
    chunk_size: int = 256,
    **options: Any,
) -> Tensor:
    """Distil at N positions: hidden states [N, d] of the student, [N, D] of the teacher, labels [N] → scalar.

    Labels are the tokens to be predicted at each position (shifted already); −100 is not counted. The sum over
    counted positions is divided by `num_tokens`, by default their number. Differentiable in the student's hidden
    states, head weight and bias, once: its gradients are formed here and scaled in place. With alpha 0 the teacher may be None. Raises ValueError for unknown names and
    options, or a missing teacher.
    """
    if name != "cross_entropy":
        loss.check_options(name, options)
    if not 0 <= alpha <= 1 or not temperature > 0:
        raise ValueError(f"alpha is {alpha} (between 0 and 1), temperature {temperature} (above 0)")
    answer = None
    if alpha > 0 and teacher_hidden is not None and teacher_head is not None:
        answer = Answer(teacher_hidden, teacher_head)
    if alpha > 0 and (answer is None or name == "cross_entropy"):
        raise ValueError(f"alpha is {alpha}: it needs the teacher's hidden states, its head and a divergence")
    counted = (labels != IGNORED).nonzero().squeeze(-1)
    if len(counted) < len(labels):
        student_hidden, labels = student_hidden[counted], labels[counted]
        if answer is not None:
            answer = replace(answer, hidden=answer.hidden[counted.to(answer.hidden.device)])
    mix = Mix(name, alpha, temperature, scale_by_temperature, options)
    total, _ = summed_loss(student_hidden, student_head, answer, labels, mix, chunk_size)
    return total * (1 / max(len(counted) if num_tokens is None else num_tokens, 1))


def summed_loss(
    hidden: Tensor,
    head: Head,
    answer: Answer | None,
    labels: Tensor,
    mix: Mix,
    chunk_size: int | None = None,
    weights: Terms | None = None,
    *,
    with_pulls: bool = False,
) -> tuple[Tensor, Terms]:
    """Sum the loss over positions that all count → total, and without gradient each term (kd includes τ²).

    weights: by term, a factor [N] for each position: the student's own words, say, have no cross-entropy. Those of
    `own` say how much of kd is summed once more, to be logged.
    with_pulls: also return PULLS.
    """
    weights, chunk_size = weights or {}, chunk_size or chunk_size_of(head)
    if answer:  # one tokenizer, heads padded differently: keep the ids that both have
        num_ids = min(head.num_ids, answer.head.num_ids)
        head, answer = head.cut(num_ids), Answer(answer.hidden, answer.head.cut(num_ids))
    inputs, device = (hidden, head.weight, head.bias), hidden.device
    grad_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's MPS has no float64
    names = ["kd", "ce", *["own"] * ("own" in weights), *PULLS * with_pulls]
    sums = {name: torch.zeros((), dtype=sum_dtype, device=device) for name in names}
    grad_hidden, grad_weight, grad_bias = grads = [
        torch.zeros_like(x, dtype=hidden.dtype if x is hidden else grad_dtype)
        if x is not None and x.requires_grad and torch.is_grad_enabled()
        else None
        for x in inputs
    ]

    with torch.no_grad():
        head = head.in_compute_dtype()
        heads = (head, answer.head if answer else None)
        for rows in chunks_of(len(labels), chunk_size):
            product = head.product(hidden[rows])
            theirs = answer.head.product(answer.hidden[rows]).to(product.device) if answer else None
            part = {name: weight[rows] for name, weight in weights.items()}
            by_ce = None  # [n, V], the gradient of the cross-entropy alone
            if with_pulls and mix.alpha < 1:
                by_ce = product.clone()
                replace_by_gradient(by_ce, None, labels[rows], (head, None), mix, part)
            kd, ce = replace_by_gradient(product, theirs, labels[rows], heads, mix, part)
            sums["kd"] += mix.factor * kd.sum(dtype=sum_dtype)
            sums["ce"] += ce.sum(dtype=sum_dtype)
            if "own" in weights:
                sums["own"] += mix.factor * (kd * part["own"]).sum(dtype=sum_dtype)
            if grad_bias is not None:
                grad_bias += product.sum(0, dtype=grad_dtype)
            del theirs  # the peak of a step's memory is about here
            by_hidden = product @ head.weight
            if with_pulls:
                of_ce = (torch.zeros_like(by_hidden) if by_ce is None else by_ce @ head.weight).to(sum_dtype)
                of_kd = by_hidden.to(sum_dtype) - of_ce
                pulls = (of_kd.square().sum(), of_ce.square().sum(), (of_kd * of_ce).sum())
                for name, pull in zip(PULLS, pulls, strict=True):
                    sums[name] += pull
                del by_ce, of_kd, of_ce
            if grad_hidden is not None:
                grad_hidden[rows] = by_hidden
            if grad_weight is not None:
                _add_product(grad_weight, product, hidden[rows].to(product.dtype))
        total = mix.loss(sums).to(grad_dtype)
    return _WithGradients.apply(total, grads, *inputs), sums


def _add_product(grad_weight: Tensor, product: Tensor, inputs: Tensor) -> None:
    """Add productᵀ · inputs to the head's gradient, in its dtype."""
    if product.dtype != grad_weight.dtype and product.device.type == "cuda":  # its products can add in float32
        torch.addmm(grad_weight, product.T, inputs, out_dtype=grad_weight.dtype, out=grad_weight)
        return
    for ids in chunks_of(len(grad_weight), HEAD_ROWS):
        if product.dtype == grad_weight.dtype:
            grad_weight[ids].addmm_(product[:, ids].T, inputs)
        else:
            grad_weight[ids].add_(product[:, ids].T @ inputs)


class _WithGradients(torch.autograd.Function):
    """A total whose gradients by its inputs are known. They are used up by the backward pass: it runs once."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, grads: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.save_for_backward(*grads)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> Any:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        # In place: a gradient of the head is as large as the head. Only then is it rounded to bf16.
        return None, None, *(None if grad is None else grad.mul_(grad_total).to(dtype) for grad, dtype in pairs)


def pulls_of(sums: dict[str, float], num_tokens: int) -> dict[str, float | None]:
    """Say how hard each term pulls: norms and cosine of their gradients by the student's last hidden states [N, d].

    sums: PULLS of a whole step of num_tokens counted positions. The norms are those of the loss that is minimised:
    alpha and τ² are in them. effective_alpha is the share of the distillation term's norm in the sum of both.
    """
    kd, ce = (math.sqrt(max(sums[name], 0.0)) / max(num_tokens, 1) for name in PULLS[:2])
    dot = sums[PULLS[2]] / max(num_tokens, 1) ** 2
    return {
        "grad_kd": kd,
        "grad_ce": ce,
        "grad_cosine": dot / (kd * ce) if kd * ce > 0 else None,
        "effective_alpha": kd / (kd + ce) if kd + ce > 0 else None,
    }


def chunk_size_of(head: Head) -> int:
    """Choose how many positions a chunk has by the size of their logits."""
    device, size = head.weight.device, CHUNK_BYTES
    if device.type == "cuda":
        size = min(GPU_CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // 64)
    return max(1, size // (head.compute_dtype.itemsize * head.num_ids))


def chunks_of(num_rows: int, size: int) -> Iterator[slice]:
    """Split rows into the fewest parts of at most `size`, of nearly equal length."""
    num_chunks = -(-num_rows // size)
    for i in range(num_chunks):
        yield slice(i * num_rows // num_chunks, (i + 1) * num_rows // num_chunks)


def blocks_of(product: Tensor) -> Iterator[slice]:
    """Split the rows of a chunk [n, V] for the softmaxes, which need several float32 copies of what they work on."""
    is_cpu = product.device.type == "cpu"
    size = max(1, (CACHE_BYTES if is_cpu else BLOCK_BYTES) // (4 * product.shape[1]))
    size *= torch.get_num_threads() if is_cpu else 1
    for start in range(0, len(product), size):
        yield slice(start, start + size)


def replace_by_gradient(
    product: Tensor,
    theirs: Tensor | None,
    labels: Tensor,
    heads: tuple[Head, Head | None],
    mix: Mix,
    weights: Terms,
) -> tuple[Tensor, Tensor]:
    """Replace a chunk's product h·Wᵀ [n, V] by the gradient of the loss by it → kd (without τ²) and ce [n].

    theirs: the teacher's product; None leaves the distillation term out. heads: of student and teacher. weights: by
    term, [n]. In blocks of rows, or on a GPU as one compiled function: step by step the softmaxes pass over float32
    copies of a chunk some thirty times; compiled, they read the products two or three times and write the gradient once.
    """
    dtype = torch.float64 if product.dtype == torch.float64 else torch.float32
    ones = torch.ones(len(labels), dtype=dtype, device=product.device)
    kd_weights, ce_weights = weights.get("kd", ones), weights.get("ce", ones)
    of_kd, of_ce = kd_weights * (mix.alpha * mix.factor / mix.temperature), ce_weights * (1 - mix.alpha)
    tensors = (product, theirs, labels, of_kd, of_ce)
    inverse_temperature = None
    if mix.temperature != 1:  # a tensor, like the weights: other points of a sweep do not compile anew
        inverse_temperature = torch.full((), 1 / mix.temperature, dtype=dtype, device=product.device)
    how: tuple[Any, ...] = (*heads, inverse_temperature, mix.name, mix.options)
    if product.device.type in COMPILED_ON and (theirs is None or mix.name in loss.CLOSED_FORMS):
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            with torch._dynamo.config.patch(recompile_limit=64):  # of a process: a sweep may try every divergence
                kd, ce = compiled()(*tensors, *how)
            return kd * kd_weights, ce * ce_weights
        except torch._dynamo.exc.TorchDynamoException as error:
            COMPILED_ON.clear()
            why = str(error).strip().split("\n")[0]
            log.warning("the loss cannot be compiled here, and is slower without: %s", why)
    # The softmaxes pass over [n, V] many times: a few rows at once stay in the processor's cache.
    parts = []
    for block in blocks_of(product):
        rows: list[Any] = [None if x is None else x[block] for x in tensors]
        parts.append(gradient_in_place(*rows, *how))
    kd, ce = map(torch.cat, zip(*parts, strict=True))
    return kd * kd_weights, ce * ce_weights


@functools.cache
def compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """Compile `gradient_in_place`, some seconds when it is first called; sizes are fixed, but for the positions."""
    return torch.compile(gradient_in_place, dynamic=False)


def gradient_in_place(
    product: Tensor,
    theirs: Tensor | None,
    labels: Tensor,
    kd_weights: Tensor,
    ce_weights: Tensor,
    head: Head,
    teacher_head: Head | None,
    inverse_temperature: Tensor | None,
    name: str,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Write the gradient of Σ kd_weights·kd + ce_weights·ce over the product → kd and ce of each position.

    inverse_temperature: None at τ = 1, where both terms share one softmax of the student.
    """
    logits, at = head.finish(product), labels.unsqueeze(-1)
    s1 = loss.log_probabilities(logits)
    ce = -s1.gather(-1, at).squeeze(-1)
    kd, grad = torch.zeros_like(ce), None
    if teacher_head is not None and theirs is not None:
        s, their_logits = s1, teacher_head.finish(theirs)
        if inverse_temperature is not None:
            s, their_logits = loss.log_probabilities(logits * inverse_temperature), their_logits * inverse_temperature
        t = loss.log_probabilities(their_logits)
        kd, grad = loss.value_and_gradient(name, s, t, options, labels)
        grad = grad.mul_(kd_weights.unsqueeze(-1))
    by_label = s1.exp_()
    if torch.compiler.is_compiling():  # a mask is fused with what is around it
        by_label.sub_((torch.arange(product.shape[1], device=labels.device) == at).to(s1.dtype))
    else:
        by_label.scatter_add_(-1, at, by_label.new_full((), -1.0).expand_as(at))
    by_label.mul_(ce_weights.unsqueeze(-1))
    product.copy_(head.through(logits, by_label if grad is None else grad.add_(by_label)))
    return kd, ce
