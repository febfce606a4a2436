"""Load the student, cut it from the teacher's layers, or initialise it; save it as an ordinary model folder."""

import collections
import contextlib
import copy
import json
import logging
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from kdx.causal_lm import DTYPES, load_causal_lm, load_config, loading, locate, ready
from kdx.config import ModelConfig, StudentConfig, TeacherConfig
from kdx.errors import ConfigError, ModelError
from kdx.run.checkpoint import REFUSALS, not_saved
from kdx.run.files import whole_folder

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
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
    with tempfile.TemporaryDirectory() as folder:  # after hours of training it would be too late
        try:
            model.generation_config.save_pretrained(folder)
        except (TypeError, ValueError) as error:
            what = f"transformers refuses to save its generation_config.json: {' '.join(str(error).split())[:240]}"
            raise ModelError(f"{group}.path", what, "Correct that file, or remove it") from None
    return model


def evenly_spread(num_layers: int, num_kept: int) -> list[int]:
    """Choose layers evenly, the first and the last among them."""
    if num_kept == 1:
        return [0]
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


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
    kept = evenly_spread(total, layers) if isinstance(layers, int) else list(layers)
    if max(kept) >= total or len(set(kept)) != len(kept):
        what = f"is {layers}; the teacher's layers are 0 to {total - 1}, each at most once"
        raise ConfigError("student.layers", what, f"Choose at most {total} of them")
    for name, value in list(vars(text).items()):
        if PER_LAYER.search(name) and isinstance(value, list | tuple) and len(value) == total:
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    with loading(path, "model", "teacher.path"):
        stored = StoredTensors(path, teacher.revision)
        stack, weights = _stack_of(stored.names, total), {}
        for name in stored.names:
            layer = re.match(rf"{re.escape(stack)}\.(\d+)\.", name)
            if layer is None:
                weights[name] = stored[name]
            elif int(layer[1]) in kept:
                weights[f"{stack}.{kept.index(int(layer[1]))}.{name[layer.end() :]}"] = stored[name]
        with torch.device("meta"):  # to learn its class, which may be code of the model's own
            like = AutoModelForCausalLM.from_config(config, trust_remote_code=teacher.trust_remote_code)
        model, report = type(like).from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, attn_implementation=attn_implementation,
            output_loading_info=True,
        )  # fmt: skip
    left = [name for name in report["unexpected_keys"] if name.startswith(f"{stack}.")]
    if wrong := sorted(report["missing_keys"]) or left:
        what = (
            f"the weights in {path} do not fit the student: {wrong[0]} is {'left over' if wrong is left else 'missing'}"
        )
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


class StoredTensors:
    """The tensors in a model's weight files, read one by one; a file is fetched from the hub when first needed."""

    def __init__(self, path: str, revision: str | None) -> None:
        self.path, self.revision = path, revision
        self._files: dict[str, Any] = {}
        for name in ("model.safetensors", INDEX, "pytorch_model.bin.index.json", "pytorch_model.bin"):
            if file := cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False):
                break
        if file and name.endswith(".json"):
            self.names: dict[str, str] = json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"]
        else:
            self.names = dict.fromkeys(self._open(name), name)  # tensor → file

    def __getitem__(self, name: str) -> Tensor:
        return self._open(self.names[name])[name][...]

    def _open(self, name: str) -> dict[str, Any]:
        """Open a file → its tensors: of safetensors slices that are not read yet, of a pickle the tensors themselves."""
        if name not in self._files:
            file = cached_file(self.path, name, revision=self.revision)
            if name.endswith(".safetensors"):
                opened = safe_open(file, "pt")
                self._files[name] = {tensor: opened.get_slice(tensor) for tensor in opened.keys()}  # noqa: SIM118
            else:
                self._files[name] = torch.load(file, map_location="cpu", weights_only=True)
        return self._files[name]

    def dtype(self) -> torch.dtype:
        """Return the dtype of most weights in the first file; bfloat16 if it is not fp32, bf16 or fp16."""
        parts = self._open(next(iter(self.names.values()))).items()
        num = collections.Counter(part[:0].dtype for name, part in parts if name.endswith("weight"))
        dtype = num.most_common(1)[0][0]
        return dtype if dtype in (torch.float32, torch.float16) else torch.bfloat16


def saved_dtype(config: StudentConfig, teacher: TeacherConfig) -> tuple[torch.dtype, str]:
    """Return the dtype that the student is saved in, and the choice in words. Raises ModelError."""
    if config.save_dtype != "auto":
        return DTYPES[config.save_dtype], config.save_dtype
    source, group = _source(config, teacher)
    if config.init == "random" or source.gguf_file:
        return torch.bfloat16, f"bf16 ({'fresh weights' if config.init == 'random' else 'from GGUF'})"
    path = locate(source, group)
    with loading(path, "model", f"{group}.path"):
        dtype = StoredTensors(path, source.revision).dtype()
    return dtype, f"{next(name for name, known in DTYPES.items() if known == dtype)} (as in {source.path})"


def cast(model: PreTrainedModel, dtype: torch.dtype) -> torch.dtype:
    """Cast a student's weights to the dtype it is saved in, or to bfloat16 if float16 would overflow → that dtype."""
    weights = [tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()]
    if dtype == torch.float16 and any(weight.detach().half().isinf().any() for weight in weights):
        log.warning("the student is saved as bf16: some of its weights are too large for fp16")
        dtype = torch.bfloat16
    for weight in weights:  # buffers that are not saved, such as rotary frequencies, stay in float32 as when loaded
        weight.grad = None
        weight.data = weight.data.to(dtype)
    return dtype


def describe(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write what makes a folder with weights a model's: config, generation config, tokenizer with chat template."""
    config = copy.deepcopy(model.config)
    config.use_cache = True  # off during training
    for part in (config, model.generation_config, tokenizer):
        part.save_pretrained(folder)


def save_student(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write weights as they are, config, generation config and tokenizer as one model folder, whole or not at all.

    Raises MachineError if the disk is full or cannot be written.
    """
    model.config.use_cache = True
    try:
        with whole_folder(folder) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    except REFUSALS as error:
        raise not_saved(folder, "the student", error) from error


def _source(config: StudentConfig, teacher: TeacherConfig) -> tuple[ModelConfig, str]:
    """Return the model that the student comes from, and its group in the config."""
    return (teacher, "teacher") if config.init == "cut" else (config, "student")


def _take_generation_config(model: PreTrainedModel, source: ModelConfig, group: str) -> None:
    """Give a model the generation config of the folder it comes from; without one it keeps its config's ids."""
    path = locate(source, group, needs_weights=False)
    with loading(path, "generation config", f"{group}.path"), contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path, revision=source.revision)
