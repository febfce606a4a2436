"""Load any causal language model and its tokenizer; split the model into backbone and output head.

N positions, V rows of the head, d width of the model.
"""

import contextlib
import dataclasses
import functools
import logging
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where a repository has pickled weights only, transformers would post its name and the user's token to a conversion
# service. Set before transformers is imported; kdx reads such weights with torch.load(weights_only=True).
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

import torch
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

from kdx.config import ModelConfig, replaced
from kdx.data.batches import MicroBatch
from kdx.data.files import nearby, resolve_path
from kdx.errors import MachineError, ModelError, of_hub, one_line, user_error
from kdx.run.files import cache_dir, locked, whole_folder
from kdx.run.identity import adapter_base, content_hash

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of check_split; lower precisions 5e-2
HINTS = {  # words of transformers' errors, in small letters → what helps
    "for this kind of automodel: automodelforcausallm": "kdx distils causal language models (decoders): choose one",
    "fp8": "fp8 weights need a GPU that has it: choose the model's bf16 weights",
    "target modules {": "Name the base that the adapter was trained with: its adapter_config.json names it",
    "deserializing header": "Copy the weights again; from git: git lfs pull",
}


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
        bias = None if self.bias is None else self.bias[:num_ids]
        return dataclasses.replace(self, weight=self.weight[:num_ids], bias=bias)

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


def counted_hidden(model: Any, batch: MicroBatch) -> Tensor:
    """Run the backbone and keep the last hidden states at the positions whose next token counts → [N, d]."""
    mask = batch.attention_mask if getattr(model, "needs_attention_mask", True) else None
    run = compiled() if getattr(model, "is_compiled", False) else operator.call
    hidden = run(model.base_model, input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.positions.to(hidden.device)]


@functools.cache
def compiled() -> Callable[..., Any]:
    """Compile the call of a backbone: a graph for each model and mode (training, measuring) serves all lengths."""
    torch._dynamo.config.recompile_limit = 64  # of a process
    return torch.compile(lambda backbone, **inputs: backbone(**inputs), dynamic=True)


def device_dtype(device: torch.device) -> str:
    """Return the fastest safe dtype of a device: bf16 if its processor has the instructions, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if device.type == "cpu" and has_bf16 else "fp32"


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
        what = f"the tokenizer in {path} is a slow one ({type(tokenizer).__name__}), without character offsets"
        raise ModelError(key, what, f"Name one with a tokenizer.json: {group}.tokenizer=...")
    return tokenizer


def load_config(config: ModelConfig, group: str) -> Any:
    """Load a model's configuration: its shape, without weights. Raises ModelError."""
    path = locate(config, group)
    with loading(path, "config", f"{group}.path"):
        return AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)


def generation_config(config: ModelConfig, group: str) -> GenerationConfig:
    """Read a model's generation config; without one, what its config says of stopping. Raises ModelError."""
    try:
        return GenerationConfig.from_pretrained(locate(config, group), revision=config.revision)
    except OSError:
        return GenerationConfig.from_model_config(load_config(config, group))


def stop_ids(config: GenerationConfig) -> list[int]:
    """Return the ids that end a generation."""
    ids = config.eos_token_id
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def load_causal_lm(
    config: ModelConfig, group: str, *, dtype: Any, quantization: str = "none", is_proved: bool = False, **how: Any
) -> PreTrainedModel:
    """Load a model in eval mode, complete, with its adapter if it has one. Raises ModelError or MachineError.

    is_proved: whether its split was checked before. how: what else from_pretrained takes, such as a device_map.
    """
    path = locate(config, group)
    how |= {"dtype": dtype, "revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with loading(path, "model", f"{group}.path"):
        if quantization != "none":
            nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
            how["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantization}": True}, **nf4)
        model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **how)
    if missing := sorted(report["missing_keys"]):
        what = f"{path} is missing {len(missing)} tensors, such as {missing[0]}"
        raise ModelError(f"{group}.path", what, "They would be initialised at random: use a complete checkpoint")
    if unused := sorted(report["unexpected_keys"]):
        log.warning("%s: ignored %d tensors unknown to its architecture, such as %s", path, len(unused), unused[0])
    ready(model, group, is_proved=is_proved)
    if adapter := getattr(config, "adapter", None):
        load_adapter(model, adapter, "teacher.adapter")
    elif config.path and adapter_base(config.path):
        load_adapter(model, config.path, f"{group}.path")
    return model


def load_adapter(model: Any, path: str, key: str) -> None:
    """Freeze a model and load an adapter folder into it, to be trained further. Raises ModelError."""
    folder = resolve_path(path, key)
    model.requires_grad_(False)
    with loading(folder, "adapter", key):
        report = model.load_adapter(folder, is_trainable=True, ignore_mismatched_sizes=True)
    config = model.peft_config["default"]
    if config.peft_type != "LORA" or config.modules_to_save:
        what = f"{folder} is not LoRA alone ({config.peft_type}, modules_to_save: {config.modules_to_save})"
        raise ModelError(key, what, "Merge it into its base first")
    mismatched = {name for name, *_ in report.mismatched_keys}
    if wrong := sorted(report.missing_keys | report.unexpected_keys | mismatched):
        what = f"{folder} does not fit its base: {len(wrong)} tensors are missing, unknown or of another shape"
        hint = f"Name the base that it was trained with: {config.base_model_name_or_path}"
        raise ModelError(key, f"{what}, the first {wrong[0]}", hint)


