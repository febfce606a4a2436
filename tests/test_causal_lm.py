"""The split of a model into backbone and head, held to the model's own logits; loading, and what is refused.

Tiny models with fresh weights, built here from their configurations: nothing is fetched.
N counted positions, V vocabulary, d width, B rows, T positions of a row.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from kdx import causal_lm
from kdx.causal_lm import Head, check_split, counted_hidden, head_of
from kdx.config import ModelConfig
from kdx.data.batches import Row, collate
from kdx.errors import ModelError
from kdx.tokenizer import common_ids

V, d = 40, 16
SHAPE = {
    "vocab_size": V, "hidden_size": d, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CONFIGS = {
    "llama, tied": lambda: hf.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, untied": lambda: hf.LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "gpt2": lambda: hf.GPT2Config(vocab_size=V, n_embd=d, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2),
    "gemma2, soft-capped": lambda: hf.Gemma2Config(
        **SHAPE, head_dim=8, final_logit_softcapping=0.5, layer_types=["full_attention"] * 2
    ),
    "cohere, logit_scale": lambda: hf.CohereConfig(**SHAPE, logit_scale=0.0625),
    "granite, logits_scaling": lambda: hf.GraniteConfig(**SHAPE, logits_scaling=8.0),
    "phi, bias": lambda: hf.PhiConfig(**SHAPE),
    "qwen2": lambda: hf.Qwen2Config(**SHAPE),
    "gpt-neox": lambda: hf.GPTNeoXConfig(
        **{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}, rotary_pct=0.5
    ),
}  # fmt: skip
each_model = pytest.mark.parametrize("kind", CONFIGS)


def build(kind, dtype=torch.float64, spread=4.0):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(spread)  # fresh weights give logits so small that a soft-cap hardly shows
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias.normal_()
    return model


# ---- the head


@each_model
def test_head_of_backbone_is_what_the_model_computes(kind):
    model = build(kind)
    ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))

    def gradients(logits):
        model.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    own, ours = model(input_ids=ids).logits, head_of(model).logits(model.base_model(input_ids=ids).last_hidden_state)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-12)
    expected, found = gradients(own), gradients(ours)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-11)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        check_split(build(kind, dtype, spread=4.0 if dtype.itemsize > 2 else 1.0), "student")


def random_head(dtype=torch.float64, **how):
    g = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in [(V, d), (V,)])
    return Head(weight, bias, **how), torch.randn(6, d, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("how", [{}, {"scale": 0.3}, {"softcap": 5.0}, {"scale": 0.3, "softcap": 2.0}])
def test_through_is_the_derivative_of_the_head(how):
    head, hidden = random_head(**how)
    product = torch.zeros(6, V, dtype=torch.float64, requires_grad=True)
    logits = Head(head.weight, head.bias + product, **how).logits(hidden)
    grad = torch.randn(6, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected,) = torch.autograd.grad(logits, product, grad)
    torch.testing.assert_close(head.through(logits.detach(), grad.clone()), expected)


def test_logits_are_float32_and_the_bias_is_added_without_rounding():
    head, hidden = random_head(torch.bfloat16)
    expected = (hidden @ head.weight.T).float() + head.bias
    assert torch.equal(head.logits(hidden), expected)
    assert head.logits(hidden.float()).dtype == torch.float32  # the product runs in the weight's dtype


def test_compute_dtype_is_autocasts_where_it_is_on():
    head, hidden = random_head(torch.float32)
    assert head.in_compute_dtype() is head
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = head.in_compute_dtype()
        assert torch.equal(low.logits(hidden), (hidden.bfloat16() @ head.weight.bfloat16().T).float() + head.bias)
        assert head.logits(hidden).dtype == torch.float32  # autocast is off inside of it
        exact, _ = random_head(torch.float64)
        assert exact.in_compute_dtype() is exact


@pytest.mark.parametrize("kind", ["llama, tied", "gpt2"])
def test_counted_hidden_are_those_before_a_counted_token(kind):
    model = build(kind)
    rows = [Row("a", [3, 4, 5, 6, 0], [False, True, False, True, True]), Row("b", [7, 0, 8], [False, True, True])]
    with torch.no_grad():
        hidden = counted_hidden(model, collate(rows, pad_id=0))
        expected = []
        for row in rows:  # one by one, without padding
            last = model.base_model(input_ids=torch.tensor([row.tokens])).last_hidden_state[0]
            expected += [last[t - 1] for t in range(1, len(row.tokens)) if row.counted[t]]
    torch.testing.assert_close(hidden, torch.stack(expected), rtol=1e-9, atol=1e-11)


def test_one_graph_serves_all_lengths(monkeypatch):
    """Of each model and mode: more would soon be past dynamo's limit, and run uncompiled."""
    model, graphs = build("llama, tied"), []
    rows = [Row("", list(range(3, 3 + length)), [False] + [True] * (length - 1)) for length in (4, 9, 7, 5, 8, 6)]
    batches = [collate(rows[:num], pad_id=0) for num in range(2, 7)]
    expected = [counted_hidden(model, batch) for batch in batches]
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    causal_lm.compiled.cache_clear()
    model.is_compiled = True
    for batch, hidden in zip(batches, expected, strict=True):
        torch.testing.assert_close(counted_hidden(model, batch), hidden)
    assert len(graphs) == 1
    causal_lm.compiled.cache_clear()


