"""Divergences against their definitions, written out in tests/plain.py, and against torch's own functions.

Sums over positions are in test_objective.py. n / N positions, V vocabulary, B rows, T positions of a row.
"""

import math

import plain
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdx import loss

INF = math.inf
NAMES = sorted(plain.DEFINITIONS)
VARIANTS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {}),
    ("jsd", {"beta": 0}),
    ("jsd", {"beta": 0.2}),
    ("jsd", {"beta": 1}),
    ("skew_forward_kl", {}),
    ("skew_forward_kl", {"skew": 0.6}),
    ("skew_reverse_kl", {}),
    ("skew_reverse_kl", {"skew": 0.6}),
    ("tvd", {}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"head_mass": 0.8}),
]
each_name = pytest.mark.parametrize("name", NAMES)
each_variant = pytest.mark.parametrize(("name", "options"), VARIANTS)


def logits(*shape, seed=0, dtype=torch.float64, scale=2.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(value, x):
    return torch.autograd.grad(value.sum(), x)[0]


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that a test's own losses are gone after it."""
    monkeypatch.setattr(loss, "_REGISTRY", dict(loss._REGISTRY))


def test_every_divergence_is_held_to_a_definition():
    assert loss.names() == NAMES


@each_variant
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_value_and_gradient_are_those_of_the_definition(name, options, temperature, dtype, tolerance):
    student, teacher = logits(5, 11).requires_grad_(), logits(5, 11, seed=1)
    expected = plain.divergence(name, student, teacher, temperature, **options)
    ours = student.detach().to(dtype).requires_grad_()
    value = loss.divergence(name, ours, teacher.to(dtype), temperature, **options)
    assert value.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        gradient(value, ours).double(), gradient(expected, student), rtol=tolerance, atol=tolerance
    )


@each_variant
def test_zero_at_a_match(name, options):
    z = logits(6, 50, dtype=torch.float32, scale=5.0).requires_grad_()
    value = loss.divergence(name, z, z.detach(), 2.0, **options)
    assert value.abs().max() < 1e-6
    assert gradient(value, z).abs().max() < 1e-6


@each_name
def test_one_number_per_position(name):
    for shape in [(7,), (3, 7), (2, 3, 7), (0, 7), (2, 0, 7)]:
        value = loss.divergence(name, logits(*shape), logits(*shape, seed=1))
        assert value.shape == shape[:-1]


@each_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_columns_that_the_teacher_excludes_are_finite(name, options, dtype):
    student, teacher = logits(4, 8, dtype=dtype).requires_grad_(), logits(4, 8, seed=1, dtype=dtype)
    teacher[:, [2, 5]] = -INF
    value = loss.divergence(name, student, teacher, **options)
    grad = gradient(value, student)
    assert value.isfinite().all()
    assert (value > 0).all()
    assert grad.isfinite().all()
    _, closed = loss.value_and_gradient(
        name, student.detach().log_softmax(-1), teacher.log_softmax(-1), options
    )  # what a run takes
    torch.testing.assert_close(closed, grad, rtol=1e-4, atol=1e-4)
    # −inf is the limit of ever smaller logits; where that limit is infinite, the teacher's share counts as LOG_TINY
    log_t = teacher.double().log_softmax(-1).clamp_min(loss.LOG_TINY)
    torch.testing.assert_close(
        value.double(), plain.divergence(name, student.detach().double(), log_t, **options), rtol=1e-4, atol=1e-6
    )


@each_name
def test_no_row_near_a_match_loses_its_gradient(name):
    # so near that rounding makes some values negative: a clamp at 0 would take the gradient of those rows away
    teacher = logits(64, 200, dtype=torch.float32)
    student = (teacher + logits(64, 200, seed=1, dtype=torch.float32, scale=1e-4)).requires_grad_()
    value = loss.divergence(name, student, teacher)
    if name in ("forward_kl", "reverse_kl"):
        assert (value < 0).any()
    assert (gradient(value, student).abs().amax(-1) > 0).all()


