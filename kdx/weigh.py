"""What alpha would weigh at each swept temperature and divergence: the end of `kdx check -m` over the loss."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from rich.measure import Measurement
from rich.table import Column, Table

from kdx.causal_lm import counted_hidden, head_of
from kdx.compare.page import heat_map
from kdx.objective import PULLS, Mix, mix_of, pulls_of, summed_loss
from kdx.run.files import Lines, write_json
from kdx.run.report import sweep_line
from kdx.run.tracking import CONSOLE
from kdx.train import Training
from kdx.words import key_of

if TYPE_CHECKING:
    from kdx.compose import Point

NUM_STEPS = 4  # first steps of the run whose rows are looked at
CHOSEN = ("loss", "loss.name", "loss.temperature")  # what every row of the table names
# Keys that make no rows: of their values the first is measured.
UNSEEN = ("loss.alpha", "loss.temperature_end", "optim", "train.seed", "sweep.")


def makes_rows(key: str) -> bool:
    """Whether the table has a row for each value of a swept key."""
    return not key.startswith(UNSEEN)


@torch.no_grad()
def weighed(training: Training, points: Sequence["Point"], swept: Sequence[str]) -> Lines:
    """Measure each divergence and temperature of these points, which differ in the loss alone, on the run's first rows.

    A row has the norms of the gradients of τ²·KD and CE, each with weight 1, for the untouched student: means over the
    steps; and the words of such a point, without alpha.
    """
    asked: dict[str, tuple[Mix, Point]] = {}
    for point in points:
        mix = replace(mix_of(point.config.loss), alpha=0.5, alpha_end=None, temperature_end=None)
        asked.setdefault(repr(mix), (mix, point))  # several alphas: one is enough
    objective, machine = training.objective, training.machine
    assert training.teacher is not None
    torch.manual_seed(training.config.train.seed)  # dropout
    objective.train()
    steps, found = replace(training.batches, rank=0, num_processes=1), {name: Lines() for name in asked}
    for step in steps.steps(0, min(NUM_STEPS, training.max_steps)):
        if step is None:
            break
        sums = {name: dict.fromkeys(PULLS, 0.0) for name in asked}
        for micro_batch in step.micro_batches:
            answer, batch = training.teacher.answer(micro_batch, is_kept=False), micro_batch.to(machine.device)
            with machine.autocast():
                hidden, head = counted_hidden(objective.model, batch), head_of(objective.model).cut(objective.num_ids)
                how: dict[str, Any] = {"weights": batch.weights, "with_pulls": True}
                for name, (mix, _) in asked.items():
                    _, terms = summed_loss(hidden, head, answer, batch.counted_labels, mix, **how)
                    sums[name] = {pull: sums[name][pull] + float(terms[pull]) for pull in PULLS}
        for name, pulls in sums.items():
            found[name].append(pulls_of(pulls, step.num_tokens))
    rows = []
    for name, (_, point) in asked.items():
        kd, ce = (fmean(pulls[norm] for pulls in found[name]) for norm in ("grad_kd", "grad_ce"))
        cosines = [pulls["grad_cosine"] for pulls in found[name] if pulls["grad_cosine"] is not None]
        cosine = fmean(cosines) if cosines else None
        typed = {key_of(word): word for word in point.words if key_of(word) in swept}
        more = [word for key, word in typed.items() if makes_rows(key) and key not in CHOSEN]
        label = " ".join([typed.get("loss", point.config.loss.name).removeprefix("loss="), *more])
        row = {"divergence": label, "temperature": point.config.loss.temperature, "num_steps": len(found[name])}
        row |= {"grad_kd": 2 * kd, "grad_ce": 2 * ce, "grad_cosine": cosine}  # alpha was a half
        others = {"loss.alpha", *(key for key in swept if not makes_rows(key))}
        words = [word for word in point.words if key_of(word) not in others and not word.startswith("sweep.")]
        rows.append(row | {"words": words})
    labels = [row["divergence"] for row in rows]
    return sorted(rows, key=lambda row: labels.index(row["divergence"]))  # the temperatures of a divergence together


def _share(one: float, other: float) -> float | None:
    return one / (one + other) if one + other > 0 else None


def show(rows: Lines, alphas: Sequence[float], folder: Path, more: Sequence[str]) -> None:
    """Print the table and a grid to type, with more words in each line; write check.json and effective_alpha.png into a folder."""
    heads = ["τ", "grad KD", "grad CE", "cosine", *(f"α {alpha:g}" for alpha in alphas), "equal at α"]
    title = f"effective alpha of the untouched student over its first {rows[0]['num_steps']} steps"
    columns = [Column(head, justify="right", no_wrap=True) for head in heads]
    table, texts = Table(Column("divergence", no_wrap=True), *columns, title=title, title_justify="left"), []
    num = len(alphas) if len(alphas) > 1 else 3
    shares = [i / (num + 1) for i in range(1, num + 1)]
    for row in rows:
        kd, ce, words = row["grad_kd"], row["grad_ce"], row.pop("words")
        effective = {f"{alpha:g}": _share(alpha * kd, (1 - alpha) * ce) for alpha in alphas}
        row |= {"effective_alpha": effective, "equal_at_alpha": _share(ce, kd)}
        values = [row["grad_cosine"], *effective.values(), row["equal_at_alpha"]]
        shown = ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(row["divergence"], f"{row['temperature']:g}", f"{kd:.4g}", f"{ce:.4g}", *shown)
        if kd > 0 and ce > 0:
            even = [f"{share * ce / (share * ce + (1 - share) * kd):.6g}" for share in shares]
            grid = [f"loss.alpha={','.join(even)}", f"sweep.name={folder.name}-even"]
            texts.append(sweep_line([*more, *words, *grid]))
    table.width = Measurement.get(CONSOLE, CONSOLE.options.update(max_width=1000), table).maximum
    CONSOLE.print(table, crop=False)  # whole in a log, too, which rich takes for 80 columns wide
    CONSOLE.print("grad KD and grad CE have weight 1; effective alpha is α·KD ÷ (α·KD + (1−α)·CE) by these norms")
    if texts:
        CONSOLE.print(f"effective alphas {', '.join(f'{share:.2f}' for share in shares)}, one line for each row:")
        CONSOLE.print("\n".join(f"  {text}" for text in texts), markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "check.json", {"rows": rows, "suggested": texts})
    names = [f"{row['divergence']}, τ {row['temperature']:g}" for row in rows]
    values = pd.DataFrame([row["effective_alpha"] for row in rows], names, dtype=float).rename_axis(columns="alpha")
    figure = heat_map(values, "Effective alpha", 2, cmap="PuOr_r", vmin=0, vmax=1).figure
    figure.set_size_inches(1.6 + 0.7 * len(alphas) + 0.07 * max(map(len, names)), 1.2 + 0.32 * len(rows))
    figure.savefig(folder / "effective_alpha.png", dpi=150, bbox_inches="tight")  # the title may be the widest
    CONSOLE.print(f"Wrote {folder / 'effective_alpha.png'} and check.json", markup=False)
