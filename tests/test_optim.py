"""Which weights decay, and the learning rate of each step."""

import pytest
import torch
from torch import nn

from kdx.cli import compose
from kdx.optim import build_optimizer, build_schedule


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def test_norms_and_biases_do_not_decay() -> None:
    student = module()
    optimizer = build_optimizer(compose(["optim.lr=0.1", "optim.weight_decay=0.5"]).optim, student)
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    for weight in student.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # without a gradient only the decay moves a weight
    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight.data, before[name] * (1 - 0.1 * 0.5 if weight.ndim >= 2 else 1))


@pytest.mark.parametrize("warmup", ["4", "0.4"])
def test_the_rate_warms_up_and_falls_to_zero(warmup: str) -> None:
    words = ["optim.lr=1.0", "optim.schedule=linear", f"optim.warmup_steps={warmup}"]
    config = compose(words).optim
    optimizer = build_optimizer(config, module())
    schedule = build_schedule(config, optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert schedule.get_last_lr()[0] == 0
