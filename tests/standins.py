"""Small models with fresh weights, laid out as the real ones are on disk and on the hub."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
DIALOGPT_TEMPLATE = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
TEXT = [
    "What is the capital of France? The capital of France is Paris.",
    "Hello there, how are you today? I am fine, thank you. And you?",
    "Name a colour. Blue is a colour, and so are red and green.",
]

FUSSY = '''
from kdx.loss import forward_kl, register

@register
def fussy(student, teacher, most: float = 9.0):
    """Forward KL that breaks for some points of a sweep."""
    if len(student) > 2 and most < 1:
        raise RuntimeError("most is too small")
    return forward_kl(student, teacher)
'''  # a plug-in's text


def write_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE and write vocab.json, merges.txt and the template, without tokenizer.json → its size."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXT * 4, vocab_size=320, special_tokens=[END], show_progress=False)
    bpe.save_model(str(folder))
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, "chat_template": DIALOGPT_TEMPLATE}
    config |= {"bos_token": END, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return int(bpe.get_vocab_size())


def write_dialogpt(folder: Path, layers: int, width: int, *, pickled: bool, seed: int = 0, **config: object) -> Path:
    """A GPT-2 of this shape in fp16, as safetensors (DialoGPT-small) or pytorch_model.bin alone (medium)."""
    size = write_tokenizer(folder)
    torch.manual_seed(seed)
    shape = GPT2Config(
        vocab_size=size,
        n_layer=layers,
        n_embd=width,
        n_head=4,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        **config,
    )
    model = GPT2LMHeadModel(shape).half()
    model.save_pretrained(folder)
    if pickled:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


def write_llama(folder: Path, layers: int = 6, width: int = 32, seed: int = 0) -> Path:
    """A Llama of this shape in fp32 with the same tokenizer."""
    size = write_tokenizer(folder)
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=size, num_hidden_layers=layers, hidden_size=width, intermediate_size=2 * width,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def put_on_hub(cache: Path, name: str, folder: Path) -> None:
    """Lay a model folder out as the hub's client keeps what it downloaded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)


def write_pairs(file: Path, num_rows: int = 40) -> Path:
    """Instruction pairs, all different."""
    rows = [
        {"source": f"What is {i} and {i + 1}?", "target": f"It is {2 * i + 1}, I am sure."} for i in range(num_rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_chats(file: Path, num_rows: int = 40) -> Path:
    """Chats of two exchanges, all different."""
    with file.open("w") as stream:
        for i in range(num_rows):
            turns = [("user", f"Hello {i}!"), ("assistant", f"Hello, and how are you, {i}?")]
            turns += [("user", "I am fine."), ("assistant", f"Blue is a colour {i}.")]
            stream.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return file


def write_place(folder: Path, *, pickled: bool = False) -> None:
    """What a command needs: a teacher `medium`, a student `small` of the same kind, and `pairs.jsonl`."""
    write_dialogpt(folder / "medium", 4, 32, pickled=pickled)
    write_dialogpt(folder / "small", 2, 16, pickled=False, seed=1)
    write_pairs(folder / "pairs.jsonl")
