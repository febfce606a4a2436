"""Whole runs on small models: what a run leaves, that its figures are right, and what another config may change."""

import json
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from runs import config_of, lines, log_of, losses_of, run_here, status, words_of
from safetensors.torch import load_file
from standins import write_dialogpt, write_llama
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdx import evaluate
from kdx.cli import compose
from kdx.config import Config
from kdx.data.encode import load_data
from kdx.distill import Summary, distill, micro_batch_size
from kdx.errors import ConfigError, MachineError
from kdx.run import checkpoint, report, results
from kdx.run.folder import Record, RunFolder
from kdx.tokenizer import load_tokenizer
from kdx.train import State, Training, steps_to_measure

MEASURES = ("ce", "kl", "reverse_kl", "agreement", "accuracy")


def short(place: Path, *words: str) -> Config:
    """A run of 4 steps without micro-batches; a test's own words replace these."""
    base = ["train.max_steps=4", "train.batch_size=8", "train.micro_batch_size=8", "train.save_every=0"]
    keys = {word.split("=")[0] for word in words}
    keys |= {"train.max_steps"} if "train.epochs" in keys else set()
    return config_of(place, *[word for word in base if word.split("=")[0] not in keys], *words)


def llama(place: Path) -> str:
    """The word for a student without dropout."""
    return f"student.path={place / 'llama'}"


# ---- what a run leaves


def test_the_files_of_a_finished_run(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "overrides.yaml", "record.json", "command.txt", "data.json", "untouched.json", "trained.json",
        "kdx.log", "metrics.jsonl", "eval_rows.jsonl", "samples.json", "samples.md", "summary.json", "status.json",
        "student", ".lock",
    }  # fmt: skip
    student = {path.name for path in (finished / "student").iterdir()}
    assert student >= {"config.json", "model.safetensors", "generation_config.json", "README.md", "tokenizer.json"}
    now = status(finished)
    assert now.keys() == {"state", "reason", "step", "max_steps", "updated", "since", "owner"}
    assert (now["state"], now["reason"], now["step"], now["max_steps"]) == ("done", "", 4, 4)
    data = json.loads((finished / "data.json").read_text())
    assert data.keys() >= {
        "optim.lr", "loss.alpha", "data", "teacher", "student", "tokenizer", "plugins", "fingerprint",
        "validation_fingerprint", "teacher_precision", "processes", "shards",
    }  # fmt: skip
    assert yaml.safe_load((finished / "config.yaml").read_text())["loss"]["temperature"] == 2.0


def test_what_was_typed_is_kept(place: Path, tmp_path: Path) -> None:
    words = ["train.max_steps=0", "tracking.notes=hf_abcdefgh12345678"]
    record = Record(words, ["loss.alpha"], {"optim.lr": "typed"}, ["-m", *words])
    distill(short(place, *words), tmp_path, record)
    assert yaml.safe_load((tmp_path / "overrides.yaml").read_text()) == [words[0], "tracking.notes=[redacted]"]
    kept = json.loads((tmp_path / "record.json").read_text())
    assert kept == {"swept": ["loss.alpha"], "sources": {"optim.lr": "typed"}}
    assert "kdx -m train.max_steps=0 'tracking.notes=[redacted]'" in (tmp_path / "command.txt").read_text()
    assert "hf_abcdefgh" not in (tmp_path / "config.yaml").read_text()


