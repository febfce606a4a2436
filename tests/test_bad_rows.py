"""Bad files and rows: each fault with its file:line, what is wrong there, and a hint; all in one pass."""

import json
from pathlib import Path

import pytest
from standins import DIALOGPT_TEMPLATE

from kdx.data.encode import load_data
from kdx.errors import KdxError
from kdx.tokenizer import SharedTokenizer

GOOD = {"source": "a", "target": "b"}
LINE = json.dumps(GOOD).encode() + b"\n"
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def load(tmp_path, monkeypatch, make_tokenizer, data_config):
    """Load data as a run does, in a folder of its own: the choice of data and its keys → what was loaded."""
    monkeypatch.chdir(tmp_path)

    def run(choice="pairs", max_length=100, **changes):
        config = data_config(choice, **{"path": "t.jsonl"} | changes)
        return load_data(config, SharedTokenizer(make_tokenizer(DIALOGPT_TEMPLATE), max_length))

    return run


@pytest.fixture
def refused(load):
    """The same, for data that are refused → the lines of the error."""

    def run(*words, **changes):
        with pytest.raises(KdxError) as caught:
            load(*words, **changes)
        assert caught.value.exit_code == 2
        return caught.value.lines

    return run


def jsonl(*rows):
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


# name: (file, content, the start of the line, what else it says)
FILES = {
    "broken JSON on line 2": ("t.jsonl", LINE + b'{"source": x}\n' + LINE, "t.jsonl:2:12: is not JSON", "one object a line"),
    "truncated last line, in text": ("t.jsonl", LINE + b'{"source": "a", "tar', "t.jsonl:2:17: is not JSON", "Was the copy cut short?"),
    "broken list": ("t.json", b'[{"source": "a"},\n {"source": }]', "t.json:2:13: is not JSON", "Was the copy cut"),
    "lines in a .json": ("t.json", LINE * 2, "t.json:2:1: is not JSON", "A .jsonl file has one object a line"),
    "an object for a list": ("t.json", b'{"version": 1}', "t.json: holds an object with version, expected a list of rows", "Wrap the rows in [ ]"),
    "NaN": ("t.jsonl", LINE + b'{"source": NaN}', 't.jsonl:2: "source" is NaN (float), expected text', "Fix the row"),
    "latin-1": ("t.jsonl", LINE + b'{"source": "caf\xe9"}\n', "t.jsonl:2: byte 0xe9 is not UTF-8", "iconv -f LATIN1 -t UTF-8 t.jsonl"),
    "a comma too few": ("t.csv", b"source,target\na,b\nc\n", "t.csv:3: ", '"target" is null (NoneType), expected text'),
    "empty": ("t.jsonl", b"", "t.jsonl: has no rows", "Was the copy cut short?"),
    "chats": ("t.jsonl", (json.dumps({"messages": TALK}) + "\n").encode(), 't.jsonl:1: "source" is missing; the row is an object with messages', "Choose a layout (data=pairs, messages, sharegpt or text), or name the column"),
    "copies of one row": ("t.jsonl", LINE * 20, "data: no training row is left (19 equal to a held-out row)", "lower data.validation"),
    "a comma too many": ("t.csv", b"source,target\na,b\na,b, and c\n", "t.csv:3: has more columns than the header", "Quote the separators"),
    "a broken quote": ("t.csv", b'source,target\n"a"b,c\n', "t.csv:2: is not CSV", "Fix the quoting"),
    "not parquet": ("t.parquet", b"PAR1 but no more", "t.parquet: is not readable as parquet", "Was the copy cut short?"),
    "another format": ("t.txt", b"hello", "data.path: t.txt is not one of .jsonl, .json, .csv, .parquet", "Convert it"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "content", "start", "says"), FILES.values(), ids=FILES)
def test_files(refused, file, content, start, says):
    Path(file).write_bytes(content)
    (line,) = refused(path=file, validation=0.05)
    assert line.startswith(start), line
    assert says in line


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_csv_is_read_with_the_delimiter_of_its_header(load, sign):
    Path("t.csv").write_text(f'source{sign}target\na{sign}b\n"c,;\td"{sign}e\n')
    assert len(load(path="t.csv").train) == 2