# ---- the proof at load


def changed(forward_of):
    """A Llama whose forward does one thing more to its logits."""

    class Changed(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = forward_of(output.logits)
            return output

    torch.manual_seed(0)
    return Changed(CONFIGS["llama, tied"]()).double().eval()


@pytest.mark.parametrize(
    "more",
    [
        lambda z: 2 * z,
        lambda z: 30 * torch.tanh(z / 30),  # on fresh weights hardly to be seen
        lambda z: z.roll(1, 1),
        lambda z: z * float("nan"),
    ],
    ids=["scaled", "soft-capped", "shifted in time", "nan"],
)
def test_a_model_that_does_more_is_refused_by_name(more):
    with pytest.raises(ModelError, match=r"student\.path: Changed computes logits in a way .* not support.* \(off by"):
        check_split(changed(more), "student")


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_the_proof_is_relative_to_the_spread_of_the_logits(size):
    with torch.no_grad():
        honest, doubled = (changed(more).float() for more in (lambda z: z, lambda z: 2 * z))
        for model in (honest, doubled):
            model.lm_head.weight = torch.nn.Parameter(size * model.lm_head.weight)
    check_split(honest, "student")  # large logits round more
    with pytest.raises(ModelError, match="in a way kdx does not support"):
        check_split(doubled, "student")  # small logits hide nothing


def test_a_model_without_head_is_refused():
    with pytest.raises(ModelError, match=r"teacher\.path: LlamaModel has no backbone and output head"):
        check_split(build("llama, tied").base_model, "teacher")


# ---- tokenizers


def tokenizer(words):
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0], eos_token=words[1])


WORDS = ["<unk>", "<end>", "a", "b", "c"]


def test_other_tokenizers_are_refused():
    assert common_ids(tokenizer(WORDS), tokenizer(list(WORDS))) == (5, frozenset())
    assert common_ids(tokenizer(WORDS), tokenizer([*WORDS, "e"])) == (5, frozenset({5}))  # what one side only adds
    with pytest.raises(ModelError, match="differ at 2 of 5 ids, the first is 2: 'a' and 'b'"):
        common_ids(tokenizer(WORDS), tokenizer(["<unk>", "<end>", "b", "a", "c"]))


# ---- loading


def given(**keys):
    """A model's keys, those not given at their plainest."""
    plainest = {"gguf_file": None, "revision": None, "trust_remote_code": False, "attn_implementation": "auto"}
    return ModelConfig(**plainest | {"tokenizer": None, "base_model": None, "license": None} | keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_gives_the_saved_model_in_the_dtype_asked_for(tmp_path, dtype):
    saved = build("llama, untied", torch.float32)
    saved.config.tie_word_embeddings = True  # merges and full fine-tunes leave it as it was
    saved.save_pretrained(tmp_path)
    model = causal_lm.load_causal_lm(given(path=str(tmp_path)), "student", dtype=dtype)
    assert not model.training
    for name, parameter in saved.named_parameters():
        ours = model.get_parameter(name)
        assert ours.dtype == dtype
        assert torch.equal(ours, parameter.to(dtype))
    assert model.config.tie_word_embeddings is False
    assert causal_lm.num_positions(causal_lm.load_config(given(path=str(tmp_path)), "student")) == 32


def test_a_teacher_is_no_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match=r"is a LoRA adapter\. Name its base, and teacher\.adapter="):
        causal_lm.locate(given(path=str(tmp_path)), "teacher")


# ---- speed


def test_a_cpu_takes_eager_attention_for_short_rows():
    cpu, auto = torch.device("cpu"), given(path="x")
    assert [causal_lm.attention_for(auto, cpu, length) for length in (256, 257)] == ["eager", None]


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_gelu_in_one_kernel_is_the_same_function(name):
    torch.manual_seed(0)
    shape = hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, activation_function=name)
    model = hf.GPT2LMHeadModel(shape).double().eval()
    ids, outcomes = torch.arange(12).unsqueeze(0), []
    for _ in range(2):
        logits = model(ids).logits
        outcomes.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
        causal_lm.fuse_activations(model)
    assert type(model.transformer.h[1].mlp.act) is torch.nn.GELU
    for one, two in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)  # gelu_fast has ten digits of sqrt(2/π)


# ---- rows padded on the right, without an attention mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_stays_where_it_is_needed(dtype):
    torch.manual_seed(0)
    both_ways = hf.Gemma3TextConfig(**SHAPE, head_dim=8, use_bidirectional_attention=True)
    router = hf.MixtralConfig(**SHAPE, num_local_experts=3, output_router_logits=True)
    for config in (both_ways, router):
        model = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        check_split(model, "student")
        assert model.needs_attention_mask
