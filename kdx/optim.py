"""The optimizer and its learning-rate schedule."""

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from kdx.config import OptimConfig
from kdx.errors import ConfigError, MachineError, did_you_mean, out_of_memory, together
from kdx.plugins import option_faults

# Of these one calls the loss again and again, one wants sparse gradients, one trains matrices alone.
UNFIT = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
REFUSALS = (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError)  # "not implemented" is a RuntimeError


def optimizer_class(config: OptimConfig) -> Callable[..., Optimizer]:
    """Find torch.CLASS or bitsandbytes.CLASS and check its options. Raises ConfigError or MachineError."""
    library, _, name = config.name.partition(".")
    try:
        module = importlib.import_module(f"{library}.optim")
    except ImportError:
        raise MachineError("optim.name", f"{library} is not installed", f"Run: pip install {library}") from None
    known = {
        k: v for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, Optimizer) and k not in UNFIT
    }
    if name not in known:
        what = f"{library} has no optimizer {name}" + " that trains a student" * (name in UNFIT)
        raise ConfigError("optim.name", what, did_you_mean(name, list(known)))
    found = known[name]
    if faults := option_faults(found, {"lr": config.lr, **config.options}, "optim.", num_given=1):
        raise together(faults)
    return found


def build_optimizer(config: OptimConfig, module: nn.Module) -> Optimizer:
    """Build the optimizer over a module's trainable parameters; norms and biases (one dimension) do not decay."""
    kind = optimizer_class(config)
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = dict(config.options)
    accepts = inspect.signature(kind).parameters
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    is_free = not any(options.get(name) for name in ("foreach", "differentiable"))
    if (
        "fused" in accepts and "fused" not in options and is_free
    ):  # one kernel over all weights: 6 times faster on a CPU
        options["fused"] = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    try:
        _take_a_step(lambda few: kind([{"params": few}], lr=config.lr, **options), parameters[0])
        return kind([g for g in groups if g["params"]], lr=config.lr, **options)
    except REFUSALS as error:
        if out_of_memory(error):
            raise
        told = " ".join(str(error).split()).rstrip(".")[:300]
        raise ConfigError("optim", f"{config.name} refuses its options: {told}", "See conf/optim/") from None


def _take_a_step(build: Callable[[list[nn.Parameter]], Optimizer], like: Tensor) -> None:
    """Find what an optimizer refuses only in its first step, before the run is prepared for hours of them."""
    few = [nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device)) for shape in ((4, 4), (4,))]
    for weight in few:
        weight.grad = torch.zeros_like(weight)
    build(few).step()


def state_bytes(config: OptimConfig, like: Tensor) -> float:
    """Bytes that the optimizer keeps for each weight: those of a small matrix after one step of no gradient."""
    weight = nn.Parameter(torch.zeros(256, 256, dtype=like.dtype, device=like.device))
    weight.grad = torch.zeros_like(weight)
    optimizer = build_optimizer(config, nn.ParameterList([weight]))
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in kept if value.numel() > 256) / weight.numel()  # but for counters and tables


def build_schedule(config: OptimConfig, optimizer: Optimizer, max_steps: int) -> LRScheduler:
    """Build the learning-rate schedule (transformers' get_scheduler). Raises ConfigError."""
    warmup = config.warmup_steps if isinstance(config.warmup_steps, int) else round(config.warmup_steps * max_steps)
    if warmup > max_steps > 0:
        what = f"is {warmup}, more than the run's {max_steps} steps"
        raise ConfigError("optim.warmup_steps", what, f"Allowed: 0 to {max_steps}, or a share of them below 1")
    try:
        schedule = get_scheduler(
            config.schedule,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=max_steps,
            scheduler_specific_kwargs=dict(config.schedule_options) or None,
        )
        rates = [rate(step) for rate in schedule.lr_lambdas for step in range(0, max_steps + 1, max_steps // 1000 + 1)]
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise ValueError("the rate would be negative, or no number")
    except (TypeError, ValueError, ArithmeticError) as error:
        told, key = " ".join(str(error).split()).rstrip("."), "optim.schedule_options"
        raise ConfigError(key, f"{config.schedule}: {told}", f"Give an option as +{key}.NAME=...") from None
    return schedule
