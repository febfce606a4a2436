"""Rows in append-only files: they are read as they were written or not at all, whatever happens to the files."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import environment, forked, wait
from torch import Tensor

from kdx import segments
from kdx.segments import HEADER_SIZE, Segments, compact, survey

KINDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def key(i: int) -> bytes:
    return i.to_bytes(16, "big")


def row(i: int, n: int = 3, width: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(i)).to(dtype)


def same(one: Tensor | None, other: Tensor) -> bool:
    """Bitwise, so that NaN equals itself and −0 differs from 0."""
    if one is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def written(folder: Path, numbers: range | list[int], owner: str = "a", **shape: int) -> Path:
    """A closed segment with these rows → its file."""
    rows = Segments(folder, owner)
    for i in numbers:
        rows.append(key(i), row(i, **shape))
    rows.close()
    return folder / rows._own


@pytest.fixture
def opened() -> Iterator[Callable[..., Segments]]:
    """Open segments that are closed when the test ends."""
    all_opened: list[Segments] = []

    def open_(folder: Path, owner: str = "reader") -> Segments:
        all_opened.append(Segments(folder, owner))
        return all_opened[-1]

    yield open_
    for one in all_opened:
        one.close()


Open = Callable[..., Segments]


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", KINDS)
    @pytest.mark.parametrize(("n", "width"), [(0, 4), (1, 1), (2, 7), (5, 63), (300, 64)])
    def test_every_dtype_and_shape_bitwise(
        self, tmp_path: Path, opened: Open, dtype: torch.dtype, n: int, width: int
    ) -> None:
        values = row(1, n, width, dtype)
        if n:
            values[0, 0] = float("nan")
            values[-1, -1] = -0.0
        writer = opened(tmp_path, "a")
        num_bytes = writer.append(key(1), values)
        assert num_bytes == HEADER_SIZE + n * width * dtype.itemsize
        assert same(writer.read(key(1)), values)
        assert same(opened(tmp_path).read(key(1)), values)

    def test_views_and_gradients_are_written_as_plain_rows(self, tmp_path: Path, opened: Open) -> None:
        values = torch.nn.Parameter(row(1, 4, 6))
        rows = opened(tmp_path, "a")
        rows.append(key(1), values.T[1:3])
        assert same(rows.read(key(1)), values.detach().T[1:3].contiguous())

    def test_what_is_not_there_is_none(self, tmp_path: Path, opened: Open) -> None:
        rows = opened(tmp_path / "absent")
        assert rows.read(key(1)) is None and key(1) not in rows and len(rows) == 0 and rows.num_bad == 0
        assert rows.position() == {}

    def test_a_reader_sees_what_others_wrote_since(self, tmp_path: Path, opened: Open) -> None:
        reader, writer = opened(tmp_path), opened(tmp_path, "a")
        writer.append(key(1), row(1))
        assert key(1) not in reader
        reader.refresh()
        assert same(reader.read(key(1)), row(1))
        writer.append(key(2), row(2))
        reader.refresh()
        assert same(reader.read(key(2)), row(2)) and len(reader) == 2

    def test_more_segments_than_a_process_may_open(self, tmp_path: Path) -> None:
        for i in range(150):
            written(tmp_path, [i])
        program = """
