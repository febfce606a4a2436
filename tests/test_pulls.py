"""How hard each term pulls: norms and cosine of both gradients, against plain autograd; and weights that move."""

import math
import re
from pathlib import Path

import pytest
import torch

from kdx import loss
from kdx.causal_lm import Head
from kdx.cli import compose
from kdx.errors import ConfigError
from kdx.objective import Mix, check_loss, pulls_of, summed_loss
from kdx.teacher import Answer

N, D, V = 9, 5, 13


def case(seed=0, **head):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = Head(draw(V, D), draw(V) if head.get("bias") else None, head.get("scale", 1.0), head.get("softcap"))
    answer = Answer(draw(N, 4), Head(draw(V, 4)))
    return draw(N, D).requires_grad_(), student, answer, torch.randint(V, (N,), generator=generator)


def plainly(hidden, head, answer, labels, mix, num_tokens):
    """The gradients of both terms of the loss by the hidden states, by autograd of the whole loss."""
    logits, theirs = head.logits(hidden), answer.head.logits(answer.hidden)
    tau = mix.temperature
    kd = loss.get(mix.name)((logits / tau).log_softmax(-1), (theirs / tau).log_softmax(-1), **mix.options)
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    terms = (mix.alpha * mix.factor * kd.sum() / num_tokens, (1 - mix.alpha) * ce / num_tokens)
    return [torch.autograd.grad(term, hidden, retain_graph=True)[0] for term in terms]


@pytest.mark.parametrize("head", [{}, {"bias": True, "scale": 0.5}, {"softcap": 3.0}])
@pytest.mark.parametrize("name", loss.names())
def test_norms_and_cosine_are_those_of_autograd(name, head):
    for temperature, chunk_size, alpha in ((1.0, 4, 0.7), (2.0, 100, 0.2)):
        mix = Mix(name, alpha, temperature)
        hidden, student, answer, labels = case(**head)
        total, terms = summed_loss(hidden, student, answer, labels, mix, chunk_size, with_pulls=True)
        kd, ce = plainly(hidden, student, answer, labels, mix, N)
        found = pulls_of({k: v.item() for k, v in terms.items()}, N)
        expected = {
            "grad_kd": kd.norm().item(),
            "grad_ce": ce.norm().item(),
            "grad_cosine": (kd.flatten() @ ce.flatten() / (kd.norm() * ce.norm())).item(),
            "effective_alpha": (kd.norm() / (kd.norm() + ce.norm())).item(),
        }
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
        # The loss and its gradient are the same bits with and without.
        (with_pulls,) = torch.autograd.grad(total, hidden)
        alone, _ = summed_loss(hidden, student, answer, labels, mix, chunk_size)
        assert torch.equal(total, alone)
        assert torch.equal(with_pulls, torch.autograd.grad(alone, hidden)[0])


def test_they_add_up_over_micro_batches_and_weigh_positions():
    hidden, head, answer, labels = case()
    mix = Mix("forward_kl", 0.7, 2.0)
    weights = {"ce": (torch.arange(N) % 2).double()}
    _, whole = summed_loss(hidden, head, answer, labels, mix, 3, weights=weights, with_pulls=True)
    sums = dict.fromkeys(whole, 0.0)
    for rows in (slice(0, 2), slice(2, 7), slice(7, N)):
        part = Answer(answer.hidden[rows], answer.head)
        some = {"ce": weights["ce"][rows]}
        _, terms = summed_loss(hidden[rows], head, part, labels[rows], mix, 3, weights=some, with_pulls=True)
        sums = {name: sums[name] + float(terms[name]) for name in sums}
    assert sums == pytest.approx({name: float(value) for name, value in whole.items()}, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_term_that_is_not_there_does_not_pull(alpha):
    hidden, head, answer, labels = case()
    _, terms = summed_loss(hidden, head, answer, labels, Mix("forward_kl", alpha, 2.0), with_pulls=True)
    found = pulls_of({name: float(value) for name, value in terms.items()}, N)
    assert found["effective_alpha"] == alpha
    assert found["grad_cosine"] is None
    assert found["grad_kd" if alpha else "grad_ce"] > 0


def test_a_divergence_that_names_labels_is_given_them(monkeypatch):
    """The example of docs/losses.md, which with a weight of its own for each position is forward KL."""
    monkeypatch.setattr(loss, "_REGISTRY", dict(loss._REGISTRY))
    text = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def decoupled" in block)
    exec(code, {})
    hidden, head, answer, labels = case()
    s, t = head.logits(hidden).log_softmax(-1), answer.head.logits(answer.hidden).log_softmax(-1)
    both, label = (loss.get("decoupled")(s, t, labels=labels, beta=beta) for beta in (1.0, 0.0))
    rest = 1 - t.gather(-1, labels[:, None]).squeeze(-1).exp()
    torch.testing.assert_close(label + rest * (both - label), loss.forward_kl(s, t))
    total, _ = summed_loss(hidden, head, answer, labels, Mix("decoupled", 1.0, 1.0, options={"beta": 2.0}), 4)
    plain = loss.get("decoupled")(s, t, labels=labels, beta=2.0).sum()
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden)[0] for value in (total, plain)))
    with pytest.raises(ConfigError, match=r"loss\.gamma"):
        check_loss(compose(["loss.name=decoupled", "loss.gamma=1"]).loss)
    check_loss(compose(["loss.name=decoupled", "loss.beta=2.0"]).loss)


def test_alpha_and_temperature_move_in_equal_steps():
    mix = Mix("forward_kl", 0.2, 4.0, alpha_end=1.0, temperature_end=2.0)
    assert [mix.at(step, 5).alpha for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [mix.at(step, 5).temperature for step in range(5)] == pytest.approx([4, 3.5, 3, 2.5, 2])
    assert math.isclose(mix.at(0, 1).alpha, 0.2)
    assert mix.formula() == "loss = α·τ²·forward_kl(teacher, student; τ) + (1−α)·CE(student, labels), α=0.2→1, τ=4→2"
    still = Mix("forward_kl", 0.2, 4.0)
    s, t = torch.randn(3, 8), torch.randn(3, 8)
    _, terms = summed_loss(
        s, Head(torch.eye(8)), Answer(t, Head(torch.eye(8))), torch.tensor([1, 2, 3]), Mix(alpha=0.0)
    )
    assert float(terms["kd"]) == pytest.approx(
        float(loss.divergence("forward_kl", s, t).sum())
    )  # logged at the end, too
    assert still.at(3, 5) is still
