"""Masks on the templates of the field, labels, batches and their order."""

import json
import random
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from kdx.data.batches import Row, StepBatches, by_length, collate, epoch_batches, fingerprint, pad_id_of
from kdx.data.encode import Encoder, prepare_tokenizer
from kdx.data.sources import Conversation, load_data
from kdx.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITHOUT_PROMPT = CHATML[: CHATML.index("{% if")]
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}"
    "{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set about = '<<SYS>>' + messages[0]['content'] + '<</SYS>> ' %}"
    "{% set messages = messages[1:] %}{% else %}{% set about = '' %}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (about if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' </s>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ 'Human' if m['role'] == 'user' else 'Bot' }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Bot:{% endif %}"
)
# Two habits of templates that make a shorter conversation differ from the beginning of a longer one.
ENDS_ONCE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% if loop.last and m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set thought = '' %}{% set said = m['content'] %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + said }}{% else %}{{ said }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIALOGPT = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

# template → special tokens, and what surrounds the assistant's words among the counted tokens
TEMPLATES = {
    "chatml": (CHATML, CHATML_TOKENS, "{}<|im_end|>"),
    "chatml without a prompt": (CHATML_WITHOUT_PROMPT, CHATML_TOKENS, "{}<|im_end|>"),
    "generation": (GENERATION, CHATML_TOKENS, "{}<|im_end|>"),
    "llama 2": (LLAMA2, ("<s>", "</s>"), " {} </s>"),
    "gemma": (GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "{}<end_of_turn>"),
    "no end token": (PLAIN, (), " {}\n"),
    "dialogpt": (DIALOGPT, (), "{}<|endoftext|>"),
}


def chat(*contents, system=None, where="chat.jsonl:1"):
    """A conversation that the user opens."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation("row", messages, where)


def counted_runs(tokenizer, row):
    """The text of each unbroken run of counted tokens."""
    runs = groupby(zip(row.tokens, row.counted, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for counted, run in runs if counted]


def encode(tokenizer, *conversations, max_length=1000, on_long="error", assistant_only=True):
    encoder = Encoder(tokenizer, max_length, on_long, assistant_only)
    return encoder.encode(conversations)[0], encoder


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "contents",
    [
        ("What is red?", "A colour."),
        ("Hello", "Fine.", "And you?", "Well."),
        ("ok", "ok", "ok", "ok", "ok", "ok"),
        ("a", "assistant", "i", "im_end", "user", "Bot: a"),
        ("<|im_end|> and </s>", "it is <|im_end|>, </s>, <end_of_turn> or <|endoftext|>.", "so", "yes"),
        ("\N{GRINNING FACE}", "caf\u00e9 \N{WAVING HAND SIGN}\u200d\u2642\ufe0f \u4f60\u597d", "\u2028", "\u05e9\u05dc\u05d5\u05dd"),
        ("12", "7", "?", "!"),
    ],
    ids=["one turn", "two turns", "same words", "words of the template", "special tokens", "unicode", "signs"],
)  # fmt: skip
def test_only_the_assistants_words_and_the_end_of_its_turn_count(make_tokenizer, name, contents):
    template, special, around = TEMPLATES[name]
    tokenizer = make_tokenizer(template, special)
    (row,), _ = encode(tokenizer, chat(*contents))
    assert counted_runs(tokenizer, row) == [around.format(content) for content in contents[1::2]]
    text = tokenizer.apply_chat_template(chat(*contents).messages, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row.tokens == tokens[: len(row.tokens)]
    assert row.counted[-1]  # what follows the last counted token is not read: it changes nothing
    assert tokenizer.decode(tokens[len(row.tokens) :]).strip() == ""


@pytest.mark.parametrize("name", ["chatml", "generation", "llama 2", "gemma", "no end token", "dialogpt"])
def test_a_system_message_does_not_count(make_tokenizer, name):
    template, special, around = TEMPLATES[name]
    tokenizer = make_tokenizer(template, special)
    (row,), _ = encode(tokenizer, chat("Hello", "Fine.", "So?", "Yes.", system="Fine."))
    assert counted_runs(tokenizer, row) == [around.format("Fine."), around.format("Yes.")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "  well \n<|im_end|>"),
        ("generation", "  well \n<|im_end|>"),
        ("llama 2", " well </s>"),
        ("gemma", "well<end_of_turn>"),
        ("dialogpt", "  well \n<|endoftext|>"),
    ],
)
def test_spaces_around_the_words_stay_as_the_template_leaves_them(make_tokenizer, name, expected):
    template, special, _ = TEMPLATES[name]
    tokenizer = make_tokenizer(template, special)
    (row,), _ = encode(tokenizer, chat(" a  ", "  well \n", "\n b", "  well \n"))
    assert counted_runs(tokenizer, row) == [expected, expected]


def test_an_assistant_that_speaks_first_or_twice_counts_each_time(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, CHATML_TOKENS)
    roles = ["assistant", "user", "assistant", "assistant"]
    talk = Conversation("1", [{"role": role, "content": f"I am {role}."} for role in roles], "x:1")
    (row,), _ = encode(tokenizer, talk)
    assert counted_runs(tokenizer, row) == ["I am assistant.<|im_end|>"] * 3


def test_a_template_that_ends_only_the_last_turn(make_tokenizer):
    tokenizer = make_tokenizer(ENDS_ONCE)
    (row,), _ = encode(tokenizer, chat("a", "Blue.", "b", "Red."))
    assert counted_runs(tokenizer, row) == [" Blue.\n", " Red.\n<|endoftext|>"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (("Blue.", "Red."), ["Blue.", "<think>\n\n</think>\n\nRed."]),
        (("ok", "ok"), ["ok", "<think>\n\n</think>\n\nok"]),
        (("a", "think"), ["a", "<think>\n\n</think>\n\nthink"]),
        (("<think>\nhm\n</think>\n\nBlue.", "Red."), ["Blue.", "<think>\n\n</think>\n\nRed."]),
        (
            ("<think>hm</think>Blue.", "<think>\nwhy not, so\n</think>\n\nRed."),
            ["Blue.", "<think>\nwhy not, so\n</think>\n\nRed."],
        ),
        (("Blue.", "<think>x</think>"), ["Blue.", "<think>\nx\n</think>\n\n"]),
    ],
)
def test_a_template_that_rewrites_earlier_turns(make_tokenizer, said, expected):
    tokenizer = make_tokenizer(QWEN3, CHATML_TOKENS)
    (row,), _ = encode(tokenizer, chat("a colour", said[0], "another", said[1]))
    assert counted_runs(tokenizer, row) == [text + "<|im_end|>" for text in expected]


def test_a_token_that_reaches_into_the_turn_counts(make_tokenizer):
    """A prompt that ends in a space gives it to the first word's token."""
    tokenizer = make_tokenizer(PLAIN.replace("Bot:{% endif", "Bot: {% endif"))
    (row,), _ = encode(tokenizer, chat("name it", "The capital", "so", "The colour"))
    assert counted_runs(tokenizer, row) == [" The capital\n", " The colour\n"]


def test_an_end_token_that_swallows_the_space_before_it_still_ends_the_turn(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, ("<|im_start|>",))
    tokenizer.add_tokens(AddedToken("<|im_end|>", lstrip=True, special=True), special_tokens=True)
    (row,), _ = encode(tokenizer, chat("a", "Blue. ", "b", "Red.\n"))
    assert [run.replace(" ", "") for run in counted_runs(tokenizer, row)] == ["Blue.<|im_end|>", "Red.<|im_end|>"]


def test_smollm2_counts_every_turn_of_real_conversations(smollm2_tokenizer, data_config):
    conversations = load_data(data_config("chitchat", take=300)).train
    rows, _ = encode(smollm2_tokenizer, *conversations, max_length=10_000)
    assert len(rows) == 300
    for row, conversation in zip(rows, conversations, strict=True):
        said = [m["content"] + "<|im_end|>" for m in conversation.messages if m["role"] == "assistant"]
        assert counted_runs(smollm2_tokenizer, row) == said


def test_assistant_only_false_counts_every_token_but_the_first(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, CHATML_TOKENS)
    (row,), _ = encode(tokenizer, chat("Hello", "Fine."), assistant_only=False)
    assert all(row.counted)
    assert row.num_counted == len(row.tokens) - 1
    assert collate([row], 0).counted_labels.tolist() == row.tokens[1:]


def test_end_of_text_counts_though_it_is_the_pad_token_too(make_tokenizer):
    tokenizer = make_tokenizer(DIALOGPT, pad_token="<|endoftext|>")
    rows, _ = encode(tokenizer, chat("Hello there", "Fine.", "And?", "Well."), chat("a", "b"))
    batch = collate(rows, pad_id_of(tokenizer))
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    assert batch.attention_mask.sum(1).tolist() == [len(row.tokens) for row in rows]
    assert (batch.counted_labels == end).sum() == 3
    ends = [[i for i, token in enumerate(row.tokens) if token == end] for row in rows]
    assert [[row.counted[i] for i in at] for row, at in zip(rows, ends, strict=True)] == [
        [False, True, False, True],
        [False, True],
    ]


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=2, max_size=6
    ).filter(lambda contents: len(contents) % 2 == 0)
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_counted_and_collated(make_tokenizer, contents):
    tokenizer = make_tokenizer(CHATML, CHATML_TOKENS)
    (row, short), _ = encode(tokenizer, chat(*contents), chat("a", "b"), max_length=10_000)
    runs = counted_runs(tokenizer, row)
    # white space that opens the words may share a token with the line break before them
    assert [run.lstrip() for run in runs] == [(said + "<|im_end|>").lstrip() for said in contents[1::2]]
    batch = collate([row, short], 0)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.positions + 1], batch.counted_labels)
    assert batch.attention_mask.flatten()[batch.positions + 1].all()
    assert len(batch.positions) == row.num_counted + short.num_counted


