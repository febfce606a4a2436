"""Load the student, or initialise it; save it as an ordinary model folder."""

import collections
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdx.adapter import is_adapted
from kdx.causal_lm import generation_config, load_causal_lm, load_config, loading, locate, ready, stop_ids
from kdx.config import ModelConfig, StudentConfig, TeacherConfig
from kdx.cut import cut, stored_tensors
from kdx.errors import ModelError
from kdx.run.files import saving, whole_folder

log = logging.getLogger(__name__)


def load_student(
    config: StudentConfig, teacher: TeacherConfig, *, dtype: torch.dtype, seed: int, device: Any = "cpu", **how: Any
) -> PreTrainedModel:
    """Return the student on its device in eval mode, with the generation config of the model it comes from.

    how: attn_implementation, and for a pretrained base what else load_causal_lm takes. Raises ConfigError or ModelError.
    """
    source, group = _source(config, teacher)
    shape = load_config(source, group)
    if getattr(shape, "quantization_config", None):
        raise ModelError(f"{group}.path", f"{source.path} is quantised and cannot be trained", "Use its full weights")
    how["dtype"] = dtype
    if config.init == "pretrained":
        model = load_causal_lm(config, "student", device_map=device, **how)
    elif config.init == "cut":
        model = ready(cut(teacher, config.layers, device_map=device, **how), "student")
    else:
        torch.manual_seed(seed)
        how["trust_remote_code"] = config.trust_remote_code
        with loading(str(config.path), "shape", "student.path"):
            model = ready(AutoModelForCausalLM.from_config(shape, **how).to(device), "student")
    freeze_unread(model)
    if getattr(model.config, "output_router_logits", False):
        log.warning("the router's auxiliary loss, which the student's config asks for, is left out")
    with loading(str(source.path), "generation config", f"{group}.path"):
        if config.init != "pretrained":
            model.generation_config = generation_config(source, group)
        model.generation_config.validate(strict=True)  # as save_pretrained does after hours of training
    return model


def freeze_unread(model: PreTrainedModel) -> None:
    """Freeze what text does not reach, as the image encoder of a multimodal model: it gets no gradient."""
    if model.config.get_text_config() is model.config:
        return
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    read = {id(parameter) for part in parts for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


def saved_dtype(config: StudentConfig, teacher: TeacherConfig) -> str:
    """Choose the dtype that the student is saved in: if auto, that of most weights it comes from. Raises ModelError."""
    source, group = _source(config, teacher)
    if config.save_dtype != "auto":
        return config.save_dtype
    if config.init == "random" or source.gguf_file:
        return "bf16"
    tensors = stored_tensors(locate(source, group), source.revision)
    dtypes = collections.Counter(tensor.dtype for name, tensor in tensors if name.endswith("weight"))
    (dtype, _), *_ = dtypes.most_common(1)
    return {torch.float32: "fp32", torch.float16: "fp16"}.get(dtype, "bf16")


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast a student's weights to the dtype it is saved in, or to bfloat16 if float16 would overflow."""
    if is_adapted(model):  # saved alone, in float32; its base, perhaps quantised, stays as in training
        return
    weights = [tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()]
    if dtype == torch.float16 and any(weight.detach().half().isinf().any() for weight in weights):
        log.warning("the student is saved as bf16: some of its weights are too large for fp16")
        dtype = torch.bfloat16
    for weight in weights:  # buffers that are not saved, such as rotary frequencies, stay in float32 as when loaded
        weight.grad = None
        weight.data = weight.data.to(dtype)


def describe(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write what makes a folder with weights a model's: config, generation config, tokenizer with chat template."""
    parts = (tokenizer,) if is_adapted(model) else (model.config, model.generation_config, tokenizer)
    for part in parts:
        part.save_pretrained(folder)


def save_student(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write weights as they are, config, generation config and tokenizer as one model folder, whole or not at all.

    Raises MachineError if the disk is full or cannot be written.
    """
    with saving("the student", folder), whole_folder(folder) as beside:
        model.save_pretrained(beside)
        model.generation_config.save_pretrained(beside)  # of an adapter that is all that was written
        tokenizer.save_pretrained(beside)


def load_saved(folder: Path, model: PreTrainedModel) -> None:
    """Load what save_student wrote into a student, in its own dtype. Raises ModelError.

    Transformers reads it: some models name their tensors otherwise on disk (GPT-NeoX, mixtures of experts).
    """
    with loading(str(folder), "student", str(folder)):
        if is_adapted(model):
            model.load_adapter(str(folder), "default", is_trainable=True, hotswap=True)
        else:
            model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def _source(config: StudentConfig, teacher: TeacherConfig) -> tuple[ModelConfig, str]:
    """Return the model that the student comes from, and its group in the config."""
    return (teacher, "teacher") if config.init == "cut" else (config, "student")


def teach_to_stop(model: PreTrainedModel, tokenizer: Any, stops: list[int]) -> None:
    """Have a student stop where its rows do: add the tokens that end counted turns to its generation config.

    stops: the one that ends most rows first; the tokenizer's end of text becomes that one, unless it is among them.
    """
    known = stop_ids(model.generation_config)
    if new := [token for token in stops if token not in known]:
        ids = [*known, *new]
        model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    if stops and tokenizer.eos_token_id not in stops:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stops[0])
