"""What decides which student comes out of a run: its config and the contents of the files it reads. Imports no torch.

One definition serves job folders, "already done", resuming and ranking.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from kdx import plugins
from kdx.config import COMMIT, GENERATED, Config, DataConfig, ModelConfig, Tree, leaves, replaced
from kdx.data.files import listed, resolve_path, what_is_read
from kdx.data.sources import parts_of
from kdx.errors import shortened
from kdx.run.files import cache_dir, digest_of, read_json, write_beside
from kdx.run.redact import redact

# Keys, or groups of keys, that cannot change the student.
FREE = (
    "run.", "sweep.", "tracking.", "eval.num_prompts", "eval.on_policy_kl", "train.log_every", "train.save_", "train.keep_checkpoints", "teacher.store",
    "teacher.license", "teacher.base_model", "student.license", "student.base_model",
)  # fmt: skip
# A key and its value → what then changes nothing. A run from before there was such a key counts as having that value.
UNUSED = {
    ("adapter.name", "none"): "adapter.", ("rollout.name", "none"): "rollout.", ("teacher.adapter", None): "teacher.adapter",
    ("loss.alpha", 0): "loss.", ("train.on_nonfinite", "stop"): "train.max_nonfinite",
}  # fmt: skip
CONTENTS = ("data", "teacher", "student", "tokenizer", "chat_template", "plugins")
ROWS = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow)(\.\w+)?$")  # files of a folder that may hold rows
WEIGHTS = ("config.json", "adapter_config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
BLOCK = 2**20  # bytes; a file that is smaller is hashed each time

Differences = list[tuple[str, Any, Any]]  # key, was, now


def identity(config: Config) -> Tree:
    """Describe what decides the student: config_identity, and a digest of each of CONTENTS.

    A digest is None where there is nothing, or nothing yet, such as a model that will be downloaded.
    """
    template = config.data.chat_template or ""
    groups = {"teacher": config.teacher, "student": config.student}
    own = {name: m for name, m in groups.items() if m.tokenizer != "teacher" and (m.tokenizer or m.path)}
    tokenizers = [_model(m, name, TOKENIZER, m.tokenizer) for name, m in own.items()]
    return config_identity(config) | {
        "data": _data(config.data),
        "teacher": _model(config.teacher, "teacher", WEIGHTS),
        "student": _model(config.student, "student", WEIGHTS[: 1 if config.student.init == "random" else None]),
        "tokenizer": _joined(tokenizers),
        "chat_template": content_hash(Path(template)) if os.path.isfile(template) else None,
        "plugins": _joined([content_hash(file) for file in plugins.files()]),
    }


def config_identity(config: Config) -> Tree:
    """Describe the part of it that is in the config, with secrets replaced."""
    return dict(redact(used(leaves(config.model_dump()))))


def used(config: Tree) -> Tree:
    """Return those dotted keys of a flat config that decide the student."""
    unused = [*FREE, *(unused for (key, off), unused in UNUSED.items() if config.get(key, off) == off)]
    if config.get("eval.metric") in GENERATED:  # it may choose the weights
        unused.remove("eval.num_prompts")
    if config.get("student.init") != "cut":
        unused.append("student.layers")
    if config.get("train.keep") == "last" and config.get("train.early_stopping.patience") is None:
        unused += ["eval.", "train.eval_every", "train.early_stopping."]  # older runs have train.eval_every
    return {k: v for k, v in config.items() if k == "loss.alpha" or not k.startswith(tuple(unused))}


def canonical(value: Any) -> str:
    """Write as JSON, always the same for equal values; 1 and 1.0 are equal."""
    return json.dumps(json.loads(json.dumps(value, default=str), parse_float=_number), sort_keys=True)


def digest(identity: Tree) -> str:
    """Return six hex digits of what is canonical."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:6]


def differences(was: Tree, now: Tree) -> Differences:
    """Return what differs between two identities. Contents that are unknown in one of them are left out."""
    unknown = [key for key in CONTENTS if was.get(key) is None or now.get(key) is None]
    keys = [key for key in {**was, **now} if key not in unknown]
    return [(key, was.get(key), now.get(key)) for key in keys if was.get(key) != now.get(key)]


