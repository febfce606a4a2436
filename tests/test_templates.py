"""Which tokens count under the chat templates of the field, and which rows are truncated, dropped or refused."""

from itertools import groupby

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from kdx.data.batches import Row, collate
from kdx.data.encode import Encoder, prepare_tokenizer
from kdx.data.sources import Conversation, read_conversations
from kdx.errors import DataError
from kdx.tokenizer import pad_id_of

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
LLAMA3 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set about = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set about = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' + about }}"
    "{{- '<|eot_id|>' }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{- m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN25 = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif %}"
    + CHATML
)
# Its block holds the header and the end of the turn, as SmolLM3's does: the template's word counts.
GENERATION_OF_ALL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
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
    "llama 3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "{}<|eot_id|>"),
    "qwen 2.5": (QWEN25, CHATML_TOKENS, "{}<|im_end|>"),
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
    """Encode, raising the first fault → the rows, the rules that dropped others, and how many were truncated."""
    encoder = Encoder(tokenizer, max_length, on_long, assistant_only)
    outcomes, is_truncated = zip(*map(encoder.encode, conversations), strict=True)
    for fault in outcomes:
        if isinstance(fault, DataError):
            raise fault
    return (
        [row for row in outcomes if isinstance(row, Row)],
        [r for r in outcomes if isinstance(r, str)],
        sum(is_truncated),
    )


