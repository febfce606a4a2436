"""Student + divergence + cross-entropy as one module, a chunk of positions at a time.

    total = alpha · τ² · D(p_T^τ, p_S^τ) + (1 − alpha) · CE(z_S, label)        loss = Σ total / num_tokens

The logits of a whole batch are never built: the heads are applied to a chunk of counted positions, and the gradients
with respect to hidden states and head are formed inside the same chunk, in the forward pass. Memory therefore does
not grow with positions × vocabulary.

N counted positions, n positions of a chunk, V vocabulary, d / D width of student / teacher.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdx import loss
from kdx.causal_lm import Head, counted_hidden, head_of
from kdx.data.batches import IGNORED, MicroBatch

CHUNK_BYTES = 2**27  # of a chunk's product h·Wᵀ: the more rows, the fewer passes over the gradient of the head
CACHE_BYTES = 2**19  # of one float32 tensor of a block on a CPU, for each thread
HEAD_ROWS = 2**14  # of the head's gradient at once: summed in float32 without a second matrix of the head's size
BLOCK_BYTES = 2**26  # of one elsewhere: large enough to fill a GPU, small beside the chunk's several such tensors


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: the numbers of the formula above."""

    name: str = "forward_kl"
    alpha: float = 0.5
    temperature: float = 1.0
    scale_by_temperature: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def formula(self) -> str:
        """The loss as one would write it down, with this run's numbers."""
        if self.alpha == 0:
            return "loss = CE(student, labels)"
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        at = f"{self.name}(teacher, student{options}; τ={self.temperature:g})"
        factors = [self.alpha, self.temperature**2 if self.scale_by_temperature else 1.0]
        kd = "".join(f"{factor:g}·" for factor in factors if factor != 1) + at
        ce = f" + {1 - self.alpha:g}·CE(student, labels)" if self.alpha < 1 else ""
        return f"loss = {kd}{ce}"


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
    states, head weight and bias. With alpha 0 the teacher may be None. Raises ValueError for unknown names and
    options, or a missing teacher.
    """
    if name != "cross_entropy":
        loss.check_options(name, options)
    if not 0 <= alpha <= 1 or not temperature > 0:
        raise ValueError(f"alpha is {alpha} (between 0 and 1), temperature {temperature} (above 0)")
    if alpha > 0 and (teacher_hidden is None or teacher_head is None or name == "cross_entropy"):
        raise ValueError(f"alpha is {alpha}: it needs the teacher's hidden states, its head and a divergence")
    counted = (labels != IGNORED).nonzero().squeeze(-1)
    if num_tokens is None:
        num_tokens = len(counted)
    if len(counted) < len(labels):
        student_hidden, labels = student_hidden[counted], labels[counted]
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden[counted.to(teacher_hidden.device)]
    objective = Objective(
        name=name, alpha=alpha, temperature=temperature, scale_by_temperature=scale_by_temperature, options=options
    )
    factor = 1 / max(num_tokens, 1)
    total, _, _ = summed_loss(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, objective, chunk_size, factor
    )
    return total


def summed_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor,
    objective: Objective,
    chunk_size: int = 256,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the loss over positions that all count → factor · total, and without gradient its terms kd (with τ²) and ce."""
    if teacher_head is not None:  # one tokenizer, heads padded differently: the ids they share
        num_ids = min(student_head.num_ids, teacher_head.num_ids)
        student_head, teacher_head = student_head.cut(num_ids), teacher_head.cut(num_ids)
    # In float16 a gradient times 1/num_tokens would underflow: the scaler's own factor has to come first.
    outside, inside = (factor, 1.0) if student_hidden.dtype == torch.float16 else (1.0, factor)
    total, kd, ce = _ChunkedSum.apply(
        student_hidden,
        student_head.weight,
        student_head.bias,
        student_head,
        teacher_hidden,
        teacher_head,
        labels,
        objective,
        chunk_size,
        inside,
    )
    return total * outside, kd, ce


