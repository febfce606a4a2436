"""What alpha would weigh at each swept temperature and divergence: the end of `kdx check -m` over the loss."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Column, Table

from kdx.causal_lm import counted_hidden, head_of
from kdx.objective import PULLS, Mix, chunk_size_of, mix_of, pulls_of, summed_loss
from kdx.run.files import write_json
from kdx.run.tracking import CONSOLE, without
from kdx.train import Training
from kdx.words import key_of

if TYPE_CHECKING:
    from kdx.compose import Point

NUM_STEPS = 4  # first steps of the run whose rows are looked at


@dataclass(frozen=True)
class Row:
    """Norms of the gradients of τ²·KD and CE, each with weight 1, for the untouched student: means over the steps."""

    divergence: str  # with its options and what else is swept
    temperature: float
    grad_kd: float
    grad_ce: float
    grad_cosine: float | None
    words: list[str]  # what was typed for such a point, without alpha

    def at(self, alpha: float) -> float | None:
        """Return the effective alpha."""
        return _share(alpha * self.grad_kd, (1 - alpha) * self.grad_ce)

    def alpha_for(self, share: float) -> float | None:
        """Return the alpha whose effective alpha is `share`."""
        return _share(share * self.grad_ce, (1 - share) * self.grad_kd)


def _share(one: float, other: float) -> float | None:
    return one / (one + other) if one + other > 0 else None


@torch.no_grad()
def weighed(training: Training, points: Sequence["Point"], swept: Sequence[str]) -> list[Row]:
    """Measure each divergence and temperature of these points, which differ in the loss alone, on the run's first rows."""
    asked: dict[str, tuple[Mix, Point]] = {}
    for point in points:
        mix = replace(mix_of(point.config.loss), alpha=0.5, alpha_end=None)
        asked.setdefault(repr(mix), (mix, point))  # several alphas: one is enough
    objective, machine = training.objective, training.machine
    assert training.teacher is not None
    torch.manual_seed(training.config.train.seed)  # dropout
    objective.train()
    steps, found = replace(training.batches, rank=0, num_processes=1), {name: list[dict[str, Any]]() for name in asked}
    for step in steps.steps(0, min(NUM_STEPS, training.max_steps)):
        if step is None:
            break
        sums = {name: dict.fromkeys(PULLS, 0.0) for name in asked}
        for micro_batch in step.micro_batches:
            answer, batch = training.teacher.answer(micro_batch, is_kept=False), micro_batch.to(machine.device)
            with machine.autocast():
                hidden, head = counted_hidden(objective.model, batch), head_of(objective.model).cut(objective.num_ids)
                how: dict[str, Any] = {"chunk_size": chunk_size_of(head), "weights": batch.weights, "with_pulls": True}
                for name, (mix, _) in asked.items():
                    _, terms = summed_loss(hidden, head, answer, batch.counted_labels, mix, **how)
                    sums[name] = {pull: sums[name][pull] + float(terms[pull]) for pull in PULLS}
        for name, pulls in sums.items():
            found[name].append(pulls_of(pulls, step.num_tokens))
    rows = []
    for name, (_, point) in asked.items():
        kd, ce, cosine = (_mean([pulls[key] for pulls in found[name]]) for key in ("grad_kd", "grad_ce", "grad_cosine"))
        loss, words = point.config.loss, point.words
        others = [word for word in words if key_of(word) in swept and not word.startswith("loss")]
        label = " ".join([*others, loss.name, *(f"{key}={value}" for key, value in loss.options.items())])
        norms = (2 * (kd or 0.0), 2 * (ce or 0.0))  # alpha was a half
        rows.append(Row(label, loss.temperature, *norms, cosine, without(words, "loss.alpha=", "sweep.")))
    labels = [row.divergence for row in rows]
    return sorted(rows, key=lambda row: labels.index(row.divergence))  # the temperatures of a divergence together


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def show(rows: Sequence[Row], alphas: Sequence[float], folder: Path) -> None:
    """Print the table and a suggested grid; write check.json and effective_alpha.png into a folder."""
    heads = ["τ", "grad KD", "grad CE", "cosine", *(f"α {alpha:g}" for alpha in alphas), "equal at α"]
    title = f"effective alpha of the untouched student over its first {NUM_STEPS} steps"
    columns = [Column(head, justify="right") for head in heads]
    table, found, texts = Table("divergence", *columns, title=title, title_justify="left"), [], []
    num = len(alphas) if len(alphas) > 1 else 3
    shares = [i / (num + 1) for i in range(1, num + 1)]
    for row in rows:
        effective = {f"{alpha:g}": row.at(alpha) for alpha in alphas}
        more = {"effective_alpha": effective, "equal_at_alpha": row.alpha_for(0.5)}
        found.append({key: value for key, value in vars(row).items() if key != "words"} | more)
        values = [row.grad_cosine, *effective.values(), row.alpha_for(0.5)]
        shown = ["" if value is None else f"{value:.2f}" for value in values]
        table.add_row(row.divergence, f"{row.temperature:g}", f"{row.grad_kd:.4g}", f"{row.grad_ce:.4g}", *shown)
        even = [f"{alpha:.4g}" for share in shares if (alpha := row.alpha_for(share)) is not None]
        grid = [f"loss.alpha={','.join(even)}", f"sweep.name={folder.name}-even"]
        texts.append("python -m kdx -m " + shlex.join([*row.words, *grid]))
    CONSOLE.print(table)
    CONSOLE.print("grad KD and grad CE have weight 1; effective alpha is α·KD ÷ (α·KD + (1−α)·CE) by these norms")
    CONSOLE.print(f"effective alphas {', '.join(f'{share:.2f}' for share in shares)}, one line for each row:")
    CONSOLE.print("\n".join(f"  {text}" for text in texts), markup=False)
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
    axes.set_yticks(range(len(rows)), [f"{row.divergence}, τ {row.temperature:g}" for row in rows])
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9)
    figure.savefig(file, dpi=150)
