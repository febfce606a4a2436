"""Load any causal language model and its tokenizer; split the model into backbone and output head.

N positions, V rows of the head, d width of the model.
"""

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where a repository has pickled weights only, transformers would post its name and the user's token to a conversion
# service. Set before transformers is imported; kdx reads such weights with torch.load(weights_only=True).
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import FastGELUActivation, NewGELUActivation

from kdx.config import SAFE_NAME, ModelConfig, replaced
from kdx.data.batches import MicroBatch
from kdx.data.files import nearby, resolve_path
from kdx.errors import KdxError, MachineError, ModelError, of_hub, one_line, out_of_memory
from kdx.run.files import cache_dir, read_json, whole_folder
from kdx.run.identity import adapter_base, content_hash

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of check_split; lower precisions 5e-2
HINTS = {  # words of transformers' errors, in small letters → what helps
    "for this kind of automodel: automodelforcausallm": "kdx distils causal language models (decoders): choose one",
    "fp8": "fp8 weights need a GPU that has it: choose the model's bf16 weights",
}
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap·tanh(scale·(h·Wᵀ + b)/softcap), without softcap scale·(h·Wᵀ + b).

    weight: [V, d]. bias: [V]. The product h·Wᵀ is computed in the weight's dtype (under autocast, in autocast's);
    everything after it in float32, or in float64 if the weight is float64.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def num_ids(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] → [n, V], float32 or float64."""
        return self.finish(self.product(hidden))

    def product(self, hidden: Tensor) -> Tensor:
        """Multiply h·Wᵀ → [n, V] in the weight's dtype; fastest over many rows at once."""
        device = self.weight.device
        with torch.autocast(device.type, enabled=False):
            hidden = hidden.to(device=device, dtype=self.weight.dtype)
            if device.type != "cuda" or self.num_ids % 8 == 0 or torch.is_grad_enabled():
                return hidden @ self.weight.T
            # A GPU's fast kernels need rows that begin at multiples of 16 bytes, whatever the number of ids.
            padded = hidden.new_empty(len(hidden), -(-self.num_ids // 8) * 8)
            return torch.mm(hidden, self.weight.T, out=padded[:, : self.num_ids])

    def finish(self, product: Tensor) -> Tensor:
        """Turn the product h·Wᵀ into logits, float32 or float64; rows are independent, so any number at a time."""
        z = product if product.dtype == torch.float64 else product.float()
        if self.bias is not None:
            z = z + self.bias.to(z.device)
        if self.scale != 1:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def through(self, logits: Tensor, grad: Tensor) -> Tensor:
        """Carry a gradient [n, V] with respect to `logits` back to the product h·Wᵀ + b, in place."""
        if self.softcap is not None:
            grad.mul_(1 - (logits / self.softcap) ** 2)
        return grad.mul_(self.scale) if self.scale != 1 else grad

    def cut(self, num_ids: int) -> "Head":
        """Keep the first `num_ids` rows, as views: rows beyond the tokenizer's ids are padding."""
        if num_ids == self.num_ids:
            return self
        return self._changed(lambda tensor: tensor[:num_ids])

    def to(self, device: torch.device | None) -> "Head":
        """Move the head to a device; None leaves it where it is."""
        return self if device is None else self._changed(lambda tensor: tensor.to(device))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Head":
        bias = None if self.bias is None else change(self.bias)
        return dataclasses.replace(self, weight=change(self.weight), bias=bias)

    def detached(self, weight: Tensor, bias: Tensor | None) -> "Head":
        """Return the same head with these tensors, detached from the graph."""
        return dataclasses.replace(self, weight=weight.detach(), bias=None if bias is None else bias.detach())

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the product: autocast's if autocast is on, except that float64 stays float64."""
        device_type = self.weight.device.type
        if self.weight.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
            return self.weight.dtype
        return torch.get_autocast_dtype(device_type)

    def in_compute_dtype(self) -> "Head":
        """Return the head with its weight in that dtype, converted once for many chunks."""
        dtype = self.compute_dtype
        return self if dtype == self.weight.dtype else dataclasses.replace(self, weight=self.weight.to(dtype))


def head_of(model: Any) -> Head:
    """Return a model's output head with everything its forward does to the logits (Cohere, Granite, Gemma)."""
    layer = model.get_output_embeddings()
    text = model.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(text, "final_logit_softcapping", None))


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    if hasattr(model, "activation_checkpointing_enable"):  # transformers renamed it within version 5
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def counted_hidden(model: Any, batch: MicroBatch) -> Tensor:
    """Run the backbone and keep the last hidden states at the positions whose next token counts → [N, d]."""
    mask = batch.attention_mask if getattr(model, "needs_attention_mask", True) else None
    output = model.base_model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)[batch.positions.to(output.last_hidden_state.device)]


