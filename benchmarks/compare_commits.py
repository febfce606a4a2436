"""Train with two versions of kdx side by side and compare the numbers.

    python benchmarks/compare_commits.py OLD NEW [--only pairs,jsd] [--first 1e-6 --last 1e-4] [--words KEY=VALUE ...]

OLD and NEW are commits of this repository or folders with a checkout. Each case runs once with each version, in fp32
with one thread. Losses, gradient norms and held-out measures of every step (metrics.jsonl, eval_rows.jsonl) and the
weights of the final student must be equal bit for bit, unless --first (the first loss, relative) and --last
(everything else, relative) allow for rounding. Ends with exit code 1 if a case is off.

$GPT2_TOKENIZER may name a folder with vocab.json and merges.txt; otherwise a small tokenizer is trained.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
STEPS = 20
END = "<|endoftext|>"
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COUNTED = ("train/loss", "train/kd", "train/ce", "train/grad_norm", "train/lr")

# Values are typed even where they are defaults: a default may differ between the versions.
COMMON = (
    f"train.max_steps={STEPS}", "train.log_every=1", "train.precision=fp32", "train.seed=0", "train.save_every=0",
    "teacher.precision=fp32", "student.save_dtype=fp32", "tracking.mode=disabled", "tracking.samples=false",
    "optim.lr=5e-4", "optim.schedule=cosine", "optim.warmup_steps=0.1", "loss.alpha=0.7", "loss.temperature=2",
    "data.seed=0", "data.validation=8", "eval.every=10",
)  # fmt: skip
DEFAULT_PAIR = ("train.batch_size=4", "data.max_length=96", "data.take=24")
GPT2 = (
    "teacher=hf", "teacher.path={models}/gpt2-teacher", "student=hf", "student.path={models}/gpt2-student",
    "data=pairs", "data.path={models}/pairs.jsonl", "data.max_length=64", "train.batch_size=8",
)  # fmt: skip
LLAMA = (
    "teacher=hf", "teacher.path={models}/llama-teacher", "student=hf", "student.path={models}/llama-student",
    "data=messages", "data.path={models}/chats.jsonl", "data.max_length=64", "train.batch_size=4",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Words of one run; later words win over the common ones."""

    about: str
    words: tuple[str, ...]
    num_processes: int = 1


CASES = {
    "live": Case("default pair, teacher live", (*DEFAULT_PAIR, "teacher.store=off")),
    "stored": Case("default pair, three epochs from the store", (*DEFAULT_PAIR, "teacher.store=on")),
    "pairs": Case("GPT-2 shapes, pairs, accumulation 4, dropout", (*GPT2, "train.micro_batch_size=2")),
    "llama": Case("Llama shapes, chats, teacher stored", (*LLAMA, "teacher.store=on")),
    "jsd": Case("jsd", (*LLAMA, "loss=jsd", "loss.beta=0.3")),
    "adaptive_kl": Case("adaptive_kl", (*LLAMA, "loss=adaptive_kl")),
    "alpha0": Case("alpha 0", (*GPT2, "loss.alpha=0")),
    "best": Case(
        "best weights, early stopping",
        (*LLAMA, "train.keep=best", "eval.every=2", "train.early_stopping.patience=2", "optim.lr=0.1"),
    ),
    "gloo": Case("two processes", (*GPT2, "train.micro_batch_size=2"), num_processes=2),
}


@dataclass
class Version:
    """One version of kdx, copied to a folder of its own."""

    name: str
    home: Path
    words: list[str] = field(default_factory=list)

    def knows(self, word: str) -> bool:
        """Whether this version's conf/ has the key of a word."""
        *path, leaf = word.split("=", 1)[0].lstrip("+~").split(".")
        if not path:
            return True
        files = [self.home / "kdx/conf/config.yaml", *(self.home / "kdx/conf" / path[0]).glob("*.yaml")]
        for file in files:
            node = yaml.safe_load(file.read_text(encoding="utf-8"))
            for key in path if file.name == "config.yaml" else path[1:]:
                node = node.get(key) if isinstance(node, dict) else None
            if isinstance(node, dict) and leaf in node:
                return True
        return False


