"""Whole runs on small models: what a run leaves, how it stops and goes on, and that its figures are right."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from standins import write_chats, write_dialogpt, write_llama, write_pairs, write_place
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdx import loss, nonfinite
from kdx.cli import compose
from kdx.config import Config
from kdx.distill import Summary, distill
from kdx.errors import ConfigError, DivergedError, MachineError
from kdx.run import checkpoint, report, typed
from kdx.run.files import seal
from kdx.run.folder import RunFolder
from kdx.run.tracking import Tracker
from kdx.state import State
from kdx.train import keep_best


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student and data, all small."""
    folder = tmp_path_factory.mktemp("place")
    write_place(folder, pickled=True)
    write_llama(folder / "llama")
    write_chats(folder / "chats.jsonl")
    return folder


def config_of(place: Path, *words: str, teacher: str = "medium", student: str = "small") -> Config:
    """A short run with the words of a test; what is typed twice counts the last time."""
    base = ["teacher=hf", f"teacher.path={place / teacher}", "data=pairs", f"data.path={place / 'pairs.jsonl'}"]
    base += ["student=hf", f"student.path={place / student}"] if student else []
    base += ["teacher.precision=fp32", "train.precision=fp32"]  # the same figures on machines with bf16
    base += ["data.validation=8", "train.max_steps=4", "train.log_every=1", "optim.lr=1e-2", "tracking.mode=disabled"]
    keys = {word.split("=")[0] for word in words}
    keys |= {"train.max_steps"} if "train.epochs" in keys else set()
    return compose([word for word in base if word.split("=")[0] not in keys] + list(words))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_to_type_next_keeps_the_words_of_this_run(tmp_path):
    words = ["data=pairs", "data.path=my file.jsonl", "loss.alpha=1", "run.like=x", "tracking.notes=[redacted]"]
    (tmp_path / "overrides.yaml").write_text(yaml.safe_dump(words))
    (tmp_path / "command.txt").write_text("python -m kdx --config-dir mine data=pairs\n")
    sweep = (
        "  python -m kdx -m --config-dir mine data=pairs 'data.path=my file.jsonl' 'tracking.notes=[redacted]' "
        "loss.temperature=1,2,4 loss.alpha=0.3,0.7"
    )
    said = typed.told(tmp_path)
    assert report.next_commands(tmp_path, said, has_student=False, has_samples=False) == ["next:", sweep]
    with_samples = report.next_commands(tmp_path, said, has_student=False, has_samples=True)
    assert with_samples == ["next:", f"  less {tmp_path}/samples.md", sweep]
    (tmp_path / "overrides.yaml").write_text("")
    (tmp_path / "command.txt").write_bytes(b"\xff\xfe'")  # a run that is done says what it can
    said = typed.told(tmp_path)
    plain = "  python -m kdx -m loss.temperature=1,2,4 loss.alpha=0.3,0.7"
    assert report.next_commands(tmp_path, said, has_student=False, has_samples=False) == ["next:", plain]