def device_dtype(device: torch.device) -> str:
    """Return the fastest safe dtype of a device: bf16 if its processor has the instructions, else fp32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_new = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        has_bf16 = device.type == "cpu" and is_new
    return "bf16" if has_bf16 else "fp32"


def attention_for(config: ModelConfig, device: torch.device, max_length: int) -> str | None:
    """Choose the attention kernel: the configured one, eager for short rows on a CPU (25 % faster), else the model's."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    return "eager" if device.type == "cpu" and max_length <= 256 else None


def num_positions(model_config: Any) -> int | None:
    """Return the longest row that a model can read, or None if its config does not say."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(config: ModelConfig, group: str) -> PreTrainedTokenizerBase:
    """Load a model's own tokenizer, or the one named by `tokenizer`. Raises ModelError."""
    if config.tokenizer:
        path, revision, key = resolve_path(config.tokenizer, f"{group}.tokenizer"), None, f"{group}.tokenizer"
    else:
        path, revision, key = locate(config, group), config.revision, f"{group}.path"
    with loading(path, "tokenizer", key):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=config.trust_remote_code)
    if not tokenizer.is_fast:
        what = f"the tokenizer in {path} is a slow one ({type(tokenizer).__name__}), which cannot say where tokens are"
        raise ModelError(key, what, f"Name one with a tokenizer.json: {group}.tokenizer=...")
    return tokenizer


def load_config(config: ModelConfig, group: str) -> Any:
    """Load a model's configuration: its shape, without weights. Raises ModelError."""
    path = locate(config, group)
    with loading(path, "config", f"{group}.path"):
        return AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)


def generation_config(config: ModelConfig, group: str) -> GenerationConfig:
    """Read a model's generation config; without one, what its config says of stopping. Raises ModelError."""
    path = locate(config, group)
    with loading(path, "generation config", f"{group}.path"):
        try:
            return GenerationConfig.from_pretrained(path, revision=config.revision)
        except OSError:
            return GenerationConfig.from_model_config(load_config(config, group))


def stop_ids(config: GenerationConfig) -> list[int]:
    """Return the ids that end a generation."""
    ids = config.eos_token_id
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def load_causal_lm(
    config: ModelConfig,
    group: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    quantization: str = "none",
    device_map: str | None = None,
) -> PreTrainedModel:
    """Load a model in eval mode, complete. Raises ModelError, or MachineError if a package is not installed."""
    path = locate(config, group)
    quantised = dict[str, Any]()  # None would undo what a config.json says
    with loading(path, "model", f"{group}.path"):
        if quantization != "none":
            how = {f"load_in_{quantization}": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
            quantised["quantization_config"] = BitsAndBytesConfig(**how)
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            device_map=device_map,
            **quantised,
        )
    if missing := sorted(report["missing_keys"]):
        what = f"{path} lacks {len(missing)} tensors, the first {missing[0]}"
        raise ModelError(f"{group}.path", what, "They would be random: use a complete checkpoint")
    if unused := sorted(report["unexpected_keys"]):
        log.warning("%s has %d tensors that its config.json has no place for: %s …", path, len(unused), unused[0])
    return ready(model, group)


def ready(model: PreTrainedModel, group: str) -> PreTrainedModel:
    """Put a model into eval mode, fuse its activations and check its split. Raises ModelError."""
    model.eval()  # check it without dropout
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None  # its look at the ids makes a GPU wait
    fuse_activations(model)
    check_split(model, group)
    return model


