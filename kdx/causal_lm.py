"""Load any causal language model and its tokenizer; split the model into backbone and output head.

N positions, V rows of the head, d width of the model.
"""

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# For a repository with pickled weights only, transformers would post its name and the user's token to a conversion
# service; the weights are read with torch.load(weights_only=True) instead. Read when transformers loads a model.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

import torch
import transformers
from filelock import FileLock
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import FastGELUActivation, NewGELUActivation

from kdx.config import SAFE_NAME, ModelConfig
from kdx.data.batches import MicroBatch
from kdx.data.files import nearby, resolve_path
from kdx.errors import MachineError, ModelError
from kdx.loading import loading
from kdx.run.files import cache_dir, known_digest, read_json, whole_folder

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap·tanh(scale·(h·Wᵀ + b)/softcap), without softcap scale·(h·Wᵀ + b).

    weight: [V, d]. bias: [V]. The product runs in the weight's dtype (autocast's, if it is on); its result and all
    after it in float32, or float64 where the weight is.
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
        """h·Wᵀ [n, V] in the weight's dtype: the matrix product, which wants many rows at once."""
        device = self.weight.device
        with torch.autocast(device.type, enabled=False):
            return hidden.to(device=device, dtype=self.weight.dtype) @ self.weight.T

    def finish(self, product: Tensor) -> Tensor:
        """Logits in float32 or float64 from h·Wᵀ: row by row, so any few rows at a time."""
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
        """Keep the first `num_ids` rows, as views: rows past the tokenizer's real ids are padding."""
        if num_ids == self.num_ids:
            return self
        bias = self.bias if self.bias is None else self.bias[:num_ids]
        return dataclasses.replace(self, weight=self.weight[:num_ids], bias=bias)

    def to(self, device: torch.device | None) -> "Head":
        """The head on a device; None leaves it where it is."""
        if device is None:
            return self
        bias = self.bias if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, weight=self.weight.to(device), bias=bias)

    def detached(self, weight: Tensor, bias: Tensor | None) -> "Head":
        """The same head on these tensors, without gradient."""
        return dataclasses.replace(self, weight=weight.detach(), bias=None if bias is None else bias.detach())

    @property
    def compute_dtype(self) -> torch.dtype:
        """What its product should run in: autocast's dtype where autocast is on, but float64 stays."""
        device_type = self.weight.device.type
        if self.weight.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
            return self.weight.dtype
        return torch.get_autocast_dtype(device_type)

    def in_compute_dtype(self) -> "Head":
        """The head with its weight in that dtype, converted once for many chunks."""
        dtype = self.compute_dtype
        return self if dtype == self.weight.dtype else dataclasses.replace(self, weight=self.weight.to(dtype))


def head_of(model: Any) -> Head:
    """The model's output head with all that its forward does to the logits (Cohere, Granite, Gemma)."""
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
    output = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)[batch.positions.to(output.last_hidden_state.device)]


def device_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The fastest safe dtype of a device, and why: bf16 where its processor has the instructions, else fp32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has bf16"
        return torch.float32, "this GPU has no bf16"
    if device.type == "cpu":
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16, "this CPU has bf16 instructions"
        return torch.float32, "this CPU has no bf16 instructions"
    return torch.float32, f"fp32 is safe on {device.type}"


def attention_for(config: ModelConfig, device: torch.device, max_length: int) -> str | None:
    """The attention kernel: as asked for, or on a CPU with short rows eager (a quarter faster there), else the model's."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    return "eager" if device.type == "cpu" and max_length <= 256 else None


def num_positions(model_config: Any) -> int | None:
    """The longest row that a model can read, if it says so."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(config: ModelConfig, group: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, or the one that `tokenizer` names. Raises ModelError."""
    path = resolve_path(config.tokenizer or config.path or "", f"{group}.path")
    extra: dict[str, Any] = {}
    if config.gguf_file and not config.tokenizer:
        path = str(_dequantised(Path(path), config.gguf_file, group))
    elif not config.tokenizer:
        _check_folder(Path(path), group, needs_weights=False)
        extra["revision"] = config.revision
    with loading(path, "tokenizer", f"{group}.tokenizer" if config.tokenizer else f"{group}.path"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code, **extra)
    if not tokenizer.is_fast:
        raise ModelError(f"{group}.tokenizer", "is a slow tokenizer without offsets", "Save it with tokenizer.json")
    return tokenizer