@pytest.mark.parametrize("name", ["kd", "ce", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_any_term_that_is_not_finite_stops_a_step(name: str, value: float) -> None:
    terms = {"kd": 0.0, "ce": 0.0, "grad_norm": 0.0}
    assert nonfinite.is_finite(SimpleNamespace(scaler=None), **terms)
    assert not nonfinite.is_finite(SimpleNamespace(scaler=None), **terms | {name: value})
    assert nonfinite.is_finite(SimpleNamespace(scaler=object()), **terms | {name: value}) == (name == "grad_norm")


def test_less_than_min_delta_is_no_improvement(tmp_path: Path) -> None:
    config = compose(["train.early_stopping.min_delta=0.1"]).train
    state = State(step=1)
    for value, worse in ((1.0, 0), (0.95, 1), (0.85, 0)):
        keep_best(config, state, {"kl": value, "ce": 0.0}, SimpleNamespace(is_main_process=True), None, tmp_path / "b")
        assert state.num_worse == worse


def test_rows_that_are_blamed_are_named_whole():
    assert nonfinite._some(["a", "b"]) == "a, b"
    assert nonfinite._some(["a" * 64] * 12) == ", ".join(["a" * 64] * 9) + " and 3 more"
    assert nonfinite._some(["a" * 700, "b"]) == "a" * 700 + " and 1 more"


def unend(run_dir: Path) -> None:
    """Take away what says that a run is done, as if it had been killed before."""
    for name in ("status.json", "summary.json"):
        (run_dir / name).unlink()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()


@pytest.fixture(scope="session")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """One finished run on chats, which several tests read."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    chats = place / "chats.jsonl"
    config = config_of(place, "data=messages", f"data.path={chats}", "train.eval_every=2", "teacher.license=mit")
    return run_dir, distill(config, run_dir)


class TestWhatARunLeaves:
    def test_files(self, finished: tuple[Path, Summary]) -> None:
        run_dir, _ = finished
        names = {p.name for p in run_dir.iterdir()}
        assert names >= {
            "config.yaml", "kdx.log", "metrics.jsonl", "eval_rows.jsonl", "samples.json", "samples.md",
            "summary.json", "status.json", "student",
        }  # fmt: skip
        assert not (run_dir / "checkpoints").exists()
        student = {p.name for p in (run_dir / "student").iterdir()}
        assert student >= {"config.json", "model.safetensors", "generation_config.json", "README.md", "vocab.json"} or (
            student >= {"config.json", "model.safetensors", "generation_config.json", "README.md", "tokenizer.json"}
        )
        umask = os.umask(0)
        os.umask(umask)
        assert (run_dir / "student" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask

    def test_summary_has_every_key(self, finished: tuple[Path, Summary]) -> None:
        run_dir, summary = finished
        kept = json.loads((run_dir / "summary.json").read_text())
        assert kept["student"] == summary.student
        for who in ("student", "untouched", "teacher"):
            assert kept[who].keys() == {
                "ce", "perplexity", "kl", "reverse_kl", "agreement", "accuracy", "num_parameters", "num_bytes",
            }  # fmt: skip
            assert kept[who]["perplexity"] == pytest.approx(math.exp(kept[who]["ce"]))
        assert kept["run"].keys() >= {
            "steps", "kept_step", "stopped_by", "tokens", "counted_tokens", "seconds", "seconds_per_step",
            "tokens_per_second", "peak_memory_bytes",
        }  # fmt: skip
        assert kept["data"].keys() >= {
            "num_rows", "num_validation_rows", "counted_validation_tokens", "num_dropped", "num_truncated",
            "fingerprint", "validation_fingerprint",
        }  # fmt: skip
        assert kept["run"]["steps"] == kept["run"]["kept_step"] == 4
        assert summary.measure == kept["student"]["kl"]

    def test_the_logged_loss_is_its_logged_parts(self, finished: tuple[Path, Summary]) -> None:
        run_dir, _ = finished
        trained = [line for line in lines(run_dir / "metrics.jsonl") if "train/loss" in line]
        assert [line["step"] for line in trained] == [1, 2, 3, 4]
        for line in trained:
            assert line["train/loss"] == 0.7 * line["train/kd"] + (1 - 0.7) * line["train/ce"]
            assert line.keys() >= {"tokens", "counted_tokens", "train/lr", "train/grad_norm", "train/epoch"}
            assert line.keys() >= {"speed/tokens_per_second", "memory/peak_bytes"}
        measured = [line["step"] for line in lines(run_dir / "metrics.jsonl") if "eval/kl" in line]
        assert measured == [2, 4]

    def test_rows_sum_to_the_summary(self, finished: tuple[Path, Summary]) -> None:
        run_dir, summary = finished
        rows = lines(run_dir / "eval_rows.jsonl")
        counted = sum(row["counted"] for row in rows)
        assert len(rows) == 8
        assert counted == summary.data["counted_validation_tokens"]
        for name in ("ce", "kl", "reverse_kl", "agreement", "accuracy"):
            assert sum(row[name] for row in rows) / counted == pytest.approx(summary.student[name])

    def test_config_is_read_back_and_status_is_done(self, finished: tuple[Path, Summary]) -> None:
        run_dir, _ = finished
        assert yaml.safe_load((run_dir / "config.yaml").read_text())["loss"]["temperature"] == 2.0
        status = json.loads((run_dir / "status.json").read_text())
        assert (status["state"], status["step"], status["max_steps"]) == ("done", 4, 4)
        assert status["owner"].keys() == {"pid", "began", "host", "boot_id"}

    def test_model_card_header(self, finished: tuple[Path, Summary]) -> None:
        run_dir, _ = finished
        _, header, body = (run_dir / "student" / "README.md").read_text().split("---\n", 2)
        card = yaml.safe_load(header)
        assert card.keys() >= {"base_model", "license", "library_name", "pipeline_tag", "datasets"}
        assert card["library_name"] == "transformers"
        assert card["pipeline_tag"] == "text-generation"
        assert str(run_dir) not in body

    def test_a_fresh_process_answers_and_measures_the_same(self, finished: tuple[Path, Summary]) -> None:
        """Without kdx: the pipeline's answers are those of samples.json, and CE is the summary's."""
        run_dir, summary = finished
        program = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, prompts, chats = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
chat = pipeline("text-generation", model=folder)
greedy = {"do_sample": False, "max_new_tokens": 48}
answers = [chat(prompt, **greedy)[0]["generated_text"][-1]["content"] for prompt in prompts]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
end, total, count = tokenizer.eos_token_id, 0.0, 0
for messages in chats:
    ids, counted = [], []
    for message in messages:
        turn = tokenizer(message["content"]).input_ids + [end]
        ids += turn
        counted += [message["role"] == "assistant"] * len(turn)
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    for t in range(1, len(ids)):
        if counted[t]:
            total, count = total - logp[t - 1, ids[t]].item(), count + 1
assert "kdx" not in sys.modules
print(json.dumps({"answers": answers, "ce": total / count, "count": count}))
"""
        samples = json.loads((run_dir / "samples.json").read_text())
        assert len(samples) == 3
        rows = {row["row"] for row in lines(run_dir / "eval_rows.jsonl")}
        from kdx.data.sources import read_conversations

        config = compose_again(run_dir)
        held_out = [c.messages for c in read_conversations(config.data) if c.id in rows]
        words = [str(run_dir / "student"), json.dumps([s["prompt"] for s in samples]), json.dumps(held_out)]
        told = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
        answer = json.loads(told.stdout.splitlines()[-1])
        assert answer["answers"] == [sample["student"] for sample in samples]
        assert answer["count"] == summary.data["counted_validation_tokens"]
        assert answer["ce"] == pytest.approx(summary.student["ce"], abs=1e-5)
        page = (run_dir / "samples.md").read_text()
        assert all(sample["student"].splitlines()[0] in page for sample in samples if sample["student"].strip())


def compose_again(run_dir: Path) -> Config:
    from kdx.cli import to_config

    return to_config(yaml.safe_load((run_dir / "config.yaml").read_text()))


@pytest.fixture(scope="session")
def with_dropout(place: Path) -> Path:
    """A student that draws random numbers, so that exact resume has something to get wrong."""
    config = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    return write_dialogpt(place / "dropout", 2, 16, pickled=False, seed=2, **config)


class TestStopAndGoOn:
    WORDS = ("train.max_steps=10", "train.batch_size=4", "train.micro_batch_size=2", "train.epochs=null")

    def test_a_stopped_run_goes_on_to_the_same_bits(self, place: Path, with_dropout: Path, tmp_path: Path) -> None:
        words = (*self.WORDS, f"student.path={with_dropout}", "train.eval_every=3", "loss.name=stops_itself")
        calls = {"left": 0}

        @loss.register
        def stops_itself(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            calls["left"] -= 1
            if calls["left"] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss.forward_kl(student, teacher)

        config = config_of(place, *words)
        distill(config, tmp_path / "straight")
        calls["left"] = 12
        with pytest.raises(SystemExit) as stop:
            distill(config, tmp_path / "stopped")
        assert stop.value.code == 143
        status = json.loads((tmp_path / "stopped" / "status.json").read_text())
        assert status["state"] == "interrupted"
        assert 0 < status["step"] < 10
        distill(config, tmp_path / "stopped")
        loss._REGISTRY.pop("stops_itself")
        straight, stopped = tmp_path / "straight", tmp_path / "stopped"
        first, second = (weights(folder / "student") for folder in (straight, stopped))
        assert all(torch.equal(first[name], second[name]) for name in first)
        varying = ("speed/tokens_per_second", "memory/peak_bytes")
        told = [
            [{k: v for k, v in line.items() if k not in varying} for line in lines(folder / "metrics.jsonl")]
            for folder in (straight, stopped)
        ]
        assert told[0] == told[1]

    def test_a_killed_run_goes_on_from_its_last_checkpoint(self, place: Path, tmp_path: Path) -> None:
        """The checkpoint of step 9 in the folder of a run that never ended, as a SIGKILL leaves it."""
        config = config_of(place, *self.WORDS, "train.save_every=3", "train.keep_checkpoints=true")
        distill(config, tmp_path / "run")
        straight = weights(tmp_path / "run" / "student")
        names = [folder.name for folder in checkpoint.found(tmp_path / "run")]
        assert names == ["step-00000010", "step-00000009"]
        unend(tmp_path / "run")
        damaged = tmp_path / "run" / "checkpoints" / names[0] / "model.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-100] ^= 1
        damaged.write_bytes(content)
        distill(config, tmp_path / "run")
        again = weights(tmp_path / "run" / "student")
        assert all(torch.equal(straight[name], again[name]) for name in straight)
        told = (tmp_path / "run" / "kdx.log").read_text()
        assert "skipped a damaged checkpoint, step-00000010" in told
        assert f"going on from {tmp_path / 'run/checkpoints' / names[1]}" in told

    def test_dropout_is_on_while_training_and_off_while_measuring(
        self, place: Path, with_dropout: Path, tmp_path: Path
    ) -> None:
        plain = write_dialogpt(place / "without-dropout", 2, 16, pickled=False, seed=2)
        words = ("train.max_steps=1", "train.log_every=1")
        students = (plain, with_dropout)
        runs = [distill(config_of(place, *words, f"student.path={p}"), tmp_path / p.name) for p in students]
        assert runs[0].untouched["ce"] == runs[1].untouched["ce"]
        one, two = (lines(tmp_path / p.name / "metrics.jsonl")[0]["train/ce"] for p in students)
        assert one != two

    def test_a_checkpoint_is_a_model_too(self, place: Path, tmp_path: Path) -> None:
        more = ("train.save_every=1", "train.keep_checkpoints=true", "train.gradient_checkpointing=true")
        distill(config_of(place, "train.max_steps=2", *more), tmp_path / "run")
        folder, _ = checkpoint.found(tmp_path / "run")
        model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(told.values()), told
        kept = load_file(folder / "model.safetensors")
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
        student = AutoTokenizer.from_pretrained(tmp_path / "run/student")
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == student.get_vocab()
        assert model.config.use_cache

    def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(self, place: Path, tmp_path: Path) -> None:
        config = config_of(place, *self.WORDS, "train.save_every=3", "train.keep_checkpoints=true")
        distill(config, tmp_path / "run")
        unend(tmp_path / "run")
        for folder in checkpoint.found(tmp_path / "run"):
            (folder / "MANIFEST.json").write_text("{")
        with pytest.raises(MachineError, match="no checkpoint is whole") as error:
            distill(config, tmp_path / "run")
        assert error.value.exit_code == 3

    def test_a_signal_after_done_ends_at_once(
        self, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Tracker, "summary", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as left:
            distill(config_of(place, "train.max_steps=1"), tmp_path / "run")
        assert left.value.code == 143
        assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
        assert not (tmp_path / "run/checkpoints").exists()

    def test_done_is_done(self, place: Path, tmp_path: Path) -> None:
        config = config_of(place, "train.max_steps=1")
        first = distill(config, tmp_path / "run")
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
        assert distill(config, tmp_path / "run") == first
        assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}

    def test_all_is_kept_by_the_disk_before_checkpoints_go(
        self, place: Path, tmp_path: Path, calls: list[tuple[str, Path]]
    ) -> None:
        run = tmp_path / "run"
        distill(config_of(place, "train.max_steps=2", "train.save_every=1"), run)
        named = [calls.index(("replace", run / name)) for name in ("student", "student/README.md", "summary.json")]
        done = calls.index(("replace", run / "status.json"), named[-1])
        gone = next(i for i, (_, path) in enumerate(calls) if path.name.endswith("-checkpoints"))
        assert [*named, done, gone] == sorted([*named, done, gone])
        kept = [path for name, path in calls[: named[0]] if name == "fsync" and path.parent.name.endswith("-student")]
        assert {path.name for path in kept} == {file.name for file in (run / "student").iterdir()} - {"README.md"}
        for i, folder in zip([*named, done], (run, run / "student", run, run), strict=True):
            assert calls[i - 1][0] == "fsync"  # what gets its name
            assert calls[i + 1] == ("fsync", folder)

    @pytest.mark.parametrize("word", ["optim.lr=2e-3", "loss.alpha=0.5", "train.seed=3", "data.max_length=50"])
    def test_another_config_is_refused(self, place: Path, tmp_path: Path, word: str) -> None:
        distill(config_of(place, "train.max_steps=1"), tmp_path / "run")
        with pytest.raises(ConfigError, match=f"begun with another {word.split('=')[0]}") as error:
            distill(config_of(place, "train.max_steps=1", word), tmp_path / "run")
        assert error.value.exit_code == 2

    @pytest.mark.parametrize("text", ["", "\0\0", "[]", "2026-02-30"])
    def test_a_config_that_is_none_is_told(self, place: Path, tmp_path: Path, text: str) -> None:
        config = config_of(place, "train.max_steps=1")
        distill(config, tmp_path / "run")
        (tmp_path / "run" / "config.yaml").write_text(text)
        unend(tmp_path / "run")
        with pytest.raises(ConfigError, match="is not the config of a run") as error:
            distill(config, tmp_path / "run")
        assert error.value.lines[0].startswith(f"{tmp_path / 'run' / 'config.yaml'}: ")

    @pytest.mark.parametrize(("text", "name"), [("", "default"), ("\0\0", "default"), ("3", "default"), ("- 3", "3")])
    def test_damaged_words_cost_a_name(self, place: Path, tmp_path: Path, text: str, name: str) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "overrides.yaml").write_text(text)
        assert RunFolder(tmp_path / "run").name(config_of(place)) == name

    @pytest.mark.parametrize("name", ["student", "checkpoints"])
    def test_a_folder_with_somebodys_own_is_refused(self, place: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("a year's work")
        with pytest.raises(ConfigError, match=f"has a {name}/, which a run would replace"):
            distill(config_of(place, "train.max_steps=1"), tmp_path)
        assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["mine"]

    def test_a_run_whose_status_is_lost_is_done_by_its_summary(self, place: Path, tmp_path: Path) -> None:
        config = config_of(place, "train.max_steps=1")
        first = distill(config, tmp_path / "run")
        for damage in ("", "{", "[]"):
            (tmp_path / "run/status.json").write_text(damage)
            student = (tmp_path / "run/student/model.safetensors").stat().st_mtime_ns
            assert distill(config, tmp_path / "run") == first
            assert (tmp_path / "run/student/model.safetensors").stat().st_mtime_ns == student
            assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"  # a sweep reads it

    def test_a_run_that_lost_its_checkpoints_says_that_it_begins_anew(self, place: Path, tmp_path: Path) -> None:
        config = config_of(place, *self.WORDS, "train.save_every=3", "train.keep_checkpoints=true")
        distill(config, tmp_path / "run")
        shutil.rmtree(tmp_path / "run/checkpoints")
        (tmp_path / "run/summary.json").unlink()
        status = json.loads((tmp_path / "run/status.json").read_text())
        (tmp_path / "run/status.json").write_text(json.dumps(status | {"state": "interrupted"}))
        distill(config, tmp_path / "run")
        told = (tmp_path / "run/kdx.log").read_text()
        assert f"{tmp_path / 'run'} was at step 10 and has no checkpoint: it begins anew" in told

    @pytest.mark.parametrize("change", [{"more": 1}, {"step": "2"}, {"window": {}}, {"best": None}])
    def test_a_state_of_another_version_is_refused(
        self, place: Path, tmp_path: Path, change: dict[str, object]
    ) -> None:
        config = config_of(place, "train.max_steps=2", "train.save_every=1", "train.keep_checkpoints=true")
        distill(config, tmp_path / "run")
        unend(tmp_path / "run")
        newest = checkpoint.found(tmp_path / "run")[0]
        state = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps(state | change))
        (newest / "MANIFEST.json").unlink()
        seal(newest)
        with pytest.raises(MachineError, match=r"state\.json: was written by another version of kdx"):
            distill(config, tmp_path / "run")


class TestNumbers:
    def test_a_loss_that_is_not_finite_stops_before_the_step(self, place: Path, tmp_path: Path) -> None:
        calls = {"count": 0}

        @loss.register
        def breaks(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            calls["count"] += 1
            return loss.forward_kl(student, teacher) * (math.nan if calls["count"] > 3 else 1.0)

        config = config_of(place, "loss.name=breaks", "train.save_every=1", "train.keep_checkpoints=true")
        with pytest.raises(DivergedError, match="step 3: the distillation term is not finite") as error:
            distill(config, tmp_path / "run")
        loss._REGISTRY.pop("breaks")
        assert error.value.exit_code == 4
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["state"] == "diverged"
        newest, _ = checkpoint.newest(tmp_path / "run")
        assert newest is not None
        from safetensors.torch import load_file

        assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())

    @pytest.mark.parametrize("micro", [1, 2, 4])
    def test_micro_batches_change_nothing(self, place: Path, tmp_path: Path, micro: int) -> None:
        """fp64: the student is the same however the batch is split."""
        words = ("train.precision=fp64", "teacher.precision=fp64", "train.epochs=1.0", "optim.name=torch.SGD")
        words += ("~optim.betas",)
        whole = distill(config_of(place, *words, student="llama"), tmp_path / "whole")  # no dropout
        words += (f"train.micro_batch_size={micro}",)
        split = distill(config_of(place, *words, student="llama"), tmp_path / "split")
        pairs = zip(
            (x for x in lines(tmp_path / "whole" / "metrics.jsonl") if "train/loss" in x),
            (x for x in lines(tmp_path / "split" / "metrics.jsonl") if "train/loss" in x),
            strict=True,
        )
        for one, other in pairs:
            assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-9)
            assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-9)
        assert whole.run["steps"] == 4
        assert whole.student["kl"] == pytest.approx(split.student["kl"], rel=1e-5)

    def test_a_student_that_is_the_teacher_measures_zero(self, place: Path, tmp_path: Path) -> None:
        config = config_of(place, "student.layers=6", "student=cut", "train.max_steps=0", teacher="llama", student="")
        summary = distill(config, tmp_path / "run")
        assert summary.untouched["kl"] == pytest.approx(0, abs=1e-6)
        assert summary.untouched["agreement"] == 1
        assert summary.untouched["ce"] == pytest.approx(summary.teacher["ce"], abs=1e-6)
        assert not (tmp_path / "run" / "student").exists()

    def test_training_helps(self, place: Path, tmp_path: Path) -> None:
        summary = distill(config_of(place, "train.max_steps=40"), tmp_path / "run")
        assert summary.student["ce"] < summary.untouched["ce"] - 1


