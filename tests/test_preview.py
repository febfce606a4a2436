"""kdx check: what a run would be, without running it."""

from pathlib import Path

import pytest
import torch
from standins import write_chats, write_dialogpt
from transformers import AutoTokenizer

from kdx.batches import Row
from kdx.cli import compose
from kdx.errors import DataError
from kdx.preview import check, marked


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("check")
    write_dialogpt(place / "teacher", 4, 32, pickled=False)
    write_dialogpt(place / "student", 2, 16, pickled=False, seed=1)
    write_chats(place / "chats.jsonl")
    words = ["teacher=hf", f"teacher.path={place}/teacher", "student=hf", f"student.path={place}/student"]
    return [*words, "data=messages", f"data.path={place}/chats.jsonl", "data.validation=8", "train.max_steps=4"]


def test_it_says_what_would_be_trained_and_trains_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check(compose([*words, "train.save_every=2", "train.precision=fp32", "teacher.precision=fp32"]))
    told = capsys.readouterr().out
    for part in ("objective", "padding", "⟦", "⟧", "together", "optim=adamw_8bit", "min for", "checkpoints", "free"):
        assert part in told
    assert list(tmp_path.iterdir()) == []


def test_savings_that_are_taken_are_not_offered(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    offered = ["train.gradient_checkpointing=true", "optim=adamw_8bit", "train.micro_batch_size=1"]
    check(compose(words))
    told = capsys.readouterr().out
    assert all(word in told for word in offered)
    check(compose([*words, *offered]))
    told = capsys.readouterr().out
    assert not any(word in told for word in offered)


def test_all_data_faults_are_told(words: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": "oops"}\n{"messages": []}\n{"nothing": 1}\n')
    with pytest.raises(DataError) as error:
        check(compose([word for word in words if not word.startswith("data.path")] + [f"data.path={bad}"]))
    assert [f"{bad}:{line}" in "\n".join(error.value.lines) for line in (1, 2, 3)] == [True] * 3


def test_what_counts_is_marked(words: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words[1].partition("=")[2])
    tokens = tokenizer("Hello there, how are you today?")["input_ids"]
    half = len(tokens) // 2
    row = Row("a", tokens, [False] * half + [True] * (len(tokens) - half))
    first, rest = tokenizer.decode(tokens[:half]), tokenizer.decode(tokens[half:])
    assert marked(tokenizer, row) == f"{first}⟦{rest}⟧"
    assert torch.is_grad_enabled()
