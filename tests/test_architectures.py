"""Twenty architectures with tiny random weights: a step as plain transformers takes it, and cuts that are proved."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdx.causal_lm import counted_hidden, head_of, ready
from kdx.cut import assemble, evenly_spread, prove, tiny
from kdx.data.batches import Row, collate
from kdx.errors import ModelError
from kdx.objective import Mix, Objective
from kdx.teacher import Answer

LAYERS = 4
COMMON = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "first_k_dense_replace": 2,
}  # fmt: skip
MODELS = {
    "Llama": {}, "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "Qwen3": {"head_dim": 12}, "Gemma2": {"head_dim": 12, "sliding_window": 4},
    "Gemma3Text": {"head_dim": 12, "sliding_window": 4}, "Mistral": {"sliding_window": 4},
    "Mixtral": {"num_local_experts": 4}, "Phi3": {}, "GPT2": {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}, "GPTNeoX": {},
    "GPTNeo": {"attention_types": [[["global", "local"], 2]], "window_size": 4, "num_layers": LAYERS}, "Olmo2": {},
    "Cohere2": {"sliding_window": 4, "logit_scale": 0.5}, "Granite": {"logits_scaling": 2.0},
    "GptOss": {"head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "DeepseekV3": DEEPSEEK, "Mamba": {"state_size": 8}, "Qwen3Moe": EXPERTS | {"mlp_only_layers": [0, 3]},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
    "SmolLM3": {"no_rope_layers": [1, 1, 0, 1]}, "Nemotron": {},
}  # fmt: skip
each_model = pytest.mark.parametrize("name", MODELS)


def build(name, seed=0):
    config = getattr(transformers, f"{name}Config")(**COMMON | MODELS[name])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return ready(model, "student")


def plain_loss(student, teacher, batch, alpha: float, temperature: float) -> tuple[Tensor, Tensor]:
    """KD and CE as transformers' users write them: whole logits, torch's own functions."""
    ours, theirs = (
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.flatten(0, 1)
        for model in (student, teacher)
    )
    s, t = ours[batch.positions], theirs[batch.positions].detach()
    log_s, log_t = (torch.log_softmax(z / temperature, -1) for z in (s, t))
    kd = temperature**2 * F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    return kd, F.cross_entropy(s, batch.counted_labels)


@each_model
def test_a_step_is_the_one_that_plain_transformers_takes(name):
    student, teacher = build(name, seed=1), build(name, seed=2)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, length in enumerate((11, 7, 4)):
        tokens = torch.randint(3, 96, (length,), generator=generator).tolist()
        rows.append(Row(str(i), tokens, [j > length // 3 for j in range(length)]))
    batch = collate(rows, 0)
    assert not student.needs_attention_mask  # what is padded on the right changes nothing, as the result shows
    same = copy.deepcopy(student)
    for model in (student, same):
        model.train()
    with torch.no_grad():
        answer = Answer(counted_hidden(teacher, batch), head_of(teacher))
    mix = Mix(name="forward_kl", alpha=0.7, temperature=2.0, scale_by_temperature=True, options={})
    total, terms = Objective(student, 96, mix)(batch, answer, 1 / len(batch.counted_labels))
    total.backward()
    kd, ce = plain_loss(same, teacher, batch, 0.7, 2.0)
    (0.7 * kd + 0.3 * ce).backward()
    num = len(batch.counted_labels)
    torch.testing.assert_close(float(terms["kd"]) / num, float(kd.detach()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(float(terms["ce"]) / num, float(ce.detach()), atol=1e-5, rtol=1e-5)
    for model in (student, same):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for (key, ours), theirs in zip(student.state_dict().items(), same.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=key)


@each_model
def test_a_cut_is_proved(name):
    model = build(name)
    prove(type(model), model.config)


def test_a_config_whose_layers_are_cut_wrongly_is_refused():
    model = build("GPTNeo")
    config = tiny(model.config)
    config.attention_layers = ["local"] * LAYERS + ["global"]  # not a list by layer: it is left as it is
    with pytest.raises(ModelError, match="GPTNeoForCausalLM cannot be cut"):
        prove(type(model), config)


def test_a_head_beside_tied_embeddings_stays_apart():
    """Whatever the config says: merges and full fine-tunes leave tie_word_embeddings as it was."""
    model = build("Llama")
    model.config.tie_word_embeddings = True
    kept = evenly_spread(LAYERS, 2)
    part = ready(assemble(type(model), model.config, model.state_dict(), kept), "student")
    assert part.config.tie_word_embeddings is False
    assert torch.equal(part.lm_head.weight, model.lm_head.weight)
    assert torch.equal(part.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_embeddings_without_a_head_beside_them_are_the_head():
    model = build("Llama")
    stored = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.config.tie_word_embeddings = False
    part = ready(assemble(type(model), model.config, stored, evenly_spread(LAYERS, 2)), "student")
    assert part.config.tie_word_embeddings is True
    assert torch.equal(part.lm_head.weight, model.model.embed_tokens.weight)