class TestWithoutDistilling:
    def test_alpha_zero_measures_the_teacher_and_trains_without(self, place: Path, tmp_path: Path) -> None:
        one = distill(config_of(place, "loss=cross_entropy"), tmp_path / "one")
        two = distill(config_of(place, "loss.alpha=0"), tmp_path / "two")
        assert one.student["kl"] is not None
        assert one.student["ce"] == two.student["ce"]
        trained = [line for line in lines(tmp_path / "one" / "metrics.jsonl") if "train/loss" in line]
        assert all(line["train/kd"] is None and line["train/loss"] == line["train/ce"] for line in trained)

    def test_no_teacher_at_all(self, place: Path, tmp_path: Path) -> None:
        base = config_of(place, "loss=cross_entropy")
        words = ["teacher=none", "loss=cross_entropy", "student=hf", f"student.path={place / 'small'}", "data=pairs"]
        words += [f"data.path={place / 'pairs.jsonl'}", "data.validation=8", "train.max_steps=4", "optim.lr=1e-2"]
        words += ["tracking.mode=disabled", "train.precision=fp32"]
        summary = distill(compose(words), tmp_path / "none")
        with_teacher = distill(base, tmp_path / "with")
        assert summary.student["kl"] is None
        assert summary.student["agreement"] is None
        assert summary.teacher["ce"] is None
        assert summary.measure == summary.student["ce"] == with_teacher.student["ce"]