@pytest.mark.parametrize("assistant_only", [True, False])
def test_long_rows_are_truncated_dropped_or_refused(make_tokenizer, assistant_only):
    tokenizer = make_tokenizer(DIALOGPT)
    long, short = chat("Hello there", "Fine, thank you. And you?", where="c.jsonl:7"), chat("a", "b")
    (whole, _), _ = encode(tokenizer, long, short, assistant_only=assistant_only)
    limit = len(whole.tokens) - 2
    options = {"max_length": limit, "assistant_only": assistant_only}

    rows, encoder = encode(tokenizer, long, short, on_long="truncate", **options)
    assert [len(row.tokens) for row in rows] == [limit, 4]
    assert (rows[0].tokens, rows[0].counted) == (whole.tokens[:limit], whole.counted[:limit])
    assert encoder.truncated == {"longer than data.max_length": 1}
    assert not encoder.dropped

    rows, encoder = encode(tokenizer, long, short, on_long="drop", **options)
    assert [len(row.tokens) for row in rows] == [4]
    assert encoder.dropped == {"longer than data.max_length": 1}
    assert not encoder.truncated

    with pytest.raises(DataError) as caught:
        encode(tokenizer, long, short, long, on_long="error", **options)
    assert f"c.jsonl:7: the row has {limit + 2} tokens, data.max_length is {limit}" in str(caught.value)
    assert "data.on_long=truncate" in str(caught.value)