import resource, sys
from pathlib import Path
from kdx.segments import Segments
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
rows = Segments(Path(sys.argv[1]), "reader")
print(sum(rows.read(i.to_bytes(16, "big")) is not None for i in range(150)), rows.num_bad)
"""
        assert run(program, tmp_path) == "150 0"


def run(program: str, *words: object) -> str:
    told = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=True, env=environment()
    )
    return told.stdout.strip()


class TestManyProcesses:
    NUM = 40

    def test_all_write_and_read_at_once(self, tmp_path: Path, opened: Open) -> None:
        """Each writes its own rows and some that others write as well, and reads all as they come."""

        def work(number: int) -> None:
            rows = Segments(tmp_path, f"w{number}")
            for i in range(self.NUM):
                for which in (number * 1000 + i, i):
                    rows.append(key(which), row(which, n=50))
                rows.refresh()
                seen = list(rows._places)
                assert all(same(rows.read(k), row(int.from_bytes(k, "big"), n=50)) for k in seen[-20:])
            assert rows.num_bad == 0
            rows.close()

        pids = [forked(lambda number=number: work(number)) for number in range(1, 5)]  # type: ignore[misc]
        assert [wait(pid) for pid in pids] == [0] * 4
        reader = opened(tmp_path)
        everything = {number * 1000 + i for number in range(5) for i in range(self.NUM)}
        assert {int.from_bytes(k, "big") for k in reader._places} == everything
        assert all(same(reader.read(key(i)), row(i, n=50)) for i in everything)
        assert survey(tmp_path).num_rows == 4 * 2 * self.NUM


class TestDamage:
    """The file below holds rows 1, 2, 3 of 3 x 4 fp32: 120 bytes each."""

    def test_cut_short_at_every_byte_of_the_last_row(self, tmp_path: Path) -> None:
        file = written(tmp_path, range(1, 4))
        content = file.read_bytes()
        size = len(content) // 3
        for length in range(2 * size, 3 * size):
            file.write_bytes(content[:length])
            rows = Segments(tmp_path, "reader")
            assert same(rows.read(key(1)), row(1)) and same(rows.read(key(2)), row(2))
            assert key(3) not in rows and rows.read(key(3)) is None and rows.num_bad == 0
            file.write_bytes(content)  # the writer was in the midst of it
            rows.refresh()
            assert same(rows.read(key(3)), row(3)), length
            rows.close()

    def test_cut_short_after_it_was_seen(self, tmp_path: Path, opened: Open) -> None:
        file = written(tmp_path, range(1, 4))
        rows = opened(tmp_path)
        os.truncate(file, file.stat().st_size - 1)
        assert rows.read(key(3)) is None and rows.num_bad == 1
        assert same(rows.read(key(2)), row(2))

    def test_every_single_bit(self, tmp_path: Path) -> None:
        """Row 2 with one bit flipped, each in turn: it is missing, its neighbours are found."""
        file = written(tmp_path, range(1, 4), n=1, width=2)
        content = file.read_bytes()
        size = len(content) // 3
        for bit in range(8 * size, 16 * size):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            rows = Segments(tmp_path, "reader")
            found = [rows.read(key(i)) for i in (1, 2, 3)]
            is_header = bit // 8 - size < HEADER_SIZE
            assert found[1] is None, bit
            assert same(found[0], row(1, 1, 2)) and same(found[2], row(3, 1, 2)), bit
            assert rows.num_bad == (0 if is_header else 1)
            assert {int.from_bytes(k, "big") for k in rows._places} <= {1, 2, 3}
            rows.close()

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        start=st.integers(0, 599),
        filling=st.one_of(st.binary(min_size=1, max_size=200), st.integers(1, 300).map(bytes)),
        seed=st.integers(0, 9),
    )
    def test_anything_overwritten(self, tmp_path: Path, start: int, filling: bytes, seed: int) -> None:
        """Rows of several shapes; those that the damage does not touch are read, the others are themselves or missing."""
        for old in tmp_path.glob("*.rows"):
            old.unlink()
        shapes = [(random.Random(seed * 100 + i).randrange(5), 3) for i in range(8)]
        writer = Segments(tmp_path, "a")
        ends = [0]
        for i, (n, width) in enumerate(shapes):
            ends.append(ends[-1] + writer.append(key(i), row(i, n, width)))
        writer.close()
        file = tmp_path / writer._own
        content = bytearray(file.read_bytes())
        start = min(start, len(content) - 1)
        filling = filling[: len(content) - start]
        before = bytes(content)
        content[start : start + len(filling)] = filling
        file.write_bytes(content)
        rows = Segments(tmp_path, "reader")
        for i, (n, width) in enumerate(shapes):
            found = rows.read(key(i))
            if before[ends[i] : ends[i + 1]] == content[ends[i] : ends[i + 1]]:
                assert same(found, row(i, n, width)), i
            else:
                assert found is None, i
        rows.close()

    def test_a_row_that_holds_the_mark_of_a_header(self, tmp_path: Path, opened: Open) -> None:
        """The search for the next header, after a damaged one, does not stop at what only looks like one."""
        fake = torch.frombuffer(bytearray(segments.MAGIC * 40), dtype=torch.float32).view(4, 20)
        writer = opened(tmp_path, "a")
        writer.append(key(1), fake)
        writer.append(key(2), row(2))
        file = tmp_path / writer._own
        with file.open("r+b") as stream:
            stream.write(b"x")
        rows = opened(tmp_path)
        assert rows.read(key(1)) is None and same(rows.read(key(2)), row(2))

    def test_a_damaged_header_before_a_long_row(self, tmp_path: Path, opened: Open, monkeypatch) -> None:
        """The next header is found wherever it lies against the pieces that are searched."""
        monkeypatch.setattr(segments, "SEARCHED", 64)
        for n in range(1, 40):
            folder = tmp_path / str(n)
            file = written(folder, [1], n=n, width=1)
            with file.open("r+b") as stream:
                stream.write(b"x")
            good = file.with_name("b-good.rows")
            good.write_bytes(file.read_bytes() + written(folder / "other", [2]).read_bytes())
            file.unlink()
            assert same(opened(folder).read(key(2)), row(2)), n

    def test_the_second_copy_serves_when_the_first_is_damaged(self, tmp_path: Path, opened: Open) -> None:
        files = [written(tmp_path, [1, 2], owner) for owner in ("a", "b", "c")]
        for file in files[:2]:
            content = bytearray(file.read_bytes())
            content[HEADER_SIZE] ^= 1
            file.write_bytes(content)
        rows = opened(tmp_path)
        assert same(rows.read(key(1)), row(1)) and rows.num_bad == 2
        assert same(rows.read(key(1)), row(1)) and rows.num_bad == 2

    def test_a_damaged_row_is_written_anew(self, tmp_path: Path, opened: Open) -> None:
        file = written(tmp_path, [1])
        content = bytearray(file.read_bytes())
        content[-1] ^= 128
        file.write_bytes(content)
        rows = opened(tmp_path, "b")
        assert rows.read(key(1)) is None and key(1) not in rows
        rows.append(key(1), row(1))
        assert same(rows.read(key(1)), row(1)) and rows.is_own(key(1))
        assert same(opened(tmp_path).read(key(1)), row(1))

    def test_rows_of_the_wrong_key_are_not_taken(self, tmp_path: Path, opened: Open) -> None:
        """A whole record with another key in its header, and a header checksum that fits: the row's own one differs."""
        import struct
        import zlib

        file = written(tmp_path, [1])
        content = bytearray(file.read_bytes())
        content[8:24] = key(9)
        content[HEADER_SIZE - 4 : HEADER_SIZE] = struct.pack("<I", zlib.crc32(content[: HEADER_SIZE - 4]))
        file.write_bytes(content)
        rows = opened(tmp_path)
        assert key(9) in rows and rows.read(key(9)) is None and rows.num_bad == 1

    def test_removed_under_a_reader(self, tmp_path: Path, opened: Open, monkeypatch) -> None:
        monkeypatch.setattr(segments, "MOST_OPEN", 1)
        one, two = written(tmp_path, [1], "a"), written(tmp_path, [2], "b")
        rows = opened(tmp_path)
        one.unlink()
        assert rows.read(key(1)) is None
        assert rows.num_bad == 0, "it is not there, which is not damage"
        assert same(rows.read(key(2)), row(2))
        two.unlink()
        assert same(rows.read(key(2)), row(2)), "what is open stays readable"
        rows.refresh()
        assert rows.position() == {}