def may_differ(key: str, now: Any) -> bool:
    """Whether a run can be resumed with this difference: one that diverged may go on and skip such steps."""
    return key == "train.max_nonfinite" or (key == "train.on_nonfinite" and now == "skip")


def table(found: Differences) -> list[str]:
    """Lay out key, was and now in three columns."""
    texts = [["null" if v is None else shortened(" ".join(str(v).split()), 40) for v in row] for row in found]
    rows = [["key", "was", "now"], *texts]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f"  {key:{widths[0]}}  {was:{widths[1]}}  {now}" for key, was, now in rows]


def content_hash(file: Path) -> str:
    """Hash a file. The hash of a big one is kept in $KDX_CACHE until its size or modification time changes."""
    stat = file.stat()
    if stat.st_size <= BLOCK:
        return digest_of(file)
    about = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    known = cache_dir() / "hashes" / xxhash.xxh3_128_hexdigest(about.encode())
    if known.is_file():
        return known.read_text()
    content = digest_of(file)
    with suppress(OSError):  # it only saves time
        write_beside(known, content)
    return content


def _data(data: DataConfig) -> str | None:
    """Hash the files that hold rows, or name the commit of a hub data set."""
    if data.name == "mix":
        return _joined([_data(part) for part, _ in parts_of(data).values()])
    found: list[str | None] = []
    for path in dict.fromkeys(path for part in what_is_read(data) for path in listed(part.path)):
        here = resolve_path(path, "data.path")
        inside = [*Path(here).glob("*"), *Path(here).glob("*/*.arrow")]  # a DatasetDict saves each split in a folder
        files = [str(file) for file in inside if ROWS.search(file.name)]
        files = sorted(files or ([here] if os.path.exists(here) else glob.glob(here, recursive=True)))
        hashes = [content_hash(Path(file)) for file in files if os.path.isfile(file)]
        found += hashes or [_commit("datasets", path, None)]
    return _joined(found)


def _model(model: ModelConfig, group: str, patterns: Sequence[str], place: str | None = None) -> str | None:
    """Hash the files of a local model that match these patterns, or name a hub model's commit."""
    if not (path := place or model.path):
        return None
    hashes: list[str | None]
    if adapter := getattr(model, "adapter", None):
        parts = sorted(Path(resolve_path(adapter, "teacher.adapter")).glob("adapter_*"))
        hashes = [*map(content_hash, parts)] or [None]  # a hub's adapter is not known
        return _joined([_model(replaced(model, adapter=None), group, patterns, place), *hashes])
    folder = Path(resolve_path(path, f"{group}.{'tokenizer' if place else 'path'}"))
    if not folder.is_dir():
        return _commit("models", path, None if place else model.revision)
    patterns = [*patterns, *([model.gguf_file] if model.gguf_file else []), *["*.py"] * model.trust_remote_code]
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    hashes = [f"{file.name}:{content_hash(file)}" for file in files]
    if base := adapter_base(str(folder)):
        hashes.append(_model(replaced(model, path=base), group, patterns))
    return _joined(hashes)


def adapter_base(path: str | None) -> str | None:
    """Return the base model that an adapter folder names; None if this path is no adapter folder."""
    file = Path(resolve_path(path or "", "student.path")) / "adapter_config.json"
    return read_json(file).get("base_model_name_or_path") if path else None


def model_digest(model: ModelConfig, group: str) -> str | None:
    """Hash the weights and the tokenizer of a model, or name its hub commit; None if that is not known."""
    return _joined([_model(model, group, WEIGHTS), _model(model, group, TOKENIZER, model.tokenizer)])


def _commit(kind: str, repo: str, revision: str | None) -> str | None:
    """Find the commit of a hub repository that was downloaded last, without asking the network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    kept = Path(HF_HUB_CACHE, f"{kind}--{repo.replace('/', '--')}", "refs", revision or "main")
    return revision if COMMIT.fullmatch(revision or "") else kept.read_text().strip() if kept.is_file() else None


def _joined(parts: Sequence[str | None]) -> str | None:
    """Hash several hashes; None if there is none, or one is not known."""
    known = [part for part in parts if part]
    return xxhash.xxh3_128_hexdigest("\n".join(known).encode()) if known and len(known) == len(parts) else None


def _number(text: str) -> int | float:
    return int(float(text)) if float(text).is_integer() else float(text)