def load_config(config: ModelConfig, group: str) -> Any:
    """Load a model's configuration: its shape, without weights. Raises ModelError."""
    path = resolve_path(config.path or "", f"{group}.path")
    if config.gguf_file:
        path = str(_dequantised(Path(path), config.gguf_file, group))
    with loading(path, "config", f"{group}.path"):
        return AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)


def load_causal_lm(
    config: ModelConfig,
    group: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    quantization: str = "none",
    device_map: str | None = None,
) -> PreTrainedModel:
    """Load a model with every weight it needs, in eval mode. Raises ModelError, or MachineError for what is missing."""
    path = resolve_path(config.path or "", f"{group}.path")
    if config.gguf_file:
        path = str(_dequantised(Path(path), config.gguf_file, group))
    _check_folder(Path(path), group)
    extra: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if quantization != "none":
        extra["quantization_config"] = _quantization(quantization, dtype, group)
    with loading(path, "model", f"{group}.path"):
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **extra,
        )
    if _is_pickled(path, config.revision):
        log.info("%s has its weights as pytorch_model.bin alone: read with torch.load(weights_only=True)", path)
    missing, wrong = sorted(report["missing_keys"]), sorted(str(m) for m in report.get("mismatched_keys", ()))
    if missing or wrong:
        what = f"lacks {len(missing) or len(wrong)} tensors, the first {(missing or wrong)[0]}"
        raise ModelError(f"{group}.path", f"{path} {what}", "They would be random: use a complete checkpoint")
    if unused := sorted(report["unexpected_keys"]):
        log.warning("%s has %d tensors that its config.json has no place for: %s …", path, len(unused), unused[0])
    return ready(model, group)


def ready(model: PreTrainedModel, group: str) -> PreTrainedModel:
    """Put a model into eval mode, its activations fused, its split into backbone and head proven. Raises ModelError."""
    model.eval()  # no dropout while it is proven
    fuse_activations(model)
    check_split(model, group)
    return model


def fuse_activations(model: PreTrainedModel) -> None:
    """Take GPT-2's GELU in one kernel, not in the eight steps of transformers: most of them keep a tensor for backward."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (NewGELUActivation, FastGELUActivation):  # one formula, written in two ways
                setattr(module, name, nn.GELU(approximate="tanh"))


def check_split(model: PreTrainedModel, group: str) -> None:
    """Prove on a tiny batch that head(backbone(x)) is what the model itself computes; else refuse it by name."""
    name = type(model).__name__
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ModelError(f"{group}.path", f"{name} has no backbone and output head", "Use a causal language model")
    head = head_of(model)
    ids = torch.arange(3, 11, device=model.device).remainder(head.num_ids).unsqueeze(0)
    with torch.no_grad(), loading(name, "forward pass", f"{group}.path", "Use a causal language model"):
        own = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        ours = head.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1))
    # Relative to the spread: on fresh weights a forgotten soft-cap moves the logits by 1e-5 only.
    off = (own.to(ours) - ours).abs().max() / own.to(ours).std().clamp_min(1e-30)
    bar = {torch.float64: 1e-9, torch.float32: 1e-4}.get(head.weight.dtype, 5e-2)
    if not ours.isfinite().all():
        raise ModelError(f"{group}.path", f"{name} says what is not finite", "Give weights that are finite numbers")
    if not off < bar:
        what = f"{name} does more to its logits than kdx knows (off by {off.item():.1e} of their spread)"
        raise ModelError(f"{group}.path", what, "Report the architecture, or choose another model")


def common_ids(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Refuse two tokenizers that map ids to different tokens; the same size is no proof. Raises ModelError."""
    ours = {i: token for token, i in teacher.get_vocab().items()}
    theirs = {i: token for token, i in student.get_vocab().items()}
    differ = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if differ:
        first = differ[0]
        what = (
            f"teacher and student differ at {len(differ)} of {len(ours.keys() | theirs.keys())} ids, the first is "
            f"{first}: {ours.get(first)!r} and {theirs.get(first)!r}"
        )
        raise ModelError("tokenizer", what, "Choose a teacher and a student with the same tokenizer")