class _ChunkedSum(torch.autograd.Function):
    """factor · Σ total over positions, with gradients formed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher_hidden: Tensor | None,
        teacher_head: Head | None,
        labels: Tensor,
        objective: Objective,
        chunk_size: int,
        factor: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = head.detached(weight, bias).in_compute_dtype()
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad_dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad_dtype) if wants_bias and bias is not None else None
        kd_sum, ce_sum = (torch.zeros((), dtype=_sum_dtype(hidden), device=hidden.device) for _ in range(2))

        for rows in chunks_of(len(labels), chunk_size):
            product = head.product(hidden[rows])
            teacher_product = None
            if objective.alpha > 0 and teacher_head is not None and teacher_hidden is not None:
                teacher_product = teacher_head.product(teacher_hidden[rows]).to(product.device)
            # The softmaxes pass over [n, V] many times: a few rows at once, so that they stay in the processor's cache.
            for block in blocks_of(product):
                logits = head.finish(product[block])
                teacher_logits = None
                if teacher_head is not None and teacher_product is not None:
                    teacher_logits = teacher_head.finish(teacher_product[block])
                kd, ce, grad = _loss_and_gradient(logits, teacher_logits, labels[rows][block], objective)
                kd_sum += kd
                ce_sum += ce
                grad = head.through(logits, grad)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                product[block] = grad  # what was the product is the gradient by it from here on
            del teacher_product  # the peak of a step is about here: activations wait, gradients come
            if grad_hidden is not None:
                grad_hidden[rows] = (product @ head.weight).to(hidden.dtype).mul_(factor)
            if grad_weight is not None:
                inputs = hidden[rows].to(product.dtype)
                for ids in chunks_of(head.num_ids, HEAD_ROWS):
                    if product.dtype == grad_dtype:
                        grad_weight[ids].addmm_(product[:, ids].T, inputs)
                    else:
                        grad_weight[ids].add_(product[:, ids].T @ inputs)

        for of_head in (grad_weight, grad_bias):
            if of_head is not None:
                of_head.mul_(factor)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        total = factor * (objective.alpha * kd_sum + (1 - objective.alpha) * ce_sum)
        return total.to(grad_dtype), kd_sum, ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> Any:
        grads = ctx.saved_tensors
        # As a rule the factor is 1, and a gradient of the head is as large as the head: no copy of it. To look is free
        # on a CPU; a GPU would be waited for.
        if grad_total.device.type != "cpu" or grad_total.item() != 1:
            grads = [None if grad is None else grad * grad_total for grad in grads]  # it is not rounded to bf16
        by_inputs = (None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        return *by_inputs, *[None] * 7


def chunk_size_of(head: Head) -> int:
    """How many positions a chunk has, by what their logits weigh."""
    return max(1, CHUNK_BYTES // (head.compute_dtype.itemsize * head.num_ids))


def chunks_of(num_rows: int, size: int) -> Iterator[slice]:
    """Cut rows into as few parts of at most `size` as can be, all of nearly one length."""
    num_chunks = -(-num_rows // size)
    for i in range(num_chunks):
        yield slice(i * num_rows // num_chunks, (i + 1) * num_rows // num_chunks)


def blocks_of(product: Tensor) -> Iterator[slice]:
    """Cut the rows of a chunk [n, V], of which the softmaxes need several float32 copies: on a CPU into what its
    caches hold, as many for each thread, elsewhere into what is small beside the chunk."""
    num_rows, row_bytes = product.shape[0], 4 * product.shape[1]
    if product.device.type == "cpu":
        size = max(1, CACHE_BYTES // row_bytes) * torch.get_num_threads()
    else:
        size = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over positions: float64, but where the device has none (Apple's MPS)."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _loss_and_gradient(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum one chunk: kd (τ² included), ce, and the gradient [n, V] of alpha·kd + (1−alpha)·ce by the logits."""
    alpha, temperature = objective.alpha, objective.temperature
    s1 = loss.log_probabilities(logits)
    rows = torch.arange(len(labels), device=labels.device)
    ce = -s1[rows, labels].sum(dtype=_sum_dtype(logits))
    if teacher_logits is None:
        kd, grad = ce.new_zeros(()), None
    else:
        t = loss.log_probabilities(teacher_logits, temperature)
        s = s1 if temperature == 1 else loss.log_probabilities(logits, temperature)
        value, grad = loss.value_and_gradient(objective.name, s, t, objective.options)
        factor = temperature**2 if objective.scale_by_temperature else 1.0
        kd = factor * value.sum(dtype=_sum_dtype(logits))
        grad.mul_(alpha * factor / temperature)  # the logits are divided by τ on the way in
    if alpha < 1:
        probabilities = s1.exp_()
        probabilities[rows, labels] -= 1
        grad = probabilities if grad is None else grad
        grad = grad.mul_(1 - alpha) if grad is probabilities else grad.add_(probabilities, alpha=1 - alpha)
    assert grad is not None
    return kd, ce, grad


class StudentObjective(nn.Module):
    """The student and its loss as one module: what accelerate wraps, so that DDP's and FSDP's hooks fire."""

    def __init__(self, model: nn.Module, num_ids: int, objective: Objective, chunk_size: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.num_ids = num_ids
        self.objective = objective
        self.chunk_size = chunk_size
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # by which accelerate makes shards

    def forward(
        self, batch: MicroBatch, teacher_hidden: Tensor | None, teacher_head: Head | None, factor: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the loss over the batch's counted positions → factor · total, and kd and ce without the factor."""
        hidden = counted_hidden(self.model, batch)
        head = head_of(self.model).cut(self.num_ids)
        labels = batch.counted_labels
        chunk_size = self.chunk_size or chunk_size_of(head)
        return summed_loss(hidden, head, teacher_hidden, teacher_head, labels, self.objective, chunk_size, factor)
