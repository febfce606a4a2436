"""Whole runs with the teacher's store, and its commands."""

import json
import os
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
import runs
from processes import in_process
from runs import outcome, start
from standins import write_dialogpt, write_llama

from kdx.cli import compose
from kdx.distill import distill
from kdx.errors import MachineError
from kdx.run.folder import Record
from kdx.store import count_rows, damaged_files
from kdx.store_commands import manage
from kdx.teacher import Teacher

NUM_TRAINED, NUM_HELD_OUT = 32, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a teacher, students and data, all small; the lengths of the rows differ."""
    folder = tmp_path_factory.mktemp("place")
    write_llama(folder / "teacher", layers=4, width=128)
    write_dialogpt(folder / "student", 2, 16, pickled=False, seed=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    write_dialogpt(folder / "dropout", 2, 16, pickled=False, seed=2, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    write_rows(folder / "pairs.jsonl", range(NUM_TRAINED + NUM_HELD_OUT))
    write_rows(folder / "doubles.jsonl", [i % 25 for i in range(NUM_TRAINED + NUM_HELD_OUT)])
    return folder


def write_rows(file, numbers):
    rows = [
        {"source": f"What is {i}?", "target": f"It is {i}, " + "I am sure, " * (i % 7) + f"and {i + 1} is next."}
        for i in numbers
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words_of(place, store, *words):
    """Two epochs of four steps, with a store or without; what is typed twice counts the last time."""
    base = [f"data.validation={NUM_HELD_OUT}", "train.batch_size=8", "train.micro_batch_size=auto", "train.max_steps=8"]
    base += ["teacher.precision=bf16", "eval.num_prompts=auto", "eval.on_policy_kl=false", "tracking.samples=true"]
    base += ["teacher.attn_implementation=sdpa"]  # in bf16 its bits follow the layout, those of eager hardly do
    base += ["teacher.store=off"] if store is None else ["teacher.store=on", f"teacher.store_dir={store}"]
    keys = {word.split("=")[0] for word in words}
    return runs.words_of(place, *(word for word in base if word.split("=")[0] not in keys), *words)


def config_of(place, store, *words):
    return compose(words_of(place, store, *words))


def figures(summary, *names):
    """What the store did for a run."""
    return tuple(summary.run["store"][name] for name in names)


def teacher_in(store):
    (folder,) = store.glob("[0-9a-f]*")
    return folder


@pytest.fixture(scope="module")
def filled(place, tmp_path_factory):
    """A store, the run that filled it as it went, and its summary. Tests only read it."""
    folder = tmp_path_factory.mktemp("filled")
    summary = distill(config_of(place, folder / "store", "data.shuffle=false"), folder / "run")
    return folder / "store", folder / "run", summary


class TestSameStudents:
    def test_without_store_with_it_and_from_it(self, place, filled, tmp_path, monkeypatch):
        """Batches that are the same in both epochs: not a bit differs, and the body is not loaded again."""
        store, first, summary = filled
        distill(config_of(place, None, "data.shuffle=false"), tmp_path / "live")
        monkeypatch.setattr("kdx.teacher.load_causal_lm", None)
        again = distill(config_of(place, store, "data.shuffle=false"), tmp_path / "again")
        assert outcome(tmp_path / "live") == outcome(first) == outcome(tmp_path / "again")
        assert summary.student == again.student and summary.teacher == again.teacher
        assert (tmp_path / "again" / "samples.json").read_text() == (first / "samples.json").read_text()
        num_rows = NUM_TRAINED + NUM_HELD_OUT
        assert figures(summary, "computed", "hits") == (num_rows, NUM_TRAINED)
        assert figures(again, "computed", "hits") == (0, 2 * NUM_TRAINED + NUM_HELD_OUT)
        before, after = ((run / "kdx.log").read_text() for run in (first, tmp_path / "again"))
        assert f"0 of {num_rows} rows in {store}" in before and "to be written" in before
        assert f"{num_rows} of {num_rows} rows in {store}" in after and "to be written" not in after


class TestRoom:
    def test_auto(self, place, tmp_path):
        words = ("teacher.store=auto", f"teacher.store_dir={tmp_path / 'store'}", "tracking.samples=false")
        once = distill(config_of(place, None, *words, "train.max_steps=4"), tmp_path / "once")
        assert once.run["store"] is None and not (tmp_path / "store").exists()
        assert "off (one epoch: nothing to reuse)" in (tmp_path / "once" / "kdx.log").read_text()
        swept = Record(swept=["loss.temperature"])
        assert distill(config_of(place, None, *words, "train.max_steps=4"), tmp_path / "swept", swept).run["store"]
        often = distill(config_of(place, None, *words, "train.max_steps=5"), tmp_path / "often")
        assert sum(figures(often, "computed", "hits")) == NUM_HELD_OUT + 5 * 8

    def test_a_disk_that_is_too_small(self, place, tmp_path, monkeypatch):
        monkeypatch.setattr("kdx.store.usage_of", lambda root: SimpleNamespace(total=100_000, free=20_000))
        summary = distill(config_of(place, tmp_path / "store", "teacher.store=auto"), tmp_path / "auto")
        assert summary.run["store"] is None
        assert (tmp_path / "auto" / "kdx.log").read_text().count("a tenth of the disk stays free") == 1

    def test_no_more_room_in_mid_run(self, place, filled, tmp_path, small_disk, monkeypatch):
        """One warning, and the same student; where disks cannot be mounted it is the limit that is reached."""
        store, words = small_disk / "store", ["data.shuffle=false", "tracking.samples=false"]
        if os.path.ismount(small_disk):
            monkeypatch.setattr("kdx.store.usage_of", lambda root: SimpleNamespace(total=0, free=10**9))
            monkeypatch.setattr("kdx.store.SHARD_BYTES", 100_000)
            (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free - 350_000))
        else:
            words.append("teacher.store_limit_gb=0.0002")
        distill(config_of(place, store, *words), tmp_path / "run")
        assert (tmp_path / "run" / "kdx.log").read_text().count("no more rows are written") == 1
        assert count_rows(teacher_in(store)) < NUM_TRAINED + NUM_HELD_OUT and not damaged_files(teacher_in(store))
        assert outcome(tmp_path / "run") == outcome(filled[1])


def config_of_doubles(place, store):
    """Data with rows twice, a student with dropout, a teacher in bf16: any other layout would show."""
    words = [f"data.path={place / 'doubles.jsonl'}", f"student.path={place / 'dropout'}", "train.max_steps=14"]
    return config_of(place, store, *words, "train.micro_batch_size=4", "train.save_every=3", "eval.every=4")


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory):
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    summary = distill(config_of_doubles(place, folder / "store"), folder / "run")
    assert figures(summary, "computed") > (count_rows(teacher_in(folder / "store")),) == (25,), (
        "some rows in two layouts"
    )
    return folder / "run"


class TestExactResume:
    @pytest.mark.parametrize(("kills", "flush_seconds"), [([2], 30), ([8, 7], 0)])
    def test_killed_and_resumed(self, place, straight, tmp_path, kills, flush_seconds):
        """Whether all rows were on disk by then or only those before a checkpoint."""
        config = config_of_doubles(place, tmp_path / "store")
        for step in kills:
            assert start(config, tmp_path / "run", partial(killed_at, step, flush_seconds)).code == -signal.SIGKILL
        summary = distill(config, tmp_path / "run")
        assert outcome(straight) == outcome(tmp_path / "run")
        assert figures(summary, "bad") == (0,) and summary.run["other_versions"] == []

    def test_a_store_that_others_had_filled_by_half(self, place, straight, tmp_path):
        other = f"data.path={place / 'pairs.jsonl'}"
        words = ("train.micro_batch_size=2", "train.max_steps=2", "data.seed=3")
        distill(config_of(place, tmp_path / "one", *words, other), tmp_path / "filler")
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        one, two = (config_of_doubles(place, tmp_path / name) for name in ("one", "two"))
        summary = distill(one, tmp_path / "run-one")
        assert min(figures(summary, "hits", "computed")) > 0
        assert start(two, tmp_path / "run-two", partial(killed_at, 8, 0)).code == -signal.SIGKILL
        distill(two, tmp_path / "run-two")
        assert outcome(tmp_path / "run-one") == outcome(tmp_path / "run-two")


def killed_at(call, flush_seconds, patch):
    """Kill a run when its teacher is asked for the nth step of this process."""
    known, calls = Teacher.answers, iter(range(1, call + 1))

    def answers(self, micro_batches):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return known(self, micro_batches)

    patch.setattr(Teacher, "answers", answers)
    patch.setattr("kdx.store.FLUSH_SECONDS", flush_seconds)


class TestCommands:
    def test_fill_stat_verify_prune(self, place, tmp_path, capfd, monkeypatch):
        """One story: filled with a sweep's words, read by a run of it, damaged, pruned, and filled again by a run."""
        store, num_rows = tmp_path / "store", NUM_TRAINED + NUM_HELD_OUT
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("KDX_STORE", str(store))
        monkeypatch.setenv("COLUMNS", "200")
        code, out, err = in_process(capfd, "store", "fill", "-m", *words_of(place, store, "loss.temperature=1,2"))
        assert code == 0 and f"{num_rows} computed" in out and out.count("computed") == 1, err
        summary = distill(compose([*words_of(place, store), "loss.temperature=2"]), tmp_path / "run")
        assert figures(summary, "computed", "bad") == (0, 0)
        capfd.readouterr()
        assert manage(["stat"]) == manage(["verify", f"teacher.store_dir={store}"]) == 0
        shown = capfd.readouterr().out
        assert "teacher" in shown and "bf16" in shown and f" {num_rows} " in shown
        (file,) = (teacher_in(store) / "rows").iterdir()
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(MachineError, match=r": 1 damaged files, such as .* Run kdx store prune") as error:
            manage(["verify"])
        assert error.value.exit_code == 3
        assert manage(["prune"]) == manage(["verify"]) == 0 and "freed in" in capfd.readouterr().out
        assert count_rows(teacher_in(store)) == 0
        summary = distill(config_of(place, store), tmp_path / "again")
        assert figures(summary, "computed", "bad") == (num_rows, 0) and count_rows(teacher_in(store)) == num_rows

    def test_prune_removes_what_no_one_uses(self, filled, tmp_path):
        folder = teacher_in(copied := shutil.copytree(filled[0], tmp_path / "store"))
        used, old, new = folder / "teacher.json", folder / "rows" / ".tmp-1-x", folder / ".tmp-2-x"
        old.touch()
        new.touch()
        os.utime(old, (0, 0))
        assert manage(["prune", str(copied), "--unused-days", "1"]) == 0 and used.exists()
        assert not old.exists() and new.exists(), "a writer may be alive"
        os.utime(used, (time.time() - 200_000,) * 2)
        assert manage(["prune", str(copied)]) == 0 and used.exists()
        assert manage(["prune", str(copied), "--unused-days", "1"]) == 0 and not folder.exists()
