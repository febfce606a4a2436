"""The student: cut from the teacher's files, its generation config, the dtype it is saved in, and its optimizer."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from standins import put_on_hub
from test_causal_lm import given

from kdx import student
from kdx.causal_lm import DTYPES
from kdx.config import StudentConfig, TeacherConfig
from kdx.distill import with_liger_kernels
from kdx.errors import ConfigError, MachineError, ModelError

TINY = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 4,
}  # fmt: skip
KINDS = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
SHAPES = {
    "llama, tied": lambda: hf.LlamaConfig(**TINY, tie_word_embeddings=True),
    "gpt2": lambda: hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=5, n_head=2, n_positions=64),
    "gemma3, windows": lambda: hf.Gemma3TextConfig(**TINY, layer_types=KINDS),
    "mixtral, fused experts": lambda: hf.MixtralConfig(**TINY, num_local_experts=3),
    "gpt_neox": lambda: hf.GPTNeoXConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2
    ),
}


def save(folder, kind="llama, tied", **how):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(SHAPES[kind]()).eval()
    model.generation_config = hf.GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[2, 3])
    model.to(how.pop("dtype", torch.float32)).save_pretrained(folder, **how)
    return model


def keys(**more):
    return StudentConfig(**vars(given(path=None)) | {"init": "cut", "layers": 3, "save_dtype": "auto"} | more)


def teacher(path, **more):
    rest = {"precision": "fp32", "quantization": "none", "device_map": None, "micro_batch_size": "auto"}
    rest |= {"store": "off", "store_dir": "x", "store_limit_gb": None, "adapter": None}
    return TeacherConfig(**vars(given(path=str(path))) | rest | more)


def load(config, of=None, dtype=torch.float32):
    return student.load_student(config, of or teacher(None), dtype=dtype, attn_implementation="eager", seed=0)


def plain_cut(folder, kept):
    """Load the whole teacher and take layers out of its list."""
    whole = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    body = whole.base_model
    name = "h" if hasattr(body, "h") else "layers"
    setattr(body, name, torch.nn.ModuleList(getattr(body, name)[i] for i in kept))
    whole.config.num_hidden_layers = len(kept)
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [whole.config.layer_types[i] for i in kept]
    return whole


# ---- cutting


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("layers", "kept"), [(3, [0, 2, 4]), ([4, 1], [4, 1])], ids=["spread", "listed"])
def test_a_cut_is_bitwise_the_whole_teacher_without_its_other_layers(tmp_path, kind, layers, kept):
    save(tmp_path, kind, dtype=torch.bfloat16, max_shard_size="4KB")
    ours, plain = load(keys(layers=layers), teacher(tmp_path)), plain_cut(tmp_path, kept)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(ours(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    assert ours.config.num_hidden_layers == len(kept)
    if kind == "gemma3, windows":
        assert ours.config.layer_types == [KINDS[i] for i in kept]
    ours.save_pretrained(tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_pickled_weights_and_hub_models_are_cut_too(tmp_path, monkeypatch):
    model = save(tmp_path / "one")
    torch.save(model.state_dict(), tmp_path / "one" / "pytorch_model.bin")
    expected = load(keys(), teacher(tmp_path / "one")).state_dict()
    put_on_hub(tmp_path / "hub", "org/one", tmp_path / "one")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "one" / "model.safetensors").unlink()
    for path in (tmp_path / "one", "org/one"):
        for name, tensor in load(keys(), teacher(path)).state_dict().items():
            assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("layers", [6, [0, 5], [1, 1]])
def test_layers_that_are_not_there_are_refused(tmp_path, layers):
    save(tmp_path)
    with pytest.raises(ConfigError, match=r"student\.layers: .* layers are 0 to 4"):
        load(keys(layers=layers), teacher(tmp_path))


def test_a_missing_tensor_is_refused(tmp_path):
    save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"do not fit the student: model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(keys(), teacher(tmp_path))


def test_quantised_weights_are_refused(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"teacher\.path: .* is quantised and cannot be trained"):
        load(keys(), teacher(tmp_path))
    with pytest.raises(ModelError, match=r"student\.path: .* is quantised"):
        load(keys(init="pretrained", path=str(tmp_path)))


def test_kernels_that_liger_lacks_are_refused(monkeypatch):
    monkeypatch.setattr("kdx.distill.is_liger_kernel_available", lambda: True)
    known = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", known)
    model = hf.AutoModelForCausalLM.from_config(SHAPES["gpt2"]())
    with pytest.raises(MachineError, match=r"train\.use_liger_kernel: Liger has no kernels for gpt2"):
        with_liger_kernels(model, torch.device("cuda"))


# ---- the generation config


@pytest.mark.parametrize("init", ["pretrained", "cut", "random"])
def test_the_generation_config_is_the_models_own(tmp_path, init):
    save(tmp_path)
    model = load(keys(init=init, path=str(tmp_path)), teacher(tmp_path))
    student.save_student(model, hf.GPT2TokenizerFast(vocab={"a": 0}, merges=[]), tmp_path / "saved")
    own, saved = (json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("", "saved"))
    assert saved == own
    assert "max_new_tokens" not in saved


def test_without_a_generation_config_it_has_the_ids_of_the_config(tmp_path):
    save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    own = load(keys(), teacher(tmp_path)).generation_config
    assert (own.eos_token_id, own.do_sample, own.temperature, own.max_new_tokens) == (2, None, None, None)


def test_a_generation_config_that_cannot_be_saved_is_refused_at_load(tmp_path):
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"num_return_sequences": 3}')
    for init, where in (("pretrained", "student"), ("cut", "teacher"), ("random", "student")):
        with pytest.raises(ModelError, match=rf"{where}\.path: .*num_return_sequences"):
            load(keys(init=init, path=str(tmp_path)), teacher(tmp_path))


# ---- the dtype it is saved in


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_auto_is_the_dtype_of_the_stored_tensors(tmp_path, name):
    model = save(tmp_path, dtype=DTYPES[name])
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("float", "bfloat"))
    assert student.saved_dtype(keys(init="pretrained", path=str(tmp_path)), teacher(None)) == name
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert student.saved_dtype(keys(), teacher(tmp_path)) == name


def test_auto_is_bf16_where_no_checkpoint_says(tmp_path):
    save(tmp_path)
    assert student.saved_dtype(keys(init="random", path=str(tmp_path)), teacher(None)) == "bf16"
    assert student.saved_dtype(keys(), teacher(tmp_path, gguf_file="a.gguf")) == "bf16"
    assert student.saved_dtype(keys(save_dtype="fp32"), teacher(None)) == "fp32"


def test_a_cast_student_is_the_one_that_is_loaded_again(tmp_path, caplog):
    save(tmp_path)
    model = load(keys(), teacher(tmp_path))
    student.cast(fine := copy.deepcopy(model), torch.float16)
    assert fine.dtype == torch.float16 and not caplog.records
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    student.cast(model, torch.float16)
    assert model.dtype == torch.bfloat16 and "too large for fp16" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    ids = torch.arange(3, 33).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("kind", ["llama, tied", "mixtral, fused experts", "gpt_neox"])
def test_a_saved_student_is_loaded_again_whatever_its_tensors_are_named_on_disk(tmp_path, kind):
    model = save(tmp_path / "model", kind)
    student.cast(model, torch.bfloat16)
    student.save_student(model, hf.GPT2TokenizerFast(vocab={"a": 0}, merges=[]), tmp_path / "student")
    again = hf.AutoModelForCausalLM.from_config(SHAPES[kind]())
    student.load_saved(tmp_path / "student", again)
    assert again.dtype == torch.float32
    assert all(torch.equal(a, b.float()) for a, b in zip(again.parameters(), model.parameters(), strict=True))
