"""What alpha would weigh at each swept temperature and divergence: the end of `kdx check -m` over the loss."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from kdx.causal_lm import counted_hidden, head_of
from kdx.config import Config
from kdx.objective import PULLS, chunk_size_of, mix_of, pulls_of, summed_loss
from kdx.run.files import write_json
from kdx.run.tracking import CONSOLE, without
from kdx.train import Training
from kdx.words import key_of

NUM_STEPS = 4  # first steps of the run whose rows are looked at


@dataclass(frozen=True)
class Row:
    """Norms of the gradients of τ²·KD and CE, each with weight 1, for the untouched student: means over the steps."""

    label: str  # what else is swept, and the divergence
    words: list[str]  # what was typed for such a point, without alpha
    temperature: float
    grad_kd: float
    grad_ce: float
    cosine: float | None

    def at(self, alpha: float) -> float | None:
        """Return the effective alpha."""
        kd, ce = alpha * self.grad_kd, (1 - alpha) * self.grad_ce
        return kd / (kd + ce) if kd + ce > 0 else None

    def alpha_for(self, share: float) -> float | None:
        """Return the alpha whose effective alpha is `share`."""
        kd, ce = (1 - share) * self.grad_kd, share * self.grad_ce
        return ce / (ce + kd) if kd + ce > 0 else None


@torch.no_grad()
def weighed(training: Training, points: Sequence[tuple[Config, list[str]]], swept: Sequence[str]) -> list[Row]:
    """Measure each divergence and temperature of these points, which differ in the loss alone, on the run's first rows."""
    mixes = [replace(mix_of(config.loss), alpha=0.5, alpha_end=None) for config, _ in points]
    numbers = [i for i, mix in enumerate(mixes) if mixes.index(mix) == i]  # several alphas: one is enough
    mixes, points = [mixes[i] for i in numbers], [points[i] for i in numbers]
    objective, machine = training.objective, training.machine
    assert training.teacher is not None
    torch.manual_seed(training.config.train.seed)  # dropout
    objective.train()
    steps, figures = replace(training.batches, rank=0, num_processes=1), []
    for step in steps.steps(0, min(NUM_STEPS, training.max_steps)):
        sums: Any = 0
        for micro_batch in step.micro_batches if step else ():
            answer, batch = training.teacher.answer(micro_batch, is_kept=False), micro_batch.to(machine.device)
            with machine.autocast():
                hidden, head = counted_hidden(objective.model, batch), head_of(objective.model).cut(objective.num_ids)
                how: dict[str, Any] = {"chunk_size": chunk_size_of(head), "weights": batch.weights, "with_pulls": True}
                terms = [summed_loss(hidden, head, answer, batch.counted_labels, mix, **how)[1] for mix in mixes]
            sums = sums + torch.stack([torch.stack([t[name] for name in PULLS]) for t in terms])
        if step:
            named = [dict(zip(PULLS, of_mix, strict=True)) for of_mix in sums.tolist()]
            figures.append([pulls_of(of_mix, step.num_tokens) for of_mix in named])
    rows = []
    for of_mix, (config, words) in zip(zip(*figures, strict=True), points, strict=False):
        kd, ce, cosine = (_mean([f[name] for f in of_mix]) for name in ("grad_kd", "grad_ce", "grad_cosine"))
        others = [w for w in words if key_of(w) in swept and key_of(w).split(".")[0] != "loss"]
        options = [f"{key}={value}" for key, value in config.loss.options.items()]
        label, kept = " ".join([*others, config.loss.name, *options]), without(words, "loss.alpha=", "sweep.")
        norms = (2 * (kd or 0.0), 2 * (ce or 0.0))  # alpha was a half
        rows.append(Row(label, kept, config.loss.temperature, *norms, cosine))
    labels = [row.label for row in rows]
    return sorted(rows, key=lambda row: labels.index(row.label))  # the temperatures of a divergence together


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def show(rows: Sequence[Row], alphas: Sequence[float], folder: Path) -> None:
    """Print the table and a suggested grid; write check.json and effective_alpha.png into a folder."""
    heads = ["τ", "grad KD", "grad CE", "cosine", *(f"α {alpha:g}" for alpha in alphas), "equal at α"]
    title = f"effective alpha of the untouched student over its first {NUM_STEPS} steps"
    table, texts = Table("divergence", title=title, title_justify="left"), []
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        values = [row.cosine, *map(row.at, alphas), row.alpha_for(0.5)]
        shown = ["" if value is None else f"{value:.2f}" for value in values]
        table.add_row(row.label, f"{row.temperature:g}", f"{row.grad_kd:.4g}", f"{row.grad_ce:.4g}", *shown)
    num = len(alphas) if len(alphas) > 1 else 3
    shares = [i / (num + 1) for i in range(1, num + 1)]
    for row in rows:
        even = [f"{alpha:.4g}" for share in shares if (alpha := row.alpha_for(share)) is not None]
        name = f"sweep.name={folder.name}-even"
        texts.append("python -m kdx -m " + shlex.join([*row.words, f"loss.alpha={','.join(even)}", name]))
    CONSOLE.print(table)
    CONSOLE.print("grad KD and grad CE have weight 1; effective alpha is α·KD ÷ (α·KD + (1−α)·CE) by these norms")
    CONSOLE.print(f"effective alphas {', '.join(f'{share:.2f}' for share in shares)}, one line for each row:")
    CONSOLE.print("\n".join(f"  {text}" for text in texts), markup=False)
    found = [
        {
            "divergence": row.label, "temperature": row.temperature, "grad_kd": row.grad_kd, "grad_ce": row.grad_ce,
            "grad_cosine": row.cosine, "effective_alpha": {f"{alpha:g}": row.at(alpha) for alpha in alphas},
            "equal_at_alpha": row.alpha_for(0.5),
        }
        for row in rows
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "check.json", {"num_steps": NUM_STEPS, "rows": found, "suggested": texts})
    draw(rows, alphas, folder / "effective_alpha.png")
    CONSOLE.print(f"Wrote {folder / 'effective_alpha.png'} and check.json", markup=False)


def draw(rows: Sequence[Row], alphas: Sequence[float], file: Path) -> None:
    """Draw the effective alpha over rows and nominal alphas, as PNG."""
    from matplotlib.figure import Figure

    size = (2.6 + 0.7 * len(alphas), 1.2 + 0.32 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(title="Effective alpha", xlabel="alpha")
    values = [[row.at(alpha) or 0.0 for alpha in alphas] for row in rows]
    axes.imshow(values, cmap="PuOr_r", vmin=0, vmax=1, alpha=0.7, aspect="auto")
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(range(len(rows)), [f"{row.label}, τ {row.temperature:g}" for row in rows])
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9)
    figure.savefig(file, dpi=150)
