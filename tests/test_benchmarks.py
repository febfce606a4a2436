"""The benchmarks run: at tiny sizes, or as far as importing them shows."""

import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _beside_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", [file.stem for file in sorted(FOLDER.glob("*.py"))])
def test_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize(
    ("what", "contestants"),
    [
        ("loss", ("kdx forward_kl", "kdx CE alone", "plain torch")),
        ("step", ("kdx, teacher live", "kdx, teacher stored")),
        ("memory", ("full  ", "lora  ", "qlora")),
    ],
)
def test_gpu_tables(what: str, contestants: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("gpu").main([what, "--tiny"])
    out = capsys.readouterr().out
    for name in contestants:
        (line,) = [line for line in out.splitlines() if name in line]
        assert "Error" not in line and float(line.split("│")[2]) > 0


def test_commits_are_compared_number_by_number() -> None:
    compare_commits = importlib.import_module("compare_commits")
    weights = torch.tensor([1.0, -2.0])
    old = {"step 1 train/loss": 2.0, "step 2 train/loss": 1.0, "weights a": weights}
    assert compare_commits.compare(old, old).is_ok(0, 0)
    rounded = compare_commits.compare(old, old | {"step 2 train/loss": 1.0 + 1e-5})
    assert rounded.where == "step 2 train/loss" and rounded.is_ok(0, 1e-4) and not rounded.is_ok(1e-4, 1e-6)
    assert not compare_commits.compare(old, old | {"weights a": weights + 1e-6}).is_ok(0, 0)
    assert not compare_commits.compare(old, {"step 1 train/loss": 2.0}).is_ok(1, 1), "a run that ended early"
    assert compare_commits.compare(old, old | {"step 2 eval/kl": 1.0}).is_ok(0, 0), "measured by one version alone"
