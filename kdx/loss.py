"""Every divergence between student and teacher, and the registry they are chosen from by name.

A divergence is a pure function of log-probabilities at the run's temperature,

    student, teacher: [n, V] float32 or float64  →  [n], one number per position,

and is 0 where both agree. One that names a parameter `labels` is also given the tokens to be predicted [n].
Temperature, its square, masking, chunking and the cross-entropy term are put around it in objective.py, once. This
file needs torch alone. Errors are ValueErrors.

n positions, V vocabulary; s, t are log-probabilities of student and teacher.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Divergence = Callable[..., Tensor]
ValueAndGradient = tuple[Tensor, Tensor]  # a divergence [n] and its gradient [n, V]
_REGISTRY: dict[str, Divergence] = {}

# What the log-probability of a token that the teacher excludes (logit −inf) counts as where the student does not:
# the smallest normal float32. A true −inf would make the reverse divergences, and all gradients with them, infinite.
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def register(function: Divergence) -> Divergence:
    """Make a divergence available as `loss.name=<its own name>`; its keyword parameters become options.

    Raises ValueError if another function has that name.
    """
    name = function.__name__
    known = _REGISTRY.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
        raise ValueError(f"a divergence named {name} is registered already, by {known.__module__}")
    if name == "cross_entropy":
        raise ValueError("cross_entropy names the loss without a teacher; choose another name")
    _REGISTRY[name] = function
    return function


def names() -> list[str]:
    return sorted(_REGISTRY)


def get(name: str) -> Divergence:
    """Return a divergence by name; ValueError names the choices."""
    if name not in _REGISTRY:
        raise ValueError(f"no divergence is named {name!r}; choices: {', '.join(names())}")
    return _REGISTRY[name]


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise ValueError if the named divergence does not take these options or values."""
    function = get(name)
    more = _labels_for(function, torch.zeros(2, dtype=torch.long))
    try:
        inspect.signature(function).bind(None, None, **options, **more)
    except TypeError as error:
        takes = ", ".join(list(inspect.signature(function).parameters)[2:]) or "none"
        raise ValueError(f"{name}: {error}; its options: {takes}") from None
    rows = torch.zeros(2, 3).log_softmax(-1)
    value = function(rows, rows, **options, **more)  # it checks ranges itself
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != [2]:  # a mean would be taken for the sum, and weigh a row by the size of its chunk
        raise ValueError(f"{name} returns shape {shape} for 2 positions; it must be one number each")


def divergence(
    name: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, **options: Any
) -> Tensor:
    """Compare logits [..., V] of student and teacher position by position → [...], τ² included.

    Computed in float32, or float64 where both are. Where one head has more rows than the other (padding of one
    tokenizer), both are cut to the ids they share, before the softmax. Raises ValueError for an unknown name or
    option, a temperature that is not positive, or shapes that differ.
    """
    check_options(name, options)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    shape = student_logits.shape[:-1]
    if shape != teacher_logits.shape[:-1]:
        raise ValueError(f"positions differ: {list(student_logits.shape)} and {list(teacher_logits.shape)}")
    num_ids = min(student_logits.shape[-1], teacher_logits.shape[-1])
    s = log_probabilities(student_logits[..., :num_ids], temperature).reshape(shape.numel(), num_ids)
    t = log_probabilities(teacher_logits[..., :num_ids], temperature).reshape(shape.numel(), num_ids)
    return temperature**2 * get(name)(s, t, **options).reshape(shape)


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax over the last dimension at a temperature, in float32 (float64 stays float64)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _labels_for(function: Divergence, labels: Tensor | None) -> dict[str, Any]:
    return {"labels": labels} if "labels" in inspect.signature(function).parameters else {}


def value_and_gradient(
    name: str, s: Tensor, t: Tensor, options: dict[str, Any], labels: Tensor | None = None
) -> ValueAndGradient:
    """Return a divergence [n] and its gradient [n, V] with respect to the student's logits at the temperature of `s`.

    Takes the closed form where there is one, autograd otherwise. `s` need not require grad.
    """
    if name in CLOSED_FORMS:
        return CLOSED_FORMS[name](s, t, **options)
    with torch.enable_grad():
        leaf = s.detach().requires_grad_()
        value = get(name)(leaf, t, **options, **_labels_for(get(name), labels))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient - s.exp() * gradient.sum(-1, keepdim=True)  # back through the log-softmax


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities, where 0·(−inf − x) is 0."""
    return (p.exp() * _zero_where_excluded(p, p - q)).sum(-1)


def _may_exclude(p: Tensor) -> bool:
    """Whether a log-probability may be −inf. On a CPU a look is one pass and masks are five; a GPU would be waited for."""
    return p.device.type != "cpu" or p.numel() == 0 or bool(p.detach().amin() == -math.inf)


def _zero_where_excluded(p: Tensor, x: Tensor) -> Tensor:
    """x, but 0 where p, log-probabilities, are −inf: the factor e^p is 0 there, and x may be infinite."""
    return x.masked_fill(p == -math.inf, 0.0) if _may_exclude(p) else x


def _excluded_as_tiny(t: Tensor, s: Tensor) -> Tensor:
    """The teacher's log-probabilities for a divergence that divides by them: see LOG_TINY."""
    return t.masked_fill((t == -math.inf) & (s != -math.inf), LOG_TINY) if _may_exclude(t) else t


