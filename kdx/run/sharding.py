"""FSDP: accelerate has torch's fully_shard lay what is trained in shards over the processes, one of each in each process.

Only training knows of shards. To be measured, sampled and saved the student is gathered into an ordinary model, which
every process keeps in main memory and takes to its device while it is used: so no process waits for another in there.
Without FSDP that model is the one that is trained, and nothing is gathered. What is gathered, all processes gather.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from kdx.config import Config
from kdx.errors import MachineError, together
from kdx.objective import StudentObjective

ASKED = "ACCELERATE_USE_FSDP"
OPTIMIZERS = ("torch.Adam", "torch.AdamW", "torch.Adamax", "torch.RAdam", "torch.RMSprop")  # they need no weight whole
WRAP = "Use fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, and name no layers"


def is_asked(variable: str = ASKED) -> bool:
    """Whether the environment that accelerate made, or the user, asks for FSDP, or for what another variable names."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def plugin(config: Config) -> FullyShardedDataParallelPlugin | None:
    """What to tell accelerate if its environment asks for FSDP. Raises MachineError for what does not go with it."""
    if not is_asked():
        return None
    os.environ[ASKED] = "true"  # the only word that accelerate reads
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise MachineError("FSDP_VERSION", f"is {version}, and kdx is written for 2", "Set fsdp_version: 2")
    # The arithmetic of any run: autocast over fp32 weights, sums of gradients in fp32. And every process loads the
    # models itself, since accelerate would leave all but the first without weights, the teacher's too.
    made = FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(), cpu_ram_efficient_loading=False
    )
    optim, precision, environment = config.optim.name, config.train.precision, os.environ
    if precision == "auto":
        precision = environment.get("ACCELERATE_MIXED_PRECISION", "")
    is_compiled = config.train.compile or environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
    refused = [
        (made.activation_checkpointing, "FSDP_ACTIVATION_CHECKPOINTING", "draws dropout anew in the backward pass",
         "Use train.gradient_checkpointing=true"),
        (isinstance(made.cpu_offload, CPUOffloadPolicy), "FSDP_OFFLOAD_PARAMS", "is not tried", "Start without it"),
        (made.ignored_modules, "FSDP_IGNORED_MODULES", "would differ from process to process", "Start without it"),
        (is_compiled, "train.compile", "does not go with FSDP", "Set it to false, and use no dynamo backend"),
        (precision == "fp16", "train.precision", "fp16 does not go with FSDP", "Use train.precision=bf16 or fp32"),
        (optim not in OPTIMIZERS, "optim.name", f"{optim} is not known to go with FSDP",
         f"Choices: {', '.join(OPTIMIZERS)}"),
    ]  # fmt: skip
    if wrong := [MachineError(where, what, mend) for is_so, where, what, mend in refused if is_so]:
        raise together(wrong)
    return made


def prepare(accelerator: Accelerator, objective: StudentObjective, optimizer: Any) -> tuple[Any, Any, Any]:
    """Have accelerate prepare what is trained → the module to call, the optimizer, and the student as a whole model.

    Raises MachineError if shards are asked for and not made, or made where they cannot be used.
    """
    student = objective.model
    if not is_asked():
        module, optimizer = accelerator.prepare(objective, optimizer)
        return module, optimizer, student
    whole = copy.deepcopy(student).to("cpu")
    forward = objective.forward

    def under_autocast(*given: Any) -> Any:
        with accelerator.autocast(AutocastKwargs(cache_enabled=False)):  # a cache would keep every weight whole
            return forward(*given)

    objective.forward = under_autocast  # type: ignore[method-assign, assignment]  # as accelerate does but with FSDP
    try:
        module, optimizer = accelerator.prepare(objective, optimizer)
    except (KeyError, ValueError) as error:  # layers that the model does not have, or a tied head in two places
        what = f"cannot be done with this student: {' '.join(str(error).split())[:200].rstrip('.')}"
        raise MachineError(ASKED, what, WRAP) from None
    check(objective)
    return module, optimizer, whole


def check(objective: StudentObjective) -> None:
    """Refuse a student that is not all in shards, or whose head is not gathered when the loss is taken."""
    if not all(isinstance(weight, DTensor) for weight in objective.parameters()):
        raise MachineError(ASKED, "is asked for, and weights are not in shards", "Start without it")
    model: Any = objective.model
    head = model.get_output_embeddings()
    if any(head in part.modules() for part in model.modules() if issubclass(type(part), FSDPModule)):
        what = "cannot be done with this student: its head would be in shards of its own, and kdx reads it from outside"
        raise MachineError(ASKED, what, WRAP)


@torch.no_grad()
def gather(objective: StudentObjective, student: nn.Module) -> None:
    """Copy what is trained into the whole student of every process, on its device."""
    trained = objective.model
    if trained is student:
        return
    student.to(next(trained.parameters()).device).train(trained.training)
    for weight, shard in zip(student.parameters(), trained.parameters(), strict=True):
        weight.copy_(plain(shard))


@contextmanager
def whole(objective: StudentObjective, student: nn.Module) -> Iterator[None]:
    """Have the student whole on its device for a while."""
    gather(objective, student)
    yield
    if objective.model is not student:
        student.to("cpu")


@torch.no_grad()
def spread(student: nn.Module, objective: StudentObjective) -> None:
    """Copy the whole student into what is trained."""
    if objective.model is not student:
        for weight, shard in zip(student.parameters(), objective.model.parameters(), strict=True):
            shard.copy_(_split(weight, shard))


def state_of(optimizer: Any, is_main: bool) -> dict[str, Any]:
    """The optimizer's state with whole tensors, in the main process alone; others help to gather them."""
    state: dict[str, Any] = optimizer.state_dict()

    def kept(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        value = plain(value)
        return value.cpu() if is_main else None

    moments = {i: {name: kept(value) for name, value in one.items()} for i, one in state["state"].items()}
    return state | {"state": moments}


def as_held(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state as its weights lie: what has the shape of a weight in shards is in shards too."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def held(value: Any, weight: Tensor) -> Any:
        is_split = isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape
        return _split(value, weight) if is_split else value

    moments = {i: {name: held(value, weights[i]) for name, value in one.items()} for i, one in state["state"].items()}
    return state | {"state": moments}


def plain(tensor: Tensor) -> Tensor:
    """A tensor as it is, gathered if it is in shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _split(tensor: Tensor, like: Any) -> Tensor:
    """The shards of a tensor that every process has whole."""
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
