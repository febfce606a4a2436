"""Whole runs with the teacher's store, and its commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ended, environment, started
from safetensors.torch import load_file
from standins import write_dialogpt, write_llama
from torch import Tensor

from kdx.cli import compose
from kdx.config import Config
from kdx.distill import Summary, distill
from kdx.errors import MachineError
from kdx.prepare import in_bytes
from kdx.segments import survey

NUM_TRAINED, NUM_HELD_OUT = 32, 8
VARYING = ("speed/tokens_per_second", "memory/peak_bytes")


@pytest.fixture(scope="module", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, students and data, all small; the lengths of the rows differ."""
    folder = tmp_path_factory.mktemp("place")
    write_llama(folder / "teacher", layers=4, width=128)
    write_dialogpt(folder / "student", 2, 16, pickled=False, seed=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    write_dialogpt(folder / "dropout", 2, 16, pickled=False, seed=2, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    write_llama(folder / "llama")
    write_rows(folder / "pairs.jsonl", range(NUM_TRAINED + NUM_HELD_OUT))
    write_rows(folder / "doubles.jsonl", [i % 25 for i in range(NUM_TRAINED + NUM_HELD_OUT)])
    return folder


def write_rows(file: Path, numbers: Any) -> None:
    rows = [
        {"source": f"What is {i}?", "target": f"It is {i}, " + "I am sure, " * (i % 7) + f"and {i + 1} is next."}
        for i in numbers
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words_of(place: Path, store: Path | None, *words: str) -> list[str]:
    """Two epochs of four steps, with a store or without; what is typed twice counts the last time."""
    base = ["teacher=hf", f"teacher.path={place / 'teacher'}", "data=pairs", f"data.path={place / 'pairs.jsonl'}"]
    base += ["student=hf", f"student.path={place / 'student'}", "teacher.precision=bf16", "train.precision=fp32"]
    base += [f"data.validation={NUM_HELD_OUT}", "train.batch_size=8", "train.max_steps=8", "train.log_every=1"]
    base += ["optim.lr=1e-2", "tracking.mode=disabled"]
    base += ["teacher.attn_implementation=sdpa"]  # in bf16 its bits follow the layout, those of eager hardly do
    base += ["teacher.store=off"] if store is None else ["teacher.store=on", f"teacher.store_dir={store}"]
    keys = {word.split("=")[0] for word in words}
    return [word for word in base if word.split("=")[0] not in keys] + list(words)


def config_of(place: Path, store: Path | None, *words: str) -> Config:
    return compose(words_of(place, store, *words))


def lines(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what differs from one time to the next."""
    read = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in VARYING} for line in read]


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "student" / "model.safetensors")


def are_equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def apart(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    return max((first[name] - second[name]).abs().max().item() for name in first)


def did(summary: Summary) -> dict[str, Any]:
    counts: dict[str, Any] = summary.run["store"]
    return counts


def damage(root: Path, name: str = "*.rows", at: int = -1) -> None:
    for file in root.rglob(name):
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)


@pytest.fixture(scope="module")
def filled(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Summary]:
    """A store, the run that filled it as it went, and its summary. Tests only read it."""
    folder = tmp_path_factory.mktemp("filled")
    summary = distill(config_of(place, folder / "store", "data.shuffle=false"), folder / "run")
    return folder / "store", folder / "run", summary


Filled = tuple[Path, Path, Summary]


class TestSameStudents:
    def test_without_store_with_it_and_from_it(self, place: Path, filled: Filled, tmp_path: Path) -> None:
        """Batches that are the same in both epochs: not a bit differs."""
        store, first, summary = filled
        distill(config_of(place, None, "data.shuffle=false"), tmp_path / "live")
        again = distill(config_of(place, store, "data.shuffle=false"), tmp_path / "again")
        assert lines(tmp_path / "live") == lines(first) == lines(tmp_path / "again")
        assert are_equal(tmp_path / "live", first) and are_equal(first, tmp_path / "again")
        assert summary.student == again.student and summary.teacher == again.teacher
        assert (tmp_path / "again" / "samples.json").read_text() == (first / "samples.json").read_text()

    def test_other_batches(self, place: Path, tmp_path: Path) -> None:
        """Rows kept in another layout: as close to a live run as two live runs of different layouts are.

        In bf16 the layout shows in a teacher's bits; SGD does not blow them up as Adam does where gradients vanish.
        """
        words = ("optim.name=torch.SGD", "~optim.betas", "optim.lr=0.1")
        distill(config_of(place, None, *words), tmp_path / "live8")
        distill(config_of(place, None, *words, "train.micro_batch_size=1"), tmp_path / "live1")
        distill(config_of(place, tmp_path / "store", *words, "train.micro_batch_size=1"), tmp_path / "fill")
        summary = distill(config_of(place, tmp_path / "store", *words), tmp_path / "stored")
        assert did(summary)["computed"] == 0
        between_live = apart(tmp_path / "live8", tmp_path / "live1")
        to_live = apart(tmp_path / "stored", tmp_path / "live8")
        moved = apart(tmp_path / "stored", tmp_path / "live8") + max(
            w.abs().max() for w in weights(tmp_path / "live8").values()
        )
        assert 0 < to_live < 2 * between_live, "bf16 differs with the layout: else this tests nothing"
        assert between_live < 1e-3 * moved
        for live, kept in zip(lines(tmp_path / "live8"), lines(tmp_path / "stored"), strict=True):
            for name in ("train/loss", "eval/kl"):
                if name in live:
                    assert kept[name] == pytest.approx(live[name], rel=1e-2)

    @pytest.mark.parametrize(
        "words",
        [
            ("data.shuffle=true", "train.seed=5"),
            ("train.batch_size=4", "train.micro_batch_size=2"),
            ("optim.lr=1e-3", "loss.temperature=4", "loss.alpha=0.3"),
            ("loss.name=reverse_kl", "train.max_steps=3"),
            ("student.path={place}/dropout", "train.epochs=1.5", "train.max_steps=null"),
            ("teacher.micro_batch_size=32", "train.micro_batch_size=4"),
        ],
    )
    def test_what_may_change_and_still_hits(
        self, place: Path, filled: Filled, tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded = watch_loading(monkeypatch)
        words = tuple(word.replace("{place}", str(place)) for word in words)
        summary = distill(
            config_of(place, filled[0], "data.shuffle=false", "train.max_steps=4", *words), tmp_path / "run"
        )
        assert did(summary)["computed"] == did(summary)["bad"] == did(summary)["bytes_written"] == 0
        assert did(summary)["hits"] > NUM_HELD_OUT
        assert "teacher" not in loaded

    def test_another_teacher_does_not_hit(self, place: Path, filled: Filled, tmp_path: Path) -> None:
        words = ("data.shuffle=false", "train.max_steps=0", "tracking.samples=false", "teacher.precision=fp32")
        shutil.copytree(filled[0], tmp_path / "store")
        summary = distill(config_of(place, tmp_path / "store", *words), tmp_path / "run")
        assert (did(summary)["hits"], did(summary)["computed"]) == (0, NUM_HELD_OUT)

    def test_a_damaged_row_is_computed_again(self, place: Path, filled: Filled, tmp_path: Path) -> None:
        shutil.copytree(filled[0], tmp_path / "store")
        damage(tmp_path / "store")
        summary = distill(config_of(place, tmp_path / "store", "data.shuffle=false"), tmp_path / "run")
        assert did(summary)["bad"] == 1
        assert did(summary)["computed"] == 8, "its micro-batch as a whole"
        assert are_equal(tmp_path / "run", filled[1])
        assert "1 found damaged and computed again" in (tmp_path / "run" / "kdx.log").read_text()
        again = distill(config_of(place, tmp_path / "store", "data.shuffle=false"), tmp_path / "again")
        assert did(again)["computed"] == 0


def watch_loading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the model folders that are loaded from now on."""
    from kdx import causal_lm

    loaded: list[str] = []
    real = causal_lm.load_causal_lm

    def load(config: Any, *words: Any, **more: Any) -> Any:
        loaded.append(Path(config.path).name)
        return real(config, *words, **more)

    monkeypatch.setattr("kdx.teacher.load_causal_lm", load)
    monkeypatch.setattr("kdx.student.load_causal_lm", load)
    return loaded


class TestWhatIsLoadedAndSaid:
    def test_a_run_that_only_reads(
        self, place: Path, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, first, summary = filled
        loaded = watch_loading(monkeypatch)
        again = distill(config_of(place, store, "data.shuffle=false"), tmp_path / "run")
        assert loaded == ["student"]
        all_rows = NUM_TRAINED + NUM_HELD_OUT
        assert (did(summary)["computed"], did(summary)["hits"]) == (all_rows, NUM_TRAINED)
        assert (did(summary)["from_others"], did(summary)["bytes_written"]) == (0, survey(rows(store)).num_bytes)
        assert (did(again)["computed"], did(again)["hits"]) == (0, 2 * NUM_TRAINED + NUM_HELD_OUT)
        assert (did(again)["from_others"], did(again)["bytes_written"]) == (did(again)["hits"], 0)
        assert did(again)["bytes_read"] > 0 and did(again)["seconds_saved"] > 0
        told, before = ((run / "kdx.log").read_text() for run in (tmp_path / "run", first))
        assert f"0 of {all_rows} rows are in {store}" in before and "to come" in before
        assert f"{all_rows} of {all_rows} rows are in {store}" in told and "to come" not in told
        hits = did(again)["hits"]
        assert f"{hits} rows read ({hits} kept by other runs), 0 computed; 0 B written" in told
        assert before.count("certificate (8 rows): KL a token") == 1 and "certificate" not in told

    def test_a_cut_student(self, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        words = (f"teacher.path={place / 'llama'}", "student=cut", "student.path=null", "student.layers=2")
        words += ("data.max_length=100", "train.max_steps=4")
        distill(config_of(place, tmp_path / "store", *words), tmp_path / "first")
        loaded = watch_loading(monkeypatch)
        summary = distill(config_of(place, tmp_path / "store", *words), tmp_path / "second")
        assert [name.rsplit("-", 1)[-1] for name in loaded] == ["2"]
        assert did(summary)["computed"] == 0
        distill(config_of(place, None, *words), tmp_path / "live")
        assert are_equal(tmp_path / "first", tmp_path / "second") and are_equal(tmp_path / "live", tmp_path / "first")

    def test_auto(self, place: Path, tmp_path: Path) -> None:
        words = ("teacher.store=auto", f"teacher.store_dir={tmp_path / 'store'}", "tracking.samples=false")
        once = distill(config_of(place, None, *words, "train.max_steps=4"), tmp_path / "once")
        assert once.run["store"] is None and not (tmp_path / "store").exists()
        assert "off (every row is seen once" in (tmp_path / "once" / "kdx.log").read_text()
        config = config_of(place, None, *words, "train.max_steps=1")
        point = replace(config, sweep=replace(config.sweep, name="many", keys=["optim.lr"]))
        assert did(distill(point, tmp_path / "point"))["computed"] == NUM_HELD_OUT + 8
        often = distill(config_of(place, None, *words, "train.max_steps=5"), tmp_path / "often")
        assert did(often)["computed"] + did(often)["hits"] == NUM_HELD_OUT + 5 * 8

    def test_a_place_that_cannot_be_written(self, place: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        store = tmp_path / "file" / "store"
        with pytest.raises(MachineError, match=r"^teacher\.store: cannot be written in .*Not a directory") as error:
            distill(config_of(place, store), tmp_path / "on")
        assert error.value.exit_code == 3 and not (tmp_path / "on" / "metrics.jsonl").exists()
        summary = distill(config_of(place, store, "teacher.store=auto", "data.shuffle=false"), tmp_path / "auto")
        assert summary.run["store"] is None
        assert (tmp_path / "auto" / "kdx.log").read_text().count("cannot be written in") == 1

    def test_a_complete_store_need_not_be_writable(
        self, place: Path, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*words: Any) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("kdx.store.write_beside", refuse)
        summary = distill(config_of(place, filled[0], "data.shuffle=false", "train.max_steps=2"), tmp_path / "run")
        assert did(summary)["computed"] == 0 and did(summary)["hits"] == 16 + NUM_HELD_OUT
        assert "takes no more rows" not in (tmp_path / "run" / "kdx.log").read_text()

    def test_a_disk_that_is_too_small(
        self, place: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (small_disk / "full").write_bytes(bytes(900_000))
        if not os.path.ismount(small_disk):
            usage = shutil._ntuple_diskusage(1_000_000, 900_000, 100_000)  # type: ignore[attr-defined]
            monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        needed = r"needs [\d,]{6,7} bytes in .*, where [\d,]{6,7} are free"
        with pytest.raises(MachineError, match=rf"^teacher\.store: {needed}") as error:
            distill(config_of(place, small_disk / "store"), tmp_path / "on")
        assert error.value.exit_code == 3 and not (tmp_path / "on" / "metrics.jsonl").exists()
        summary = distill(
            config_of(place, small_disk / "store", "teacher.store=auto", "train.max_steps=5"), tmp_path / "auto"
        )
        assert summary.run["store"] is None
        assert (tmp_path / "auto" / "kdx.log").read_text().count("are free, a tenth of the disk to be left") == 1

    @pytest.mark.parametrize("how", ["limit", "disk"])
    def test_no_more_room_in_mid_run(
        self, place: Path, filled: Filled, tmp_path: Path, small_disk: Path, how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One warning, and the same student."""
        words = ["data.shuffle=false", "tracking.samples=false"]
        if how == "limit":
            store = tmp_path / "store"
            words.append("teacher.store_limit_gb=0.0002")
        else:
            store = small_disk / "store"
            monkeypatch.setattr("kdx.prepare.room", lambda root: (10**9, 10**9))
            if os.path.ismount(small_disk):
                free = shutil.disk_usage(small_disk).free
                (small_disk / "full").write_bytes(bytes(free - 200_000))
            else:
                words.append("teacher.store_limit_gb=0.0002")
        summary = distill(config_of(place, store, *words), tmp_path / "run")
        told = (tmp_path / "run" / "kdx.log").read_text()
        assert told.count("takes no more rows") == 1
        found = survey(rows(store))
        assert 0 < found.num_rows < NUM_TRAINED + NUM_HELD_OUT and (found.num_bad, found.num_stray_bytes) == (0, 0)
        assert did(summary)["computed"] > NUM_TRAINED + NUM_HELD_OUT
        assert are_equal(tmp_path / "run", filled[1])


def rows(store: Path) -> Path:
    (folder,) = store.glob("[0-9a-f]*/rows")
    return folder


def config_of_doubles(place: Path, store: Path) -> Config:
    """Data with rows twice, a student with dropout, a teacher in bf16: any other layout would show."""
    words = [f"data.path={place / 'doubles.jsonl'}", f"student.path={place / 'dropout'}", "train.max_steps=14"]
    return config_of(place, store, *words, "train.micro_batch_size=4", "train.save_every=3", "train.eval_every=4")


@pytest.fixture(scope="module")
def straight(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    summary = distill(config_of_doubles(place, folder / "store"), folder / "run")
    assert did(summary)["computed"] > survey(rows(folder / "store")).num_rows == 25, "some rows in two layouts"
    return folder / "run"


class TestExactResume:
    @pytest.mark.parametrize("kills", [[2], [5], [8], [13], [5, 4, 5, 8], [8, 7]])
    def test_killed_and_gone_on(self, place: Path, straight: Path, tmp_path: Path, kills: list[int]) -> None:
        """Killed before the first checkpoint, after it while the store fills, after an epoch, and again and again."""
        config = config_of_doubles(place, tmp_path / "store")
        for step in kills:
            assert ended(started(killed_at, step, config, tmp_path / "run")) == -signal.SIGKILL
        summary = distill(config, tmp_path / "run")
        assert are_equal(straight, tmp_path / "run")
        assert lines(straight) == lines(tmp_path / "run")
        assert [line["step"] for line in lines(tmp_path / "run") if "train/loss" in line] == list(range(1, 15))
        assert did(summary)["bad"] == 0

    def test_a_store_that_others_had_filled_by_half(self, place: Path, straight: Path, tmp_path: Path) -> None:
        other = f"data.path={place / 'pairs.jsonl'}"
        for name in ("one", "two"):
            words = ("train.micro_batch_size=2", "train.max_steps=2", "data.seed=3")
            distill(config_of(place, tmp_path / name / "store", *words, other), tmp_path / name / "filler")
        one, two = (config_of_doubles(place, tmp_path / name / "store") for name in ("one", "two"))
        summary = distill(one, tmp_path / "one" / "run")
        assert did(summary)["from_others"] > 0 and did(summary)["computed"] > 0
        assert ended(started(killed_at, 8, two, tmp_path / "two" / "run")) == -signal.SIGKILL
        distill(two, tmp_path / "two" / "run")
        assert are_equal(tmp_path / "one" / "run", tmp_path / "two" / "run")
        assert lines(tmp_path / "one" / "run") == lines(tmp_path / "two" / "run")


def killed_at(step: int, config: Config, run_dir: Path) -> None:
    """A run that is killed in a step, before it is counted."""
    from kdx.state import State

    known = State.add

    def add(self: State, batch: Any, seconds: float) -> None:
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        known(self, batch, seconds)

    State.add = add  # type: ignore[method-assign]
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    distill(config, run_dir)


class TestCommands:
    def kdx(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kdx", *words]
        env = environment(KDX_STORE=str(folder / "store"), KDX_CACHE=os.environ["KDX_CACHE"], COLUMNS="200")
        told = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert "Traceback" not in told.stderr, told.stderr
        return told

    def test_fill_show_verify_prune(self, place: Path, tmp_path: Path) -> None:
        """One story: filled with a sweep's words, read by its runs, damaged, tidied, and filled again by a run."""
        words = words_of(place, tmp_path / "store", "loss.temperature=1,2")
        told = self.kdx(tmp_path, "store", "fill", *words)
        assert told.returncode == 0, told.stderr
        assert f"{NUM_TRAINED + NUM_HELD_OUT} computed" in told.stdout and "certificate (8 rows)" in told.stdout
        for temperature in (1, 2):
            point = [*words_of(place, tmp_path / "store"), f"loss.temperature={temperature}"]
            summary = distill(compose(point), tmp_path / f"run{temperature}")
            assert did(summary)["computed"] == did(summary)["bad"] == 0
            assert did(summary)["hits"] == 2 * NUM_TRAINED + NUM_HELD_OUT

        shown = self.kdx(tmp_path, "store", "stat")
        assert shown.returncode == 0, shown.stderr
        assert "teacher" in shown.stdout and "bf16" in shown.stdout and " 40 " in shown.stdout
        whole = self.kdx(tmp_path, "store", "verify", f"teacher.store_dir={tmp_path / 'store'}")
        assert (whole.returncode, whole.stderr) == (0, "")

        damage(tmp_path / "store")
        bad = self.kdx(tmp_path, "store", "verify")
        assert bad.returncode == 3
        assert bad.stderr == (
            f"kdx: error: {tmp_path / 'store'}: 1 damaged. Run: kdx store prune; "
            "what is damaged is then computed again when it is asked for\n"
        )
        size = survey(rows(tmp_path / "store")).num_bytes
        pruned = self.kdx(tmp_path, "store", "prune")
        found = survey(rows(tmp_path / "store"))
        assert pruned.returncode == 0, pruned.stderr
        assert found.num_rows == NUM_TRAINED + NUM_HELD_OUT - 1
        assert f"{in_bytes(size - found.num_bytes)} freed" in pruned.stdout
        assert self.tend("verify", str(tmp_path / "store")) == 0
        summary = distill(config_of(place, tmp_path / "store"), tmp_path / "run")
        assert 0 < did(summary)["computed"] <= 8 and did(summary)["bad"] == 0
        assert survey(rows(tmp_path / "store")).num_rows == NUM_TRAINED + NUM_HELD_OUT

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["tidy"], "kdx store: does one of: fill, stat, verify, prune."),
            (["stat", "teacher.store_dir=absent"], "absent does not exist."),
            (["fill", "teacher=none", "loss=cross_entropy", "student=dialogpt_small"], "teacher: is none"),
            (["fill", "teacher.stor=on"], "did you mean teacher.store"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, words: list[str], said: str) -> None:
        told = self.kdx(tmp_path, "store", *words)
        assert told.returncode == 2
        assert told.stderr.startswith("kdx: error: ") and told.stderr.count("\n") == 1, told.stderr
        assert said.lower() in told.stderr.lower()

    def tend(self, *words: str) -> int:
        from kdx.store_commands import tend

        return tend(list(words))

    def test_prune_removes_what_no_one_uses(self, place: Path, filled: Filled, tmp_path: Path) -> None:
        store = tmp_path / "store"
        shutil.copytree(filled[0], store)
        (folder,) = store.glob("[0-9a-f]*")
        used = folder / "use.json"
        assert self.tend("prune", str(store), "--unused-days", "1") == 0 and used.exists()
        os.utime(used, (time.time() - 200_000,) * 2)
        assert self.tend("prune", str(store)) == 0 and used.exists()
        assert self.tend("prune", str(store), "--unused-days", "1") == 0
        assert not folder.exists()

    @pytest.mark.parametrize("name", ["head.safetensors", "teacher.json"])
    def test_a_damaged_head(self, place: Path, filled: Filled, tmp_path: Path, name: str) -> None:
        """Verify tells it, prune mends it, and the next run keeps it anew."""
        store = tmp_path / "store"
        shutil.copytree(filled[0], store)
        damage(store, name, at=-40)
        with pytest.raises(MachineError, match="1 damaged"):
            self.tend("verify", str(store))
        assert self.tend("prune", str(store)) == 0
        assert self.tend("verify", str(store)) == 0
        distill(config_of(place, store, "data.shuffle=false", "train.max_steps=1"), tmp_path / "run")
        assert len(list(store.glob(f"*/{name}"))) == 1
        assert self.tend("verify", str(store)) == 0

    def test_prune_takes_what_killed_processes_left(self, filled: Filled, tmp_path: Path) -> None:
        store = tmp_path / "store"
        shutil.copytree(filled[0], store)
        (folder,) = store.glob("[0-9a-f]*")
        old, new = folder / ".tmp-1-head.safetensors", folder / "rows" / ".tmp-2-x"
        cut = store / "students" / "half-cut"
        cut.mkdir(parents=True)
        for file in (old, new, cut / "model.safetensors"):
            file.write_bytes(b"half")
        os.utime(old, (0, 0))
        with pytest.raises(MachineError, match="1 damaged"):
            self.tend("verify", str(store))
        assert self.tend("prune", str(store)) == 0
        assert not old.exists() and not cut.exists() and new.exists()