def _log_mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """log(weight·eᵃ + (1−weight)·eᵇ) with finite gradients; 0 where both are −inf, which _kl leaves out."""
    if _may_exclude(a):
        both = (a == -math.inf) & (b == -math.inf)
        a, b = a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)
    return torch.logaddexp(a + math.log(weight), b + math.log1p(-weight))


def _check_share(name: str, value: float, *, ends: bool) -> None:
    if not (0 <= value <= 1 if ends else 0 < value < 1):
        raise ValueError(f"{name} is {value}; it must be between 0 and 1{'' if ends else ', both excluded'}")


@register
def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student): cover all that the teacher might say (Hinton et al., 2015)."""
    return _kl(teacher, student)


def _forward_kl(s: Tensor, t: Tensor) -> ValueAndGradient:
    p = t.exp()
    value = (p * _zero_where_excluded(t, t - s)).sum(-1)
    return value, s.exp().sub_(p)


@register
def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student ‖ teacher): prefer what the teacher surely says (Gu et al., 2024)."""
    return _kl(student, _excluded_as_tiny(teacher, student))


def _reverse_kl(s: Tensor, t: Tensor) -> ValueAndGradient:
    ratio = _zero_where_excluded(s, s - _excluded_as_tiny(t, s))
    p = s.exp()
    value = (p * ratio).sum(-1)
    return value, ratio.sub_(value.unsqueeze(-1)).mul_(p)


@register
def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence, M = (1−β)S + βT: β·KL(T ‖ M) + (1−β)·KL(S ‖ M) (Agarwal et al., 2024).

    β=0 is forward_kl and β=1 reverse_kl, as special cases: the formula itself is 0 there.
    """
    _check_share("beta", beta, ends=True)
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    mixture = _log_mixture(teacher, student, beta)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _jsd(s: Tensor, t: Tensor, beta: float = 0.5) -> ValueAndGradient:
    if beta in (0, 1):
        return _reverse_kl(s, t) if beta else _forward_kl(s, t)
    mixture = _log_mixture(t, s, beta)
    p = s.exp()
    ratio = _zero_where_excluded(s, s - mixture)
    of_student = (p * ratio).sum(-1)
    value = beta * _kl(t, mixture) + (1 - beta) * of_student
    return value, (1 - beta) * p * (ratio - of_student.unsqueeze(-1))


@register
def skew_forward_kl(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    """KL(T ‖ λT + (1−λ)S): forward KL that stays bounded (Ko et al., 2024)."""
    _check_share("skew", skew, ends=False)
    return _kl(teacher, _log_mixture(teacher, student, skew))


def _skew_forward_kl(s: Tensor, t: Tensor, skew: float = 0.1) -> ValueAndGradient:
    mixture = _log_mixture(t, s, skew)
    moved = (t + s + math.log1p(-skew) - mixture).exp()  # T, times the student's share of the mixture
    return _kl(t, mixture), s.exp() * moved.sum(-1, keepdim=True) - moved


@register
def skew_reverse_kl(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    """KL(S ‖ λS + (1−λ)T): reverse KL that stays bounded (Ko et al., 2024)."""
    _check_share("skew", skew, ends=False)
    return _kl(student, _log_mixture(student, teacher, skew))


def _skew_reverse_kl(s: Tensor, t: Tensor, skew: float = 0.1) -> ValueAndGradient:
    mixture = _log_mixture(s, t, skew)
    p, ratio = s.exp(), _zero_where_excluded(s, s - mixture)
    slope = ratio - (s + math.log(skew) - mixture).exp()  # less the student's share of the mixture
    value = (p * ratio).sum(-1)
    return value, p * (slope - (p * slope).sum(-1, keepdim=True))


@register
def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    """Total variation distance, ½ Σ|p_T − p_S| (Wen et al., 2023)."""
    return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


@register
def adaptive_kl(student: Tensor, teacher: Tensor, head_mass: float = 0.5) -> Tensor:
    """Forward and reverse KL, weighted by where student and teacher differ: head or tail (Wu et al., 2025).

    The tail is the teacher's least likely tokens whose probabilities, summed in ascending order, stay within
    1 − head_mass. The weights carry gradient.
    """
    _check_share("head_mass", head_mass, ends=False)
    p = teacher.exp()
    gap = (p - student.exp()).abs()
    ascending, order = p.detach().sort(dim=-1, stable=True)
    tail = torch.empty_like(p, dtype=torch.bool).scatter_(-1, order, ascending.cumsum(-1) <= 1 - head_mass)
    in_tail = gap.masked_fill(~tail, 0.0).sum(-1)
    total = gap.sum(-1)
    share_of_tail = in_tail / total.masked_fill(total == 0, 1.0)  # 0, not 0/0, at a match
    share_of_head = (total - in_tail) / total.masked_fill(total == 0, 1.0)
    return share_of_head * forward_kl(student, teacher) + share_of_tail * reverse_kl(student, teacher)


# By name: (s, t, **options) → value [n] and its gradient [n, V] with respect to the logits behind s, in one pass.
CLOSED_FORMS: dict[str, Callable[..., ValueAndGradient]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}
