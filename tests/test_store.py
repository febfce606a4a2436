"""A teacher's folder in the store, and the teacher that reads from it."""

import os
import random
import stat
import time
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from standins import write_llama
from transformers import AutoModelForCausalLM

from kdx import store as store_module
from kdx.causal_lm import Head, head_of
from kdx.data.batches import Row, collate
from kdx.run.files import size_of
from kdx.store import Identity, TeacherStore, damaged_files, load_head
from kdx.teacher import Teacher

WHO = Identity("teacher", "fp32", "none")


@pytest.fixture
def opened(tmp_path):
    def open_(identity=WHO, **more):
        return TeacherStore(tmp_path / "store", identity, name="org/name", **more)

    return open_


def digest(i):
    return f"{i:032x}"


def written(store, *numbers, flush=True):
    """Store rows of 3 positions, width 4 → them."""
    rows = {digest(i): torch.full((3, 4), float(i)) for i in numbers}
    store.write(list(rows), list(rows.values()))
    if flush:
        store.flush()
    return rows


def shards(store):
    return sorted(store.rows.glob("[!.]*"))


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


class TestRows:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_round_trip(self, opened, dtype):
        """Every bit pattern, NaNs included; a row without positions; from the buffer and from the disk."""
        bits = torch.randint(0, 256, (6, 40 * dtype.itemsize), dtype=torch.uint8)
        rows = [bits.view(dtype)[:5], bits.view(dtype)[5:], torch.empty(0, 40, dtype=dtype)]
        names, store = [digest(i) for i in range(3)], opened()
        store.write(names, rows)
        assert opened().read(names) is None, "not flushed yet"
        kept = [row.clone() for row in rows]
        rows[0].zero_()  # what the caller does with its tensor afterwards
        buffered = store.read(names)
        store.flush()
        for found in (buffered, store.read(names), opened().read(names)):
            for row, known in zip(found, kept, strict=True):
                assert (row.dtype, row.shape) == (dtype, known.shape)
                assert torch.equal(row.view(torch.uint8), known.view(torch.uint8))
        assert not list(store.folder.rglob(".tmp-*"))

    def test_any_damage_is_a_missing_row_never_a_wrong_one(self, opened, caplog):
        rows = written(first := opened(), 1, 2)
        (file,) = shards(first)
        whole = file.read_bytes()
        missing = 0
        for bit in range(0, 8 * len(whole), 29):
            flip(file, bit)
            store = opened()
            for name, row in rows.items():
                found = store.read([name])
                missing += found is None
                assert found is None or torch.equal(found[0], row), bit
            file.write_bytes(whole)
        assert missing > len(whole) / 29, "most bits matter"
        written(opened(), 3)
        for content in (b"", whole[:100], whole[:-1]):
            file.write_bytes(content)
            caplog.clear()
            store = opened()
            assert [store.read([digest(i)]) is None for i in (1, 1, 3)] == [True, True, False]
            assert len(caplog.records) == 1 and f"skipping the damaged file {file}" in caplog.text

    def test_a_damaged_row_is_written_again_and_then_read(self, opened):
        written(first := opened(), 1, 2)
        flip(shards(first)[0], -1)
        store = opened()
        damaged = next(i for i in (1, 2) if store.read([digest(i)]) is None)
        assert store.counts["bad"] == 1 and store.missing([digest(1), digest(2)]) == [digest(damaged)]
        rows = written(store, damaged)
        assert torch.equal(opened().read([digest(damaged)])[0], rows[digest(damaged)])

    def test_a_stored_row_keeps_its_bits(self, opened):
        """Computed again in another batch, and twice in one batch: what is used is what a resumed run will find."""
        rows = written(store := opened(), 1)
        names = [digest(1), digest(2), digest(2)]
        given = [torch.zeros(3, 4), torch.ones(3, 4), torch.full((3, 4), 1.5)]
        used = store.write(names, given)
        assert torch.equal(used[0], rows[digest(1)]) and used[1] is given[1] and torch.equal(used[2], given[1])
        store.close()
        assert all(torch.equal(row, now) for row, now in zip(used, opened().read(names), strict=True))

    def test_flushed_by_size_and_by_time(self, opened, monkeypatch):
        monkeypatch.setattr(store_module, "SHARD_BYTES", 100)
        written(store := opened(), 1, 2, flush=False)
        assert shards(store) == []
        written(store, 3, flush=False)
        written(store, 4, flush=False)
        assert len(shards(store)) == 1 and opened().missing([digest(3), digest(4)]) == [digest(4)]
        now = time.monotonic() + 31
        monkeypatch.setattr(time, "monotonic", lambda: now)
        store.read([digest(4)])
        assert opened().missing([digest(4)]) == []

    def test_the_limit(self, opened, caplog):
        store = opened(limit_gb=2500e-9)
        for i in range(30):
            written(store, i)
        assert len(caplog.records) == 1 and "teacher.store_limit_gb=2.5e-06 is reached" in caplog.text
        assert store.is_full and store.counts["computed"] == 30
        kept = 30 - len(opened().missing([digest(i) for i in range(30)]))
        assert 5 < kept < 20 and size_of(store.root) <= 2700
        assert store.read([digest(0)]) is not None

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("os error 28")])
    def test_a_full_disk(self, opened, error, caplog, monkeypatch):
        def full(rows, file, metadata):
            file.write_bytes(b"some of it fits")
            raise error

        store = opened()
        written(store, 0)
        monkeypatch.setattr(store_module, "save_file", full)
        rows = written(store, 1)
        written(store, 2)
        store.close()
        assert len(caplog.records) == 1 and "no more rows are written" in caplog.text and " free)" in caplog.text
        assert torch.equal(store.read([digest(1)])[0], rows[digest(1)]), "still in the buffer"
        assert opened().missing([digest(i) for i in range(3)]) == [digest(1), digest(2)]
        assert len(shards(store)) == 1 and not list(store.rows.glob(".tmp-*"))


