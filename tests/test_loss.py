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


def test_against_torch():
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(
        loss.divergence("forward_kl", student, teacher), F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    )
    torch.testing.assert_close(
        loss.divergence("reverse_kl", student, teacher), F.kl_div(t, s, reduction="none", log_target=True).sum(-1)
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
    # a mean over the vocabulary would halve when every token is split in two halves of half its probability
    student, teacher = logits(3, 7), logits(3, 7, seed=1)
    if name != "adaptive_kl":  # whose head may gain or lose half a token
        twice = loss.divergence(name, student.repeat_interleave(2, -1), teacher.repeat_interleave(2, -1))
        torch.testing.assert_close(twice, loss.divergence(name, student, teacher))


def test_jsd_at_its_ends():
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    for beta, name in [(0, "forward_kl"), (0.0, "forward_kl"), (1, "reverse_kl"), (1.0, "reverse_kl")]:
        ours = loss.divergence("jsd", student, teacher, beta=beta)
        assert torch.equal(ours, loss.divergence(name, student, teacher))
    for beta in (1e-9, 1 - 1e-9):  # the formula's own limit, which is not what the ends are
        assert loss.divergence("jsd", student, teacher, beta=beta).abs().max() < 1e-7


def test_adaptive_kl_weighs_by_head_and_tail():
    teacher = torch.tensor([[0.6, 0.3, 0.1]]).double().log()
    student = torch.tensor([[0.2, 0.3, 0.5]]).double().log()
    forward, reverse = (loss.divergence(name, student, teacher) for name in ("forward_kl", "reverse_kl"))
    # head_mass ½: the tail is tokens 2 and 3 (0.1 + 0.3 ≤ 0.5); both sides differ by 0.4
    torch.testing.assert_close(loss.divergence("adaptive_kl", student, teacher), (forward + reverse) / 2)
    # head_mass 0.95: no token fits into 0.05, all is head
    torch.testing.assert_close(loss.divergence("adaptive_kl", student, teacher, head_mass=0.95), forward)


@each_variant
def test_closed_form_and_autograd_agree(name, options):
    z, t = logits(5, 13), logits(5, 13, seed=1).log_softmax(-1)
    value, closed = loss.value_and_gradient(name, z.log_softmax(-1), t, options)
    z.requires_grad_()
    expected = loss.get(name)(z.log_softmax(-1), t, **options)
    assert not value.requires_grad
    assert not closed.requires_grad
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(closed, gradient(expected, z), rtol=1e-10, atol=1e-12)


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
        (lambda z: loss.divergence("jsd", z, z, gamma=1), "its options: beta"),
        (lambda z: loss.divergence("forward_kl", z, z, beta=0.5), "its options: none"),
        (lambda z: loss.divergence("jsd", z, z, beta=1.1), "beta is 1.1; it must be between 0 and 1"),
        (lambda z: loss.divergence("jsd", z, z, beta=math.nan), "between 0 and 1"),
        (lambda z: loss.divergence("skew_forward_kl", z, z, skew=0), "both excluded"),
        (lambda z: loss.divergence("adaptive_kl", z, z, head_mass=1.0), "head_mass is 1.0; .* both excluded"),
        (lambda z: loss.divergence("forward_kl", z, z, 0.0), "temperature is 0.0; it must be above 0"),
        (lambda z: loss.divergence("forward_kl", z, z, math.nan), "above 0"),
        (lambda z: loss.divergence("forward_kl", z, z[:1]), r"positions differ: \[2, 5\] and \[1, 5\]"),
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
    with pytest.raises(ValueError, match="its options: power"):
        loss.divergence("half_tvd", student, teacher, strength=1)


def test_taken_names_are_refused(registry):
    def tvd(student, teacher):
        return student.sum(-1) - teacher.sum(-1)

    def cross_entropy(student, teacher):
        return student.sum(-1) - teacher.sum(-1)

    with pytest.raises(ValueError, match=r"named tvd is registered already, by kdx\.loss"):
        loss.register(tvd)
    with pytest.raises(ValueError, match="choose another name"):
        loss.register(cross_entropy)


@pytest.mark.parametrize("reduce", [lambda x: x.mean(), lambda x: x, lambda x: x.sum(-1, keepdim=True)])
def test_loss_of_another_shape_is_refused(registry, reduce):
    @loss.register
    def mine(student, teacher):
        return reduce((student - teacher).abs())

    with pytest.raises(ValueError, match="for 2 positions; it must be one number each"):
        loss.divergence("mine", logits(2, 5), logits(2, 5, seed=1))


def test_log_probabilities_keep_float64_and_raise_the_rest_to_float32():
    z = logits(2, 5)
    assert torch.equal(loss.log_probabilities(z), z.log_softmax(-1))
    assert torch.equal(loss.log_probabilities(z, 2.0), (z / 2).log_softmax(-1))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        low = z.to(dtype)
        assert torch.equal(loss.log_probabilities(low), low.float().log_softmax(-1))
        assert torch.equal(low, z.to(dtype))  # the input is left as it was


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
