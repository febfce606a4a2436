"""Commands in odd places: streams that are closed, full or of another locale, a folder that is gone, strange YAML."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment
from standins import write_dialogpt, write_pairs

KDX = f"{sys.executable} -m kdx"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def shell(line: str, folder: Path, **more: str) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, check=False)


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (f"{KDX} --cfg job >&-", 0, ""),
        (f"{KDX} optim.lr=-1 2>&-", 2, ""),
        (f"{KDX} optim.lr=-1 2>/dev/full", 2, ""),
        (f"{KDX} --help | true", 141, ""),
        (f"{KDX} --cfg job | true", 141, ""),
        (f"{KDX} --cfg job >/dev/full", 3, "kdx: error: disk: No space left on device"),
        (f"mkdir x && cd x && rmdir ../x && {KDX}", 3, "kdx: error: .: the folder you are in was removed"),
    ],
)  # fmt: skip
def test_what_a_shell_may_do(tmp_path: Path, line: str, code: int, told: str) -> None:
    done = shell(line, tmp_path)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr + done.stdout
    if told:
        (only,) = done.stderr.decode().splitlines()
        assert only.startswith(told)


def test_words_that_are_no_text_in_a_locale(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "kdx", b"train.seed=\xff"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(**ASCII), capture_output=True, check=False)
    told = rb"kdx: error: train.seed=\udcff: is not text in this locale. Use one of UTF-8: export LC_ALL=C.UTF-8"
    assert (done.returncode, done.stderr.splitlines()) == (2, [told])


def test_a_run_whose_streams_are_closed_or_ascii(tmp_path: Path) -> None:
    """Every file it writes is as it should be: none got the number of a stream that was closed."""
    write_dialogpt(tmp_path / "teacher", 2, 16, pickled=False)
    write_pairs(tmp_path / "t.jsonl")
    words = (
        "teacher=hf teacher.path=teacher student=hf student.path=teacher data=pairs data.path=t.jsonl data.validation=2"
    )
    words += " train.max_steps=1 tracking.mode=disabled tracking.samples=false hydra.run.dir="
    assert shell(f"{KDX} {words}closed <&- >&- 2>&-", tmp_path).returncode == 0
    done = shell(f"{KDX} {words}ascii", tmp_path, **ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"loss = 0.7\xb74\xb7forward_kl" in done.stdout
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in ("closed", "ascii")]
    assert weights[0] == weights[1]
    assert "·" in (tmp_path / "ascii/kdx.log").read_text(encoding="utf-8")


def test_yaml_that_nobody_chose_stands_in_nobodys_way(tmp_path: Path) -> None:
    for name in ("notes", "experiment"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    (tmp_path / "mine/notes/numbers.yaml").write_text("a: [" + ", ".join(["1"] * 120_000) + "]\n")
    (tmp_path / "mine/experiment/numbers.yaml").write_text("a: [" + ", ".join(["1"] * 120_000) + "]\n")
    (tmp_path / "mine/notes/broken.yaml").write_text("a: [")
    os.mkfifo(tmp_path / "mine/experiment/pipe.yaml")
    done = shell(f"timeout 60 {KDX} --config-dir mine optim.lr=-1", tmp_path)
    assert (done.returncode, done.stderr) == (2, b"kdx: error: optim.lr: is -1. Allowed: above 0\n")


def bomb() -> str:
    lines, last = ["a: &a [x, x, x, x, x, x, x, x, x, x]"], "a"
    for name in "bcdefghij":
        lines.append(f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]")
        last = name
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (bomb(), "trap.yaml: names parts of itself over and over"),
        ("a: &a [*a]", "trap.yaml: names parts of itself over and over"),
        ("hydra: null", "trap.yaml: hydra: is no group of keys"),
        ("hydra: 5", "trap.yaml: hydra: is no group of keys"),
        (f"train:\n  seed: {'9' * 5000}", "trap.yaml: does not parse: Exceeds the limit"),
        (f"a: {'[' * 50_000}", "trap.yaml: is nested too deep"),
        (f"a: {'[' * 50_000}{']' * 50_000}", "trap.yaml: is nested too deep"),
        (f"{'- ' * 50_000}x", "trap.yaml: is nested too deep"),
    ],
    ids=["bomb", "itself", "no hydra", "a number", "digits", "open", "deep", "lists"],
)
def test_strange_yaml(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mine/experiment/trap.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# @package _global_\n{text}\n")
    done = shell(f"{KDX} --config-dir mine experiment=trap", tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.decode().splitlines()
    assert told in line
    assert os.listdir(tmp_path) == ["mine"]
