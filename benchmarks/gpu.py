"""The loss and a training step at the sizes of real models, as multiples of the time of their matrix products.

    python benchmarks/gpu.py loss [--shapes 4096,128256,2048,4096] [--chunk 2048]     N, V, d, D
    python benchmarks/gpu.py memory [--rows 4 --length 1024] [--checkpointing]      peak and time of a step: full, LoRA, QLoRA
    python benchmarks/gpu.py step [--student 16,2048,8192,32,8] [--teacher 28,3072,8192,24,8] [--rows 8 --length 1024]

Weights are random and made on the device, so nothing is downloaded. Matrix products in bf16, AdamW over fp32 weights.
`memory` predicts a peak as `kdx check` does and measures it, beside the same step with the whole logits of both models, as
TRL computes it; its QLoRA student and teacher have the shape of Llama-3.1 8B. Without a GPU nothing is quantised. The
moments of a paged optimizer are not the allocator's, so they are predicted but not in the measured peak.
`loss` first compares kdx's gradients with torch's in float64. --tiny is a quick check on any machine. Whole runs beside
Hugging Face's Trainer and TRL are in benchmarks/step.py.

N counted positions, V vocabulary, d / D width of student / teacher.
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kdx import check
from kdx.adapter import add_adapter
from kdx.causal_lm import Head, check_split, counted_hidden, head_of
from kdx.cli import compose
from kdx.data.batches import MicroBatch, Row, collate
from kdx.loss import divergence
from kdx.objective import Mix, Objective, chunk_size_of, distillation_loss
from kdx.optim import build_optimizer
from kdx.store import Identity
from kdx.teacher import Teacher

ALPHA, TEMPERATURE = 0.7, 2.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ["4096,128256,2048,4096", "16384,128256,2048,4096", "8192,151936,896,3584", "8192,151665,896,3584"]
STUDENT, TEACHER = "16,2048,8192,32,8", "28,3072,8192,24,8"  # the shapes of Llama-3.2 1B and 3B
LARGE = "32,4096,14336,32,8"  # of Llama-3.1 8B
PLAIN_BYTES = 40e9  # of the plain loss's logits: what needs more is not tried

Work = Callable[[], Any]


def measure(work: Work, repeats: int) -> tuple[float, float]:
    """Run once to warm up, then repeatedly → median milliseconds, and the peak in GB above what was there (GPU)."""
    work()
    times = []
    base = 0
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    peak = torch.cuda.max_memory_allocated() - base if DEVICE.type == "cuda" else 0
    return statistics.median(times), peak / 1e9


def show(title: str, contestants: dict[str, Work], repeats: int, num_tokens: int) -> None:
    """Measure each and print a table; the first contestant is the matrix products alone."""
    table = Table(title=title)
    for column in ("", "ms", "× products", "tokens/s", "peak GB"):
        table.add_column(column, justify="right" if column else "left")
    products = None
    for name, work in contestants.items():
        try:
            ms, peak = measure(work, repeats)
        except (torch.OutOfMemoryError, ImportError) as error:
            table.add_row(name, type(error).__name__)
            continue
        products = products or ms
        table.add_row(name, f"{ms:.1f}", f"{ms / products:.2f}", f"{1e3 * num_tokens / ms:,.0f}", f"{peak:.2f}")
    Console().print(table)


# The loss


def check_gradients() -> None:
    """Print how far kdx's gradients are from those of plain torch in float64. Relative, of hidden states and head."""
    generator = torch.Generator().manual_seed(0)
    num, ids = 300, 1003
    shapes = ((num, 64), (ids, 64), (num, 96), (ids, 96))
    tensors = [torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE) for shape in shapes]
    labels = torch.randint(ids, (num,), generator=generator).to(DEVICE)
    table = Table(title=f"relative error of gradients on {DEVICE.type}")
    for column in ("", "float64", "float32"):
        table.add_column(column)
    for name in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        hidden, weight = (tensor.clone().requires_grad_() for tensor in tensors[:2])
        logits = hidden @ weight.T
        kd = divergence(name, logits, tensors[2] @ tensors[3].T, TEMPERATURE)
        total = (ALPHA * kd + (1 - ALPHA) * F.cross_entropy(logits, labels, reduction="none")).mean()
        exact = torch.autograd.grad(total, (hidden, weight))
        cells = []
        for dtype in (torch.float64, torch.float32):
            h, w, teacher_hidden, teacher_weight = (tensor.to(dtype).clone() for tensor in tensors)
            h.requires_grad_(), w.requires_grad_()
            settings: Any = {"name": name, "alpha": ALPHA, "temperature": TEMPERATURE, "chunk_size": 77}
            total = distillation_loss(h, Head(w), teacher_hidden, Head(teacher_weight), labels, **settings)
            errors = [(a - b).norm() / b.norm() for a, b in zip(torch.autograd.grad(total, (h, w)), exact, strict=True)]
            cells.append(" ".join(f"{error.item():.0e}" for error in errors))
        table.add_row(name, *cells)
    Console().print(table)


