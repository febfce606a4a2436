"""The optimizer and its learning-rate schedule."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdx.checked import check_options
from kdx.config import OptimConfig
from kdx.errors import ConfigError, MachineError, did_you_mean, one_line


def optimizer_class(config: OptimConfig) -> Callable[..., Optimizer]:
    """Find torch.CLASS or bitsandbytes.CLASS and check the names of its options. Raises ConfigError or MachineError."""
    library, _, name = config.name.partition(".")
    try:
        module = importlib.import_module(f"{library}.optim")
    except ImportError:
        raise MachineError("optim.name", f"{library} is not installed", f"Run: pip install {library}") from None
    known = {k: v for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, Optimizer)}
    if name not in known:
        raise ConfigError("optim.name", f"{library} has no optimizer {name}", did_you_mean(name, sorted(known)))
    check_options(known[name], {"lr": config.lr, **config.options}, "optim.", num_given=1)
    return known[name]


def build_optimizer(config: OptimConfig, module: nn.Module) -> Optimizer:
    """Build the optimizer over a module's trainable parameters; norms and biases (one dimension) do not decay.

    Raises ConfigError for options that the class refuses.
    """
    kind = optimizer_class(config)
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = dict(config.options)
    if "fused" in inspect.signature(kind).parameters:  # one kernel over all weights: six times faster on a CPU
        options.setdefault("fused", True)
    try:
        return kind([g for g in groups if g["params"]], lr=config.lr, **options)
    except Exception as error:  # a library's class checks its options as it likes
        raise ConfigError("optim", f"{config.name}: {one_line(error)}", "See conf/optim/ for its options") from error


def state_bytes(config: OptimConfig, like: Tensor) -> float:
    """Measure how many bytes the optimizer keeps per weight, by one step of a small matrix."""
    weight = nn.Parameter(torch.zeros(256, 256, dtype=like.dtype, device=like.device))
    weight.grad = torch.zeros_like(weight)
    optimizer = build_optimizer(config, nn.ParameterList([weight]))
    optimizer.step()
    state = filter(torch.is_tensor, optimizer.state[weight].values())
    return sum(value.nbytes for value in state if value.numel() > 256) / weight.numel()  # leave out step counts, tables


def build_schedule(config: OptimConfig, optimizer: Optimizer, max_steps: int) -> LRScheduler:
    """Build the learning-rate schedule (transformers' get_scheduler). Raises ConfigError."""
    from transformers import get_scheduler  # late: peft and bitsandbytes come with it, and the latter logs

    warmup = config.warmup_steps if isinstance(config.warmup_steps, int) else round(config.warmup_steps * max_steps)
    if warmup > max_steps > 0:
        what = f"is {warmup}, more than the run's {max_steps} steps"
        raise ConfigError("optim.warmup_steps", what, f"Allowed: 0 to {max_steps}, or a share of them below 1")
    try:
        return get_scheduler(
            config.schedule,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=max_steps,
            scheduler_specific_kwargs=dict(config.schedule_options) or None,
        )
    except (TypeError, ValueError) as error:
        key = "optim.schedule_options"
        raise ConfigError(key, f"{config.schedule}: {one_line(error)}", f"Set one with {key}.NAME=...") from None
