"""A teacher's folder in the store, and the teacher that reads from it."""

import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import write_llama, write_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdx import causal_lm
from kdx.causal_lm import Head, head_of
from kdx.certificate import certify
from kdx.cli import compose
from kdx.data.batches import MicroBatch, Row, collate, dummy
from kdx.store import Identity, Kept, TeacherStore, bytes_of, room, size_of
from kdx.teacher import Teacher

WHO = Identity("weights", "tokenizer", "fp32", "none")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., TeacherStore]]:
    """Open the store of this test; it is closed at the end."""
    stores: list[TeacherStore] = []

    def open_(identity: Identity = WHO, owner: str = "run", limit_bytes: float | None = None) -> TeacherStore:
        stores.append(TeacherStore(tmp_path / "store", identity, name="org/name", owner=owner, limit_bytes=limit_bytes))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


Open = Callable[..., TeacherStore]


def digest(i: int) -> str:
    return f"{i:032x}"


def damage(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def damage_rows(folder: Path, at: int = -1) -> None:
    """Flip a bit of the last row of each segment below a folder."""
    for file in folder.rglob("*.rows"):
        damage(file, at)


class TestFolder:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("softcap", [None, 30.0])
    @pytest.mark.parametrize("has_bias", [True, False])
    def test_head_round_trip(self, opened: Open, dtype: torch.dtype, softcap: float | None, has_bias: bool) -> None:
        head = Head(torch.randn(7, 5).to(dtype), torch.randn(7).to(dtype) if has_bias else None, 1 / 3, softcap)
        store = opened()
        assert store.kept() is None and not store.has_head()
        store.keep(Kept(head, 35, 70))
        kept = opened().kept()
        assert kept is not None and store.has_head()
        assert (kept.num_parameters, kept.num_bytes) == (35, 70)
        assert (kept.head.scale, kept.head.softcap, kept.head.weight.dtype) == (1 / 3, softcap, dtype)
        assert torch.equal(kept.head.weight, head.weight)
        assert (kept.head.bias is None) == (head.bias is None)
        hidden = torch.randn(3, 5).to(dtype)
        assert torch.equal(kept.head.logits(hidden), head.logits(hidden))
        assert not list(store.folder.glob(".tmp-*"))

    def test_what_is_kept_follows_the_umask(self, opened: Open) -> None:
        umask = os.umask(0o027)
        try:
            store = opened()
            store.keep(Kept(Head(torch.randn(7, 5)), 35, 70))
        finally:
            os.umask(umask)
        for name in ("head.safetensors", "teacher.json"):
            assert stat.S_IMODE((store.folder / name).stat().st_mode) == 0o640

    @pytest.mark.parametrize("name", ["head.safetensors", "teacher.json"])
    @pytest.mark.parametrize("how", ["any bit", "cut", "emptied", "zeros", "removed", "a list"])
    def test_a_damaged_head_is_as_if_absent(self, opened: Open, name: str, how: str) -> None:
        """Or it is read as it was, where the damage is in what is only shown. Never a head that is not the teacher's."""
        head = Head(torch.randn(7, 5), torch.randn(7), 1 / 3, 30.0)
        store = opened()
        store.keep(Kept(head, 35, 70))
        file = store.folder / name
        content = file.read_bytes()
        damages = [content[: len(content) // 2], b"", bytes(len(content)), b"[]"]
        if how == "removed":
            file.unlink()
            assert store.kept() is None
            return
        if how == "any bit":
            damages = []
            for bit in range(0, 8 * len(content), 3):
                damaged = bytearray(content)
                damaged[bit // 8] ^= 1 << bit % 8
                damages.append(bytes(damaged))
        else:
            damages = [damages[["cut", "emptied", "zeros", "a list"].index(how)]]
        absent = 0
        for damaged in damages:
            file.write_bytes(damaged)
            kept = store.kept()
            absent += kept is None
            if kept is not None:
                assert torch.equal(kept.head.weight, head.weight) and kept.head.bias is not None
                assert (kept.head.scale, kept.head.softcap) == (1 / 3, 30.0)
                assert (kept.num_parameters, kept.num_bytes) == (35, 70)
        assert absent == len(damages) or (name == "teacher.json" and how == "any bit" and absent > len(damages) / 4)

    def test_answers(self, opened: Open) -> None:
        store = opened()
        assert store.answer("What is it?") is None
        store.keep_answer("What is it?", "It is … blue.\n")
        assert opened().answer("What is it?") == "It is … blue.\n"
        assert store.answer("What is it") is None
        (file,) = (store.folder / "answers").iterdir()
        whole = file.read_bytes()
        for at in range(len(whole)):
            content = bytearray(whole)
            content[at] ^= 1
            file.write_bytes(content)
            assert store.answer("What is it?") in (None, "It is … blue.\n"), at
        for content in (b"", b"[]", b"null", b'{"answer": 5, "sha256": ""}', whole[:-9]):
            file.write_bytes(content)
            assert store.answer("What is it?") is None

    def test_a_damaged_certificate_is_taken_again(self, opened: Open) -> None:
        store = opened()
        store.certify({"rows": 8})
        assert opened().certificate() == {"rows": 8}
        for content in (b"", b"[]", b"{", b"\xff"):
            (store.folder / "certificate.json").write_bytes(content)
            assert store.certificate() is None

    def test_the_limit_is_said_once_and_kept(self, opened: Open, caplog: pytest.LogCaptureFixture) -> None:
        store = opened(limit_bytes=10_000)
        with caplog.at_level(logging.WARNING):
            for i in range(30):
                store.write([digest(i)], [torch.full((10, 16), float(i))], 0.1)
        said = [r.getMessage() for r in caplog.records]
        assert len(said) == 1 and "teacher.store_limit_gb=1e-05 is reached" in said[0]
        assert store.is_full and store.counts.computed == 30
        kept = [i for i in range(30) if digest(i) in [d for d in map(digest, range(30)) if not store.missing([d])]]
        assert 10 < len(kept) < 30
        assert 9_000 < size_of(store.root) <= 10_000
        assert store.read([digest(0)]) is not None

    def test_a_full_disk_is_said_once(
        self, opened: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = opened()
        store.write([digest(0)], [torch.zeros(1, 4)], 0.1)
        real = os.write

        def full(descriptor: int, data: Any) -> int:
            if len(data) > 50:  # some of it fits
                return real(descriptor, data[:50])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with caplog.at_level(logging.WARNING):
            for i in range(1, 9):
                store.write([digest(i)], [torch.ones(10, 16)], 0.1)
        monkeypatch.undo()
        said = [r.getMessage() for r in caplog.records]
        assert len(said) == 1 and "No space left on device" in said[0] and "goes on with the live teacher" in said[0]
        other = opened(owner="other")
        assert other.missing([digest(i) for i in range(9)]) == [digest(i) for i in range(1, 9)]

    def test_counts(self, opened: Open) -> None:
        one, other = opened(owner="one"), opened(owner="other")
        one.write([digest(1), digest(2)], [torch.zeros(3, 4), torch.ones(1, 4)], 2.0)
        assert one.read([digest(1), digest(2)]) is not None
        assert other.read([digest(1), digest(3)]) is None
        assert other.read([digest(1)]) is not None
        assert (one.counts.computed, one.counts.hits, one.counts.from_others) == (2, 2, 0)
        assert one.counts.bytes_read == 64 and one.counts.bytes_written == size_of(one.root)
        assert one.counts.seconds_saved == pytest.approx(2.0)  # half a second a position
        assert (other.counts.computed, other.counts.hits, other.counts.from_others) == (0, 1, 1)
        assert bytes_of(4, 2, 4, 4) == one.counts.bytes_written
        one.close()
        assert opened().seconds_per_position == 0.5

    def test_use_is_noted_by_those_who_only_read(self, opened: Open) -> None:
        one = opened()
        one.write([digest(1)], [torch.zeros(3, 4)], 1.0)
        one.close()
        note = one.folder / "use.json"
        os.utime(note, (0, 0))
        idle = opened()
        idle.close()
        assert note.stat().st_mtime == 0
        reader = opened()
        reader.read([digest(1)])
        reader.close()
        assert note.stat().st_mtime > time.time() - 100

    def test_room_leaves_a_tenth(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"total": 1000, "free": 300})())
        assert room(tmp_path / "not" / "yet") == (200, 300)


class TestIdentity:
    def test_each_part_decides(self, tmp_path: Path) -> None:
        others = [{"weights": "x"}, {"tokenizer": "x"}, {"dtype": "bf16"}, {"quantization": "8bit"}]
        keys = {WHO.key, *(replace(WHO, **other).key for other in others)}
        assert len(keys) == 5 and replace(WHO).key == WHO.key

    def test_rows_of_another_identity_are_not_seen(self, opened: Open) -> None:
        opened().write([digest(1)], [torch.zeros(3, 4)], 1.0)
        assert opened(replace(WHO, dtype="bf16")).missing([digest(1)]) == [digest(1)]

    def test_a_file_swapped_in_place(self, tmp_path: Path) -> None:
        """Same size, and the time put back as it was: the digest is another."""
        folder = write_llama(tmp_path / "llama")
        config = replace(compose(["teacher=hf", f"teacher.path={folder}"]).teacher)
        file = folder / "model.safetensors"
        before, was = causal_lm.weights_digest(config, "teacher"), file.stat()
        assert causal_lm.weights_digest(config, "teacher") == before
        content = bytearray(file.read_bytes())
        content[-7] ^= 64
        while file.stat().st_ctime_ns == was.st_ctime_ns:  # clocks of file systems tick every few milliseconds
            with file.open("r+b") as stream:
                stream.write(content)
            os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
        now = file.stat()
        assert (now.st_size, now.st_mtime_ns, now.st_ino) == (was.st_size, was.st_mtime_ns, was.st_ino)
        assert causal_lm.weights_digest(config, "teacher") != before
        content[-7] ^= 64
        file.write_bytes(content)
        assert causal_lm.weights_digest(config, "teacher") == before

    def test_tokenizers(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path / "one")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
        before = causal_lm.tokenizer_digest(tokenizer)
        assert causal_lm.tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "one")) == before
        tokenizer.add_tokens(["<new>"])
        assert causal_lm.tokenizer_digest(tokenizer) != before

    def test_a_row_is_its_tokens_and_what_counts(self) -> None:
        base = Row("a", [1, 2, 3], [False, False, True])
        assert Row("other", [1, 2, 3], [False, False, True]).digest == base.digest
        assert Row("a", [1, 2, 3], [True, False, True]).digest == base.digest, "nothing predicts the first token"
        others = [
            Row("a", [1, 2, 4], [False, False, True]),
            Row("a", [1, 2, 3], [False, True, True]),
            Row("a", [1, 2, 3], [False, True, False]),
            Row("a", [1, 3, 2], [False, False, True]),
            Row("a", [1, 2, 3, 0], [False, False, True, False]),
            Row("a", [2, 3], [False, True]),
        ]
        assert len({base.digest, *(row.digest for row in others)}) == 7


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama", layers=2)


def rows_of(num: int, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num):
        length = int(torch.randint(4, 20, (1,), generator=generator))
        tokens = torch.randint(3, 250, (length,), generator=generator).tolist()
        rows.append(Row(f"row{i}", tokens, [t >= length // 2 for t in range(length)]))
    return rows


class Loader:
    """Loads a model, and counts how often."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.path, self.dtype, self.calls = path, dtype, 0

    def __call__(self) -> Any:
        self.calls += 1
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype)


def teacher_of(load: Loader, store: TeacherStore | None, rows_at_once: int | None = None) -> Teacher:
    return Teacher(load, "fp32", WHO, store=store, rows_at_once=rows_at_once)


class TestTeacher:
    def test_a_hit_is_live_bitwise(self, llama: Path, opened: Open) -> None:
        live = teacher_of(Loader(llama), None)
        batch = collate([*rows_of(4), dummy(0)], 0)
        first = teacher_of(Loader(llama), opened())
        assert torch.equal(first.hidden(batch), live.hidden(batch))
        load = Loader(llama)
        second = teacher_of(load, opened())
        assert torch.equal(second.hidden(batch), live.hidden(batch))
        assert torch.equal(second.head.logits(second.hidden(batch)), live.head.logits(live.hidden(batch)))
        assert load.calls == 0 and not second.is_loaded
        assert (second.num_parameters, second.num_bytes) == (live.num_parameters, live.num_bytes)

    def test_the_body_is_loaded_when_a_row_is_missing_and_once(self, llama: Path, opened: Open) -> None:
        rows = rows_of(4)
        teacher_of(Loader(llama), opened()).hidden(collate(rows[:3], 0))
        load = Loader(llama)
        teacher = teacher_of(load, opened())
        teacher.hidden(collate(rows[:3], 0))
        assert load.calls == 0
        teacher.hidden(collate(rows[2:], 0))
        teacher.hidden(collate(rows_of(2, seed=1), 0))
        assert load.calls == 1

    def test_a_batch_with_one_missing_row_is_live_as_a_whole(self, llama: Path, opened: Open) -> None:
        """The rows that are there are marked, so that it shows whether they were used."""
        rows, store = rows_of(4), opened()
        teacher = teacher_of(Loader(llama), store)
        batch = collate(rows, 0)
        store.write([rows[1].digest], [torch.full((rows[1].num_counted, 32), 7.0)], 1.0)
        live = teacher.live(batch)
        assert torch.equal(teacher.hidden(batch), live)
        assert (store.counts.hits, store.counts.computed) == (0, 5)
        again = teacher.hidden(batch)
        of_row = torch.cat([torch.full((row.num_counted,), i) for i, row in enumerate(rows)])
        assert (again[of_row == 1] == 7).all()
        assert torch.equal(again[of_row != 1], live[of_row != 1])

    def test_what_is_settled_stays_so(self, llama: Path, opened: Open) -> None:
        """A run that stops and goes on measures with the same bits, though it finds rows kept that were missing."""
        rows, store = rows_of(4), opened()
        teacher = teacher_of(Loader(llama), store)
        store.write([rows[1].digest], [torch.full((rows[1].num_counted, 32), 7.0)], 1.0)
        batch = collate(rows, 0)
        settled = teacher.settled(batch)
        assert torch.equal(settled, teacher_of(Loader(llama), opened()).settled(batch))
        assert (settled == 7).any()
        assert torch.equal(teacher_of(Loader(llama), None).settled(batch), teacher.live(batch))

    def test_a_damaged_row_is_computed_again(self, llama: Path, opened: Open) -> None:
        batch = collate(rows_of(3), 0)
        first = opened()
        kept = teacher_of(Loader(llama), first).hidden(batch)
        damage_rows(first.root)
        store = opened(owner="second")
        teacher = teacher_of(Loader(llama), store)
        assert torch.equal(teacher.hidden(batch), kept)
        assert (store.rows.num_bad, store.counts.hits, store.counts.computed) == (1, 0, 3)
        assert torch.equal(teacher.hidden(batch), kept)
        assert store.counts.hits == 3 and store.rows.num_bad == 1

    @pytest.mark.parametrize("rows_at_once", [None, 1, 2, 4, 5, 100])
    @pytest.mark.parametrize("is_stored", [True, False])
    def test_larger_passes_say_the_same(
        self, llama: Path, opened: Open, rows_at_once: int | None, is_stored: bool
    ) -> None:
        rows = sorted(rows_of(9), key=lambda row: len(row.tokens), reverse=True)
        micro_batches = [collate(rows[i : i + 2], 0) for i in range(0, 8, 2)]
        micro_batches.append(collate([rows[8], dummy(0)], 0))
        sizes: list[int] = []

        class Watched(Teacher):
            def live(self, batch: MicroBatch) -> Tensor:
                sizes.append(len(batch.row_ids))
                return super().live(batch)

        one_by_one = [teacher_of(Loader(llama, torch.float64), None).live(batch) for batch in micro_batches]
        store = opened() if is_stored else None
        load = Loader(llama, torch.float64)
        teacher = Watched(load, "fp64", WHO, store=store, rows_at_once=rows_at_once)
        for _ in range(2):
            answers = list(teacher.answers(micro_batches))
            assert [len(a) for a in answers] == [len(batch.counted_labels) for batch in micro_batches]
            for answer, one in zip(answers, one_by_one, strict=True):
                torch.testing.assert_close(answer, one, rtol=1e-12, atol=1e-12)
        assert max(sizes) == {None: 2, 1: 2, 2: 2, 4: 4, 5: 4, 100: 10}[rows_at_once]
        assert len(sizes) == {None: 5, 1: 5, 2: 5, 4: 3, 5: 3, 100: 1}[rows_at_once] * (1 if is_stored else 2)

    def test_the_kept_head_works_where_the_run_does(self, llama: Path, opened: Open) -> None:
        teacher_of(Loader(llama), opened())
        store = opened()
        assert Teacher(Loader(llama), "", WHO, store=store, device=torch.device("meta")).head.weight.is_meta
        whole = AutoModelForCausalLM.from_pretrained(llama)
        assert torch.equal(teacher_of(Loader(llama), store).head.weight, head_of(whole).weight)

    def test_a_store_that_breaks_down_leaves_the_live_teacher(
        self, llama: Path, opened: Open, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        (tmp_path / "store").write_text("a file where the folder should be")
        store = opened()
        with caplog.at_level(logging.WARNING):
            teacher = teacher_of(Loader(llama), store)
            batch = collate(rows_of(3), 0)
            assert torch.equal(teacher.hidden(batch), teacher.live(batch))
            store.keep_answer("a", "b")
            store.close()
        assert len(caplog.records) == 1


class TestCertificate:
    def test_a_bf16_teacher_of_some_width(self, tmp_path: Path, opened: Open) -> None:
        folder = write_llama(tmp_path / "wide", layers=4, width=128)
        rows, store = rows_of(16), opened()
        teacher = Teacher(Loader(folder, torch.bfloat16), "bf16", WHO, store=store)
        assert certify(teacher, rows, 0) is None, "nothing is kept yet"
        for start in range(0, 16, 4):
            teacher.hidden(collate(rows[start : start + 4], 0))
        certificate = certify(teacher, rows, 0)
        assert certificate is not None and certificate == opened().certificate()
        assert certificate["rows"] == 8 and certificate["positions"] > 30
        for temperature in ("1", "2", "4"):
            kept, live = (certificate[which][temperature] for which in ("stored_to_live", "live_to_live"))
            assert 0 <= kept <= live + 1e-4
        assert max(certificate["live_to_live"].values()) > 0, "bf16 wanders with the layout: else this tests nothing"

    def test_it_is_measured_once_and_tells_wrong_rows(self, llama: Path, opened: Open) -> None:
        rows, store = rows_of(8), opened()
        teacher = teacher_of(Loader(llama), store)
        for row in rows:
            wrong = teacher.live(collate([row], 0)) + 1
            store.write([row.digest], [wrong], 1.0)
        certificate = certify(teacher, rows, 0)
        assert certificate is not None
        assert certificate["stored_to_live"]["1"] > 100 * certificate["live_to_live"]["1"]
        store.certify({"rows": 1})
        assert certify(teacher, rows, 0) == {"rows": 1}