class TestGoingBack:
    def test_only_the_owners_later_rows_are_forgotten(self, tmp_path: Path, opened: Open) -> None:
        run = opened(tmp_path, "run")
        run.append(key(1), row(1))
        position = run.position()
        run.append(key(2), row(2))
        written(tmp_path, [3], "other")
        written(tmp_path, [4], "run")  # a segment that the checkpoint knows nothing of
        written(tmp_path, [5], "runner")  # someone else, whose name begins alike
        again = opened(tmp_path, "run")
        assert len(again) == 5
        again.go_back(position)
        assert {int.from_bytes(k, "big") for k in again._places} == {1, 3, 5}
        again.append(key(2), row(20))
        again.refresh()
        assert same(again.read(key(2)), row(20)) and key(4) not in again

    def test_what_was_forgotten_stays_forgotten(self, tmp_path: Path, opened: Open) -> None:
        """Stopped twice: the second position knows where the first one cut."""
        first = opened(tmp_path, "run")
        first.append(key(1), row(1))
        position = first.position()
        first.append(key(2), row(2))
        second = opened(tmp_path, "run")
        second.go_back(position)
        second.append(key(3), row(3))
        position = second.position()
        second.append(key(4), row(4))
        third = opened(tmp_path, "run")
        third.go_back(position)
        assert {int.from_bytes(k, "big") for k in third._places} == {1, 3}

    def test_the_owners_other_processes_are_seen_from_then_on(self, tmp_path: Path, opened: Open) -> None:
        ranks = [opened(tmp_path, "run") for _ in range(2)]
        for rank in ranks:
            rank.go_back({})
        ranks[1].append(key(1), row(1))
        ranks[0].refresh()
        assert same(ranks[0].read(key(1)), row(1))
        assert sum(ranks[0].position().values()) == ranks[1].position()[ranks[1]._own] > 0

    def test_a_fresh_start_forgets_an_earlier_attempt(self, tmp_path: Path, opened: Open) -> None:
        written(tmp_path, [1], "run")
        written(tmp_path, [2], "other")
        rows = opened(tmp_path, "run")
        rows.go_back({})
        assert key(1) not in rows and key(2) in rows
        rows.append(key(1), row(1))
        assert same(rows.read(key(1)), row(1))