def fuse_activations(model: PreTrainedModel) -> None:
    """Compute GPT-2's GELU in one kernel: transformers takes eight steps, most of which save a tensor for backward."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (NewGELUActivation, FastGELUActivation):  # the same formula, written in two ways
                setattr(module, name, nn.GELU(approximate="tanh"))


def check_split(model: PreTrainedModel, group: str) -> None:
    """Check on a tiny row that head(backbone(x)) equals the model's own logits. Raises ModelError if not.

    Sets `model.needs_attention_mask`: False if what follows the row, without a mask, does not change it.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None or model.base_model is model:
        hint = "Choose another model: kdx needs model.base_model and an output head (Llama 4 names them otherwise)"
        raise ModelError(f"{group}.path", f"{name} has no backbone and output head that kdx can find", hint)
    head = head_of(model)
    row = torch.arange(3, 11, device=model.device).remainder(head.num_ids).unsqueeze(0)
    rows = [row, torch.cat([row, row], dim=1), torch.cat([row, row.flip(1)], dim=1)]  # alone, and followed by others
    with torch.no_grad():
        own = model(input_ids=row, use_cache=False).logits
        alone, *followed = (
            model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, : row.shape[1]] for ids in rows
        )
        ours = head.logits(alone)
        own = own.to(ours)
        # Relative to the spread: with fresh weights a missed soft-cap changes the logits by only 1e-5.
        off, off_followed = (
            (logits - own).abs().max() / own.std().clamp_min(1e-30) for logits in (ours, head.logits(followed[0]))
        )
    bar = TOLERANCE.get(head.weight.dtype, 5e-2)
    if not ours.isfinite().all():
        raise ModelError(f"{group}.path", f"the logits of {name} are not finite", "Check its weights for NaN and inf")
    if not off < bar:
        what = f"{name} does more to its logits than kdx knows (off by {off.item():.1e} of their spread)"
        raise ModelError(f"{group}.path", what, "Report the architecture, or choose another model")
    # A mixture's experts round differently when other tokens are routed; its auxiliary loss must not see padding.
    is_causal = torch.equal(*followed) and bool(off_followed < bar)
    model.needs_attention_mask = not is_causal or bool(getattr(model.config, "output_router_logits", False))


def locate(config: ModelConfig, group: str) -> str:
    """Return a model's folder (for a GGUF file, its dequantised copy) or hub id. Raises ModelError."""
    path, key = resolve_path(config.path or "", f"{group}.path"), f"{group}.path"
    folder = Path(path)
    if config.gguf_file:
        return str(_dequantised(folder, config.gguf_file, group))
    if not folder.is_dir() and not HUB_NAME.fullmatch(path):
        raise ModelError(key, f"{path} does not exist", nearby(folder))
    if (folder / "adapter_config.json").is_file():
        if group == "teacher":
            raise ModelError(key, f"{folder} is a LoRA adapter", f"Name its base, and teacher.adapter={folder}")
        if not (base := adapter_base(str(folder))):
            what, hint = f"{folder} is an adapter that names no base", "Add base_model_name_or_path to its config"
            raise ModelError(key, what, hint)
        return locate(replaced(config, path=base), group)
    for index in folder.glob("*.index.json"):
        shards = read_json(index).get("weight_map") or {"": ""}
        if not all(SAFE_NAME.fullmatch(str(name)) for name in shards.values()):
            raise ModelError(key, f"{index} is damaged, or names files outside its folder", "Copy the model again")
    return path


@contextlib.contextmanager
def loading(path: str, what: str, key: str) -> Iterator[None]:
    """Turn an error while loading a model into one line with the library's own message."""
    try:
        yield
    except KdxError:
        raise
    except Exception as error:
        message = one_line(error).partition(" Model type should be one of")[0]
        what, hint = f"cannot load the {what} in {path}: {message}", nearby(Path(path))
        if memory := out_of_memory(error):
            raise memory from error
        if isinstance(error, ImportError):
            raise MachineError(key, what, "Install the package") from error
        if not Path(path).exists():
            what = f"{path} is not a folder here, and cannot be read from the hub"
            raise of_hub(error, ModelError, key, what, "Log in for gated models (hf auth login). " + hint) from error
        if isinstance(error, SafetensorError):
            hint = "Copy the weights again; from git: git lfs pull"
        hint = next((better for words, better in HINTS.items() if words in what.lower()), hint)
        raise ModelError(key, what, hint) from error


def _dequantised(folder: Path, gguf_file: str, group: str) -> Path:
    """Dequantise a GGUF file into a model folder in the cache, once for all processes."""
    source = folder / gguf_file
    if not source.is_file():
        raise ModelError(f"{group}.gguf_file", f"{source} does not exist", nearby(folder))
    cached = cache_dir() / "gguf" / content_hash(source)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):
        if not cached.is_dir():
            log.info("dequantising %s once, to %s", gguf_file, cached)
            with loading(str(source), "model", f"{group}.gguf_file"):
                model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
            model.hf_quantizer = None  # save_pretrained refuses a GGUF model unless it counts as plain
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            with whole_folder(cached) as beside:
                model.save_pretrained(beside)
                tokenizer.save_pretrained(beside)
    return cached
