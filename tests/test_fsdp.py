"""The objective under torch's fully_shard, on two gloo processes: the same gradients, and an ordinary model folder."""

from pathlib import Path

import pytest
import torch
from processes import ended, fresh
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kdx.causal_lm import Head, counted_hidden, head_of
from kdx.data.batches import Row, collate
from kdx.objective import Objective, StudentObjective

NUM_IDS = 61  # below the head's 64 rows: the rest is padding
RATE = 0.1


def rows() -> list[Row]:
    """Rows of several lengths; of the last none counts."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, length in enumerate((9, 5, 12, 7)):
        ids = torch.randint(0, NUM_IDS, (length,), generator=generator).tolist()
        made.append(Row(str(i), ids, [i < 3] * length))
    return made


def student(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(shape).double()


def step(module: nn.Module, batches: list[list[Row]], factor: float) -> None:
    """Accumulate the gradient of these micro-batches, as kdx.train does, and take a plain step."""
    torch.manual_seed(2)
    teacher = Head(torch.randn(64, 8, dtype=torch.float64))
    answers = torch.randn(4, 16, 8, dtype=torch.float64)
    for batch in (collate(part, 0) for part in batches):
        hidden = torch.cat([answers[int(i), :n] for i, n in zip(batch.row_ids, batch.num_counted, strict=True)])
        total, _, _ = module(batch, hidden, teacher)
        (total * factor).backward()
    torch.optim.SGD(module.parameters(), lr=RATE).step()


def sharded_step(rank: int, place: Path, tied: bool) -> None:
    """One of two processes: two rows for the first, in two micro-batches, and two for the second."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    module = StudentObjective(student(tied), NUM_IDS, Objective(alpha=0.6, temperature=2.0))
    for layer in module.model.model.layers:
        fully_shard(layer)
    fully_shard(module)
    assert all(isinstance(weight, DTensor) for weight in module.parameters())
    given = rows()
    step(module, [[given[2 * rank]], [given[2 * rank + 1]]], factor=2 / num_tokens())  # FSDP averages, as DDP does
    shards = {name: weight.grad.to_local() for name, weight in module.model.named_parameters()}
    torch.save(shards, place / f"gradients-{rank}.pt")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(module.model, options=options)
    if rank == 0:
        module.model.save_pretrained(place / "student", state_dict=weights)
    torch.distributed.destroy_process_group()


def num_tokens() -> int:
    return sum(collate(rows(), 0).num_counted)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_two_processes_are_as_one(tmp_path, tied):
    processes = [fresh(sharded_step, rank, tmp_path, tied) for rank in range(2)]
    assert [ended(process, 120) for process in processes] == [0, 0]
    alone = StudentObjective(student(tied), NUM_IDS, Objective(alpha=0.6, temperature=2.0))
    step(alone, [rows()], factor=1 / num_tokens())
    shards = [torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True) for rank in range(2)]
    gradients = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    expected = dict(alone.model.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-9, atol=1e-14)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float64)
    for name, weight in saved.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-14)
    batch = collate(rows(), 0)
    logits = [head_of(m).logits(counted_hidden(m, batch)) for m in (saved, alone.model)]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-12)