def test_the_summary(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() == {"student", "untouched", "teacher", "run", "data", "environment"}
    for who in ("student", "untouched", "teacher"):
        assert summary[who].keys() == {*MEASURES, "perplexity", "num_parameters"}
        assert summary[who]["perplexity"] == pytest.approx(math.exp(summary[who]["ce"]))
    assert summary["run"].keys() == {
        "name", "formula", "steps", "kept_step", "stopped_by", "num_nonfinite", "other_versions", "tokens", "effective_alpha_start",
        "effective_alpha_end",
        "counted_tokens", "seconds", "seconds_per_step", "tokens_per_second", "peak_memory_bytes", "store",
    }  # fmt: skip
    assert summary["data"].keys() == {
        "num_rows", "num_validation_rows", "counted_tokens", "counted_validation_tokens", "num_dropped",
        "num_truncated", "num_noted", "num_unused", "fingerprint", "validation_fingerprint",
    }  # fmt: skip
    assert summary["environment"].keys() >= {"kdx", "torch", "precision", "teacher_digest", "git_commit", "command"}
    assert summary["run"]["steps"] == summary["run"]["kept_step"] == 4
    assert Summary(**summary).measure == summary["student"]["kl"]


def test_logged_losses_are_their_parts_and_rows_sum_to_the_summary(finished: Path) -> None:
    logged = lines(finished / "metrics.jsonl")
    trained = [line for line in logged if "train/loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    for line in trained:
        assert line["train/loss"] == 0.7 * line["train/kd"] + (1 - 0.7) * line["train/ce"]
        assert line.keys() == {
            "step", "tokens", "counted_tokens", "train/loss", "train/kd", "train/ce", "train/lr", "train/grad_norm",
            "train/epoch", "speed/tokens_per_second", "memory/peak_bytes",
            "train/grad_kd", "train/grad_ce", "train/grad_cosine", "train/effective_alpha",
        }  # fmt: skip
    assert [line["step"] for line in logged if "eval/kl" in line] == [2, 4]
    rows, summary = lines(finished / "eval_rows.jsonl"), json.loads((finished / "summary.json").read_text())
    counted = sum(row["counted"] for row in rows)
    assert (len(rows), counted) == (8, summary["data"]["counted_validation_tokens"])
    for name in MEASURES:
        assert sum(row[name] for row in rows) / counted == pytest.approx(summary["student"][name])
        assert logged[-1][f"eval/{name}"] == summary["student"][name]


def test_the_model_card(finished: Path) -> None:
    _, header, body = (finished / "student" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert card.keys() >= {"base_model", "license", "library_name", "pipeline_tag", "datasets"}
    assert (card["library_name"], card["pipeline_tag"]) == ("transformers", "text-generation")
    assert str(finished) not in body and "| KL |" in body


PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, prompts, chats = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
chat = pipeline("text-generation", model=folder)
answers = [chat(prompt, do_sample=False, max_new_tokens=48)[0]["generated_text"][-1]["content"] for prompt in prompts]
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


def test_a_process_without_kdx_answers_and_measures_the_same(place: Path, finished: Path) -> None:
    """transformers' own pipeline gives the answers of samples.json, and a loop the cross-entropy of the summary."""
    samples, summary = (json.loads((finished / f"{name}.json").read_text()) for name in ("samples", "summary"))
    assert len(samples) == 3
    chats = [json.loads(line)["messages"] for line in (place / "chats.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    config = compose(words_of(place, "data=messages", f"data.path={place / 'chats.jsonl'}", "data.validation=8"))
    held_out = load_data(config.data, load_tokenizer(config), 3).held_out
    texts = {tokenizer.decode(row.tokens): row for row in held_out}
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    chosen = [chat for chat, text in zip(chats, rendered, strict=True) if text in texts]
    words = [str(finished / "student"), json.dumps([s["prompt"] for s in samples]), json.dumps(chosen)]
    told = subprocess.run([sys.executable, "-c", PLAIN, *words], capture_output=True, text=True, check=True)
    answer = json.loads(told.stdout.splitlines()[-1])
    assert answer["answers"] == [sample["student"] for sample in samples]
    assert answer["count"] == summary["data"]["counted_validation_tokens"]
    assert answer["ce"] == pytest.approx(summary["student"]["ce"], abs=1e-3)  # the student is kept in fp16
    page = (finished / "samples.md").read_text()
    assert all(s["student"].splitlines()[0] in page for s in samples if s["student"].strip())


def test_what_to_type_next_keeps_the_words_of_this_run(place: Path, tmp_path: Path) -> None:
    words = ["--config-dir", "mine", "data=pairs", "data.path=my file.jsonl", "loss.alpha=1", "run.like=x"]
    sweep = (
        "  python -m kdx -m --config-dir mine data=pairs 'data.path=my file.jsonl' "
        "loss.temperature=1,2,4 loss.alpha=0.3,0.7"
    )
    record = Record(command=words)
    found = report.next_commands(tmp_path, short(place), record, has_samples=True)
    assert found == ["next:", f"  less {tmp_path}/samples.md", sweep]
    in_sweep = report.next_commands(tmp_path / "job", short(place, "sweep.name=s"), Record(), has_samples=False)
    assert in_sweep == ["next:", f"  python -m kdx compare {tmp_path}"]
    assert report.next_commands(tmp_path, short(place, "loss=cross_entropy"), record, has_samples=False) == []


# ---- the same run, and another

REFUSED = ("optim.lr=2e-3", "loss.alpha=0.5", "train.seed=3", "data.max_length=50")


def test_done_is_done_and_another_config_is_refused(place: Path, finished: Path, tmp_path: Path) -> None:
    def content() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}

    words = ["data=messages", f"data.path={place / 'chats.jsonl'}", "train.max_steps=4", "eval.every=2"]
    words += ["teacher.license=mit", "tracking.samples=true", "data.validation=8"]
    before, config = content(), config_of(place, *words)
    assert RunFolder(finished).is_done(config)
    assert distill(config, finished) == Summary(**json.loads((finished / "summary.json").read_text()))
    for word in REFUSED:
        with pytest.raises(ConfigError, match=rf"holds a run with a different {word.split('=')[0]}") as error:
            distill(config_of(place, *words, word), finished)
        assert error.value.exit_code == 2
        assert error.value.lines[1].split() == ["key", "was", "now"]
        assert error.value.lines[2].split()[0] == word.split("=")[0]
    assert distill(config_of(place, *words, "train.log_every=7"), finished)  # nothing that decides the student
    assert content() == before
    assert not RunFolder(tmp_path / "none").is_done(config)


def with_another_state(run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """Copy a stopped run and change the state in its checkpoint → the state as it was."""
    shutil.copytree(run, copy)
    file = copy / "checkpoints/step-00000005/state.json"
    state: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps(state | changes))
    monkeypatch.setattr(checkpoint, "verify", lambda folder: None)
    return state


def test_a_state_of_another_version_is_refused(
    stopped: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, words = stopped
    with_another_state(folder / "run", tmp_path / "run", monkeypatch, more=1)
    with pytest.raises(MachineError, match=r"state\.json: was written by another version of kdx"):
        distill(config_of(folder / "place", *words), tmp_path / "run")


def test_seconds_are_those_of_all_processes_of_a_run(
    stopped: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, words = stopped
    state = with_another_state(folder / "run", tmp_path / "run", monkeypatch, elapsed=1000.0)
    assert 0 < state["seconds"] < state["elapsed"]
    summary = distill(config_of(folder / "place", *words), tmp_path / "run")
    kept = json.loads((tmp_path / "run/trained.json").read_text())["state"]["elapsed"]
    assert 1000 < kept < summary.run["seconds"] < 1100


def test_another_run_in_the_same_folder_is_another_one_in_wandb(place: Path, tmp_path: Path) -> None:
    """Unless it resumes from a checkpoint of the first."""
    folder, file = RunFolder(tmp_path), tmp_path / "wandb_id.txt"
    for words, is_same in (([], False), ([], True), (["train.seed=1"], False)):
        folder.begin(short(place, *words), {"fingerprint": "a"})
        assert file.is_file() == is_same
        file.write_text("abc")
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    folder.begin(short(place, "train.seed=1", "train.on_nonfinite=skip"), {"fingerprint": "a"})
    assert file.is_file()


# ---- numbers

# train/loss of the first steps in fp64, and the student's held-out measures: a change of these is a change of numbers.
COMMITTED = {
    "loss=forward_kl": [1.7338679, 1.6259643, 1.8149299, 1.4999916, 4.8079824, 0.0412458],
    "loss=jsd loss.beta=0.2": [1.7279421, 1.6166494, 1.8296647, 1.4839508, 4.8086156, 0.0430481],
    "loss.alpha=0": [5.7560464, 5.3839022, 6.0849215, 4.9299397, 4.8011903, 0.04447],
}


@pytest.mark.parametrize("words", [("loss=forward_kl",), ("loss=jsd", "loss.beta=0.2"), ("loss.alpha=0",)])
def test_committed_losses(place: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    fp64 = ("train.precision=fp64", "teacher.precision=fp64", "student.save_dtype=fp32", llama(place))
    summary = distill(short(place, *fp64, *words), tmp_path)
    found = [*losses_of(tmp_path), summary.student["ce"], summary.student["kl"]]
    assert found == pytest.approx(COMMITTED[" ".join(words)], abs=1e-5)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_nothing(place: Path, tmp_path: Path, micro: int) -> None:
    words = ["train.precision=fp64", "teacher.precision=fp64", llama(place), "optim.name=torch.SGD", "~optim.betas"]
    words += ["train.batch_size=6", "train.epochs=1"]
    whole = distill(short(place, *words, "train.micro_batch_size=6"), tmp_path / "whole")
    split = distill(short(place, *words, f"train.micro_batch_size={micro}"), tmp_path / "split")
    for name in ("train/loss", "train/grad_norm"):
        one, other = (
            [x[name] for x in lines(tmp_path / run / "metrics.jsonl") if name in x] for run in ("whole", "split")
        )
        assert one == pytest.approx(other, rel=1e-9)
    assert whole.run["steps"] == 6
    assert whole.student["kl"] == pytest.approx(split.student["kl"], rel=1e-5)


def test_a_student_that_is_the_teacher_measures_zero(place: Path, tmp_path: Path) -> None:
    words = [f"teacher.path={place / 'llama'}", "student=cut", "student.layers=6", "student.path=null"]
    summary = distill(short(place, *words, "train.max_steps=0"), tmp_path)
    assert summary.untouched["kl"] == pytest.approx(0, abs=1e-6)
    assert summary.untouched["agreement"] == 1
    assert summary.untouched["ce"] == pytest.approx(summary.teacher["ce"], abs=1e-6)
    assert not (tmp_path / "student").exists()


def test_a_teacher_is_asked_again_for_held_out_rows_that_memory_has_no_room_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = distill(short(place, "train.max_steps=0"), tmp_path / "kept")
    monkeypatch.setattr(evaluate, "KEPT_BYTES", 2000)
    again = distill(short(place, "train.max_steps=0"), tmp_path / "again")
    assert again.student["kl"] == kept.student["kl"] and again.teacher["ce"] == kept.teacher["ce"]


def test_dropout_is_on_while_training_and_off_while_measuring(place: Path, tmp_path: Path) -> None:
    still = write_dialogpt(tmp_path / "still", 2, 16, pickled=False, seed=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    runs = [
        distill(short(place, "train.max_steps=1", f"student.path={path}"), tmp_path / f"run-{path.name}")
        for path in (still, place / "student")
    ]
    assert runs[0].untouched["ce"] == runs[1].untouched["ce"]
    assert losses_of(tmp_path / "run-still") != losses_of(tmp_path / "run-student")


def test_alpha_zero_measures_the_teacher_and_trains_without(place: Path, tmp_path: Path) -> None:
    one = distill(short(place, "loss=cross_entropy"), tmp_path / "one")
    two = distill(short(place, "loss.alpha=0"), tmp_path / "two")
    none = ["teacher=none", "loss=cross_entropy", "teacher.path=null"]
    without = distill(short(place, *none), tmp_path / "none")
    assert one.student["kl"] is not None
    assert one.student["ce"] == two.student["ce"] == without.student["ce"] == without.measure
    assert without.student["kl"] is without.student["agreement"] is without.teacher["ce"] is None
    trained = [line for line in lines(tmp_path / "one" / "metrics.jsonl") if "train/loss" in line]
    assert all(line["train/kd"] is None and line["train/loss"] == line["train/ce"] for line in trained)


# ---- choices


@pytest.mark.parametrize(
    "words",
    [
        ("optim=lion_8bit",),
        ("train.gradient_checkpointing=true", "train.precision=bf16", "student.save_dtype=bf16"),
        ("data.validation=null",),
        ("train.epochs=0.25", "data.assistant_only=false", "data.shuffle=false"),
        ("loss=adaptive_kl", "train.max_grad_norm=null", "loss.scale_by_temperature=false"),
        ("optim.schedule=cosine_with_min_lr", "optim.schedule_options.min_lr_rate=0.1", "student=random"),
    ],
    ids=lambda words: words[0],
)
def test_choices_run(place: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    summary = distill(short(place, *(() if "epochs" in words[0] else ("train.max_steps=2",)), *words), tmp_path)
    assert summary.run["steps"] == 2
    assert summary.student["ce"] is None or math.isfinite(summary.student["ce"])
    assert all(x is not None and math.isfinite(x) for x in losses_of(tmp_path))
    saved = load_file(tmp_path / "student/model.safetensors")
    is_bf16 = "student=random" in words or "student.save_dtype=bf16" in words
    assert {x.dtype for x in saved.values()} == {torch.bfloat16 if is_bf16 else torch.float16}


def test_a_quantised_teacher(place: Path, tmp_path: Path) -> None:
    write_llama(tmp_path / "wide", width=64)  # blocks are of 64 numbers
    words = (f"teacher.path={tmp_path / 'wide'}", "train.max_steps=1")
    plain = distill(short(place, *words), tmp_path / "plain")
    summary = distill(short(place, *words, "teacher.quantization=4bit"), tmp_path / "run")
    assert summary.teacher["ce"] == pytest.approx(plain.teacher["ce"], abs=0.2)
    assert summary.teacher["ce"] != plain.teacher["ce"]


def test_keep_best_and_early_stopping(place: Path, tmp_path: Path) -> None:
    """At a rate that ruins the student an early measure is the best: its weights are kept, and the run stops."""
    words = ("eval.every=1", "train.keep=best", "train.early_stopping.patience=2", "train.max_steps=20")
    summary = distill(short(place, *words, "optim.lr=0.5", "optim.schedule=constant"), tmp_path)
    measured = [line["eval/kl"] for line in lines(tmp_path / "metrics.jsonl") if "eval/kl" in line]
    best = min(range(len(measured) - 1), key=lambda i: measured[i])
    assert summary.run["stopped_by"] == "early_stopping"
    assert summary.run["steps"] == best + 1 + 2
    assert summary.run["kept_step"] == best + 1
    assert summary.student["kl"] == pytest.approx(measured[best], rel=1e-2)  # fp16


def test_measuring_changes_no_weights(place: Path, tmp_path: Path) -> None:
    """eval.every=auto measures at evenly spaced steps; the student, trained with dropout, is bitwise the same."""
    students = []
    for every, steps in (("auto", [1, 3, 4, 6]), ("0", [6])):
        distill(short(place, f"eval.every={every}", "train.max_steps=6"), tmp_path / every)
        assert [line["step"] for line in lines(tmp_path / every / "metrics.jsonl") if "eval/kl" in line] == steps
        students.append((tmp_path / every / "student" / "model.safetensors").read_bytes())
    assert students[0] == students[1]


@pytest.mark.parametrize(
    ("every", "train", "held_out", "max_steps", "steps"),
    [
        ("auto", 1000, 10, 60, [10, 20, 30, 40, 50]),
        ("auto", 1000, 100, 60, [15, 30, 45]),  # ⌊0.3 · 1000 ÷ 100⌋ = 3
        ("auto", 1000, 100, 30, [15]),  # half an epoch
        ("auto", 1000, 400, 60, []),
        ("auto", 20000, 10, 3, [1, 2]),
        ("auto", 1000, 0, 60, []),
        (20, 1000, 10, 60, [20, 40]),
        (0, 1000, 10, 60, []),
    ],
)
def test_the_steps_to_measure_are_decided_from_counts(place: Path, every, train, held_out, max_steps, steps) -> None:
    data: Any = SimpleNamespace(
        train=SimpleNamespace(lengths=torch.tensor([train - 1, 1])),
        held_out=SimpleNamespace(lengths=torch.tensor([held_out])),
    )
    batches: Any = SimpleNamespace(steps_per_epoch=60)
    found = steps_to_measure(short(place, f"eval.every={every}"), data, batches, max_steps)
    assert [step for step in range(max_steps + 1) if step in found] == steps
    best = short(place, f"eval.every={every}", "train.keep=best") if every else None
    if every == "auto" and not steps:
        with pytest.raises(ConfigError, match=r"train.keep=best: needs held-out measures"):
            steps_to_measure(best, data, batches, max_steps)


def test_the_metric_that_decides(place: Path, tmp_path: Path) -> None:
    """eval.metric chooses the best weights, and what a sweep compares; without a teacher it is CE."""
    words = ("eval.every=1", "eval.metric=ce", "train.keep=best", "train.max_steps=6", "optim.lr=0.2")
    summary = distill(short(place, *words), tmp_path)
    measured = [line["eval/ce"] for line in lines(tmp_path / "metrics.jsonl") if "eval/ce" in line]
    assert summary.run["kept_step"] == 1 + min(range(6), key=lambda i: measured[i])
    assert summary.measure == summary.student["ce"] != summary.student["kl"]


def test_less_than_min_delta_is_no_improvement(place: Path) -> None:
    training = object.__new__(Training)
    training.config, training.state = short(place, "train.early_stopping.min_delta=0.1"), State(step=1)
    training.whole, training.student, training.objective = nullcontext, None, nn.Module()
    for value, worse in ((1.0, 0), (0.95, 1), (0.85, 0)):
        means = {"kl": value, "ce": 0.0}
        judge: Any = lambda model, means=means: SimpleNamespace(means=lambda: means)  # noqa: E731
        training.measure(judge, RunFolder(Path()))
        assert training.state.num_worse == worse


def test_a_batch_is_shared_out_evenly(place: Path) -> None:
    config = short(place, "train.batch_size=6", "train.micro_batch_size=auto").train
    assert micro_batch_size(config, 3) == 2
    with pytest.raises(ConfigError, match="is 6, not a multiple of 4 "):
        micro_batch_size(config, 4)
    with pytest.raises(ConfigError, match="is 6, not a multiple of 4 "):
        micro_batch_size(short(place, "train.batch_size=6", "train.micro_batch_size=2").train, 2)


def test_a_disk_that_is_too_small_is_refused_before_training(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "usage_of", lambda path: type("", (), {"free": 1000})())
    assert run_here(short(place, "train.save_every=1"), tmp_path) == 3
    assert "the student and its checkpoints need " in capfd.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_makes_a_run_doubtful_is_said(place: Path, tmp_path: Path) -> None:
    distill(short(place, "train.max_steps=0", "student.layers=1"), tmp_path)
    assert "only 64 counted held-out tokens" in log_of(tmp_path)
    assert "student.layers=1 is not used: the student is not cut" in log_of(tmp_path)


def test_a_checkpoint_is_a_model_too(stopped: tuple[Path, list[str]]) -> None:
    folder = stopped[0] / "run/checkpoints/step-00000005"
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    state = model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in load_file(folder / "model.safetensors").items())
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_prompts_that_leave_no_room_are_passed_over(place: Path, tmp_path: Path) -> None:
    """The models read 128 tokens: a prompt of 120 has no room for an answer."""
    long = [{"source": "hello " * 120 + str(i), "target": "Blue is a colour."} for i in range(20)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in long) + (place / "pairs.jsonl").read_text())
    words = ("train.max_steps=1", "data.validation=30", "tracking.samples=true")
    distill(short(place, f"data.path={file}", *words), tmp_path / "run")
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert len(samples) == 3
    assert all(len(sample["prompt"][0]["content"]) < 120 for sample in samples)
