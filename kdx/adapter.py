"""LoRA adapters beside a model's linear layers: add them, merge them (peft, via transformers).

Hu et al., 2021, arXiv:2106.09685; over a quantised base: Dettmers et al., 2023, arXiv:2305.14314.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from kdx.causal_lm import load_causal_lm
from kdx.config import AdapterConfig, StudentConfig
from kdx.errors import ConfigError, one_line


def is_adapted(model: Any) -> bool:
    """Return whether adapters stand beside a model's layers."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def add_adapter(model: Any, config: AdapterConfig, seed: int) -> None:
    """Freeze a student and put adapters beside the linear layers of its text model; they begin as nothing.

    Adapters that it was loaded with are trained further. They are in float32, or in float64 beside a float64 base.
    Raises ConfigError.
    """
    from peft import LoraConfig  # late: importing it takes a second
    from peft.tuners.tuners_utils import BaseTunerLayer

    if is_adapted(model):
        for name in ("r", "lora_alpha", "lora_dropout"):
            if (has := getattr(model.peft_config["default"], name)) != (asked := getattr(config, name)):
                what = f"is {asked:g}, but the student's adapter has {has:g}"
                raise ConfigError(f"adapter.{name}", what, f"Set adapter.{name}={has:g}")
    else:
        model.requires_grad_(False)
        torch.manual_seed(seed)
        settings = config.model_dump(include={"r", "lora_alpha", "lora_dropout", "target_modules"})
        lora = LoraConfig(**settings)
        if model.config.get_text_config() is not model.config:  # multimodal
            text = {*model.get_decoder().modules()}
            lora.exclude_modules = {name for name, part in model.named_modules() if name and part not in text}
        try:
            with warnings.catch_warnings():  # as of GPT-2's weights, which are transposed: peft sees that itself
                warnings.simplefilter("ignore")
                model.add_adapter(lora)
        except (TypeError, ValueError) as error:
            hint = "Name layers of the model: adapter.target_modules=[q_proj,v_proj]"
            raise ConfigError("adapter.target_modules", one_line(error), hint) from error
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(part, "base_layer"):
            what = "names the embeddings or the output head, which the loss reads without an adapter"
            raise ConfigError("adapter.target_modules", what, "Choose all-linear, or layers of the backbone")
    for tensor in trained(model).values():
        tensor.data = tensor.data.to(torch.promote_types(model.dtype, torch.float32))
    for part in model.modules():
        if isinstance(part, BaseTunerLayer):
            part._cast_input_dtype = _as_autocast_does
    model.eval()


def _as_autocast_does(inputs: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast an adapter's inputs to its dtype, but not under autocast, which would keep a second copy cast back."""
    return inputs if inputs is None or torch.is_autocast_enabled(inputs.device.type) else inputs.to(dtype)


def merge_adapter(model: Any, dtype: torch.dtype) -> None:
    """Add adapters to the weights they stand beside, in place: an ordinary model is left. dtype: of the sums."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [(name, part) for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
    for name, layer in reversed(layers):  # a mixture's experts have an adapter inside an adapter
        base = layer.get_base_layer()
        base.to(torch.promote_types(model.dtype, torch.float32))
        layer.merge()
        model.set_submodule(name, base.to(dtype))
    del model.peft_config
    model._hf_peft_config_loaded = False


def dequantise(model: Any, config: AdapterConfig, student: StudentConfig) -> None:
    """Put the base as it was before it was quantised, in bfloat16, under a student's adapters, in main memory.

    The device holds the quantised base until then, and may not have room for both.
    """
    attention = model.config._attn_implementation
    how = {"dtype": torch.bfloat16, "attn_implementation": attention}
    plain: Any = load_causal_lm(student, "student", is_proved=True, **how)  # kernels of a GPU could not prove it here
    add_adapter(plain, config, seed=0)
    plain.load_state_dict(trained(model), strict=False)
    for name, part in plain.named_children():
        setattr(model, name, part)
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    vars(model).pop("quantization_method", None)  # with it, transformers refuses to move or save the model