class TestChoices:
    @pytest.mark.parametrize(
        "words",
        [
            ("optim=adamw_8bit",),
            ("optim=lion_8bit",),
            ("train.gradient_checkpointing=true",),
            ("train.precision=bf16", "student.save_dtype=bf16"),
            ("teacher.precision=bf16",),
            ("data.validation=null", "tracking.samples=false"),
            ("train.epochs=0.5",),
            ("data.assistant_only=false", "data.shuffle=false"),
            ("loss=jsd", "loss.beta=0.1"),
            ("loss=adaptive_kl",),
            ("optim.schedule=cosine_with_min_lr", "+optim.schedule_options.min_lr_rate=0.1"),
            ("train.max_grad_norm=null", "loss.scale_by_temperature=false"),
        ],
        ids=lambda words: words[0],
    )
    def test_runs(self, place: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
        summary = distill(
            config_of(place, "train.max_steps=2", *words) if "epochs" not in words[0] else config_of(place, *words),
            tmp_path / "run",
        )
        assert summary.run["steps"] == 2
        measured = summary.student["ce"]
        assert measured is None or math.isfinite(measured)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
        assert saved.dtype == (torch.bfloat16 if "student.save_dtype=bf16" in words else torch.float16)  # as it came

    @pytest.mark.parametrize("kind", ["8bit", "4bit"])
    def test_a_quantised_teacher(self, place: Path, tmp_path: Path, kind: str) -> None:
        write_llama(place / "wide", width=64)  # 4-bit blocks are of 64 numbers
        config = config_of(place, f"teacher.quantization={kind}", "train.max_steps=2", teacher="wide", student="small")
        plain = distill(config_of(place, "train.max_steps=2", teacher="wide"), tmp_path / "plain")
        summary = distill(config, tmp_path / "run")
        assert summary.environment["teacher_precision"].startswith(kind)
        assert summary.teacher["ce"] == pytest.approx(plain.teacher["ce"], abs=0.2)
        assert summary.teacher["ce"] != plain.teacher["ce"]

    @pytest.mark.parametrize("teacher", ["llama", "medium"])
    @pytest.mark.parametrize("layers", ["3", "[0,1,3]"])
    def test_a_cut_student(self, place: Path, tmp_path: Path, teacher: str, layers: str) -> None:
        """The cut is the teacher with layers taken out of its list, and nothing else."""
        config = config_of(
            place, "student=cut", f"student.layers={layers}", "train.max_steps=1", teacher=teacher, student=""
        )
        summary = distill(config, tmp_path / "run")
        whole = AutoModelForCausalLM.from_pretrained(place / teacher, dtype=torch.float32)
        stack = whole.model.layers if teacher == "llama" else whole.transformer.h
        kept = {"3": {6: [0, 2, 5], 4: [0, 2, 3]}[len(stack)], "[0,1,3]": [0, 1, 3]}[layers]
        rest = torch.nn.ModuleList(stack[i] for i in kept)
        if teacher == "llama":
            whole.model.layers = rest
        else:
            whole.transformer.h = rest
        assert summary.untouched["num_parameters"] == whole.num_parameters()
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
        assert saved.config.num_hidden_layers == 3

    def test_layers_that_are_not_there(self, place: Path, tmp_path: Path) -> None:
        for layers in ("7", "[0,6]", "[1,1]"):
            words = ("student=cut", f"student.layers={layers}")
            with pytest.raises(ConfigError, match=r"student\.layers"):
                distill(config_of(place, *words, teacher="llama", student=""), tmp_path / layers)

    def test_a_fresh_student_follows_the_seed(self, place: Path, tmp_path: Path) -> None:
        kls = [
            distill(
                config_of(place, "student=random", f"train.seed={seed}", "train.max_steps=0"), tmp_path / name
            ).untouched["kl"]
            for name, seed in (("a", 1), ("b", 1), ("c", 2))
        ]
        assert kls[0] == kls[1] != kls[2]

    def test_keep_best_and_early_stopping(self, place: Path, tmp_path: Path) -> None:
        """At a rate that ruins the student, the first measure is the best: its weights are kept, and the run stops."""
        words = ("train.eval_every=1", "train.keep=best", "train.early_stopping.patience=2", "train.max_steps=20")
        config = config_of(place, *words, "optim.lr=0.5", "optim.schedule=constant")
        summary = distill(config, tmp_path / "run")
        measured = [line["eval/kl"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "eval/kl" in line]
        best = min(range(len(measured) - 1), key=lambda i: measured[i])
        assert summary.run["stopped_by"] == "early_stopping"
        assert summary.run["steps"] == best + 1 + 2
        assert summary.run["kept_step"] == best + 1
        assert summary.student["kl"] == pytest.approx(measured[best], rel=1e-4)

    def test_held_out_rows_ignore_training_choices(self, place: Path, tmp_path: Path) -> None:
        prints = set()
        for i, words in enumerate(
            [(), ("train.seed=5",), ("data.take=10",), ("train.batch_size=4",), ("train.epochs=2.0",)]
        ):
            config = config_of(place, *words, "train.max_steps=0") if i < 4 else config_of(place, *words)
            prints.add(distill(config, tmp_path / str(i)).data["validation_fingerprint"])
        assert len(prints) == 1


class TestFoundInReview:
    """Faults that a reading of the code found; each was so before it was mended."""

    def test_alpha_zero_goes_on_after_a_stop(self, place: Path, tmp_path: Path) -> None:
        config = config_of(place, "loss=cross_entropy", "train.save_every=2", "train.keep_checkpoints=true")
        first = distill(config, tmp_path / "run")
        unend(tmp_path / "run")
        assert distill(config, tmp_path / "run").student == first.student

    def test_prompts_that_leave_no_room_are_passed_over(self, place: Path, tmp_path: Path) -> None:
        """The models read 128 tokens: a prompt of 120 has no room for an answer."""
        long = {"source": "hello " * 120, "target": "Blue is a colour."}
        rows = [long | {"source": long["source"] + str(i)} for i in range(20)]
        file = tmp_path / "long.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) + (place / "pairs.jsonl").read_text())
        distill(config_of(place, f"data.path={file}", "train.max_steps=1", "data.validation=30"), tmp_path / "run")
        samples = json.loads((tmp_path / "run" / "samples.json").read_text())
        assert len(samples) == 3
        assert all(len(sample["prompt"][0]["content"]) < 120 for sample in samples)

    def test_measures_of_other_data_are_not_kept(self, place: Path, tmp_path: Path) -> None:
        file = write_pairs(tmp_path / "data.jsonl", 20)
        config = config_of(place, f"data.path={file}", "train.max_steps=1")
        distill(config, tmp_path / "run")
        unend(tmp_path / "run")
        file.write_text(file.read_text().replace("I am sure", "I am quite sure of it"))
        again = distill(config, tmp_path / "run")
        assert again.teacher == distill(config, tmp_path / "new").teacher

    def test_a_torn_last_line_does_not_lock_the_folder(self, place: Path, tmp_path: Path) -> None:
        config = config_of(place, "train.max_steps=2", "train.save_every=1", "train.keep_checkpoints=true")
        distill(config, tmp_path / "run")
        unend(tmp_path / "run")
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "tok')
        distill(config, tmp_path / "run")
        steps = [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
        assert steps == [1, 2]

    def test_no_git_loses_nothing(self, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        summary = distill(config_of(place, "train.max_steps=1"), tmp_path / "run")
        assert summary.environment["git_commit"] is None
        assert (tmp_path / "run" / "student" / "model.safetensors").is_file()

    def test_a_log_line_spans_a_stop(self, place: Path, tmp_path: Path) -> None:
        """A line every 4 steps, a stop at step 3: the line of step 4 is over all four."""
        config = config_of(place, "train.log_every=4", "train.save_every=3", "train.keep_checkpoints=true")
        distill(config, tmp_path / "run")
        straight = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
        unend(tmp_path / "run")
        distill(config, tmp_path / "run")
        again = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
        assert [line["train/loss"] for line in straight] == [line["train/loss"] for line in again]
