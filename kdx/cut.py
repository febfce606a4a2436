"""Cut a student out of its teacher: some of its layers, and its embeddings, norms and head; proved before a step."""

import collections
import copy
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from kdx.causal_lm import load_config, loading, locate
from kdx.config import TeacherConfig
from kdx.errors import ConfigError, ModelError, one_line

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model.bin")
PER_LAYER = re.compile("layer|block|pattern|^intermediate_size$|^num_.*heads$")  # config lists with a value per layer
# The widths of the tiny model that proves a cut; whatever is not named here stays, the layers above all.
TINY = {
    4: "num_attention_heads n_head num_heads sliding_window window_size",
    8: "head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim hidden_size_per_layer_input",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank qk_head_dim",
    32: "hidden_size n_embd d_model embedding_size",
    64: "vocab_size vocab_size_per_layer_input intermediate_size n_inner ffn_dim ffn_hidden_size "
    "max_position_embeddings n_positions n_ctx",
}
TOLERANCE = 1e-5  # of the tiny model's logits, relative to their spread
HINT = "Choose another teacher, or student=hf"


def evenly_spread(num_layers: int, num_kept: int) -> list[int]:
    """Choose layers evenly, the first and the last among them."""
    return [round(i * (num_layers - 1) / max(1, num_kept - 1)) for i in range(num_kept)]


def cut(teacher: TeacherConfig, layers: int | list[int] | None, **how: Any) -> PreTrainedModel:
    """Build a smaller model from some of the teacher's layers, and its embeddings, norms and head; proved first.

    Only these tensors are read. layers: how many (evenly spread), or which. how: what else from_pretrained takes.
    Raises ConfigError or ModelError.
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
        prove(kind, config, how["device_map"])
        return assemble(kind, config, dict(stored_tensors(path, teacher.revision)), kept, **how)


def assemble(
    kind: type[PreTrainedModel], config: Any, stored: dict[str, Tensor], kept: list[int], **how: Any
) -> PreTrainedModel:
    """Build a model from these layers of a larger one of this config. Raises ConfigError or ModelError."""
    config, weights = copy.deepcopy(config), {}
    text = config.get_text_config()
    total = text.num_hidden_layers
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
    model, report = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **how)
    head, missing = model.get_output_embeddings(), set(report["missing_keys"])
    if missing == {f"{name}.weight" for name, part in model.named_modules() if part is head}:
        # The file has one tensor for both, whatever the config says.
        head.weight = model.get_input_embeddings().weight
        missing = set()
    for what, names in (("is missing", missing), ("has no place", report["unexpected_keys"])):
        if names:
            raise ModelError("teacher.path", f"its weights do not fit the student: {min(names)} {what}", HINT)
    return model


def _stack_of(names: Iterable[str], total: int) -> str:
    """Find what the names of all layers begin with, such as model.layers. Raises ConfigError."""
    numbers = collections.defaultdict(set)
    for name in names:
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            numbers[found[1]].add(int(found[2]))
    stacks = [stack for stack, seen in numbers.items() if seen == set(range(total))]
    if len(stacks) != 1:
        what = f"cannot be cut from this teacher: its weights have {len(stacks)} stacks of {total} layers"
        raise ConfigError("student", what, HINT)
    return stacks[0]


@torch.no_grad()
def prove(kind: type[PreTrainedModel], config: Any, device: torch.device | str = "cpu") -> None:
    """Prove on a tiny model of this class, with all its layers and random weights, that it can be cut.

    With all layers it gives the same logits; with half of them, those of the model with the other layers skipped; and
    it reloads from its own files. So lists by layer that are not understood cost no training. Raises ModelError.
    """
    row = torch.arange(3, 15, device=device).unsqueeze(0)
    try:
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            with torch.device(device):
                whole = kind(tiny(config)).eval()
            for parameter in whole.parameters():  # fresh norms and biases are ones and zeros, which hide a wrong place
                nn.init.normal_(parameter, std=0.2)
            whole.save_pretrained(folder)
            tensors = dict(stored_tensors(folder, None))
            total = whole.config.get_text_config().num_hidden_layers
            stack = whole.get_submodule(_stack_of((name for name, _ in whole.named_parameters()), total))
            for kept in (list(range(total)), evenly_spread(total, max(1, total // 2))):
                for i in set(range(total)) - set(kept):
                    stack[i].register_forward_hook(_skip, with_kwargs=True)
                part = assemble(kind, whole.config, tensors, kept, device_map=device).eval()
                ours, theirs = (model(input_ids=row, use_cache=False).logits for model in (part, whole))
                if not (ours - theirs).abs().max() < TOLERANCE * theirs.std():
                    raise ValueError(f"{len(kept)} of {total} layers give other logits than the model without the rest")
                part.save_pretrained(Path(folder) / "part")
                again = kind.from_pretrained(Path(folder) / "part", device_map=device).eval()
                if not torch.equal(again(input_ids=row, use_cache=False).logits, ours):
                    raise ValueError("its config does not reload as it was saved")
    except Exception as error:  # whatever its code does with lists that were cut
        what = f"{kind.__name__} cannot be cut: {type(error).__name__}: {one_line(error)}"
        raise ModelError("student", what, HINT) from error


def _skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Have a layer give back the hidden states that it was given."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def tiny(config: Any) -> Any:
    """Return a config of the same architecture and number of layers, with small widths."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    num_groups, num_heads = (getattr(text, f"num_{name}_heads", None) for name in ("key_value", "attention"))
    for size, names in TINY.items():
        for name in names.split():
            if isinstance(vars(text).get(name), int):
                setattr(text, name, size)
    if isinstance(num_groups, int):
        text.num_key_value_heads = 4 if num_groups == num_heads else min(num_groups, 2)
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
    for name in FILES:
        is_last = name == FILES[-1]
        if file := cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=is_last):
            break
    is_index = file.endswith(".json")
    for part in get_checkpoint_shard_files(path, file, revision=revision)[0] if is_index else [file]:
        yield from load_state_dict(part).items()
