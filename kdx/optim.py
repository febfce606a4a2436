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
from kdx.validation import Problem, binding_problems, has_type, show, type_words

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
    problems = binding_problems(found, {"lr": config.lr, **config.options}, "optim.", skip=1)
    problems = problems or _unlike_defaults(found, config.options)
    if problems:
        raise together([ConfigError(*problem) for problem in problems])
    return found


def _unlike_defaults(kind: Callable[..., Optimizer], options: dict[str, Any]) -> list[Problem]:
    """The options that are not of their default's kind: optimizers compare before they look, or index without."""
    found = []
    for name, parameter in inspect.signature(kind).parameters.items():
        value, default, shown = options.get(name), parameter.default, parameter.default
        if name not in options or not isinstance(default, bool | int | float | tuple):
            continue
        wanted: Any = bool if isinstance(default, bool) else float
        fits, words = has_type(value, wanted), type_words(wanted)
        if isinstance(default, tuple):
            fits = isinstance(value, list) and has_type(value, list[float | None]) and len(value) == len(default)
            words, shown = f"a list of {len(default)} numbers", list(default)
        if name == "maximize" and value is True:
            found.append(Problem("optim.maximize", "is true, which makes the loss greater", "Take it out"))
        numbers = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, float)]
        fits = fits and all(map(math.isfinite, numbers))
        if not fits:
            found.append(Problem(f"optim.{name}", f"is {show(value)}, expected {words}", f"Allowed: such as {shown}"))
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
