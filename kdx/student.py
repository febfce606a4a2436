"""Load the student, cut it from the teacher, or make a fresh one; save it as an ordinary model folder."""

import copy
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kdx.causal_lm import load_causal_lm, load_config, ready
from kdx.config import StudentConfig, TeacherConfig, replaced
from kdx.errors import ConfigError, ModelError
from kdx.loading import loading
from kdx.run.checkpoint import REFUSALS, not_saved
from kdx.run.files import open_to_umask, put, seal, temporary, verify, whole_folder

log = logging.getLogger(__name__)


def load_student(
    config: StudentConfig,
    teacher: TeacherConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    seed: int,
    kept: Path | None = None,
) -> PreTrainedModel:
    """Return the student with master weights in `dtype`, whatever the file holds. Raises ConfigError or ModelError.

    kept: where a cut student is kept, so that the teacher is cut once.
    """
    if config.init == "pretrained":
        return load_causal_lm(config, "student", dtype=dtype, attn_implementation=attn_implementation)
    if config.init == "cut":
        if dtype != torch.float32:
            kept = None  # it is kept in fp32
        if kept is not None and verify(kept) is None:
            there = replaced(teacher, path=str(kept), gguf_file=None, revision=None)
            return load_causal_lm(there, "student", dtype=dtype, attn_implementation=attn_implementation)
        whole = load_causal_lm(teacher, "teacher", dtype=dtype, attn_implementation=attn_implementation)
        smaller = cut(whole, config.layers, teacher.trust_remote_code)
        if kept is not None and not teacher.trust_remote_code:
            _keep(smaller, kept)
        return smaller
    shape = load_config(config, "student")
    torch.manual_seed(seed)
    mend = "Give the path of a causal language model"
    with loading(str(config.path), "shape", "student.path", mend):
        model = AutoModelForCausalLM.from_config(
            shape, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=config.trust_remote_code
        )
    return ready(model, "student")


def evenly_spread(num_layers: int, num_kept: int) -> list[int]:
    """Choose layers evenly, the first and the last among them."""
    if num_kept == 1:
        return [0]
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def cut(model: PreTrainedModel, layers: int | list[int], trust_remote_code: bool = False) -> PreTrainedModel:
    """Make an ordinary smaller model from some layers of a model, with its embeddings, norms and head.

    layers: how many (evenly spread), or which. Raises ConfigError if the model has no such layers.
    """
    total = model.config.get_text_config().num_hidden_layers
    if isinstance(layers, int):
        if layers > total:
            raise ConfigError("student.layers", f"is {layers}, but the teacher has {total}", f"Allowed: 1 to {total}")
        kept = evenly_spread(total, layers)
    else:
        kept = list(layers)
        wrong = [i for i in kept if i >= total]
        if wrong or len(set(kept)) != len(kept):
            what = f"is {kept}; the teacher's layers are 0 to {total - 1}, each at most once"
            raise ConfigError("student.layers", what, "Choose among them")
    stacks = [n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == total]
    if len(stacks) != 1:
        what = f"cannot cut {type(model).__name__}: it has {len(stacks)} stacks of {total} layers"
        raise ConfigError("student", what, "Choose another teacher, or student=hf")
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):  # per-layer lists must be cut with the layers
        if isinstance(getattr(text, name, None), list | tuple) and len(getattr(text, name)) == total:
            setattr(text, name, [getattr(text, name)[i] for i in kept])
    text.num_hidden_layers = len(kept)
    smaller = AutoModelForCausalLM.from_config(
        config,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    place = {old: new for new, old in enumerate(kept)}
    pattern = re.compile(rf"^{re.escape(stacks[0])}\.(\d+)\.")
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = pattern.match(name)
        if layer is None:
            weights[name] = tensor
        elif int(layer[1]) in place:
            weights[pattern.sub(f"{stacks[0]}.{place[int(layer[1])]}.", name)] = tensor
    smaller.load_state_dict(weights, strict=True)
    smaller.tie_weights()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return ready(smaller, "student")


def _keep(model: PreTrainedModel, folder: Path) -> None:
    """Keep a cut student as a model folder, whole or not at all; a full disk costs only that."""
    beside = temporary(folder)
    try:
        model.save_pretrained(beside)
        open_to_umask(*beside.iterdir())
        seal(beside)
        if verify(folder) is not None:  # another run may have been as quick, and reads its own already
            put(beside, folder)
    except (OSError, SafetensorError) as error:
        if verify(folder) is not None:
            log.warning("the cut student is not kept in the store: %s", error)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def describe(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write what makes a folder with weights a model's: config, generation config, tokenizer with chat template."""
    config = copy.deepcopy(model.config)
    config.use_cache = True  # off while it is trained
    for part in (config, model.generation_config, tokenizer):
        part.save_pretrained(folder)


def save_student(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write config, weights as they are, tokenizer with chat template and generation config as one model folder.

    Whole or not at all, and kept by the disk. Raises MachineError if it is full or refuses.
    """
    model.config.use_cache = True
    try:
        with whole_folder(folder) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    except REFUSALS as error:
        raise not_saved(folder, "the student", error) from error


def answer_greedily(model: PreTrainedModel, max_new_tokens: int) -> None:
    """Give the model a generation config of its own special tokens, greedy and short, which is saved with it.

    So `pipeline("text-generation", …)` without further words answers as the run's samples do. Raises ModelError.
    """
    known = model.generation_config
    ids = {name: getattr(known, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        told = value if isinstance(value, list) and value else [value]
        if value is not None and not all(type(i) is int and i >= 0 for i in told):
            what = f"its generation_config.json has {name}: {value!r}, expected an id"
            raise ModelError("student.path", what, "Mend that file, or remove it")
    if ids["pad_token_id"] is None:
        eos = ids["eos_token_id"]
        ids["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **ids)
