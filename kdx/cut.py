"""Cut a student out of its teacher: some of its layers, and its embeddings, norms and head; proved before a step."""

import collections
import copy
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from kdx.causal_lm import generation_config, load_config, loading, locate, ready
from kdx.config import TeacherConfig
from kdx.errors import ConfigError, ModelError

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model.bin")
PER_LAYER = re.compile("layer|block|pattern|^intermediate_size$|^num_.*heads$")  # config lists with a value per layer
# The widths of the tiny model that proves a cut; whatever is not named here stays, the layers above all.
TINY = {
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "head_dim": 8, "kv_channels": 8,
    "intermediate_size": 64, "n_inner": 64, "ffn_dim": 64, "ffn_hidden_size": 64, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "sliding_window": 4, "window_size": 4,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
}  # fmt: skip
TOLERANCE = 1e-5  # of the tiny model's logits, relative to their spread


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

    Only these tensors are read from the teacher's files. That the cut is right is proved first, on a tiny model of the
    same class. layers: how many (evenly spread), or which. Raises ConfigError or ModelError.
    """
    config, path = load_config(teacher, "teacher"), locate(teacher, "teacher")
    total = config.get_text_config().num_hidden_layers
    kept = evenly_spread(total, layers) if isinstance(layers, int) else list(layers or ())
    if max(kept) >= total or len(set(kept)) != len(kept):
        what = f"is {layers}; the teacher's layers are 0 to {total - 1}, each at most once"
        raise ConfigError("student.layers", what, f"Choose at most {total} of them")
    with loading(path, "model", "teacher.path"):
        with torch.device("meta"):  # to learn its class, which may be code of the model's own
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=teacher.trust_remote_code))
        prove(kind, config)
        tensors = stored_tensors(path, teacher.revision)
        model = assemble(kind, config, tensors, kept, dtype=dtype, attn_implementation=attn_implementation)
    model.config.name_or_path = path
    model.generation_config = generation_config(teacher, "teacher")
    return ready(model, "student")


def assemble(
    kind: type[PreTrainedModel], config: Any, tensors: Iterable[tuple[str, Tensor]], kept: list[int], **options: Any
) -> PreTrainedModel:
    """Build a model from these layers of a larger one of this config. Raises ConfigError or ModelError."""
    config, stored, weights = copy.deepcopy(config), dict(tensors), {}
    text = config.get_text_config()
    total = text.num_hidden_layers
    if (every := getattr(text, "decoder_sparse_step", 1)) > 1:  # Qwen: which layers have experts, as a rhythm
        text.mlp_only_layers = [i for i in range(total) if i in text.mlp_only_layers or (i + 1) % every]
        text.decoder_sparse_step = 1
    for name, value in list(vars(text).items()):
        if not PER_LAYER.search(name) or not isinstance(value, list | tuple):
            continue
        if len(value) == total:
            setattr(text, name, [value[i] for i in kept])
        elif all(type(i) is int and 0 <= i < total for i in value):  # numbers of layers, as of those without experts
            setattr(text, name, [kept.index(i) for i in value if i in kept])
    if first := getattr(text, "first_k_dense_replace", None):  # DeepSeek: so many layers without experts
        text.first_k_dense_replace = sum(i < first for i in kept)
    text.num_hidden_layers = len(kept)
    stack = _stack_of(stored, total)
    for name, tensor in stored.items():
        layer = re.match(rf"{re.escape(stack)}\.(\d+)\.", name)
        if layer is None:
            weights[name] = tensor.clone()
        elif int(layer[1]) in kept:
            weights[f"{stack}.{kept.index(int(layer[1]))}.{name[layer.end() :]}"] = tensor.clone()
    _tie_as_stored(kind, config, weights)
    model, report = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **options)
    for what, names in (("is missing", report["missing_keys"]), ("has no place", report["unexpected_keys"])):
        if names:
            text = f"the teacher's weights do not fit the student: {min(names)} {what}"
            raise ModelError("teacher.path", text, "Choose another teacher, or student=hf")
    return model


def _tie_as_stored(kind: type[PreTrainedModel], config: Any, weights: dict[str, Tensor]) -> None:
    """Tie head and embeddings if the files have one tensor for both: some configs say otherwise."""
    with torch.device("meta"):
        model = kind(copy.deepcopy(config))
    named = {id(module): name for name, module in model.named_modules()}
    embeddings, head = (
        weights.get(f"{named.get(id(module))}.weight")
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if embeddings is not None:
        is_tied = head is None or (head.shape == embeddings.shape and torch.equal(head, embeddings))
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = is_tied


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


def prove(kind: type[PreTrainedModel], config: Any) -> None:
    """Prove on a tiny model of this class, with all its layers and random weights, that it can be cut.

    With all layers it gives the same logits; with half of them, those of the model with the other layers skipped; and
    it reloads from its own files. So a config whose lists by layer are not understood is found before hours of
    training. Raises ModelError.
    """
    name = kind.__name__
    try:
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            whole = kind(tiny(config)).eval()
            for parameter in whole.parameters():  # fresh norms and biases are ones and zeros, which hide a wrong place
                nn.init.normal_(parameter, std=0.2)
            whole.save_pretrained(folder)
            tensors = dict(stored_tensors(folder, None))
            total = whole.config.get_text_config().num_hidden_layers
            half = evenly_spread(total, max(1, total // 2))
            row = torch.arange(3, 15).unsqueeze(0)
            for kept in (list(range(total)), half):
                part = assemble(kind, whole.config, tensors.items(), kept).eval()
                stack = _stack_of(dict(whole.named_parameters()), total)
                ours, theirs = _logits(part, row), _logits(whole, row, stack, set(range(total)) - set(kept))
                if not (ours - theirs).abs().max() < TOLERANCE * theirs.std():
                    raise ValueError(f"{len(kept)} of {total} layers give other logits than the model without the rest")
                part.save_pretrained(Path(folder) / "part")
                again = kind.from_pretrained(Path(folder) / "part").eval()
                if not torch.equal(_logits(again, row), ours):
                    raise ValueError("its config does not reload as it was saved")
    except Exception as error:  # whatever its code does with lists that were cut
        what = f"{name} cannot be cut: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ModelError("student", what[:300].rstrip(". "), "Choose another teacher, or student=hf") from error


@torch.no_grad()
def _logits(model: PreTrainedModel, row: Tensor, stack: str = "", skipped: Iterable[int] = ()) -> Tensor:
    """Run a model, some of its layers skipped: they give back the hidden states that they were given."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [model.get_submodule(f"{stack}.{i}").register_forward_hook(skip, with_kwargs=True) for i in skipped]
    try:
        return model(input_ids=row, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def tiny(config: Any) -> Any:
    """Return a config of the same architecture and number of layers, with small widths."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    grouped = getattr(text, "num_key_value_heads", None)
    is_grouped = grouped not in (None, getattr(text, "num_attention_heads", None))
    for name, size in TINY.items():
        if isinstance(vars(text).get(name), int):
            setattr(text, name, size)
    if isinstance(expand := getattr(text, "expand", None), int) and hasattr(text, "num_heads"):  # Mamba 2
        text.num_heads = expand * TINY["hidden_size"] // TINY["head_dim"]
    if isinstance(grouped, int):
        text.num_key_value_heads = min(grouped, 2) if is_grouped else 4
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 1)
    rope = getattr(text, "rope_parameters", None) or {}
    for scaling in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        for name, value in scaling.items():
            if isinstance(value, list):  # a factor for each pair of a head's values
                scaling[name] = value[:4]
    return config


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