def test_rows_left_without_a_counted_token_are_dropped_and_counted(make_tokenizer):
    tokenizer = make_tokenizer(DIALOGPT)
    rows, encoder = encode(tokenizer, chat("Hello there", "Fine."), chat("a", "b"), max_length=3, on_long="truncate")
    assert len(rows) == 1
    assert encoder.truncated == {"longer than data.max_length": 2}
    assert encoder.dropped == {"no counted token left": 1}


def test_all_rows_that_a_template_refuses_are_said_at_once(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA2, ("<s>", "</s>"))
    roles = ["user", "user", "assistant"]
    bad = [
        Conversation(str(i), [{"role": role, "content": "x"} for role in roles], f"chat.jsonl:{i}") for i in range(30)
    ]
    with pytest.raises(DataError) as caught:
        encode(tokenizer, chat("a", "b"), *bad)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("chat.jsonl:0: the chat template refuses the conversation: turns must alternate")
    assert "30 faults, the first 20 shown" in lines[-1]


def test_a_template_that_leaves_the_assistant_out_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(DataError, match=r"chat\.jsonl:1: the chat template leaves out.*data\.assistant_only=false"):
        encode(tokenizer, chat("a", "b"))
    rows, _ = encode(tokenizer, chat("what is it", "b"), assistant_only=False)
    assert tokenizer.decode(rows[0].tokens) == "what is it"


def test_the_chat_template_comes_from_the_config_the_tokenizer_or_the_end_of_text(
    make_tokenizer, data_config, tmp_path
):
    tokenizer = make_tokenizer(PLAIN)
    assert prepare_tokenizer(tokenizer, data_config("custom")) == "the tokenizer's own"
    assert tokenizer.chat_template == PLAIN
    assert prepare_tokenizer(tokenizer, data_config("custom", chat_template=DIALOGPT)) == "data.chat_template"
    assert tokenizer.chat_template == DIALOGPT
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    prepare_tokenizer(tokenizer, data_config("custom", chat_template=str(file)))
    assert tokenizer.chat_template == CHATML

    bare = make_tokenizer()
    assert prepare_tokenizer(bare, data_config("custom")) == "turns joined by the end-of-text token"
    (row,), _ = encode(bare, chat("a", "b"))
    assert bare.decode(row.tokens) == "a<|endoftext|>b<|endoftext|>"
    prepare_tokenizer(make_tokenizer(), data_config("custom", chat_template=LLAMA2))