# ---- rows. (choice, row, what is said of it)
CHAT = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
LAYOUT = "Choose a layout (data=pairs, messages, sharegpt or text), or name the column: data."
CHOSEN = "Choose data=pairs if there is a prompt, else data=messages data.messages_column=chosen"
OTHER = "Fix the row, or name another column: data."
FIX = "expected text that is not blank. Fix the row, or remove it"
ROLES = "Roles are system, developer, user, assistant, tool, function, observation, ipython; map others with data.roles, as in data.roles.bot=assistant"
ROWS = [
    ("pairs", {"q": "a", "a": "b"}, f'"source" is missing; the row is an object with q, a. {LAYOUT}source_column=...'),
    ("pairs", {"chosen": TALK}, f'"source" is missing; the row is an object with chosen. {CHOSEN}'),
    ("pairs", {}, f'"source" is missing; the row is an object with no keys. {LAYOUT}source_column=...'),
    ("pairs", {**GOOD, "target": None}, f'"target" is null (NoneType), expected text that is not blank. {OTHER}target_column=...'),
    ("pairs", {**GOOD, "target": 5}, f'"target" is 5 (int), expected text that is not blank. {OTHER}target_column=...'),
    ("pairs", {**GOOD, "source": ["a"]}, f'"source" is ["a"] (list), expected text that is not blank. {OTHER}source_column=...'),
    ("pairs", {**GOOD, "target": ""}, f'"target" is "" (str), expected text that is not blank. {OTHER}target_column=...'),
    ("pairs", {**GOOD, "source": "a\ud83d"}, '"source" has half of a surrogate pair, which is not text. Was the text cut in the middle of an emoji? Fix it'),
    ("pairs", ["a", "b"], 'is ["a", "b"] (list), expected an object. Write one JSON object a row'),
    ("messages", {"text": "a"}, f'"messages" is missing; the row is an object with text. {LAYOUT}messages_column=...'),
    ("messages", {"prompt": "a", "chosen": "b"}, f'"messages" is missing; the row is an object with prompt, chosen. {CHOSEN}'),
    ("messages", {"messages": "oops"}, f'"messages" is "oops" (str), expected a list of messages. {CHAT}'),
    ("messages", {"messages": []}, f'"messages" is [] (list), expected a list of messages. {CHAT}'),
    ("messages", {"messages": ["hi", *TALK]}, 'messages[0]: is "hi" (str), expected an object with "role" and "content". Name them: data.role_key, data.content_key'),
    ("messages", {"messages": [*TALK, {"role": "user"}]}, 'messages[2]: is an object with role, expected an object with "role" and "content". Name them: data.role_key, data.content_key'),
    ("messages", {"messages": [TALK[0], {"role": "bot", "content": "b"}]}, f'messages[1]: the role is "bot" (str). {ROLES}'),
    ("messages", {"messages": [TALK[0], {**TALK[1], "content": [1]}]}, f'messages[1]: "content" is [1] (list), {FIX}'),
    ("messages", {"messages": [TALK[0], {**TALK[1], "content": " "}]}, f'messages[1]: "content" is " " (str), {FIX}'),
    ("messages", {"messages": [TALK[0]]}, "has no message of the assistant. The student learns the assistant's turns: add one"),
    ("sharegpt", {"messages": TALK}, f'"conversations" is missing; the row is an object with messages. {LAYOUT}messages_column=...'),
    ("sharegpt", {"conversations": TALK}, 'messages[0]: is an object with role, content, expected an object with "from" and "value". Name them: data.role_key, data.content_key'),
]  # fmt: skip


@pytest.mark.parametrize("choice", ["pairs", "messages", "sharegpt"])
def test_rows(refused, choice):
    """All rows of a source in one file, so in one pass."""
    bad = [(row, says) for name, row, says in ROWS if name == choice]
    good = {"pairs": GOOD, "messages": {"messages": TALK}}.get(choice)
    good = good or {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    Path("t.jsonl").write_bytes(jsonl(*(part for row, _ in bad for part in (good, row))))
    *lines, total = refused(choice)
    assert lines == [f"t.jsonl:{2 * i}: {says}" for i, (_, says) in enumerate(bad, 1)]
    assert total.startswith(f"data: {len(bad)} ")
    assert total.endswith("set data.on_bad_row=skip, which leaves out at most data.max_bad_rows")


def test_parsing_encoding_and_held_out_rows_are_one_pass(refused):
    template = '{% for m in messages %}{{ raise_exception("no sums") if "+" in m.content else m.content }}{% endfor %}'
    long = {"source": "a", "target": "b " * 100}
    Path("t.jsonl").write_bytes(jsonl(GOOD, {"source": "a"}, long, {"source": "2+2", "target": "4"}, *[GOOD] * 20))
    Path("held.jsonl").write_bytes(jsonl(b"{oops\n", long))
    changes = {"chat_template": template, "on_long": "error", "validation": "held.jsonl", "max_length": 20}
    lines = refused(**changes)
    assert [line.split(": ")[0] for line in lines] == [
        "t.jsonl:2", "held.jsonl:1:2", "t.jsonl:3", "t.jsonl:4", "held.jsonl:2", "data",
    ]  # fmt: skip
    assert lines[2].endswith("data.max_length is 20. Raise it, or set data.on_long=truncate or split")
    assert lines[3].startswith("t.jsonl:4: the chat template refuses the conversation: no sums. Fix the row, or give")
    Path("t.jsonl").write_bytes(jsonl(GOOD, long, *[GOOD] * 20))  # no faults in the text
    Path("held.jsonl").write_bytes(jsonl(*({**row, "source": "c"} for row in (GOOD, long))))
    assert [line.split(": ")[0] for line in refused(**changes)] == ["t.jsonl:2", "held.jsonl:2", "data"]


def test_the_first_20_of_all_faults_and_how_many(refused):
    Path("t.jsonl").write_bytes(jsonl(LINE, *[{"source": "a"}] * 15, *[b"{\n"] * 15))
    *lines, total = refused()
    assert [line.split(": ")[0] for line in lines] == [
        *(f"t.jsonl:{n}" for n in range(2, 17)), *(f"t.jsonl:{n}:2" for n in range(17, 22)),
    ]  # fmt: skip
    assert total.startswith("data: 30 ")
    assert "first 20 shown" in total
    Path("t.jsonl").write_bytes(jsonl(*[{"prompt": "a", "chosen": "b"}] * 30))
    *lines, total = refused("messages", messages_column="chosen")
    assert len(lines) == 3
    assert lines[0].endswith(f"{CHAT}, or choose data=pairs for a prompt and a text")
    assert (
        total
        == "data: 30 invalid rows, first 3 shown. Fix them, or set data.on_bad_row=skip, which leaves out at most data.max_bad_rows"
    )


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
)
REFUSED = "the chat template refuses the conversation: roles must alternate. "


