"""Rows → checked conversations: every fault in one pass, sources, what is held out and what is trained on."""

import hashlib
import json
import random
import sys
import types

import datasets
import pytest
from standins import DIALOGPT_TEMPLATE

from kdx.config import replaced
from kdx.data import encode
from kdx.data import sources as kdx_data
from kdx.data.encode import load_data
from kdx.data.sources import check_source, read_conversations, register_source, split
from kdx.errors import ConfigError, DataError, first_of
from kdx.tokenizer import SharedTokenizer


@pytest.fixture
def file_of(tmp_path):
    """Write rows (or raw text) to a file of this test's folder → its path."""

    def write(rows, name="t.jsonl"):
        file = tmp_path / name
        lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(lines, encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def registry(monkeypatch):
    """Sources registered by a test are forgotten after it."""
    monkeypatch.setattr(kdx_data, "_SOURCES", dict(kdx_data._SOURCES))


def numbered(count, start=0):
    return [{"id": f"r{i}", "source": f"question {i}", "target": f"answer {i}"} for i in range(start, start + count)]


def ids(conversations):
    return [conversation.id for conversation in conversations]


def said(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


def read(config):
    """Read, check and split → the conversations to train on and those held out, and how many fell to which rule."""
    found = read_conversations(config)
    if found.faults:
        raise first_of(found.faults, found.num_read)
    train, held_out = ([found[i] for i in part] for part in split(config, found))
    return types.SimpleNamespace(
        train=train, held_out=held_out, **{name: +counter for name, counter in found.counts.items()}
    )


def faults(config, kind=DataError):
    with pytest.raises(kind) as caught:
        read(config)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


GOOD = {"source": "a", "target": "b"}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_chitchat_has_3240_conversations_that_end_with_the_assistant(data_config):
    dataset = read(data_config("chitchat", validation=128))
    rows = dataset.train + dataset.held_out
    assert (len(rows), len(dataset.held_out)) == (3240, 128)
    assert {len(row.messages) for row in rows} <= set(range(4, 13))
    assert all(row.messages[-1]["role"] == "assistant" for row in rows)
    assert all([m["role"] for m in row.messages] == ["user", "assistant"] * (len(row.messages) // 2) for row in rows)
    assert all(message["content"].strip() for row in rows for message in row.messages)
    assert len(set(ids(rows))) == 3240
    assert dataset.dropped["fewer turns than data.min_turns"] > 3000
    assert dataset.changed["unanswered last turn cut off"] > 0
    assert "chitchat_dataset" not in sys.modules  # its files are read, the package is never imported


def test_ones_own_source_yields_either_shape_and_takes_options(registry, data_config):
    @register_source
    def tickets(path, min_turns: int = 2):
        yield {"messages": TALK * min_turns, "id": path, "where": "ticket 1"}
        yield {"source": "q", "target": "a"}

    config = data_config("custom", name="tickets", path="t.db")
    first, second = read(config).train
    assert (first.id, first.where, len(first.messages)) == ("t.db", "ticket 1", 4)
    assert (said(second), second.where) == ([("user", "q"), ("assistant", "a")], "tickets[1]")
    more = data_config("custom", name="tickets", path="t.db", min_turns=3)
    assert len(read(more).train[0].messages) == 6


def test_a_wrong_option_names_the_key_and_the_known_ones(registry, data_config):
    @register_source
    def tickets(path, min_turns: int):
        raise AssertionError("read before it was checked")

    for options, says in (
        ({"min_turn": 3}, "data.min_turn: is not an option of tickets. Did you mean data.min_turns? "),
        ({"min_turns": "many"}, 'data.min_turns: is "many". It should be a valid integer'),
        ({}, "data.min_turns: is missing"),
    ):
        config = data_config("custom", name="tickets", path="t.db", **options)
        with pytest.raises(ConfigError) as caught:
            check_source(config)
        assert says in str(caught.value)
        assert faults(config, ConfigError) == str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"words": "a"}, 'tickets[1]: is an object with words, expected an object with "messages", with'),
        ({"source": "a"}, "is an object with source"),
        (("a", "b"), 'tickets[1]: is ["a", "b"] (tuple), expected an object'),
        ({"source": "a", "target": 5, "where": "ticket 9"}, 'ticket 9: messages[1]: "content" is 5 (int)'),
    ],
)
def test_what_ones_own_source_yields_is_checked(registry, data_config, item, says):
    @register_source
    def tickets():
        yield GOOD
        yield item

    (line,) = faults(data_config("custom", name="tickets", path="x"))
    assert says in line