class TestFullDisk:
    PROGRAM = """
import os, resource, sys
from pathlib import Path
import torch
from kdx.segments import Segments
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
rows, failed = Segments(folder, "a"), 0
for i in range(200):
    try:
        rows.append(i.to_bytes(16, "big"), torch.full((50, 64), float(i)))
    except OSError:
        failed += 1
        assert i.to_bytes(16, "big") not in rows
kept = sum(rows.read(i.to_bytes(16, "big")) is not None for i in range(200))
rows.close()
print(kept, failed, rows.num_bad)
"""

    def check(self, folder: Path, told: str) -> None:
        kept, failed, bad = map(int, told.split())
        assert kept + failed == 200 and kept > 10 and failed > 10 and bad == 0
        found = survey(folder)
        assert (found.num_rows, found.num_bad, found.num_stray_bytes) == (kept, 0, 0)

    def test_a_limit_on_the_size_of_files(self, tmp_path: Path) -> None:
        limit = 1_000_003
        self.check(tmp_path, run(self.PROGRAM, tmp_path, limit))
        assert limit - 2 * 12_900 < sum(f.stat().st_size for f in tmp_path.glob("*.rows")) <= limit

    def test_a_small_disk(self, small_disk: Path) -> None:
        """Where a disk can be mounted a real one, else the same through a limit."""
        self.check(small_disk, run(self.PROGRAM, small_disk, 0 if os.path.ismount(small_disk) else 900_000))

    def test_compacting_on_a_full_disk_changes_nothing(self, tmp_path: Path) -> None:
        for owner in ("a", "b"):
            written(tmp_path, range(60) if owner == "a" else range(60, 120), owner, n=50, width=64)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        program = """
import resource, sys
from pathlib import Path
from kdx.segments import compact
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    compact(Path(sys.argv[1]))
except OSError as error:
    print(error.strerror)
"""
        assert run(program, tmp_path) == "File too large"
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