def ready(model: PreTrainedModel, group: str, *, is_proved: bool = False) -> PreTrainedModel:
    """Put a model into eval mode, fuse its activations and check its split, on its device. Raises ModelError."""
    model.eval()  # check it without dropout
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None  # its look at the ids makes a GPU wait
    fuse_activations(model)
    if not is_proved:
        check_split(model, group)
    # Merges and full fine-tunes leave the flag as it was: what the tensors say is saved.
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = is_tied
    return model


def fuse_activations(model: PreTrainedModel) -> None:
    """Compute GPT-2's GELU in one kernel: transformers takes eight steps, most of which save a tensor for backward."""
    for name, part in list(model.named_modules()):
        if type(part) in (NewGELUActivation, FastGELUActivation):  # the same formula, written in two ways
            model.set_submodule(name, nn.GELU(approximate="tanh"))


def check_split(model: PreTrainedModel, group: str) -> None:
    """Check on a tiny row that head(backbone(x)) equals the model's own logits. Raises ModelError if not.

    Sets `model.needs_attention_mask`: False if what follows the row, without a mask, does not change it.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None or model.base_model is model:
        hint = "Choose another model: kdx needs model.base_model and an output head (Llama 4 names them differently)"
        raise ModelError(f"{group}.path", f"{name} has no backbone and output head that kdx can find", hint)
    head = head_of(model)
    row = torch.arange(3, 11, device=model.device).remainder(head.num_ids).unsqueeze(0)
    with torch.no_grad():
        own = model(input_ids=row, use_cache=False).logits
        alone, *followed = (
            model.base_model(input_ids=torch.cat([row, *more], dim=1), use_cache=False).last_hidden_state[:, :8]
            for more in ([], [row], [row.flip(1)])  # what follows the row
        )
        ours, ours_followed = head.logits(alone), head.logits(followed[0])
    own = own.to(ours)
    # Relative to the spread: with fresh weights a missed soft-cap changes the logits by only 1e-5.
    bar = TOLERANCE.get(head.weight.dtype, 5e-2) * own.std().clamp_min(1e-30)
    if not (off := (ours - own).abs().max()) < bar:
        what = f"{name} computes logits in a way kdx does not support, or they are not finite (off by {off.item():.1e})"
        raise ModelError(f"{group}.path", what, "Check its weights for NaN, or choose another model")
    # A mixture's experts round differently when other tokens are routed; its auxiliary loss must not see padding.
    is_causal = torch.equal(*followed) and bool((ours_followed - own).abs().max() < bar)
    model.needs_attention_mask = not is_causal or bool(getattr(model.config, "output_router_logits", False))


def locate(config: ModelConfig, group: str) -> str:
    """Return a model's folder (of a GGUF file its dequantised copy, of an adapter its base) or hub id."""
    path = resolve_path(config.path or "", f"{group}.path")
    if config.gguf_file:
        return str(_dequantised(Path(path), config.gguf_file, group))
    if not (base := adapter_base(path)):
        return path
    if group == "teacher":
        raise ModelError("teacher.path", f"{path} is a LoRA adapter", f"Name its base, and teacher.adapter={path}")
    return locate(replaced(config, path=base), group)


@contextlib.contextmanager
def loading(path: str, what: str, key: str) -> Iterator[None]:
    """Turn an error while loading a model into one line with the library's own message."""
    try:
        yield
    except Exception as error:
        if user_error(error):
            raise
        message = one_line(error).partition(" Model type should be one of")[0]
        what, hint = f"cannot load the {what} in {path}: {message}", nearby(Path(path))
        if isinstance(error, ImportError):
            raise MachineError(key, what, "Install the package") from error
        if not Path(path).exists():
            what = f"{path} is not a folder here, and cannot be read from the hub"
            raise of_hub(error, ModelError, key, what, "Log in for gated models (hf auth login). " + hint) from error
        hint = next((better for words, better in HINTS.items() if words in what.lower()), hint)
        raise ModelError(key, what, hint) from error


def _dequantised(folder: Path, gguf_file: str, group: str) -> Path:
    """Dequantise a GGUF file into a model folder in the cache, once for all processes."""
    source = folder / gguf_file
    if not source.is_file():
        raise ModelError(f"{group}.gguf_file", f"{source} does not exist", nearby(folder))
    cached = cache_dir() / "gguf" / content_hash(source)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{cached}.lock")):
        if not cached.is_dir():
            log.info("dequantising %s once, to %s", gguf_file, cached)
            with loading(str(source), "model", f"{group}.gguf_file"):
                model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
            model.hf_quantizer = None  # save_pretrained refuses a GGUF model unless it counts as plain
            vars(model.config).pop("quantization_config", None)
            with whole_folder(cached) as beside:
                model.save_pretrained(beside)
                tokenizer.save_pretrained(beside)
    return cached