def check_out(source: str, home: Path) -> None:
    """Copy kdx with its conf/ from a commit or a folder."""
    home.mkdir(parents=True)
    if Path(source).is_dir():
        ignored = shutil.ignore_patterns("conf", "__pycache__")
        shutil.copytree(Path(source) / "kdx", home / "kdx", ignore=ignored)
        shutil.copytree(Path(source) / "conf", home / "kdx/conf")
        return
    archive = subprocess.run(["git", "-C", ROOT, "archive", source, "kdx", "conf"], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", home], input=archive.stdout, check=True)
    (home / "conf").rename(home / "kdx/conf")


def sentence(rng: random.Random, length: int) -> str:
    """Words made of syllables: enough structure for a tokenizer to learn."""
    words = (
        "".join(rng.choices(("ka", "lo", "mi", "ten", "ur", "so", "pra"), k=rng.randint(1, 3))) for _ in range(length)
    )
    return " ".join(words).capitalize() + "."


def write_models(folder: Path) -> None:
    """Write two tiny pairs with fresh weights, instruction pairs and chats."""
    transformers.utils.logging.disable_progress_bar()
    rng = random.Random(0)
    folder.mkdir()
    with (folder / "pairs.jsonl").open("w") as pairs, (folder / "chats.jsonl").open("w") as chats:
        for _ in range(60):
            row = {"source": sentence(rng, rng.randint(3, 12)), "target": sentence(rng, rng.randint(4, 20))}
            pairs.write(json.dumps(row) + "\n")
            turns = [{"role": role, "content": sentence(rng, rng.randint(2, 7))} for role in ("user", "assistant") * 2]
            chats.write(json.dumps({"messages": turns}) + "\n")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    if given := os.environ.get("GPT2_TOKENIZER"):
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(Path(given) / name, tokenizer)
    else:
        bpe = ByteLevelBPETokenizer()
        files = [str(folder / "pairs.jsonl"), str(folder / "chats.jsonl")]
        bpe.train(files, vocab_size=600, special_tokens=[END], show_progress=False)
        bpe.save_model(str(tokenizer))
    gpt2 = GPT2Tokenizer(vocab=f"{tokenizer}/vocab.json", merges=f"{tokenizer}/merges.txt")
    chat = GPT2Tokenizer(vocab=f"{tokenizer}/vocab.json", merges=f"{tokenizer}/merges.txt")
    chat.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    chat.chat_template = CHAT
    end = gpt2.convert_tokens_to_ids(END)
    for name, layers, width in (("teacher", 3, 64), ("student", 2, 32)):
        torch.manual_seed(layers)
        ids: Any = {"bos_token_id": end, "eos_token_id": end, "initializer_range": 0.2}  # far from uniform
        shape = GPT2Config(vocab_size=len(gpt2), n_layer=layers, n_embd=width, n_head=4, n_positions=128, **ids)
        llama = LlamaConfig(
            vocab_size=len(chat) + 8 * layers, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=name == "student", **ids,
        )  # fmt: skip
        GPT2LMHeadModel(shape).save_pretrained(folder / f"gpt2-{name}")
        gpt2.save_pretrained(folder / f"gpt2-{name}")
        LlamaForCausalLM(llama).save_pretrained(folder / f"llama-{name}")
        chat.save_pretrained(folder / f"llama-{name}")


def run(case: Case, version: Version, other: Version, models: Path, words: list[str], folder: Path) -> Path:
    """Train one case with one version → its run folder. Raises RuntimeError with the end of its output."""
    run_dir = folder / "run"
    # A key that this version does not have is left out; if neither has what the user typed, kdx refuses it.
    own = [word.format(models=models) for word in (*COMMON, *case.words) if version.knows(word)]
    own += [word for word in (*words, *version.words) if version.knows(word) or not other.knows(word)]
    typed = {word.split("=", 1)[0]: word for word in own}  # the last one wins
    launcher = ["-m"]
    if case.num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.num_processes}", "-m"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "KDX_", "HYDRA_", "ACCELERATE_"))}
    clean |= {k: v for k, v in os.environ.items() if k == "KDX_CACHE"}
    clean |= {"PYTHONPATH": str(version.home), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        *launcher,
        "kdx",
        *typed.values(),
        f"teacher.store_dir={folder}/store",
        f"hydra.run.dir={run_dir}",
    ]
    done = subprocess.run(command, env=clean, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{version.name} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return run_dir


def numbers(run_dir: Path) -> dict[str, Any]:
    """What a run computed, by name: `step 3 train/loss`, `held-out row 7 kl` → number, `weights x` → tensor."""
    found: dict[str, Any] = {}
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        for key, value in line.items():
            if (key in COUNTED or key.startswith("eval/")) and value is not None:
                found[f"step {line['step']} {key}"] = value
    for i, row in enumerate(map(json.loads, (run_dir / "eval_rows.jsonl").read_text().splitlines())):
        found |= {f"held-out row {i} {key}": value for key, value in row.items() if isinstance(value, float)}
    found |= {f"weights {name}": tensor for name, tensor in load_file(run_dir / "student/model.safetensors").items()}
    return found


def difference(old: Any, new: Any) -> float:
    """Largest difference relative to the old value; of tensors, to the largest old one."""
    if isinstance(old, torch.Tensor):
        if old.shape != new.shape or old.dtype != new.dtype:
            return math.inf
        if torch.equal(old, new):
            return 0.0
        apart = (old.double() - new.double()).abs().max() / old.double().abs().max().clamp_min(1e-30)
        return float(apart) or 1e-300  # not bitwise equal
    return 0.0 if old == new else abs(old - new) / max(abs(old), 1e-30)


@dataclass
class Verdict:
    """How far apart two runs of a case are."""

    num_numbers: int
    worst: float
    where: str
    first: float
    missing: list[str]

    def is_ok(self, first: float, last: float) -> bool:
        return not self.missing and self.num_numbers > 0 and self.first <= first and self.worst <= last


def compare(old: dict[str, Any], new: dict[str, Any]) -> Verdict:
    """Compare what both runs report. Held-out measures that only one takes at a step are no difference."""
    missing = [name for name in old.keys() ^ new.keys() if " eval/" not in name]
    apart = {name: difference(old[name], new[name]) for name in old if name in new}
    where = max(apart, key=lambda name: apart[name], default="")
    return Verdict(len(apart), apart.get(where, 0.0), where, apart.get("step 1 train/loss", math.inf), sorted(missing))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="OLD NEW", help="commits or folders")
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--first", type=float, default=0.0, help="tolerance of the first loss")
    parser.add_argument("--last", type=float, default=0.0, help="tolerance of everything else")
    parser.add_argument("--words", nargs="+", default=[], help="typed for both versions, in every case")
    parser.add_argument("--old-words", nargs="+", default=[], help="typed for OLD alone")
    parser.add_argument("--new-words", nargs="+", default=[], help="typed for NEW alone")
    parser.add_argument("--keep", type=Path, help="keep models and runs in this new folder")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:12} {case.about}" for name, case in CASES.items()))
        return
    chosen = args.only.split(",")
    if unknown := set(chosen) - CASES.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}; --list shows them")
    if len(args.versions) != 2:
        parser.error("name two versions, OLD and NEW")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary) / "work").absolute()
        old = Version("old", folder / "old", args.old_words)
        new = Version("new", folder / "new", args.new_words)
        for version, source in zip((old, new), args.versions, strict=True):
            check_out(source, version.home)
        write_models(folder / "models")
        table = Table(title=f"{args.versions[0]} and {args.versions[1]}")
        for column in ("case", "numbers", "first loss", "largest difference", "at", "ok"):
            table.add_column(column)
        is_ok = True
        for name in chosen:
            began = time.monotonic()
            try:
                pair = ((old, new), (new, old))
                runs = [
                    run(CASES[name], v, o, folder / "models", args.words, folder / "runs" / name / v.name)
                    for v, o in pair
                ]
            except RuntimeError as error:
                print(f"{name}: {error}", flush=True)
                table.add_row(name, "", "", "failed", "", "no")
                is_ok = False
                continue
            verdict = compare(*map(numbers, runs))
            ok = verdict.is_ok(args.first, args.last)
            is_ok &= ok
            apart = ["bitwise" if value == 0 else f"{value:.1e}" for value in (verdict.first, verdict.worst)]
            where = verdict.where if verdict.worst else ""
            if verdict.missing:
                where = f"{len(verdict.missing)} in one run only: {verdict.missing[0]}"
            table.add_row(name, f"{verdict.num_numbers:,}", *apart, where, "yes" if ok else "no")
            print(f"{name}: {apart[1]} {where} ({time.monotonic() - began:.0f} s)", flush=True)
    Console().print(table)
    sys.exit(0 if is_ok else 1)


if __name__ == "__main__":
    main()
