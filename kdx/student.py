"""Load the student, cut it from the teacher's layers, or initialise it; save it as an ordinary model folder."""

import collections
import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from kdx.causal_lm import load_causal_lm, load_config, loading, locate, ready
from kdx.config import ModelConfig, StudentConfig, TeacherConfig
from kdx.errors import ConfigError, ModelError
from kdx.run.files import saving, whole_folder

log = logging.getLogger(__name__)

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model.bin")
PER_LAYER = re.compile("layer|block|pattern|^intermediate_size$|^num_.*heads$")  # config lists with a value per layer


def load_student(
    config: StudentConfig, teacher: TeacherConfig, *, dtype: torch.dtype, attn_implementation: str | None, seed: int
) -> PreTrainedModel:
    """Return the student in eval mode, its master weights in `dtype`. Raises ConfigError or ModelError.

    Its generation config is left as its model's, or as that of the teacher it is cut from.
    """
    source, group = _source(config, teacher)
    shape = load_config(source, group)
    if getattr(shape, "quantization_config", None):
        raise ModelError(f"{group}.path", f"{source.path} is quantised and cannot be trained", "Use its full weights")
    if config.init == "pretrained":
        model = load_causal_lm(config, "student", dtype=dtype, attn_implementation=attn_implementation)
    elif config.init == "cut":
        model = cut(teacher, config.layers, dtype=dtype, attn_implementation=attn_implementation)
    else:
        torch.manual_seed(seed)
        with loading(str(config.path), "shape", "student.path"):
            model = AutoModelForCausalLM.from_config(
                shape, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=config.trust_remote_code
            )
        _take_generation_config(model, source, group)
        ready(model, "student")
    with loading(str(source.path), "generation config", f"{group}.path"):
        model.generation_config.validate(strict=True)  # as save_pretrained does after hours of training
    return model


def evenly_spread(num_layers: int, num_kept: int) -> list[int]:
    """Choose layers evenly, the first and the last among them."""
    return [round(i * (num_layers - 1) / max(1, num_kept - 1)) for i in range(num_kept)]


def cut(
    teacher: TeacherConfig,
    layers: int | list[int] | None,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build a smaller model from some of the teacher's layers, and its embeddings, norms and head.

    Only these tensors are read from the teacher's files. layers: how many (evenly spread), or which.
    Raises ConfigError or ModelError.
    """
    config, path = load_config(teacher, "teacher"), locate(teacher, "teacher")
    text = config.get_text_config()
    total = text.num_hidden_layers
    kept = evenly_spread(total, layers) if isinstance(layers, int) else list(layers or ())
    if max(kept) >= total or len(set(kept)) != len(kept):
        what = f"is {layers}; the teacher's layers are 0 to {total - 1}, each at most once"
        raise ConfigError("student.layers", what, f"Choose at most {total} of them")
    for name, value in list(vars(text).items()):
        if PER_LAYER.search(name) and isinstance(value, list | tuple) and len(value) == total:
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    with loading(path, "model", "teacher.path"):
        stored, weights = dict(stored_tensors(path, teacher.revision)), {}
        stack = _stack_of(stored, total)
        for name, tensor in stored.items():
            layer = re.match(rf"{re.escape(stack)}\.(\d+)\.", name)
            if layer is None:
                weights[name] = tensor.clone()
            elif int(layer[1]) in kept:
                weights[f"{stack}.{kept.index(int(layer[1]))}.{name[layer.end() :]}"] = tensor.clone()
        with torch.device("meta"):  # to learn its class, which may be code of the model's own
            like = AutoModelForCausalLM.from_config(config, trust_remote_code=teacher.trust_remote_code)
        model, report = type(like).from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, attn_implementation=attn_implementation,
            output_loading_info=True,
        )  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        what = f"the weights in {path} do not fit the student: {missing[0]} is missing"
        raise ModelError("teacher.path", what, "Choose other layers, or another teacher")
    model.config.name_or_path = path
    _take_generation_config(model, teacher, "teacher")
    return ready(model, "student")


def _stack_of(names: Iterable[str], total: int) -> str:
    """Find what the names of all layers begin with, such as model.layers. Raises ConfigError."""
    numbers = collections.defaultdict(set)
    for name in names:
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            numbers[found[1]].add(int(found[2]))
    stacks = [stack for stack, seen in numbers.items() if seen == set(range(total))]
    if len(stacks) != 1:
        what = f"cannot be cut from this teacher: its weights have {len(stacks)} stacks of {total} layers"
        raise ConfigError("student", what, "Choose another teacher, or student=hf")
    return stacks[0]


def stored_tensors(path: str, revision: str | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a model's weight files; those of safetensors are read when they are used."""
    for first in FILES:
        if file := cached_file(path, first, revision=revision, _raise_exceptions_for_missing_entries=False):
            break
    names = json.loads(Path(file).read_text())["weight_map"].values() if first.endswith(".json") else [first]
    for name in sorted(set(names)):
        file = cached_file(path, name, revision=revision)
        is_safe = name.endswith(".safetensors")
        yield from (load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)).items()


def saved_dtype(config: StudentConfig, teacher: TeacherConfig) -> str:
    """Choose the dtype that the student is saved in: if auto, that of most weights it comes from. Raises ModelError."""
    source, group = _source(config, teacher)
    if config.save_dtype != "auto":
        return config.save_dtype
    if config.init == "random" or source.gguf_file:
        return "bf16"
    path = locate(source, group)
    with loading(path, "model", f"{group}.path"):
        tensors = stored_tensors(path, source.revision)
        dtypes = collections.Counter(tensor.dtype for name, tensor in tensors if name.endswith("weight"))
    (dtype, _), *_ = dtypes.most_common(1)
    return {torch.float32: "fp32", torch.float16: "fp16"}.get(dtype, "bf16")


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a student's weights to the dtype it is saved in, or to bfloat16 if float16 would overflow."""
    weights = [tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()]
    if dtype == torch.float16 and any(weight.detach().half().isinf().any() for weight in weights):
        log.warning("the student is saved as bf16: some of its weights are too large for fp16")
        dtype = torch.bfloat16
    for weight in weights:  # buffers that are not saved, such as rotary frequencies, stay in float32 as when loaded
        weight.grad = None
        weight.data = weight.data.to(dtype)


def describe(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write what makes a folder with weights a model's: config, generation config, tokenizer with chat template."""
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(folder)


def save_student(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write weights as they are, config, generation config and tokenizer as one model folder, whole or not at all.

    Raises MachineError if the disk is full or cannot be written.
    """
    with saving("the student", folder), whole_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def load_saved(folder: Path, model: PreTrainedModel) -> None:
    """Load what save_student wrote into a student, in its own dtype. Raises ModelError.

    Transformers reads it: some models name their tensors otherwise on disk (GPT-NeoX, mixtures of experts).
    """
    with loading(str(folder), "student", str(folder)):
        saved = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


def _source(config: StudentConfig, teacher: TeacherConfig) -> tuple[ModelConfig, str]:
    """Return the model that the student comes from, and its group in the config."""
    return (teacher, "teacher") if config.init == "cut" else (config, "student")


def _take_generation_config(model: PreTrainedModel, source: ModelConfig, group: str) -> None:
    """Give a model the generation config of the folder it comes from; without one it keeps its config's ids."""
    path = locate(source, group)
    with loading(path, "generation config", f"{group}.path"), contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path, revision=source.revision)