def by_rank(names, seed):
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_rows_have_the_smallest_digest_of_seed_and_id(file_of, data_config, seed):
    rows = numbered(50)
    order = by_rank([row["id"] for row in rows], seed)
    for validation, number in ((7, 7), (0.1, 5), (0.001, 1), (49, 49)):
        dataset = read(data_config("pairs", path=file_of(rows), validation=validation, seed=seed))
        assert ids(dataset.held_out) == order[:number]
        assert ids(dataset.train) == [row["id"] for row in rows if row["id"] not in order[:number]]
    random.Random(0).shuffle(rows)
    again = read(data_config("pairs", path=file_of(rows), validation=7, seed=seed, take=3, shuffle=False))
    assert ids(again.held_out) == order[:7]


@pytest.mark.parametrize("shared", ["lang", 0, ""])
def test_rows_that_share_an_id_are_told_apart_wherever_they_stand(file_of, data_config, shared):
    rows = [{**row, "id": shared} for row in numbered(30)] + [GOOD, GOOD, GOOD]
    first = read(data_config("pairs", path=file_of(rows), validation=8))
    again = read(data_config("pairs", path=file_of(rows[::-1]), validation=8))
    everything = read(data_config("pairs", path=file_of(rows)))
    assert len(set(ids(everything.train))) == 33
    assert ids(first.held_out) == ids(again.held_out)
    assert [said(row) for row in first.held_out] == [said(row) for row in again.held_out]
    other = read(data_config("pairs", path=file_of(rows), validation=8, seed=1))
    assert ids(other.held_out) != ids(first.held_out)


def test_training_rows_equal_to_a_held_out_row_are_dropped_and_counted(file_of, data_config):
    rows = numbered(20)
    copies = [{**row, "id": f"copy of {row['id']}"} for row in rows]
    dataset = read(data_config("pairs", path=file_of(rows + copies), validation=6))
    held_out = {row.digest for row in dataset.held_out}
    assert not held_out & {row.digest for row in dataset.train}
    assert dataset.dropped["equal to a held-out row"] == 2 * len(held_out) - 6
    assert len(dataset.train) == 40 - 2 * len(held_out)


def test_a_held_out_split_is_read_by_its_name(file_of, data_config, tmp_path, registry):
    file_of(numbered(10), "train.jsonl")
    file_of(numbered(4, start=100), "test-00000.jsonl")
    dataset = read(data_config("pairs", path=str(tmp_path), validation="split:test"))
    assert ids(dataset.held_out) == ["r100", "r101", "r102", "r103"]
    assert ids(dataset.train) == [f"r{i}" for i in range(10)]

    @register_source
    def tickets(split):
        yield from numbered(3, start=10 if split == "test" else 0)

    dataset = read(data_config("custom", name="tickets", path="x", validation="split:test"))
    assert (ids(dataset.held_out), ids(dataset.train)) == (["r10", "r11", "r12"], ["r0", "r1", "r2"])


def test_take_counts_training_rows_and_is_nested(file_of, data_config):
    path = file_of(numbered(60))

    def train(take, **changes):
        return read(data_config("pairs", path=path, validation=10, take=take, **changes))

    whole, ten, twenty = train(None), train(10), train(20)
    assert [len(dataset.train) for dataset in (whole, ten, twenty)] == [50, 10, 20]
    assert ids(ten.held_out) == ids(twenty.held_out) == ids(whole.held_out)
    assert set(ids(ten.train)) < set(ids(twenty.train)) < set(ids(whole.train))
    assert ids(twenty.train) == [name for name in ids(whole.train) if name in ids(twenty.train)]
    assert set(ids(ten.train)) != set(ids(whole.train)[:10])
    assert ids(train(10, seed=1).train) != ids(ten.train)
    assert not whole.said
    assert len(train(51).train) == 50
    assert train(51).said == {"all training rows are used, fewer than data.take=51": 50}


