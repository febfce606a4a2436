"""Fixtures that several test files share."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub client is imported: no test needs the network

import pytest
import torch
import yaml
from runs import config_of, make_place, run_here, signal_at
from standins import END, TEXT, write_chats, write_dialogpt, write_llama
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from kdx.config import DataConfig

torch.set_num_threads(1)  # the models are small: threads would mostly wait for one another

CONF = Path(__file__).parents[1] / "conf"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="fault tests with all their kills: some minutes")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to count as far as the promises go, or a few times only."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small teacher and a smaller student."""
    folder = tmp_path_factory.mktemp("models")
    write_dialogpt(folder / "teacher", 2, 16, pickled=False)
    write_dialogpt(folder / "student", 1, 16, pickled=False)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student with dropout, a Llama, and data, all small."""
    folder = make_place(tmp_path_factory.mktemp("place"))
    write_llama(folder / "llama")
    write_chats(folder / "chats.jsonl")
    return folder


@pytest.fixture(scope="session")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on chats with samples and a held-out measure on the way, which several tests read."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    words = ["data=messages", f"data.path={place / 'chats.jsonl'}", "train.max_steps=4", "eval.every=2"]
    words += ["teacher.license=mit", "tracking.samples=true", "data.validation=8"]
    assert run_here(config_of(place, *words), run_dir) == 0
    return run_dir


@pytest.fixture(scope="session")
def stopped(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with a place of its own, stopped at step 5 of 9: the folder of both, and the run's words."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(place, folder / "place")
    words = ["train.micro_batch_size=2", "train.max_steps=9", "optim.schedule=constant", "train.save_every=100"]
    assert run_here(config_of(folder / "place", *words), folder / "run", signal_at(5)) == 143
    return folder, words


@pytest.fixture
def beside_models(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type commands in, with that teacher and that student."""
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kdx"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    return tmp_path


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Tell a fault test's figure at the end of the session, whichever process counted it."""
    return partial(record_property, "figure")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    figures = [text for r in reports if r.when == "call" for name, text in r.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures of the fault tests")
        terminalreporter.write_line("\n".join(figures))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Every call that the disk's order hangs on, with the path it is about: of a renaming, the new one."""
    told: list[tuple[str, Path]] = []

    def listened(name: str, known: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if name == "fsync":
                about = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
            else:
                about = Path(args[1] if name in ("replace", "rename") else args[0])
            result = known(*args, **more)
            told.append((name, about))
            return result

        return call

    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, listened(name, getattr(os, name)))
    return told


@pytest.fixture(scope="session", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what teachers say out of the project's own outputs/."""
    os.environ["KDX_STORE"] = str(tmp_path_factory.mktemp("teacher-store"))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokenised rows out of the user's own cache, but share the dequantised default teacher with it."""
    from kdx.run.files import cache_dir

    own, ours = cache_dir(), tmp_path_factory.mktemp("cache")
    for name in ("gguf", "digests"):
        (own / name).mkdir(parents=True, exist_ok=True)
        (ours / name).symlink_to(own / name)
    os.environ["KDX_CACHE"] = str(ours)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Build a small GPT-2-like tokenizer: end of text is bos and eos, there is no pad token.

    Further special tokens and a chat template can be given.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXT * 4, vocab_size=400, special_tokens=[END], show_progress=False)
    learnt = bpe.to_str()

    def make(template: str | None = None, special: tuple[str, ...] = (), **tokens: str) -> PreTrainedTokenizerFast:
        tokens = {"bos_token": END, "eos_token": END} | tokens
        made = PreTrainedTokenizerFast(tokenizer_object=type(bpe._tokenizer).from_str(learnt), **tokens)
        made.add_special_tokens({"additional_special_tokens": list(special)})
        made.chat_template = template
        return made

    return make


def _data_group(name: str) -> dict[str, Any]:
    node = yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    for parent in node.pop("defaults", []):
        node = node if parent == "_self_" else _data_group(parent) | node
    return node


@pytest.fixture(scope="session")
def data_config() -> Callable[..., DataConfig]:
    """Build a DataConfig from a choice in conf/data and changes; nothing is held out unless asked for."""

    def make(choice: str, **changes: Any) -> DataConfig:
        values = _data_group(choice) | {"validation": None} | changes
        return DataConfig(**values)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, or a plain folder where mounting is not allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        is_mounted = False
    yield folder
    if is_mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