def weights_digest(config: ModelConfig, group: str) -> str:
    """What decides a model's weights: a digest of its files, or on the hub its repository and commit.

    Files are hashed once as they are now: by name, size, times and place on disk. Raises ModelError.
    """
    path = resolve_path(config.path or "", f"{group}.path")
    if config.gguf_file:
        path = str(_dequantised(Path(path), config.gguf_file, group))
    digest = hashlib.sha256()
    folder = Path(path)
    if folder.is_dir():
        patterns = ("config.json", *WEIGHT_FILES, *(["*.py"] if config.trust_remote_code else []))
        for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
            digest.update(f"{file.name}:{known_digest(file)};".encode())
    else:
        load_config(config, group)  # asks the hub what the revision is now, and keeps the answer in its cache
        kept = try_to_load_from_cache(path, "config.json", revision=config.revision)
        commit = Path(kept).parent.name if isinstance(kept, str) else uuid.uuid4()  # else nothing tells versions apart
        digest.update(f"{path}@{commit}".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the id → token map."""
    return hashlib.sha256(json.dumps(sorted((i, t) for t, i in tokenizer.get_vocab().items())).encode()).hexdigest()


def _dequantised(folder: Path, gguf_file: str, group: str) -> Path:
    """Dequantise a GGUF file into a model folder in the cache, once, whoever asks first."""
    source = folder / gguf_file
    if not source.is_file():
        raise ModelError(f"{group}.gguf_file", f"{source} does not exist", nearby(folder))
    if importlib.util.find_spec("gguf") is None:
        raise MachineError(f"{group}.gguf_file", "the package gguf is not installed", "Run: pip install gguf")
    stamp = known_digest(source)[:16]
    kept = cache_dir() / "gguf" / stamp
    if (kept / "config.json").is_file():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.parent / f"{stamp}.lock"):
            if not (kept / "config.json").is_file():
                log.info("dequantising %s once, to %s", gguf_file, kept)
                with loading(str(source), "model", f"{group}.gguf_file"):
                    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
                    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
                model.hf_quantizer = None  # save_pretrained refuses what came from GGUF unless told it is plain now
                if hasattr(model.config, "quantization_config"):
                    del model.config.quantization_config
                with whole_folder(kept) as beside:
                    model.save_pretrained(beside)
                    tokenizer.save_pretrained(beside)
    except OSError as error:
        mend = "Set KDX_CACHE to a folder with room"
        raise MachineError("KDX_CACHE", f"cannot write {kept}: {error}", mend) from None
    return kept


def _is_pickled(path: str, revision: str | None) -> bool:
    """Whether a model's weights exist, here or in the hub's cache, as a pickle and not as safetensors."""

    def has(name: str) -> bool:
        if Path(path).is_dir():
            return (Path(path) / name).is_file()
        return isinstance(try_to_load_from_cache(path, name, revision=revision), str)

    return has("pytorch_model.bin") and not (has("model.safetensors") or has("model.safetensors.index.json"))


def _quantization(kind: str, dtype: torch.dtype, group: str) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"{group}.quantization", "the package bitsandbytes is not installed", "Run: pip install bitsandbytes"
        )
    if kind == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _check_folder(folder: Path, group: str, needs_weights: bool = True) -> None:
    """Say clearly what is wrong with a local model folder, before transformers guesses."""
    if not folder.is_dir():
        return
    key = f"{group}.path"
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        mend = f"Merge it first: from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')"
        raise ModelError(key, f"{folder} is a LoRA adapter, not a model", mend)
    if (folder / "adapter_config.json").is_file():
        what = f"{folder} has a LoRA adapter beside its weights, and kdx would train without it"
        raise ModelError(key, what, "Merge it, or take adapter_config.json away")
    if not (folder / "config.json").is_file():
        raise ModelError(key, f"{folder} has no config.json", nearby(folder))
    if not read_json(folder / "config.json"):
        raise ModelError(key, f"{folder / 'config.json'} is damaged, or no JSON object", "Copy the model again")
    if needs_weights and not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ModelError(key, f"{folder} has no weights", nearby(folder))
    for index in folder.glob("*.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelError(key, f"{index} is damaged: it names no weights", "Copy the model again")
        if not all(SAFE_NAME.fullmatch(str(name)) for name in shards.values()):
            raise ModelError(key, f"{index} names weights outside its folder", "Do not load this checkpoint")