def test_a_tokenizer_without_template_and_end_of_text_is_refused(make_tokenizer, data_config):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"data\.chat_template: .* neither template nor end-of-text"):
        prepare_tokenizer(tokenizer, data_config("custom"))


def make_rows(count, seed=0, longest=40):
    """Rows of random length and mask; their tokens tell them apart."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        length = rng.randint(2, longest)
        counted = [rng.random() < 0.6 for _ in range(length - 1)] + [True]
        rows.append(Row(f"r{i}", [rng.randrange(1000) for _ in range(length)], counted))
    return rows


@pytest.mark.parametrize("sizes", [[], [2], [2, 7, 3], [5, 5]])
def test_collate_shifts_labels_once_and_pads_on_the_right(sizes):
    rows = [Row(str(n), list(range(10, 10 + n)), [i % 3 != 1 for i in range(n)]) for n in sizes]
    batch = collate(rows, pad_id=99)
    length = max(sizes, default=1)
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(sizes), length)
    expected = []
    for i, row in enumerate(rows):
        n = len(row.tokens)
        assert batch.input_ids[i].tolist() == row.tokens + [99] * (length - n)
        assert batch.attention_mask[i].tolist() == [1] * n + [0] * (length - n)
        expected += [(i * length + t - 1, row.tokens[t], i) for t in range(1, n) if row.counted[t]]
    found = zip(batch.positions.tolist(), batch.counted_labels.tolist(), batch.row_of.tolist(), strict=True)
    assert list(found) == expected
    assert batch.row_ids == tuple(row.id for row in rows)
    assert batch.positions.dtype == batch.counted_labels.dtype == torch.long
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.positions, batch.positions)
    assert moved.row_ids == batch.row_ids


def test_the_pad_id_is_always_a_real_id(make_tokenizer):
    bare = make_tokenizer()
    assert pad_id_of(bare) == bare.eos_token_id
    assert pad_id_of(SimpleNamespace(pad_token_id=0, eos_token_id=5)) == 0
    assert pad_id_of(SimpleNamespace(pad_token_id=None, eos_token_id=None)) == 0


@given(st.lists(st.integers(2, 200), min_size=1, max_size=400), st.integers(1, 9), st.integers(0, 3), st.booleans())
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_every_row_once(lengths, batch_size, epoch, shuffle):
    batches = epoch_batches(lengths, batch_size, seed=1, epoch=epoch, shuffle=shuffle)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    if not shuffle:
        assert [i for batch in batches for i in batch] == list(range(len(lengths)))


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = [len(row.tokens) for row in make_rows(100)]

    def order(seed, epoch):
        return epoch_batches(lengths, 8, seed=seed, epoch=epoch, shuffle=True)

    random.seed(5)
    first = order(0, 0)
    random.seed(6)
    assert order(0, 0) == first
    different = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({json.dumps(batches) for batches in different}) == 4
    assert len({json.dumps(sorted(map(sorted, batches))) for batches in different}) == 4


def padding_of(lengths, batches):
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def test_rows_of_like_length_stand_together_and_long_ones_do_not_come_first():
    lengths = [len(row.tokens) for row in make_rows(2000, longest=200)]
    batches = epoch_batches(lengths, 8, seed=0, epoch=0, shuffle=True)
    plain = epoch_batches(lengths, 8, seed=0, epoch=0, shuffle=False)
    assert padding_of(lengths, batches) < 0.08
    assert padding_of(lengths, plain) > 0.3
    means = [sum(lengths[i] for i in batch) / 8 for batch in batches]
    halves = sum(means[:125]) / 125, sum(means[125:]) / 125
    assert abs(halves[0] - halves[1]) < 10
    assert means[:16] not in (sorted(means[:16]), sorted(means[:16], reverse=True))


def step_batches(rows, **changes):
    options = {"batch_size": 8, "micro_batch_size": 4, "seed": 3, "shuffle": True, "pad_id": 0} | changes
    return StepBatches(rows, **options)


def plain_rows(batch):
    """Each row of a step as its text and labels, without padding or order."""
    found = []
    for micro in batch.micro_batches:
        for i, name in enumerate(micro.row_ids):
            tokens = micro.input_ids[i][micro.attention_mask[i] == 1].tolist()
            found.append((name, tokens, micro.counted_labels[micro.row_of == i].tolist()))
    return sorted(found)


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_step_can_be_reached_directly(shuffle):
    batches = step_batches(make_rows(29), shuffle=shuffle)
    assert batches.steps_per_epoch == 4
    straight = list(batches.steps(0, 11))
    assert [batch.epoch for batch in straight] == [(step + 1) / 4 for step in range(11)]
    for first in range(12):
        direct = list(step_batches(make_rows(29), shuffle=shuffle).steps(first, 11))
        assert len(direct) == 11 - first
        for one, other in zip(direct, straight[first:], strict=True):
            assert one.epoch == other.epoch
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                assert a.row_ids == b.row_ids
                assert torch.equal(a.input_ids, b.input_ids)
                assert torch.equal(a.positions, b.positions)


@pytest.mark.parametrize(("processes", "micro"), [(1, 8), (1, 3), (2, 4), (2, 2), (4, 2), (4, 1), (8, 1)])
def test_processes_share_the_rows_of_a_step(processes, micro):
    rows = make_rows(21)  # the last batch has 5 rows: some of 8 processes go without
    whole = list(step_batches(rows, micro_batch_size=8).steps(0, 6))
    shares = [
        list(step_batches(rows, micro_batch_size=micro, rank=rank, num_processes=processes).steps(0, 6))
        for rank in range(processes)
    ]
    for step, everything in enumerate(whole):
        mine = [share[step] for share in shares]
        together = sorted(row for share in mine for row in plain_rows(share) if row[0])
        assert together == plain_rows(everything)
        assert len({len(share.micro_batches) for share in mine}) == 1
        assert {share.num_tokens for share in mine} == {sum(len(labels) for _, _, labels in together)}
        assert {share.num_input_tokens for share in mine} == {sum(len(tokens) for _, tokens, _ in together)}
        for share in mine:
            assert all(1 <= len(batch.row_ids) <= micro for batch in share.micro_batches)
            # a process without rows still runs its micro-batches, and adds nothing
            empty = [batch for batch in share.micro_batches if batch.row_ids == ("",)]
            assert all(len(batch.positions) == 0 for batch in empty)
    last = [share[2] for share in shares]
    assert sum(len([r for r in plain_rows(share) if r[0]]) for share in last) == 5


def test_padding_is_the_share_of_positions_without_a_token():
    rows = make_rows(37)
    batches = step_batches(rows)
    micros = [micro for batch in batches.steps(0, batches.steps_per_epoch) for micro in batch.micro_batches]
    real = sum(int(micro.attention_mask.sum()) for micro in micros)
    assert batches.padding(1000) == pytest.approx(1 - real / sum(micro.input_ids.numel() for micro in micros))
    assert batches.padding(0) == 0
    assert step_batches(rows, micro_batch_size=1).padding(1000) == 0


def test_by_length_has_every_row_once_longest_first():
    rows = make_rows(23)
    batches = by_length(rows, 4)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(23))
    lengths = [len(rows[i].tokens) for i in order]
    assert lengths == sorted(lengths, reverse=True)


def test_the_tokens_of_any_number_of_steps():
    batches = step_batches(make_rows(23), batch_size=4)
    for steps in (0, 1, 5, 6, 7, 15, 18):
        read = sum(step.num_input_tokens for step in batches.steps(0, steps))
        assert batches.num_input_tokens(steps) == read
    assert batches.num_input_tokens(6 * 10**20) == 10**20 * batches.num_input_tokens(6)  # without going through them


def test_the_fingerprint_sees_ids_tokens_masks_and_order():
    one, two = Row("a", [1, 2, 3], [False, True, True]), Row("b", [4, 5], [False, True])
    variants = [
        [one, two],
        [two, one],
        [one],
        [Row("c", one.tokens, one.counted), two],
        [Row("a", [1, 2, 4], one.counted), two],
        [Row("a", one.tokens, [False, False, True]), two],
    ]
    assert len({fingerprint(rows) for rows in variants}) == len(variants)
    assert fingerprint([one, two]) == fingerprint([Row("a", [1, 2, 3], [False, True, True]), two])