@pytest.fixture
def alternating(load):
    """A chat template that refuses rows 4, 8 and 12 of 20, where row 2 is bad as text."""
    twice = [
        {"messages": [TALK[0], TALK[0], TALK[1]]},
        {"messages": [TALK[1], TALK[1]]},
        {"messages": TALK * 2 + [TALK[1]]},
    ]
    rows = [{"messages": [{**TALK[0], "content": f"a{i}"}, TALK[1]]} for i in range(20)]
    rows[1], rows[3::4] = {"messages": "oops"}, [*twice, *rows[15::4]]
    Path("t.jsonl").write_bytes(jsonl(*rows))
    return {"chat_template": ALTERNATING, "validation": 2}


def test_rows_that_the_chat_template_refuses_are_skipped_and_counted(load, alternating, caplog):
    data = load("messages", **alternating, on_bad_row="skip", max_bad_rows=0.2)
    assert data.dropped == {"bad row (data.on_bad_row=skip)": 4}
    assert (len(data.train), len(data.held_out)) == (14, 2)
    assert "skipped 4 bad rows, the first: t.jsonl:2: " in caplog.text


def test_they_count_towards_the_most_that_are_skipped(load, refused, alternating):
    first, *lines, total = refused("messages", **alternating, on_bad_row="skip", max_bad_rows=3)
    assert first == "data: 4 of 20 rows are bad, and data.max_bad_rows is 3. Fix them, or raise it"
    assert lines[0].startswith("t.jsonl:2: ")
    assert all(line.startswith(f"t.jsonl:{n}: {REFUSED}") for n, line in zip((4, 8, 12), lines[1:], strict=True))
    assert total.startswith("data: 5 ")
    first, *lines, total = refused("messages", **alternating)  # without skip
    assert [line.split(": ")[0] for line in (first, *lines)] == [f"t.jsonl:{n}" for n in (2, 4, 8, 12)]
    good = [{"messages": [{**TALK[0], "content": f"b{i}"}, TALK[1]]} for i in range(3)]
    Path("held.jsonl").write_bytes(jsonl(*good, {"messages": [*TALK, TALK[1]]}))  # rows of a held-out file, too
    data = load("messages", **alternating | {"validation": "held.jsonl"}, on_bad_row="skip", max_bad_rows=4)
    assert data.dropped == {"bad row (data.on_bad_row=skip)": 5}
    assert (len(data.train), len(data.held_out)) == (16, 3)


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_chat_template_may_refuse_all_rows(refused, how):
    Path("t.jsonl").write_bytes(jsonl(*({**GOOD, "id": i, "source": f"a{i}"} for i in range(20))))
    lines = refused(chat_template='{{ raise_exception("no") }}', on_bad_row=how, validation=2)
    assert "t.jsonl:1: the chat template refuses the conversation: no. " in lines[how == "skip"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_length": 2}, "no training row is left (40 no counted token left). Raise data.max_length"),
        ({"max_length": 3, "on_long": "drop"}, "no training row is left (40 longer than data.max_length)"),
        ({"chat_template": "{% oops %}"}, "data.chat_template: is not Jinja: Encountered unknown tag 'oops'"),
        ({"chat_template": "nowhere.jinja"}, "data.chat_template: nowhere.jinja is not a file"),
    ],
)
def test_nothing_left_and_templates_that_are_none(refused, changes, says):
    Path("t.jsonl").write_bytes(jsonl(*({"source": f"a b c {i}", "target": "d e f"} for i in range(40))))
    assert says in refused(**changes)[0]