def loss_contestants(num: int, ids: int, width: int, teacher_width: int, chunk: int | None) -> dict[str, Work]:
    """Forward and backward of the loss, from hidden states to the gradients of hidden states and head."""
    hidden = torch.randn(num, width, device=DEVICE).bfloat16().requires_grad_()
    weight = nn.Parameter(torch.randn(ids, width, device=DEVICE) * 0.03)
    teacher_hidden = torch.randn(num, teacher_width, device=DEVICE).bfloat16()
    teacher_weight = (torch.randn(ids, teacher_width, device=DEVICE) * 0.03).bfloat16()
    labels = torch.randint(ids, (num,), device=DEVICE)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    low = weight.detach().bfloat16()

    def products() -> None:
        for start in range(0, num, 4096):
            rows = hidden.detach()[start : start + 4096]
            logits = rows @ low.T
            teacher_hidden[start : start + 4096] @ teacher_weight.T
            logits @ low
            logits.T @ rows

    def kdx(name: str = "forward_kl", alpha: float = ALPHA) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            head = Head(weight)
            distillation_loss(
                hidden, head, teacher_hidden if alpha else None, Head(teacher_weight) if alpha else None, labels,
                name=name, alpha=alpha, temperature=TEMPERATURE, chunk_size=chunk or chunk_size_of(head),
            ).backward()  # fmt: skip

    def plain() -> None:
        if 4 * 5 * num * ids > PLAIN_BYTES:
            raise torch.OutOfMemoryError
        with torch.autocast(DEVICE.type, torch.bfloat16):
            student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        s, t = (F.log_softmax(logits.float() / TEMPERATURE, -1) for logits in (student, teacher))
        kd = F.kl_div(s, t, log_target=True, reduction="batchmean")
        (ALPHA * TEMPERATURE**2 * kd + (1 - ALPHA) * F.cross_entropy(student.float(), labels)).backward()

    def liger() -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        settings = {"weight_hard_loss": 1 - ALPHA, "weight_soft_loss": ALPHA, "beta": 0.0, "temperature": TEMPERATURE}
        function = LigerFusedLinearJSDLoss(**settings, compiled=DEVICE.type == "cuda", chunk_size=1024)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            total = function(hidden, weight.bfloat16(), teacher_hidden, teacher_weight, labels)
        (total[0] if isinstance(total, tuple) else total).backward()

    return {
        "five matrix products": products,
        "kdx forward_kl": kdx,
        "kdx reverse_kl": lambda: kdx("reverse_kl"),
        "kdx jsd": lambda: kdx("jsd"),
        "kdx CE alone": lambda: kdx(alpha=0.0),
        "plain torch": plain,
        "Liger chunked JSD": liger,
    }


# A step