@pytest.fixture
def load(make_tokenizer):
    """Load the data of a config with a small tokenizer, and a chat template if need be."""

    def run(config, template=DIALOGPT_TEMPLATE, max_length=100):
        return load_data(config, SharedTokenizer(make_tokenizer(template), max_length), 2)

    return run


def unread(*_):
    raise AssertionError("read or encoded again")


def test_a_second_run_maps_what_the_first_has_encoded(file_of, data_config, load, monkeypatch):
    config = data_config("pairs", path=file_of(numbered(30)), validation=5)
    first = load(config)
    with monkeypatch.context() as patched:
        patched.setattr(encode, "read_conversations", unread)
        second = load(config)
        assert (list(first.train), first.prompts) == (list(second.train), second.prompts)
        assert (first.fingerprint, first.held_out_fingerprint) == (second.fingerprint, second.held_out_fingerprint)
        assert load(replaced(config, shuffle=False)).fingerprint == first.fingerprint  # the order of epochs is not kept
        for changed in (
            lambda: load(replaced(config, seed=1)),
            lambda: load(config, "{% for m in messages %}{{ m.content }}{% endfor %}"),
            lambda: load(config, max_length=5),
            lambda: load(data_config("pairs", path=file_of(numbered(31)), validation=5)),  # the same file, longer
        ):
            with pytest.raises(AssertionError, match="read or encoded again"):
                changed()


def test_a_hub_data_set_is_read_again_only_when_it_changes(data_config, load, monkeypatch):
    hub = {"org/name": datasets.Dataset.from_list(numbered(30))}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: hub[path])
    config = data_config("pairs", path="org/name", validation=5)
    first = load(config)
    monkeypatch.setattr(encode, "read_conversations", unread)
    assert load(config).fingerprint == first.fingerprint
    hub["org/name"] = datasets.Dataset.from_list(numbered(31))
    with pytest.raises(AssertionError, match="read or encoded again"):
        load(config)


def test_ones_own_source_is_cached_by_what_it_yields(registry, data_config, load, monkeypatch):
    rows = numbered(9)

    @register_source
    def tickets():
        yield from rows

    config = data_config("custom", name="tickets", path="x")
    first = load(config)
    monkeypatch.setattr(encode.Encoder, "encode", unread)
    assert load(config).fingerprint == first.fingerprint
    rows.append(numbered(10)[9])
    with pytest.raises(AssertionError, match="read or encoded again"):
        load(config)


def test_rows_are_as_they_were_encoded_in_one_process_or_in_several(file_of, data_config, load, monkeypatch):
    texts = [{"source": f"What is {i}?" * (i % 5 + 1), "target": f"It is {i}." * (i % 3 + 1)} for i in range(70)]
    config = data_config("pairs", path=file_of(texts), validation=3)
    here = load(config, max_length=30)
    monkeypatch.setattr(encode, "CHUNK", 4)
    monkeypatch.setattr(encode, "num_cores", lambda: 2)
    monkeypatch.setattr(encode, "_digest", lambda config, *_: str(config.validation))
    apart = load(config, max_length=30)
    assert list(here.train) == list(apart.train)
    assert (here.fingerprint, here.dropped, here.changed) == (apart.fingerprint, apart.dropped, apart.changed)
    rows = here.train
    assert rows.lengths.tolist() == [len(row.tokens) for row in rows]
    assert rows.num_counted.tolist() == [row.num_counted for row in rows]
    assert rows.digests == [row.digest for row in rows]
    assert rows[-1] == list(rows)[-1]
    assert len(load(data_config("pairs", path=file_of(texts))).held_out) == 0
