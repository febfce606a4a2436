"""`kdx evaluate`: it fills in what the run would have measured, and scores tasks as they are defined."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import config_of, lines, run_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdx import evaluate_command
from kdx.cli import _main
from kdx.errors import KdxError

WORDS = ["train.max_steps=2", "eval.num_prompts=3", "data.validation=8", "student.save_dtype=fp32"]
RUNS = {
    "straight": ["eval.on_policy_kl=true"],
    "sweep/first": ["eval.on_policy_kl=false"],  # the same student
    "sweep/second": ["eval.on_policy_kl=false", "optim.lr=1e-3"],
    "sweep/lora": ["eval.on_policy_kl=false", "adapter=lora", "adapter.r=2", "adapter.save=adapter"],
}


@pytest.fixture(scope="module")
def made(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that took on-policy KL, and a sweep that did not, with a run in it that was stopped."""
    folder = tmp_path_factory.mktemp("made")
    for name, words in RUNS.items():
        assert run_here(config_of(place, *WORDS, *words), folder / name) == 0
    shutil.copytree(folder / "sweep/second", folder / "sweep/stopped")
    status = read(folder / "sweep/stopped/status.json") | {"state": "interrupted"}
    (folder / "sweep/stopped/status.json").write_text(json.dumps(status))
    (folder / "sweep/second/eval_answers.jsonl").unlink()
    return folder


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))


def test_on_policy_kl_is_filled_in_for_a_sweep(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, loaded, load = made / "sweep", [], evaluate_command.load_teacher
    monkeypatch.setattr(evaluate_command, "load_teacher", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    before = read(sweep / "first/summary.json")
    assert before["student"]["on_policy_kl"] is None
    assert _main(["evaluate", str(sweep), "--on-policy"]) == 0
    assert len(loaded) == 1  # for all runs
    assert lines(sweep / "first/eval_answers.jsonl") == lines(made / "straight/eval_answers.jsonl")
    expected = {"on_policy_kl": read(made / "straight/summary.json")["student"]["on_policy_kl"]}
    assert read(sweep / "first/summary.json") == before | {"student": before["student"] | expected}
    for name in ("second", "lora"):
        assert len(lines(sweep / name / "eval_answers.jsonl")) == 3
        assert 0 < read(sweep / name / "summary.json")["student"]["on_policy_kl"] != expected["on_policy_kl"]
    assert "on-policy KL" in (sweep / "compare.md").read_text()
    said = capsys.readouterr().out
    assert "on-policy KL" in said[said.index("Greedy answers to") :]
    assert "skipped: stopped is not done" in said
    assert f"Wrote {sweep / 'compare.html'}" in said
    assert _main(["evaluate", str(sweep), "--on-policy"]) == 0
    assert len(loaded) == 1  # nothing was left to do


def test_rows_or_a_teacher_that_have_changed_are_refused(made: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "sweep/stopped", tmp_path / "run")
    shutil.copy(made / "sweep/first/status.json", tmp_path / "run/status.json")
    for word in ("teacher.precision=bf16", f"teacher.path={place / 'student'}", "data.seed=1"):
        with pytest.raises(KdxError, match="was measured on other rows, or with another teacher or precision"):
            _main(["evaluate", str(tmp_path / "run"), "--on-policy", word])


def test_tasks_are_scored_by_their_definition(
    made: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For 5 of 8 questions the likeliest choice is the right one. The W&B run gets the scores, too."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    run = made / "straight"
    model, tokenizer = (kind.from_pretrained(run / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    rows = []
    for i in range(8):
        row = {
            "question": f"What is {i} and {i + 1}?",
            "choices": [" It is the capital.", " Blue, I am sure.", f" {i}"],
        }
        start, found = len(tokenizer(row["question"])["input_ids"]), []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["question"] + choice)["input_ids"]])
            logs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            found.append(logs.gather(-1, ids[0, start:, None]).sum().item())
        best = max(range(3), key=found.__getitem__)
        rows.append(row | {"label": best if i < 5 else (best + 1) % 3})
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tiny.jsonl")}},
    }
    task |= {"output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}"}
    task |= {"doc_to_choice": "choices", "doc_to_target": "label", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))  # which is YAML too

    (run / "wandb_id.txt").write_text("abcd1234\n")
    kept = run.parent / "wandb/offline-run-1-abcd1234/files/wandb-summary.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"alpha": 0.7, "_step": 2}))
    opened: list[Any] = []

    def open_run(*about: Any, **_: Any) -> Any:
        opened.append(SimpleNamespace(about=about, summary={}, define_metric=lambda *_, **__: None))
        return nullcontext(opened[-1])

    monkeypatch.setattr(evaluate_command, "open_run", open_run)
    words = ["evaluate", str(run), "--tasks", "tiny", "--include_path", str(tmp_path), "tracking.mode=offline"]
    assert _main(words) == 0
    error = pytest.approx((5 / 8 * 3 / 8 / 7) ** 0.5)
    assert read(run / "summary.json")["tasks"] == {"tiny/acc": 5 / 8, "tiny/acc_stderr": error}
    assert opened[0].about == ("offline", run.parent, "abcd1234")
    assert opened[0].summary == {"alpha": 0.7, "tasks/tiny/acc": 5 / 8, "tasks/tiny/acc_stderr": error}
    assert "0.625 ± 0.183" in (run / "compare.md").read_text()

    monkeypatch.setattr(evaluate_command, "open_run", lambda *_, **__: 1 / 0)
    assert _main([*words, "--limit", "4"]) == 0
    assert read(run / "summary.json")["tasks"]["tiny/acc (limit 4)"] == 1
    assert "could not send the measures of straight to W&B" in capsys.readouterr().out
    assert run_here(config_of(place, *WORDS, *RUNS["straight"]), run) == 0  # is done still
    with pytest.raises(KdxError, match="'tyni' is not a registered task"):
        _main(["evaluate", str(run), "--tasks", "tyni"])


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nowhere", "--on-policy"], 2, "nowhere: does not exist"),
        (["{made}/sweep/stopped", "--on-policy"], 2, "stopped is not done or has no student.*Resume it"),
        (["{made}/straight"], 2, "give --on-policy or --tasks A,B"),
        (["{made}/straight", "--tasks", "arc_easy"], 3, "is not installed. pip install lm_eval"),
    ],
)
def test_a_users_errors_are_one_line(
    words: list[str], code: int, says: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_command, "find_spec", lambda _: None)
    with pytest.raises(KdxError, match=says) as caught:
        _main(["evaluate", *(word.format(made=made) for word in words)])
    assert (caught.value.exit_code, len(caught.value.lines)) == (code, 1)