def make_model(shape: str, ids: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama with random weights on the device; shape: layers, width, feed-forward width, heads, key-value heads."""
    layers, width, wide, heads, groups = map(int, shape.split(","))
    config = LlamaConfig(
        vocab_size=ids, hidden_size=width, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    with DEVICE:
        model = LlamaForCausalLM(config).to(dtype).eval()
    check_split(model, "model")  # as kdx does: causal models need no attention mask
    return model


def make_batch(num_rows: int, length: int, ids: int) -> MicroBatch:
    """Rows of nearly one length; the last three quarters of each count."""
    rng = random.Random(0)
    rows = []
    for i in range(num_rows):
        size = length - rng.randrange(max(1, length // 50))
        tokens = [rng.randrange(ids) for _ in range(size)]
        rows.append(Row(id=str(i), tokens=tokens, counted=[t >= size // 4 for t in range(size)]))
    return collate(rows, pad_id=0).to(DEVICE)


def step_contestants(args: argparse.Namespace, batch: MicroBatch) -> dict[str, Work]:
    """Whole optimizer steps: forward, backward, clipping and AdamW."""
    if args.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
    student = make_model(args.student, args.vocabulary, torch.float32).train()
    teacher = make_model(args.teacher, args.vocabulary, torch.bfloat16).eval().requires_grad_(False)
    if args.checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.compile:
        student.is_compiled = teacher.is_compiled = True
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    teacher_head = head_of(teacher)
    labels = torch.full(batch.input_ids.shape, -100, device=DEVICE)
    labels.view(-1)[batch.positions] = batch.counted_labels

    @torch.no_grad()
    def live() -> Tensor:
        return counted_hidden(teacher, batch)

    stored = live().cpu()
    if DEVICE.type == "cuda":
        stored = stored.pin_memory()

    def step(total: Tensor) -> None:
        total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def kdx(answer: Callable[[], Tensor | None]) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            teacher_hidden = answer()
            alpha = 0.0 if teacher_hidden is None else ALPHA
            head = head_of(student)
            total = distillation_loss(
                counted_hidden(student, batch), head, teacher_hidden, teacher_head if alpha else None,
                batch.counted_labels, alpha=alpha, temperature=TEMPERATURE, chunk_size=args.chunk or chunk_size_of(head),
            )  # fmt: skip
        step(total)

    def plain() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            total = student(input_ids=batch.input_ids, labels=labels, use_cache=False).loss
        step(total)

    def products() -> None:
        for model, is_trained in ((student, True), (teacher, False)):
            for module in model.modules():
                if not isinstance(module, nn.Linear):
                    continue
                is_head = module is model.get_output_embeddings()
                num = len(batch.positions) if is_head else batch.input_ids.numel()
                weight = weights.setdefault(id(module), module.weight.detach().bfloat16())
                inputs = noise[:num, : weight.shape[1]]
                for start in range(0, num, 4096):
                    rows = inputs[start : start + 4096]
                    outputs = rows @ weight.T
                    if is_trained:
                        outputs @ weight
                        outputs.T @ rows

    weights: dict[int, Tensor] = {}
    widest = max(
        module.in_features for m in (student, teacher) for module in m.modules() if isinstance(module, nn.Linear)
    )
    noise = torch.randn(batch.input_ids.numel(), widest, device=DEVICE).bfloat16()
    return {
        "matrix products, both models": products,
        "transformers, CE": plain,
        "kdx CE": lambda: kdx(lambda: None),
        "kdx, teacher live": lambda: kdx(live),
        "kdx, teacher stored": lambda: kdx(lambda: stored.to(DEVICE, non_blocking=True)),
    }


# Memory


class Longest(list[Row]):
    """Rows of nearly one length, with the column that kdx check looks for the longest in."""

    @property
    def lengths(self) -> Any:
        return np.array([len(row.tokens) for row in self])


def quantised(model: LlamaForCausalLM, bits: int) -> LlamaForCausalLM:
    """Put 4- or 8-bit layers (bitsandbytes) in the place of a model's linear ones, but for the head; one at a time."""
    import bitsandbytes as bnb

    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            shape, weight = (layer.in_features, layer.out_features), layer.weight.data
            small: Any
            if bits == 4:
                how = {"compress_statistics": False, "quant_type": "nf4"}
                small = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16, device="meta", **how)
                small.weight = bnb.nn.Params4bit(weight, requires_grad=False, **how).to(DEVICE)
            else:
                small = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
                small.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(DEVICE)
            model.model.set_submodule(name, small)
    setattr(model, f"is_loaded_in_{bits}bit", True)  # peft looks there
    return model