class TestCompact:
    def test_whole_rows_stay_damage_and_duplicates_go(self, tmp_path: Path, opened: Open) -> None:
        written(tmp_path, [1, 2, 3], "a")
        damaged = written(tmp_path, [4, 2, 5], "b")
        cut = written(tmp_path, [6, 7], "c")
        content = bytearray(damaged.read_bytes())
        content[HEADER_SIZE] ^= 1
        damaged.write_bytes(content)
        os.truncate(cut, cut.stat().st_size - 1)
        size = len(content) // 3
        assert survey(tmp_path) == (7, 8 * size - 1, 1, size - 1)
        assert compact(tmp_path) == 3 * size - 1
        assert survey(tmp_path) == (5, 5 * size, 0, 0)
        assert len(list(tmp_path.iterdir())) == 1
        rows = opened(tmp_path)
        assert all(same(rows.read(key(i)), row(i)) for i in (1, 2, 3, 5, 6))
        assert compact(tmp_path) == 0

    def test_a_copy_that_is_whole_replaces_one_that_is_not(self, tmp_path: Path, opened: Open) -> None:
        first = written(tmp_path, [1], "a")
        written(tmp_path, [1], "b")
        content = bytearray(first.read_bytes())
        content[-1] ^= 1
        first.write_bytes(content)
        compact(tmp_path)
        assert same(opened(tmp_path).read(key(1)), row(1))

    def test_nothing_and_nowhere(self, tmp_path: Path) -> None:
        assert compact(tmp_path / "absent") == 0
        assert survey(tmp_path / "absent") == (0, 0, 0, 0)
        broken = tmp_path / "a-x.rows"
        broken.write_bytes(b"no row at all" * 20)
        assert compact(tmp_path) == 260
        assert not list(tmp_path.iterdir())

    def test_a_segment_that_is_being_written_is_left_alone(self, tmp_path: Path, opened: Open) -> None:
        """By a live process, in the midst of a row."""
        into, out = os.pipe()
        back, answer = os.pipe()

        def work() -> None:
            os.close(answer)  # so that this process ends with the other
            rows = Segments(tmp_path, "live")
            rows.append(key(1), row(1))
            assert rows._writing is not None
            os.write(rows._writing, b"kdx-row1 half")
            os.write(out, b"1")
            os.read(back, 1)

        pid = forked(work)
        os.read(into, 1)
        written(tmp_path, [2, 2], "closed")
        assert survey(tmp_path).num_stray_bytes == 0, "what is being written is not damage"
        assert compact(tmp_path) == (HEADER_SIZE + 48)
        names = sorted(file.name.split("-")[0] for file in tmp_path.iterdir())
        assert names == ["compact", "live"]
        os.write(answer, b"1")
        assert wait(pid) == 0
        for descriptor in (into, out, back, answer):
            os.close(descriptor)
        assert survey(tmp_path).num_stray_bytes == 13
        compact(tmp_path)
        rows = opened(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1 and len(rows) == 2
        assert same(rows.read(key(1)), row(1)) and same(rows.read(key(2)), row(2))

    def test_a_reader_goes_on(self, tmp_path: Path, opened: Open) -> None:
        """Rows known from segments that are gone are found where they were written, and none counts as damaged."""
        for i in range(5):
            written(tmp_path, [i])
        rows = opened(tmp_path)
        compact(tmp_path)
        rows.refresh()
        assert all(same(rows.read(key(i)), row(i)) for i in range(5)) and rows.num_bad == 0

    def test_killed_at_any_moment_it_loses_nothing(self, tmp_path: Path) -> None:
        """After each call of the system that changes a file: the process ends there, as SIGKILL would end it."""
        ended = 0
        for after in range(100):
            folder = tmp_path / str(after)
            written(folder, range(0, 4), "a")
            written(folder, range(2, 6), "b")

            def work(folder: Path = folder, after: int = after) -> None:
                calls = 0

                def counted(real: Callable[..., object]) -> Callable[..., object]:
                    def call(*args: object, **more: object) -> object:
                        nonlocal calls
                        if calls == after:
                            os._exit(9)
                        calls += 1
                        return real(*args, **more)

                    return call

                for name in ("write", "rename", "fsync", "unlink", "ftruncate", "close"):
                    setattr(os, name, counted(getattr(os, name)))
                compact(folder)

            code = wait(forked(work))
            ended += code == 9
            rows = Segments(folder, "reader")
            assert all(same(rows.read(key(i)), row(i)) for i in range(6)), after
            rows.close()
            compact(folder)
            assert survey(folder)[::2] == (6, 0)
            if code == 0:
                break
        assert 10 < ended < 100

    def test_two_at_once(self, tmp_path: Path) -> None:
        for round_ in range(10):
            folder = tmp_path / str(round_)
            for i in range(8):
                written(folder, [i, i + 1], n=100)
            pids = [forked(lambda folder=folder: compact(folder) and None) for _ in range(3)]  # type: ignore[misc]
            assert [wait(pid) for pid in pids] == [0, 0, 0]
            rows = Segments(folder, "reader")
            assert all(same(rows.read(key(i)), row(i, n=100)) for i in range(9))
            rows.close()


def test_files_get_the_mode_of_any_new_file(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        file = written(tmp_path, [1])
    finally:
        os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o640


def test_rows_are_kept_by_the_disk(
    tmp_path: Path, calls: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SYNC_BYTES", 400)
    one = Segments(tmp_path, "one")

    def num_synced() -> int:
        return sum(name == "fsync" and path.suffix == ".rows" for name, path in calls)

    for i in range(5):
        one.append(bytes([i]) * 16, torch.zeros(3, 4))
    assert num_synced() == 1
    one.close()
    assert num_synced() == 2
