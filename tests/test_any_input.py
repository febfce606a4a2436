"""Whatever the input: rows become conversations or faults, tokens keep their bounds, losses are what they are defined as."""

import json

import plain
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_loss import NAMES, logits, pairs
from test_rows import TOKENIZERS

from kdx import loss
from kdx.data.batches import collate
from kdx.data.encode import Encoder
from kdx.data.sources import Conversation, read_conversations
from kdx.errors import DataError, first_of
from kdx.tokenizer import SharedTokenizer

quick = settings(
    max_examples=120, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

# ---- rows
texts = st.text(st.characters(), max_size=8)  # surrogates, too
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
names = st.sampled_from(["source", "target", "messages", "role", "content", "id", "where", "column"])
values = st.recursive(
    scalars, lambda part: st.lists(part, max_size=3) | st.dictionaries(names | texts, part, max_size=4), max_leaves=6
)
roles = st.sampled_from(["system", "user", "assistant"])
messages = st.lists(st.fixed_dictionaries({"role": roles | values, "content": texts | values}), max_size=4)
likely = st.fixed_dictionaries({"source": texts, "target": texts}, optional={"id": values, "where": values})
likely |= st.fixed_dictionaries({"messages": messages}, optional={"id": values, "column": values})


@quick
@given(row=values | likely, choice=st.sampled_from(["pairs", "messages"]))
def test_any_row_is_a_conversation_or_a_fault_with_its_place(tmp_path, data_config, row, choice):
    good = {"source": "a", "target": "b", "messages": [{"role": "assistant", "content": "b"}], "id": "good"}
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    config = data_config(choice, path=str(file))
    found = read_conversations(config)
    try:
        if found.faults:
            raise first_of(found.faults, found.num_read)
        _, second = found
    except DataError as error:
        (line,) = error.lines
        assert line.isprintable()
        where, rest = line.split(": ", 1)
        assert where == f"{file}:2"
        assert rest.count(". ") >= 1  # what, and the hint
        skipped = read_conversations(data_config(choice, path=str(file), on_bad_row="skip", max_bad_rows=None))
        assert skipped.counts["dropped"].total() == len(skipped) == 1
        return
    assert second.where == f"{file}:2"
    assert second.messages[-1]["role"] == "assistant"
    for message in second.messages:
        assert message.keys() == {"role", "content"}
        assert message["role"] in ("system", "user", "assistant")
        assert message["content"].strip()
        message["content"].encode()


# ---- tokens
said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
turns = st.lists(st.tuples(roles, said | st.sampled_from(["<|im_end|>", "a <|im_start|>assistant\n"])), max_size=5)


@quick
@given(
    turns=turns, last=said, name=st.sampled_from(sorted({*TOKENIZERS} - {"base"})), max_length=st.integers(1, 40),
    on_long=st.sampled_from(["truncate", "split", "drop", "error"]), assistant_only=st.booleans(),
)  # fmt: skip
def test_encoded_rows_keep_their_bounds(
    make_tokenizer, data_config, turns, last, name, max_length, on_long, assistant_only
):
    template, special, tokens = TOKENIZERS[name]
    tokenizer = make_tokenizer(template, special, **tokens)
    told = [{"role": role, "content": content} for role, content in [*turns, ("assistant", last)]]
    config = data_config("messages", on_long=on_long, assistant_only=assistant_only)
    encoder = Encoder(SharedTokenizer(tokenizer, max_length), config)
    encoded = encoder.encode(Conversation("r", told, "t.jsonl:1"))
    if encoded.fault:
        (line,) = encoded.fault.lines
        assert line.startswith("t.jsonl:1: ")
    for row in encoded.rows:
        assert 1 <= len(row.tokens) == len(row.counted) <= max_length
        assert row.num_counted >= 1
        assert max(row.tokens) < len(tokenizer)
        batch = collate([row], 0)
        assert len(batch.positions) == len(batch.counted_labels) == row.num_counted
        assert ((batch.positions >= 0) & (batch.positions < len(row.tokens) - 1)).all()
        assert torch.equal(batch.input_ids.flatten()[batch.positions + 1], batch.counted_labels)


# ---- losses
@quick
@given(pair=pairs(), name=st.sampled_from(NAMES), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_any_logits_give_what_the_definition_says(pair, name, temperature):
    """In float64, by plain loops over probabilities, wherever these can hold the value."""
    student, teacher = pair
    assume(name != "adaptive_kl" or student.dtype == torch.float64)  # where a tail ends is a matter of rounding
    value = loss.divergence(name, student, teacher, temperature)
    assert value.shape == student.shape[:1]
    if len(student):
        wanted = plain.divergence(name, student.double(), teacher.double(), temperature)
        lowest = [loss.log_probabilities(z.double(), temperature) for z in pair]
        holds = wanted.isfinite() & torch.stack([(x.isneginf() | (x > -690)).all(-1) for x in lowest]).all(0)
        size = (
            torch.where(teacher.isfinite(), teacher, 0).abs().max().double() + student.abs().nan_to_num(posinf=0).max()
        )
        eps = 1e-10 if student.dtype == torch.float64 else 1e-5
        off = (value.double() - wanted)[holds].abs()
        assert (off <= eps * (1 + wanted[holds] + temperature * size)).all(), (value, wanted)


@quick
@given(
    n=st.integers(0, 3), seed=st.integers(0, 999), scale=st.sampled_from([1.0, 50.0]), name=st.sampled_from(NAMES),
    noise=st.sampled_from([0.0, 1e-3, 1e-2]), dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_noise_of_bf16_around_a_match_is_a_small_divergence(n, seed, scale, name, noise, dtype):
    """The student is the teacher but for rounding: the divergence is as small as the definition's, and not negative."""
    teacher = logits(n, 9, seed=seed, scale=scale, dtype=dtype)
    student = (teacher.double() * (1 + noise * logits(n, 9, seed=seed + 1, scale=1.0))).to(dtype)
    value = loss.divergence(name, student, teacher, 2.0)
    assert value.isfinite().all()
    if n and name != "adaptive_kl":
        wanted = plain.divergence(name, student.double(), teacher.double(), 2.0)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=1e-5 * (1 + scale))