def row_of(tokenizer, conversation, **options):
    ((row,), _, _) = encode(tokenizer, conversation, **options)
    return row


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
    row = row_of(tokenizer, chat(*contents))
    assert counted_runs(tokenizer, row) == [around.format(content) for content in contents[1::2]]
    text = tokenizer.apply_chat_template(chat(*contents).messages, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row.tokens == tokens[: len(row.tokens)]
    assert row.counted[-1]  # what follows the last counted token is not read: it changes nothing
    assert tokenizer.decode(tokens[len(row.tokens) :]).strip() == ""


@pytest.mark.parametrize("name", ["chatml", "generation", "llama 2", "llama 3", "qwen 2.5", "gemma", "dialogpt"])
def test_a_system_message_does_not_count(make_tokenizer, name):
    template, special, around = TEMPLATES[name]
    tokenizer = make_tokenizer(template, special)
    row = row_of(tokenizer, chat("Hello", "Fine.", "So?", "Yes.", system="Fine."))
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
    row = row_of(tokenizer, chat(" a  ", "  well \n", "\n b", "  well \n"))
    assert counted_runs(tokenizer, row) == [expected, expected]


def test_an_assistant_that_speaks_first_or_twice_counts_each_time(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, CHATML_TOKENS)
    roles = ["assistant", "user", "assistant", "assistant"]
    talk = Conversation("1", [{"role": role, "content": f"I am {role}."} for role in roles], "x:1")
    row = row_of(tokenizer, talk)
    assert counted_runs(tokenizer, row) == ["I am assistant.<|im_end|>"] * 3


def test_a_template_that_ends_only_the_last_turn(make_tokenizer):
    tokenizer = make_tokenizer(ENDS_ONCE)
    row = row_of(tokenizer, chat("a", "Blue.", "b", "Red."))
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
    row = row_of(tokenizer, chat("a colour", said[0], "another", said[1]))
    assert counted_runs(tokenizer, row) == [text + "<|im_end|>" for text in expected]


def test_a_template_that_marks_headers_too_is_taken_at_its_word(make_tokenizer):
    tokenizer = make_tokenizer(GENERATION_OF_ALL, CHATML_TOKENS)
    row = row_of(tokenizer, chat("a colour", "Blue.", "more", "Red."))
    expected = ["<|im_start|>assistant\nBlue.<|im_end|>\n", "<|im_start|>assistant\nRed.<|im_end|>\n"]
    assert counted_runs(tokenizer, row) == expected


def test_a_token_that_reaches_into_the_turn_counts(make_tokenizer):
    """A prompt that ends in a space gives it to the first word's token."""
    tokenizer = make_tokenizer(PLAIN.replace("Bot:{% endif", "Bot: {% endif"))
    row = row_of(tokenizer, chat("name it", "The capital", "so", "The colour"))
    assert counted_runs(tokenizer, row) == [" The capital\n", " The colour\n"]


def test_an_end_token_that_swallows_the_space_before_it_still_ends_the_turn(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, ("<|im_start|>",))
    tokenizer.add_tokens(AddedToken("<|im_end|>", lstrip=True, special=True), special_tokens=True)
    row = row_of(tokenizer, chat("a", "Blue. ", "b", "Red.\n"))
    assert [run.replace(" ", "") for run in counted_runs(tokenizer, row)] == ["Blue.<|im_end|>", "Red.<|im_end|>"]


def test_smollm2_counts_every_turn_of_real_conversations(smollm2_tokenizer, data_config):
    conversations = list(read_conversations(data_config("chitchat")))[:200]
    rows, _, _ = encode(smollm2_tokenizer, *conversations, max_length=10_000)
    for row, conversation in zip(rows, conversations, strict=True):
        said = [m["content"] + "<|im_end|>" for m in conversation.messages if m["role"] == "assistant"]
        assert counted_runs(smollm2_tokenizer, row) == said


def test_assistant_only_false_counts_every_token_but_the_first(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, CHATML_TOKENS)
    row = row_of(tokenizer, chat("Hello", "Fine."), assistant_only=False)
    assert all(row.counted)
    assert row.num_counted == len(row.tokens) - 1
    assert collate([row], 0).counted_labels.tolist() == row.tokens[1:]


def test_end_of_text_counts_though_it_is_the_pad_token_too(make_tokenizer):
    tokenizer = make_tokenizer(DIALOGPT, pad_token="<|endoftext|>")
    rows, _, _ = encode(tokenizer, chat("Hello there", "Fine.", "And?", "Well."), chat("a", "b"))
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
    (row, short), _, _ = encode(tokenizer, chat(*contents), chat("a", "b"), max_length=10_000)
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
    (whole, _), _, _ = encode(tokenizer, long, short, assistant_only=assistant_only)
    limit = len(whole.tokens) - 2
    options = {"max_length": limit, "assistant_only": assistant_only}

    rows, dropped, num_truncated = encode(tokenizer, long, short, on_long="truncate", **options)
    assert [len(row.tokens) for row in rows] == [limit, 4]
    assert (rows[0].tokens, rows[0].counted) == (whole.tokens[:limit], whole.counted[:limit])
    assert (dropped, num_truncated) == ([], 1)

    rows, dropped, num_truncated = encode(tokenizer, long, short, on_long="drop", **options)
    assert [len(row.tokens) for row in rows] == [4]
    assert (dropped, num_truncated) == (["longer than data.max_length"], 0)

    with pytest.raises(DataError) as caught:
        encode(tokenizer, long, short, long, on_long="error", **options)
    assert f"c.jsonl:7: the row has {limit + 2} tokens, data.max_length is {limit}" in str(caught.value)
    assert "data.on_long=truncate" in str(caught.value)


def test_rows_left_without_a_counted_token_are_dropped(make_tokenizer):
    talks = chat("Hello there", "Fine."), chat("a", "b")
    rows, dropped, num_truncated = encode(make_tokenizer(DIALOGPT), *talks, max_length=3, on_long="truncate")
    assert (len(rows), dropped, num_truncated) == (1, ["no counted token left"], 2)


def test_a_row_that_the_template_refuses_is_named_and_the_others_are_encoded(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA2, ("<s>", "</s>"))
    bad = Conversation("x", [{"role": role, "content": "x"} for role in ("user", "user", "assistant")], "chat.jsonl:7")
    encoder = Encoder(tokenizer, 100, "error", True)
    first, fault, last = (encoder.encode(one)[0] for one in (chat("a", "b"), bad, chat("c", "d")))
    assert str(fault).startswith("chat.jsonl:7: the chat template refuses the conversation: turns must alternate")
    assert [counted_runs(tokenizer, row) for row in (first, last)] == [[" b </s>"], [" d </s>"]]


def test_a_template_that_leaves_the_assistant_out_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(DataError, match=r"chat\.jsonl:1: the chat template leaves out.*data\.assistant_only=false"):
        encode(tokenizer, chat("a", "b"))
    row = row_of(tokenizer, chat("what is it", "b"), assistant_only=False)
    assert tokenizer.decode(row.tokens) == "what is it"


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
    row = row_of(bare, chat("a", "b"))
    assert bare.decode(row.tokens) == "a<|endoftext|>b<|endoftext|>"
    prepare_tokenizer(make_tokenizer(), data_config("custom", chat_template=LLAMA2))


def test_a_tokenizer_without_template_and_end_of_text_is_refused(make_tokenizer, data_config):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"data\.chat_template: .* neither a template nor an end-of-text"):
        prepare_tokenizer(tokenizer, data_config("custom"))