@each_variant
def test_bf16_logits_give_no_negative_divergence(name, options):
    student = logits(64, 300, dtype=torch.bfloat16)
    teacher = student + logits(64, 300, seed=1, dtype=torch.bfloat16, scale=0.02)
    value = loss.divergence(name, student, teacher, **options)
    assert value.dtype == torch.float32
    assert value.min() > -1e-6
    expected = loss.divergence(name, student.double(), teacher.double(), **options)
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-6)
    if name in ("forward_kl", "reverse_kl"):  # the mistake that this is about does happen on these numbers
        s, t = (student.log_softmax(-1), teacher.log_softmax(-1))
        p, q = (t, s) if name == "forward_kl" else (s, t)
        assert (p.exp() * (p - q)).sum(-1).min() < -1e-4


def test_padded_heads_are_cut():
    student = logits(4, 12)
    teacher = student[:, :9]
    value = loss.divergence("forward_kl", student, teacher)
    assert value.abs().max() < 1e-12  # the same model on the ids that both have
    with_zeros = loss.divergence("forward_kl", student, F.pad(teacher, (0, 3)))
    assert with_zeros.min() > 1e-3
    grad = gradient(loss.divergence("forward_kl", student.requires_grad_(), teacher + logits(4, 9, seed=1)), student)
    assert (grad[:, 9:] == 0).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda z: loss.divergence("forward", z, z), "adaptive_kl, forward_kl, jsd"),
        (lambda z: loss.divergence("jsd", z, z, beta=1.1), "beta is 1.1; it must be between 0 and 1"),
        (lambda z: loss.divergence("skew_forward_kl", z, z, skew=0), "both excluded"),
        (lambda z: loss.divergence("adaptive_kl", z, z, head_mass=1.0), "head_mass is 1.0; .* both excluded"),
    ],
)
def test_errors_name_what_is_allowed(call, says):
    with pytest.raises(ValueError, match=says):
        call(logits(2, 5))


def test_own_loss(registry):
    @loss.register
    def half_tvd(student, teacher, power=1.0):
        return 0.5 * (student.exp() - teacher.exp()).abs().pow(power).sum(-1)

    assert "half_tvd" in loss.names()
    student, teacher = logits(3, 6), logits(3, 6, seed=1)
    torch.testing.assert_close(
        loss.divergence("half_tvd", student, teacher, 2.0), loss.divergence("tvd", student, teacher, 2.0)
    )


def test_taken_names_are_refused(registry):
    def tvd(student, teacher):
        return student.sum(-1) - teacher.sum(-1)

    with pytest.raises(ValueError, match=r"named tvd is registered already, by kdx\.loss"):
        loss.register(tvd)


@pytest.mark.parametrize("reduce", [lambda x: x.mean(), lambda x: x, lambda x: x.sum(-1, keepdim=True)])
def test_loss_of_another_shape_is_refused(registry, reduce):
    @loss.register
    def mine(student, teacher):
        return reduce((student - teacher).abs())

    with pytest.raises(ValueError, match="for 2 positions; it must be one number each"):
        loss.divergence("mine", logits(2, 5), logits(2, 5, seed=1))


@st.composite
def pairs(draw):
    """Logits [n, V] of student and teacher, n from 0: ordinary, huge or bf16, some columns −inf."""
    n, v = draw(st.integers(0, 4)), draw(st.integers(1, 12))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    seed = draw(st.integers(0, 10_000))
    student, teacher = (logits(n, v, seed=2 * seed + i, scale=scale, dtype=dtype) for i in (0, 1))
    for column in draw(st.sets(st.integers(1, 12), max_size=4)):
        if column < v:  # column 0 stays: something must be possible
            teacher[:, column] = -INF
            if draw(st.booleans()):
                student[:, column] = -INF
    return student, teacher


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(pair=pairs(), name=st.sampled_from(NAMES), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_any_logits_give_finite_values_that_are_not_negative(pair, name, temperature):
    student, teacher = pair
    student.requires_grad_()
    value = loss.divergence(name, student, teacher, temperature)
    grad = gradient(value, student)
    assert value.shape == student.shape[:1]
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert (value >= -1e-5 * temperature**2).all()
    closed_value, closed = loss.value_and_gradient(
        name,
        loss.log_probabilities(student.detach(), temperature),
        loss.log_probabilities(teacher, temperature),
        {},
    )
    torch.testing.assert_close(temperature**2 * closed_value, value.detach(), rtol=1e-4, atol=1e-5)
    # a gradient by logits sums to 0 in every row: moving all of them together changes nothing
    size = closed.abs().amax(-1) + 1
    assert (closed.sum(-1).abs() <= 1e-4 * size).all()