class TestBesideTheRows:
    @pytest.mark.parametrize(
        ("dtype", "softcap", "bias"), [(torch.float32, None, torch.randn(7)), (torch.bfloat16, 30.0, None)]
    )
    def test_head(self, opened, dtype, softcap, bias):
        head = Head(torch.randn(7, 5).to(dtype), bias, 1 / 3, softcap)
        store, umask = opened(), os.umask(0o027)
        store.save_head(head, 2**40)
        os.umask(umask)
        for name in ("head.safetensors", "teacher.json"):
            assert stat.S_IMODE((store.folder / name).stat().st_mode) == 0o640
        stored, num_parameters = load_head(store.folder)
        assert (stored.scale, stored.softcap, stored.weight.dtype, num_parameters) == (1 / 3, softcap, dtype, 2**40)
        assert torch.equal(stored.weight, head.weight) and (stored.bias is None) == (head.bias is None)
        flip(file := store.folder / "head.safetensors", -1)
        assert load_head(store.folder) is None and damaged_files(store.folder) == [file]

    def test_each_part_of_the_identity_decides(self, opened):
        others = [{"teacher": "x"}, {"dtype": "bf16"}, {"quantization": "8bit"}]
        assert len({WHO.key, *(replace(WHO, **other).key for other in others)}) == 4
        written(opened(), 1)
        assert opened(replace(WHO, dtype="bf16")).missing([digest(1)]) == [digest(1)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "llama", layers=2)


@pytest.fixture(scope="module")
def rows():
    draw, rows = random.Random(0), []
    for i in range(9):
        length = draw.randint(4, 20)
        tokens = [draw.randrange(3, 250) for _ in range(length)]
        rows.append(Row(f"row{i}", tokens, [t >= length // 2 for t in range(length)]))
    return rows


class Counting(Teacher):
    """A teacher that notes how often its body is loaded, and the rows of each pass."""

    def __init__(self, path, store, dtype=torch.float32, **more):
        self.loads, self.passes = 0, list[int]()

        def load():
            self.loads += 1
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

        super().__init__(load, WHO, store=store, **more)

    def live(self, batch):
        self.passes.append(len(batch.row_ids))
        return super().live(batch)


class TestTeacher:
    def test_stored_is_live_bitwise(self, llama, rows, opened):
        live = Counting(llama, None)
        batch = collate(rows[:4], 0)
        expected = live.answer(batch)
        first = Counting(llama, opened())
        assert torch.equal(first.answer(batch).hidden, expected.hidden)
        first.store.close()
        second = Counting(llama, opened())
        answer = second.answer(batch)
        assert torch.equal(answer.hidden, expected.hidden) and answer.head is second.head
        assert torch.equal(answer.head.logits(answer.hidden), expected.head.logits(expected.hidden))
        assert second.loads == 0 and not second.is_loaded
        assert second.num_parameters == live.num_parameters
        second.answer(collate(rows[3:6], 0))
        assert second.loads == 1 and second.is_loaded
        assert torch.equal(second.head.weight, head_of(live.model).weight)
        assert Counting(llama, opened(), device=torch.device("meta")).head.weight.is_meta

    def test_a_batch_with_a_missing_row_is_computed_as_a_whole(self, llama, rows, opened):
        """The row that was there is marked: it keeps its bits, in this answer and in the next."""
        store, batch = opened(), collate(rows[:4], 0)
        teacher = Counting(llama, store)
        store.write([rows[1].digest], [torch.full((rows[1].num_counted, 32), 7.0)])
        answer = teacher.answer(batch).hidden
        assert teacher.passes == [4] and store.counts == {"hits": 0, "computed": 5, "bad": 0}
        is_marked, live = batch.row_of == 1, Teacher.live(teacher, batch)
        assert (answer[is_marked] == 7).all() and torch.equal(answer[~is_marked], live[~is_marked])
        assert torch.equal(teacher.answer(batch).hidden, answer) and teacher.passes == [4]
        store.close()
        assert torch.equal(Counting(llama, opened()).answer(batch).hidden, answer)

    @pytest.mark.parametrize(("rows_at_once", "passes"), [(None, [2] * 4), (1, [1] * 8), (5, [4, 4]), (100, [8])])
    def test_smaller_and_larger_passes(self, llama, rows, opened, rows_at_once, passes):
        rows = sorted(rows, key=lambda row: len(row.tokens), reverse=True)
        batches = [collate(rows[i : i + 2], 0) for i in range(0, 8, 2)]
        alone = [Counting(llama, None, torch.float64).live(batch) for batch in batches]
        teacher = Counting(llama, opened(), torch.float64, rows_at_once=rows_at_once)
        for _ in ("live", "stored"):
            for answer, one in zip(teacher.answers(batches), alone, strict=True):
                torch.testing.assert_close(answer.hidden, one, rtol=1e-12, atol=1e-12)
        assert teacher.passes == passes
