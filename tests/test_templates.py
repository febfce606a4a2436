"""Which tokens count under the chat templates of the field, and which rows are truncated, dropped or refused."""

from itertools import groupby

import pytest

from kdx.data.encode import Encoder, prepare_tokenizer
from kdx.data.sources import Conversation
from kdx.errors import DataError
from kdx.tokenizer import SharedTokenizer

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
    encoder = Encoder(SharedTokenizer(tokenizer, max_length), on_long, assistant_only)
    found = [encoder.encode(conversation) for conversation in conversations]
    for encoded in found:
        if encoded.fault:
            raise encoded.fault
    rows = [row for encoded in found for row in encoded.rows]
    return rows, [encoded.dropped for encoded in found if encoded.dropped], sum(len(e.changed) for e in found)


def row_of(tokenizer, conversation, **options):
    ((row,), _, _) = encode(tokenizer, conversation, **options)
    return row


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
    encoder = Encoder(SharedTokenizer(tokenizer, 100), "error", True)
    first, refused, last = (encoder.encode(one) for one in (chat("a", "b"), bad, chat("c", "d")))
    assert str(refused.fault).startswith(
        "chat.jsonl:7: the chat template refuses the conversation: turns must alternate"
    )
    assert [counted_runs(tokenizer, row) for row in first.rows + last.rows] == [[" b </s>"], [" d </s>"]]


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
    assert prepare_tokenizer(SharedTokenizer(tokenizer, 100), data_config("custom")) == "the tokenizer's own"
    assert tokenizer.chat_template == PLAIN
    assert (
        prepare_tokenizer(SharedTokenizer(tokenizer, 100), data_config("custom", chat_template=DIALOGPT))
        == "data.chat_template"
    )
    assert tokenizer.chat_template == DIALOGPT
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    prepare_tokenizer(SharedTokenizer(tokenizer, 100), data_config("custom", chat_template=str(file)))
    assert tokenizer.chat_template == CHATML

    bare = make_tokenizer()
    assert (
        prepare_tokenizer(SharedTokenizer(bare, 100), data_config("custom")) == "turns joined by the end-of-text token"
    )
    row = row_of(bare, chat("a", "b"))
    assert bare.decode(row.tokens) == "a<|endoftext|>b<|endoftext|>"
    prepare_tokenizer(SharedTokenizer(make_tokenizer(), 100), data_config("custom", chat_template=LLAMA2))


def test_a_tokenizer_without_template_and_end_of_text_is_refused(make_tokenizer, data_config):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"data\.chat_template: .* neither a template nor an end-of-text"):
        prepare_tokenizer(SharedTokenizer(tokenizer, 100), data_config("custom"))