@dataclass(frozen=True)
class Kind:
    """A line of the table of `memory`; without a GPU nothing is quantised."""

    name: str
    adapter: bool = False
    bits: int = 16  # of the student
    teacher_bits: int = 16
    optim: str = "adamw"
    large: bool = False  # student and teacher of Llama-3.1 8B's shape
    whole: bool = False  # the peer: whole logits of both models, as in TRL's GKDTrainer


KINDS = (
    Kind("full"),
    Kind("full, whole logits (TRL's loss)", whole=True),
    Kind("full, 8-bit teacher and optimizer", teacher_bits=8, optim="adamw_8bit"),
    Kind("full, 4-bit teacher, paged optimizer", teacher_bits=4, optim="paged_adamw_8bit"),
    Kind("lora", adapter=True),
    Kind("lora, whole logits (TRL's loss, peft)", adapter=True, whole=True),
    Kind("qlora, 8B under 8B", adapter=True, bits=4, teacher_bits=4, large=True),
)


def measure_memory(args: argparse.Namespace, kind: Kind) -> list[str]:
    """Predict the peak of a step as `kdx check` does, measure it over real steps → the cells of a table."""
    shapes = (LARGE, LARGE) if kind.large and not args.tiny else (args.student, args.teacher)
    dtypes = (torch.bfloat16 if kind.adapter else torch.float32, torch.bfloat16)
    models = []
    for shape, dtype, bits in zip(shapes, dtypes, (kind.bits, kind.teacher_bits), strict=True):
        model = make_model(shape, args.vocabulary, dtype)
        models.append(quantised(model, bits) if bits < 16 and DEVICE.type == "cuda" else model)
    student, live = models
    if kind.adapter:
        add_adapter(student, compose(["student=hf", "student.path=x", "adapter=lora"]).adapter, seed=0)
    if args.checkpointing:
        student.activation_checkpointing_enable()
    teacher = Teacher(lambda: live, Identity("", "bf16", "none"))
    objective = Objective(student, args.vocabulary, Mix(alpha=ALPHA, temperature=TEMPERATURE))
    optim = compose([f"optim={kind.optim if DEVICE.type == 'cuda' else 'adamw'}"]).optim
    optimizer = build_optimizer(optim, objective)
    machine = SimpleNamespace(
        device=DEVICE, num_processes=1, autocast=lambda: torch.autocast(DEVICE.type, torch.bfloat16)
    )
    rng = random.Random(0)
    tokens = [[rng.randrange(args.vocabulary) for _ in range(args.length)] for _ in range(args.rows)]
    counted = [t >= args.length // 4 for t in range(args.length)]
    rows = Longest(Row(id=str(i), tokens=part, counted=counted) for i, part in enumerate(tokens))
    training: Any = SimpleNamespace(
        student=student, teacher=teacher, objective=objective, optimizer=optimizer, machine=machine,
        batches=SimpleNamespace(batch_size=args.rows, micro_batch_size=args.rows, pad_id=0),
        data=SimpleNamespace(train=rows), config=SimpleNamespace(optim=optim, rollout=SimpleNamespace(is_on_policy=False)),
    )  # fmt: skip
    kept, totals = check.kept_in_memory(training), list[float]()
    if not kind.whole:
        for sizes in ((1, 2), (args.rows,)):
            measured = {size: check.rise(training, size) for size in sizes}
            totals.append(sum(kept.values()) + check.predicted(measured, args.rows))
    batch = collate(rows, 0).to(DEVICE)

    def step(*, with_pulls: bool = False) -> None:
        if kind.whole:
            whole_logits(student, live, batch).backward()
        else:
            check.a_pass(training, args.rows, with_pulls=with_pulls)
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if DEVICE.type == "cuda":
        ms, _ = measure(step, args.repeats)
        step(with_pulls=True)
        peak = torch.cuda.max_memory_allocated()
    else:
        with check.PeakBytes() as tensors:
            ms, _ = measure(step, args.repeats)
            step(with_pulls=True)
        peak = tensors.peak + sum(kept.values()) - kept["optimizer"]
    sizes = [f"{size / 1e9:.3g}" for size in totals] or ["", ""]
    return [*sizes, f"{peak / 1e9:.3g}", f"{ms:.1f}", f"{1e3 * args.rows * args.length / ms:,.0f}"]


def whole_logits(student: Any, teacher: Any, batch: MicroBatch) -> Tensor:
    """The same loss from the logits of all positions of both models, in float32."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = student(batch.input_ids, use_cache=False).logits.float()
        with torch.no_grad():
            taught = teacher(batch.input_ids, use_cache=False).logits.float()
    s, t = (F.log_softmax(z / TEMPERATURE, -1) for z in (logits, taught))
    kd = F.kl_div(s, t, log_target=True, reduction="none").sum(-1).flatten()[batch.positions].mean()
    ce = F.cross_entropy(logits.flatten(0, 1)[batch.positions], batch.counted_labels)
    return ALPHA * TEMPERATURE**2 * kd + (1 - ALPHA) * ce


def memory_table(args: argparse.Namespace) -> None:
    """Print predicted and measured peaks in GB, and the time of a step: each kind of student under a live teacher."""
    table = Table(title=f"{args.rows} rows of {args.length} tokens, live teacher; peak GB of a step")
    for column in ("", "from 1 and 2 rows", "from all rows", "measured", "ms", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for kind in KINDS:
        try:
            table.add_row(kind.name, *measure_memory(args, kind))
        except torch.OutOfMemoryError as error:
            table.add_row(kind.name, type(error).__name__)
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    Console().print(table)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loss", "step", "memory"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a check on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk", type=int, help="positions of a chunk; left out: what kdx chooses")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,V,d,D", help="of `loss`")
    shape = "LAYERS,WIDTH,FEED_FORWARD,HEADS,KV_HEADS"
    parser.add_argument("--student", default=STUDENT, metavar=shape)
    parser.add_argument("--teacher", default=TEACHER, metavar=shape)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the student's activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile kdx's bodies")
    parser.add_argument("--liger", action="store_true", help="Liger's norms, rotary embeddings and SwiGLU")
    args = parser.parse_args(words)
    if args.tiny:
        args.repeats, args.shapes = 1, ["48,300,16,32"]
        args.student, args.teacher, args.vocabulary, args.rows, args.length = "1,16,32,2,1", "2,32,64,2,1", 300, 2, 24
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    if args.what == "loss":
        check_gradients()
        for sizes in args.shapes:
            num, ids, width, teacher_width = map(int, sizes.split(","))
            title = f"N {num:,}, V {ids:,}, d {width:,}, D {teacher_width:,}"
            show(title, loss_contestants(num, ids, width, teacher_width, args.chunk), args.repeats, num)
    elif args.what == "memory":
        memory_table(args)
    else:
        batch = make_batch(args.rows, args.length, args.vocabulary)
        num_tokens = int(batch.attention_mask.sum())
        title = f"student {args.student}, teacher {args.teacher}, {num_tokens:,} tokens"
        show(title, step_contestants(args, batch), args.repeats, num_tokens)


if __name__ == "__main__":
    main()
