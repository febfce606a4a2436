"""Whose chat template a run uses, and which rows are truncated, dropped or refused."""

import pytest
from standins import DIALOGPT_TEMPLATE
from test_rows import CHATML, PLAIN

from kdx.data.encode import Encoder, prepare_tokenizer
from kdx.data.sources import Conversation
from kdx.errors import DataError
from kdx.tokenizer import SharedTokenizer


def chat(*contents, where="chat.jsonl:1"):
    """A conversation that the user opens."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation("row", messages, where)


def encode(tokenizer, *conversations, max_length=1000, on_long="error", assistant_only=True):
    """Encode, raising the first fault → the rows, the rules that dropped others, and how many were truncated."""
    encoder = Encoder(SharedTokenizer(tokenizer, max_length), on_long, assistant_only)
    found = [encoder.encode(conversation) for conversation in conversations]
    for encoded in found:
        if encoded.fault:
            raise encoded.fault
    rows = [row for encoded in found for row in encoded.rows]
    counts = [count for encoded in found for count in encoded.counts]
    dropped = [rule for counter, rule in counts if counter == "dropped"]
    return rows, dropped, sum(counter == "changed" for counter, _ in counts)


def row_of(tokenizer, conversation, **options):
    ((row,), _, _) = encode(tokenizer, conversation, **options)
    return row


@pytest.mark.parametrize("assistant_only", [True, False])
def test_long_rows_are_truncated_dropped_or_refused(make_tokenizer, assistant_only):
    tokenizer = make_tokenizer(DIALOGPT_TEMPLATE)
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
    rows, dropped, num_truncated = encode(make_tokenizer(DIALOGPT_TEMPLATE), *talks, max_length=3, on_long="truncate")
    assert (len(rows), dropped, num_truncated) == (1, ["no counted token left"], 2)


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
        prepare_tokenizer(SharedTokenizer(tokenizer, 100), data_config("custom", chat_template=DIALOGPT_TEMPLATE))
        == "data.chat_template"
    )
    assert tokenizer.chat_template == DIALOGPT_TEMPLATE
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


def test_a_tokenizer_without_template_and_end_of_text_is_refused(make_tokenizer, data_config):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"data\.chat_template: .* neither a template nor an end-of-text"):
        prepare_tokenizer(SharedTokenizer(tokenizer, 100), data_config("custom"))
