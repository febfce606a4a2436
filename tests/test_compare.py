"""Many runs in one comparison: what is ranked, how sure that is, and pages that hostile text cannot break."""

import csv
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_runs import NUM_ROWS, write_lines, write_run, write_sweep

from kdx import sweep
from kdx.compare import ranking
from kdx.compare.page import looks_of
from kdx.compare.ranking import Comparison, Ranking
from kdx.compare.read import FILES, compare, compared, default_out, find, main, short_names
from kdx.errors import ConfigError, KdxError, MachineError
from kdx.run import identity as drift


@pytest.fixture(scope="session")
def six(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """A sweep of six points and its baseline, compared."""
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "temperature-alpha-3fa9c1", [1, 2, 4], [0.3, 0.7])
    return compare([folder], folder), folder


def only(comparison: Comparison) -> Ranking:
    (found,) = comparison.rankings
    return found


def ranked(*paths: Path) -> Comparison:
    """A comparison that writes no files."""
    return compared(*find(paths), Path("nowhere"))


def point(table: Ranking, label: str) -> ranking.Point:
    (found,) = [p for p in table.points if p.label == label]
    return found


def edit(file: Path, change: Any) -> None:
    """Change a JSON or YAML file in place."""
    is_yaml = file.suffix == ".yaml"
    tree = yaml.safe_load(file.read_text()) if is_yaml else json.loads(file.read_text())
    change(tree)
    file.write_text(yaml.safe_dump(tree) if is_yaml else json.dumps(tree))


class TestIntervals:
    def test_draws_are_of_rows_and_means_are_ratios_of_sums(self):
        """Against all 27 ways to draw three rows of three."""
        counted, sums = np.array([1.0, 4.0, 10.0]), np.array([[3.0, 1.0], [4.0, 2.0], [5.0, 30.0]])
        ways = [list(way) for way in itertools.product(range(3), repeat=3)]
        exact = np.array([sums[way].sum(0) / counted[way].sum() for way in ways])
        drawn = ranking.resampled_means(counted, sums, num=40_000)
        assert drawn.shape == (40_000, 2)
        assert {tuple(row) for row in drawn.round(9)} == {tuple(row) for row in exact.round(9)}
        assert drawn.mean(0) == pytest.approx(exact.mean(0), rel=0.01)
        assert drawn.std(0) == pytest.approx(exact.std(0), rel=0.02)

    def test_the_interval_of_a_mean_is_the_textbooks(self):
        values = np.random.default_rng(1).normal(0.3, 2.0, 900)
        low, high = ranking.interval(ranking.resampled_means(np.ones(900), values[:, None])[:, 0])
        half = 1.96 * values.std() / math.sqrt(900)
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)

    def test_rows_are_paired(self):
        """Hard rows are hard for both; a difference that holds on each row is seen, unless the pairs are torn."""
        generator = np.random.default_rng(0)
        counted, hard = generator.integers(5, 50, 200).astype(float), generator.lognormal(0, 1, 200)
        one, other = counted * hard, counted * (hard + 0.02 + generator.normal(0, 0.05, 200))
        paired = ranking.resampled_means(counted, np.column_stack([one, other]))
        low, high = ranking.interval(paired[:, 1] - paired[:, 0])
        assert 0 < low < 0.02 < high < 0.04
        torn = generator.permutation(200)
        apart = ranking.resampled_means(counted, one[:, None])[:, 0]
        apart = ranking.resampled_means(counted[torn], other[torn, None], seed=1)[:, 0] - apart
        low, high = ranking.interval(apart)
        assert low < 0 < high

    def test_many_rows_are_drawn_in_blocks(self, monkeypatch):
        counted, sums = np.arange(1.0, 31.0), np.random.default_rng(0).normal(3, 1, (30, 2))
        whole = ranking.resampled_means(counted, sums, num=500)
        monkeypatch.setattr(ranking, "BLOCK", 30 * 7)
        assert ranking.resampled_means(counted, sums, num=500) == pytest.approx(whole, rel=1e-12)

    def test_equal_students_are_not_distinguishable_and_differ_by_nothing(self, tmp_path):
        for name in ("one", "two"):
            write_run(tmp_path / name, optim__lr={"one": 1e-3, "two": 2e-3}[name], noise=0)
        table = only(ranked(tmp_path))
        for measure in ("kl", "ce"):
            assert [p.rank[measure] for p in table.points] == [1, 1]
            assert sorted(p.to_best.get(measure) or (0, 0) for p in table.points) == [(0, 0), (0, 0)]
            assert all(p.is_best(measure) for p in table.points)

    def test_what_is_clearly_worse_is_not_marked_and_what_is_close_is(self, tmp_path):
        for lr, kl in ((1e-3, 0.700), (2e-3, 0.701), (4e-3, 0.800)):
            write_run(tmp_path / f"lr-{lr}", optim__lr=lr, means={"kl": kl})
        table = only(ranked(tmp_path))
        assert [p.is_best("kl") for p in table.by("kl")] == [True, True, False]
        low, high = table.by("kl")[2].to_best["kl"]
        assert 0 < low < 0.1 < high < 0.15
        assert table.verdict[0] == "Best by KL: lr 0.001; not distinguishable from it: lr 0.002."

    def test_an_interval_of_the_difference_to_the_baseline_is_around_the_difference(self, six):
        table = only(six[0])
        baseline = point(table, "baseline (alpha = 0)")
        assert baseline.to_baseline == {"kl": None, "ce": None}
        for p in table.points:
            if p is not baseline:
                low, high = p.to_baseline["kl"]
                assert low < p.measures["kl"] - baseline.measures["kl"] < high

    def test_each_setting_has_its_own_baseline(self, tmp_path):
        for lr, kl in ((1e-3, 0.9), (2e-3, 0.8)):
            write_run(tmp_path / f"base-{lr}", loss__alpha=0.0, optim__lr=lr, means={"kl": kl}, noise=0)
            write_run(tmp_path / f"run-{lr}", loss__alpha=0.5, optim__lr=lr, means={"kl": 0.7}, noise=0)
        write_run(tmp_path / "alone", loss__alpha=0.5, optim__lr=4e-3)
        table = only(ranked(tmp_path))
        for lr, difference in ((0.001, -0.2), (0.002, -0.1)):
            assert np.mean(point(table, f"α 0.5, lr {lr}").to_baseline["kl"]) == pytest.approx(difference, abs=0.02)
        assert point(table, "α 0.5, lr 0.004").to_baseline["kl"] is None


@pytest.mark.parametrize(
    ("pairs", "on"),
    [
        ([(1, 3), (2, 2), (3, 1)], [1, 1, 1]),
        ([(1, 3), (2, 4), (3, 1)], [1, 0, 1]),
        ([(1, 1), (1, 2), (2, 1)], [1, 0, 0]),
        ([(1, 1), (1, 1)], [1, 1]),
        ([(5, 5)], [1]),
    ],
)
def test_pareto(pairs, on):
    assert ranking.pareto(pairs) == [bool(x) for x in on]


class TestRanking:
    def test_by_kl_and_by_ce_side_by_side(self, six):
        table = only(six[0])
        for measure in ("kl", "ce"):
            values = [p.measures[measure] for p in table.by(measure)]
            assert len(values) == 7
            assert values == sorted(values)
            assert [p.rank[measure] for p in table.by(measure)] == list(range(1, 8))
        assert table.by("kl")[0].label == "τ 2, α 0.7"
        assert table.by("ce")[0].label == "τ 2, α 0.3"
        assert table.points == table.by("kl")

    def test_two_bests_are_no_single_best(self, six):
        verdict = " ".join(only(six[0]).verdict)
        assert "No single best" in verdict
        assert "favours a larger alpha and forward_kl" in verdict
        assert "a smaller alpha" in verdict
        assert "Pareto front (no other student is better in both KL and CE): τ 2, α 0.7; τ 2, α 0.3." in verdict

    def test_one_best_is_said_to_be_one(self, tmp_path):
        write_run(tmp_path / "a", optim__lr=1e-3, means={"kl": 0.5, "ce": 3.0})
        write_run(tmp_path / "b", optim__lr=2e-3, means={"kl": 0.6, "ce": 3.1})
        verdict = " ".join(only(ranked(tmp_path)).verdict)
        assert "No single best" not in verdict
        assert "Best by KL: lr 0.001." in verdict
        assert "Best by CE: lr 0.001" in verdict

    def test_measures_are_the_summarys_and_those_of_the_rows(self, six):
        comparison, folder = six
        for p in only(comparison).points:
            (run,) = p.runs
            told = json.loads((folder / run.name / "summary.json").read_text())
            assert p.measures["ce"] == told["student"]["ce"]
            assert p.measures["seconds"] == told["run"]["seconds"]
            for measure, sums in run.rows.sums.items():
                assert sums.sum() / run.rows.counted.sum() == pytest.approx(told["student"][measure], rel=1e-12)
            assert len(run.rows.ids) == NUM_ROWS

    def test_teacher_and_untouched_student_stand_beside(self, six):
        references = dict(only(six[0]).references)
        assert references["teacher"]["ce"] == 2.81
        assert references["untouched student"]["kl"] == 5.8

    def test_seeds_are_averaged_with_their_spread(self, tmp_path):
        for alpha in (0.3, 0.7):
            for seed in (0, 1, 2):
                place = tmp_path / f"s{seed}-{alpha}"
                write_run(place, loss__alpha=alpha, train__seed=seed, tracking__name=place.name, sweep__name=place.name)
        table = only(compare([tmp_path], tmp_path))
        assert [p.label for p in table.points] == ["α 0.7", "α 0.3"]
        for p in table.points:
            kl = [run.summary["student"]["kl"] for run in p.runs]
            assert len(set(kl)) == 3
            assert p.measures["kl"] == pytest.approx(sum(kl) / 3)
            assert p.spread["kl"] == (min(kl), max(kl))
        low, high = table.points[1].to_best["kl"]
        assert low < table.points[1].measures["kl"] - table.points[0].measures["kl"] < high
        header, *lines = csv.reader(io.StringIO((tmp_path / "compare.csv").read_text()))
        first = dict(zip(header, lines[0], strict=True))
        assert (first["num_runs"], first["train.seed"]) == ("3", "0 1 2")
        assert (float(first["kl_min"]), float(first["kl_max"])) == table.points[0].spread["kl"]

    def test_the_interval_of_an_average_is_of_all_its_seeds(self, tmp_path):
        for lr, levels in ((1e-3, (0.5, 0.9)), (2e-3, (0.71, 0.71))):
            for seed, kl in enumerate(levels):
                write_run(tmp_path / f"{lr}-{seed}", optim__lr=lr, train__seed=seed, means={"kl": kl})
        low, high = only(ranked(tmp_path)).points[1].to_best["kl"]
        assert -0.02 < low < 0.01 < high < 0.04

    def test_other_training_rows_are_another_student(self, tmp_path):
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", train__seed=1)
        edit(tmp_path / "b" / "summary.json", lambda s: s["data"].update(fingerprint="other"))
        assert [len(p.runs) for p in only(ranked(tmp_path)).points] == [1, 1]

    def test_a_baseline_is_one_whatever_the_rest_of_its_loss_says(self, tmp_path):
        write_run(tmp_path / "a", loss__alpha=0.0, loss__temperature=4.0)
        write_run(tmp_path / "b", loss__alpha=0.0, loss__name="jsd", train__seed=1)
        write_run(tmp_path / "c", loss__alpha=0.5)
        comparison = ranked(tmp_path)
        assert {p.label: len(p.runs) for p in only(comparison).points} == {"α 0.5": 1, "baseline (alpha = 0)": 2}
        assert set(comparison.differing) == {"loss.alpha", "train.seed"}

    def test_one_and_one_point_nought_are_one_value(self, tmp_path):
        write_run(tmp_path / "a", loss__temperature=1)
        write_run(tmp_path / "b", loss__temperature=1.0, train__seed=1)
        assert [len(p.runs) for p in only(ranked(tmp_path)).points] == [2]

    def test_a_key_that_older_runs_lack_is_null(self, tmp_path):
        for seed in (0, 1):
            write_run(tmp_path / str(seed), train__seed=seed)
        edit(tmp_path / "1" / "config.yaml", lambda c: c["teacher"].update(new=None))
        comparison = ranked(tmp_path)
        assert [len(p.runs) for p in only(comparison).points] == [2]
        assert comparison.differing == ["train.seed"]

    def test_config_values_of_all_kinds(self, tmp_path):
        for i, value in enumerate(([0, 3], None, True, math.nan, [math.inf], "x" * 60, {"a": 1.5})):
            write_run(tmp_path / str(i), student__layers=value)
        comparison = ranked(tmp_path)
        told = {p.label for p in only(comparison).points}
        assert told == {
            "layers [0, 3]", "layers null", "layers true", "layers NaN", 'layers ["Infinity"]', f"layers …{'x' * 27}",
            "a 1.5",
        }  # fmt: skip

    def test_without_a_teacher_ce_ranks_alone(self, tmp_path):
        nothing = dict.fromkeys(("kl", "reverse_kl", "agreement"))
        for lr in (1e-3, 2e-3):
            write_run(tmp_path / f"{lr}", means=nothing | {"ce": 3 + lr}, loss__alpha=0.0, optim__lr=lr)
        table = only(compare([tmp_path], tmp_path))
        assert [p.rank for p in table.points] == [{"ce": 1}, {"ce": 2}]
        assert not any("KL" in line for line in table.verdict)
        assert "CE against KL" not in (tmp_path / "compare.html").read_text()


class TestTablesApart:
    @pytest.mark.parametrize(
        ("other", "why"),
        [
            ({"fingerprint": "ffff"}, "Different held-out rows: table 1 5e1d0a7744bb9c02 (a), table 2 ffff (b)."),
            ({"digest": "dddd"}, "Different teachers: table 1 c0ffee0123456789 (a), table 2 dddd (b)."),
            ({"precision": "bf16"}, "Different precisions of the teacher: table 1 fp32 (a), table 2 bf16 (b)."),
            ({"digest": None}, "Different precisions of the teacher: table 1 fp32 (a), table 2 not recorded (b)."),
        ],
    )
    def test_what_cannot_be_compared_is_not(self, tmp_path, other, why):
        write_run(tmp_path / "a", loss__alpha=0.3)
        write_run(tmp_path / "b", loss__alpha=0.7, **other)
        comparison = compare([tmp_path], tmp_path)
        assert [[p.rank for p in table.points] for table in comparison.rankings] == [[{"kl": 1, "ce": 1}]] * 2
        assert why in comparison.why_apart
        page = (tmp_path / "compare.html").read_text()
        assert "Table 2: " in page
        assert why in page
        assert len(json.loads((tmp_path / "compare.json").read_text())["tables"]) == 2

    def test_teachers_without_a_digest_are_known_by_their_config(self, tmp_path):
        for name, path in (("a", "one"), ("b", "one"), ("c", "two")):
            write_run(tmp_path / name, digest=None, teacher__path=path, optim__lr={"a": 1e-3}.get(name, 2e-3))
        assert [len(table.points) for table in ranked(tmp_path).rankings] == [2, 1]

    def test_one_table_needs_no_reason(self, six):
        assert six[0].why_apart == []


class TestNeverRanked:
    @pytest.mark.parametrize("state", ["failed", "diverged", "interrupted", "running", "pending"])
    def test_only_what_is_done_is(self, tmp_path, state):
        """A summary may be there from before: the state decides."""
        write_run(tmp_path / "good", loss__alpha=0.3)
        write_run(tmp_path / "bad", loss__alpha=0.7, means={"kl": 0.001})
        edit(tmp_path / "bad" / "status.json", lambda s: s.update(state=state, reason="step 3: because"))
        comparison = compare([tmp_path], tmp_path)
        assert [p.runs[0].name for p in only(comparison).points] == ["good"]
        assert [(r.name, r.state, r.reason) for r in comparison.not_ranked] == [("bad", state, "step 3: because")]
        for name in FILES:
            assert "step 3: because" in (tmp_path / name).read_text(), name

    def test_without_a_reason_it_is_said_how_far_it_is(self, tmp_path):
        write_run(tmp_path / "run", state="running")
        (run,) = ranked(tmp_path).not_ranked
        assert run.reason == "step 57 of 208, written 2026-11-24T02:45:09+0000"

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("measure", ["kl", "ce", "agreement"])
    def test_what_is_not_finite(self, tmp_path, value, measure):
        write_run(tmp_path / "good", loss__alpha=0.3)
        write_run(tmp_path / "bad", loss__alpha=0.7)
        edit(tmp_path / "bad" / "summary.json", lambda s: s["student"].update({measure: value}))
        comparison = compare([tmp_path], tmp_path)
        assert [run.reason for run in comparison.not_ranked] == [f"not finite: {measure}"]
        assert [p.runs[0].name for p in only(comparison).points] == ["good"]
        json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)

    def test_nothing_held_out(self, tmp_path):
        write_run(tmp_path / "run")
        edit(tmp_path / "run" / "summary.json", lambda s: s["student"].update(ce=None, kl=None))
        assert [run.reason for run in ranked(tmp_path).not_ranked] == ["nothing was held out"]

    @pytest.mark.parametrize(
        ("file", "text", "why"),
        [
            ("summary.json", None, "summary.json is missing"),
            ("summary.json", "{", "summary.json is damaged: Expecting property name"),
            ("summary.json", "[]", "summary.json is damaged: expected an object"),
            ("summary.json", "{}", "summary.json is damaged: student is not there"),
            ("summary.json", "\xff", "summary.json is damaged: 'utf-8' codec can't decode"),
            ("summary.json", "[" * 100_000, "summary.json is damaged: "),
            ("summary.json", '{"student": {"ce": "3"}}', "summary.json is damaged: student.ce is not a number"),
            ("summary.json", '{"student": {"ce": 1%s}}' % ("0" * 400), "summary.json is damaged: int too large"),
            ("config.yaml", None, "config.yaml is missing"),
            ("config.yaml", "a: [", "config.yaml is damaged: while parsing"),
            ("config.yaml", "a: &a [1]\nb: [*a, *a]", "config.yaml is damaged: has an alias"),
            ("status.json", None, "status.json is missing"),
            ("status.json", "null", "status.json is damaged: expected an object"),
        ],
    )
    def test_damaged_runs_are_named_and_the_rest_is_compared(self, tmp_path, file, text, why):
        write_run(tmp_path / "good", loss__alpha=0.3)
        write_run(tmp_path / "bad", loss__alpha=0.7)
        (tmp_path / "bad" / file).unlink()
        if text is not None:
            (tmp_path / "bad" / file).write_bytes(text.encode("latin-1"))
        comparison = ranked(tmp_path)
        (run,) = comparison.not_ranked
        assert run.name == "bad"
        assert run.reason.startswith(why)
        assert [p.runs[0].name for p in only(comparison).points] == ["good"]

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (lambda rows: rows[:-1], "its kl is not that of summary.json"),
            (lambda rows: [*rows, rows[0]], "a row stands there twice"),
            (lambda rows: [rows[0] | {"kl": "x"}, *rows[1:]], "a sum is not a number"),
            (lambda rows: [rows[0] | {"kl": None}, *rows[1:]], "its kl is not that of summary.json"),
            (lambda rows: [], "no rows"),
            (lambda rows: [{k: [v] for k, v in row.items()} for row in rows], "a sum is not a number"),
            (lambda rows: [5], "expected an object"),
            (lambda rows: [row | {"counted": 0} for row in rows], "a row without counted tokens"),
        ],
    )
    def test_rows_that_do_not_add_up_give_no_intervals(self, tmp_path, change, why):
        write_run(tmp_path / "good", loss__alpha=0.7)
        write_run(tmp_path / "bad", loss__alpha=0.3)
        file = tmp_path / "bad" / "eval_rows.jsonl"
        write_lines(file, change([json.loads(line) for line in file.read_text().splitlines()]))
        comparison = compare([tmp_path], tmp_path)
        assert comparison.notes == [f"bad: eval_rows.jsonl is damaged: {why}"]
        bad = point(only(comparison), "α 0.3")
        assert (bad.rank["kl"], bad.to_best["kl"], bad.is_best("kl")) == (2, None, False)
        assert "no interval" in (tmp_path / "compare.md").read_text()

    def test_a_seed_without_rows_leaves_out_its_own_points_intervals(self, tmp_path):
        for name, alpha, seed in (("a", 0.3, 0), ("b", 0.3, 1), ("c", 0.5, 0), ("d", 0.7, 0)):
            write_run(tmp_path / name, loss__alpha=alpha, train__seed=seed)
        (tmp_path / "b" / "eval_rows.jsonl").write_bytes(b"\xff\x00\x9c" * 7)
        (alone,) = only(ranked(tmp_path / "a", tmp_path / "b")).points
        assert (len(alone.runs), alone.to_best["kl"]) == (2, None)
        table = only(ranked(tmp_path))
        assert point(table, "α 0.3").to_best["ce"] is None
        assert [p.label for p in table.points if p.to_best["kl"]] != []


HOSTILE = (
    "<script>alert(1)</script>\x1b[31m\u202e\x00<img src=x onerror=alert(2)> | `b` [a](http://evil) $x^2$ {{ 7*7 }}"
)


class Tags(HTMLParser):
    """All elements of a page and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a comparison of runs that are hostile wherever they can be."""
    place = tmp_path_factory.mktemp("hostile")
    for i, alpha in enumerate((0.3, 0.7)):
        run = write_run(place / f"<b>{alpha}", loss__alpha=alpha, say=HOSTILE, data__path=f"{HOSTILE}{i}")
        edit(run / "config.yaml", lambda c, i=i: c["optim"]["options"].update({f"x{HOSTILE}": f"=cmd|{i}"}))
        edit(run / "samples.json", lambda s: s[0]["prompt"][0].update(role=HOSTILE, content=HOSTILE))
        edit(run / "summary.json", lambda s: s["data"].update(validation_fingerprint=HOSTILE))
    edit(run / "summary.json", lambda s: s["environment"].update(teacher_digest=HOSTILE, teacher_precision=HOSTILE))
    write_run(place / "failed", state="failed", reason=HOSTILE)
    compare([place], place)
    return {name: (place / name).read_text(encoding="utf-8") for name in FILES}


class TestHostile:
    def test_the_page_holds_no_element_that_is_not_its_own(self, texts):
        tags = Tags(texts["compare.html"]).found
        assert {tag for tag, _ in tags} <= {
            "html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "h3", "h4", "p", "ul", "li",
            "div", "span", "b", "table", "thead", "tbody", "tr", "th", "td", "details", "summary",
            "svg", "g", "defs", "path", "text", "use", "clippath", "rect",
        }  # fmt: skip
        attributes = {name for _, attrs in tags for name in attrs}
        assert not any(name.startswith("on") for name in attributes)
        assert not attributes & {"src", "href", "action", "srcdoc", "data", "formaction"}
        assert all(str(attrs["xlink:href"]).startswith("#") for _, attrs in tags if "xlink:href" in attrs)
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in texts["compare.html"]
        assert "{{ 7*7 }}" in texts["compare.html"]

    def test_the_policy_stands_before_all_else(self, texts):
        tags = Tags(texts["compare.html"]).found
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        content = {"http-equiv": "Content-Security-Policy", "content": policy}
        assert tags.index(("meta", content)) < next(i for i, (tag, _) in enumerate(tags) if tag in ("style", "body"))

    @pytest.mark.parametrize("name", FILES)
    def test_control_characters_are_stripped(self, texts, name):
        assert not [c for c in texts[name] if not c.isprintable() and c not in "\n\t"]
        assert "alert(1)" in texts[name]

    def test_markdown_is_not_obeyed(self, texts):
        assert "<" not in texts["compare.md"]
        assert "[a](" not in texts["compare.md"]
        head, *rows = [line for line in texts["compare.md"].splitlines() if line.startswith("| run ")]
        assert not rows
        bars = [
            len(re.findall(r"(?<!\\)\|", line))
            for line in texts["compare.md"].splitlines()
            if "failed | failed" in line
        ]
        assert bars == [len(re.findall(r"(?<!\\)\|", head))]

    def test_spreadsheets_find_no_formula(self, texts):
        cells = [cell for row in csv.reader(io.StringIO(texts["compare.csv"])) for cell in row]
        assert "'=cmd|0" in cells
        assert not [cell for cell in cells if cell.startswith(("=", "@"))]

    def test_the_terminal_prints_plain_text(self, tmp_path, capsys):
        write_run(tmp_path / "a", state="failed", reason="[red]x[/red] \x1b[2J")
        write_run(tmp_path / "b", loss__alpha=0.3, optim__name="[bold]x")
        write_run(tmp_path / "c", loss__alpha=0.4, optim__name="[/bold]y")
        assert main([str(tmp_path)]) == 0
        told = capsys.readouterr().out
        assert r"[red]x[/red] \x1b[2J" in told
        assert "[bold]x" in told
        assert "\x1b" not in told

    def test_secrets_are_hidden(self, tmp_path):
        write_run(tmp_path / "a", data__path="https://me:pa55word@host/x")
        write_run(tmp_path / "b", data__path="hf_abcdefghijklmnop")
        write_run(tmp_path / "c", state="failed", reason="no access with hf_abcdefghijklmnop")
        compare([tmp_path], tmp_path)
        for name in FILES:
            assert "[redacted]" in (tmp_path / name).read_text().replace("\\", "")
            assert not re.search("pa55word|hf_abc", (tmp_path / name).read_text())


class TestFiles:
    def test_csv(self, six):
        comparison, folder = six
        rows = list(csv.DictReader(io.StringIO((folder / "compare.csv").read_text())))
        assert [row["kind"] for row in rows] == ["student"] * 6 + ["baseline", "teacher", "untouched"]
        best = rows[0]
        assert (best["loss.temperature"], best["loss.alpha"]) == ("2.0", "0.7") or (
            (best["loss.temperature"], best["loss.alpha"]) == ("2", "0.7")
        )
        assert float(best["kl"]) == only(comparison).points[0].measures["kl"]
        assert (best["rank_kl"], best["best_kl"], best["pareto_front"], best["kl_minus_best_low"]) == (
            "1",
            "True",
            "True",
            "",
        )
        assert float(rows[1]["kl_minus_best_low"]) == only(comparison).points[1].to_best["kl"][0]
        assert rows[6]["loss.temperature"] == ""

    def test_json(self, six):
        comparison, folder = six
        tree = json.loads((folder / "compare.json").read_text())
        (table,) = tree["tables"]
        assert table["best"] == {"kl": "τ 2, α 0.7", "ce": "τ 2, α 0.3"}
        assert table["pareto_front"] == ["τ 2, α 0.7", "τ 2, α 0.3"]
        assert table["validation_fingerprint"] == "5e1d0a7744bb9c02"
        assert table["teacher"]["digest"] == "c0ffee0123456789"
        assert [s["label"] for s in table["students"]] == [p.label for p in only(comparison).points]
        assert [s["label"] for s in table["students"] if s["baseline"]] == ["baseline (alpha = 0)"]
        assert tree["differs"]["alpha-0_0f0f0f"] == {"loss.alpha": 0.0}
        assert set(tree["differs"]["temperature-2_alpha-0.7_1a2b3c"]) == {"loss.temperature", "loss.alpha"}

    def test_markdown(self, six):
        text = (six[1] / "compare.md").read_text()
        assert "| 1 student | 2 | 0.7 | 1 \\* | 5 | ● | 0.6363 | 0.6999 | 0.6127 | 3.3510 | 28.532 | 0.3524 |" in text
        assert "| 7 baseline (alpha = 0) | — | 0 | 7 | 3 \\* |" in text
        assert "not over training seeds, and not corrected for picking the best of n." in text

    def test_the_terminal(self, six, capsys):
        comparison, folder = six
        assert main([str(folder)]) == 0
        told = capsys.readouterr().out
        line = next(line for line in told.splitlines() if "0.6363" in line)
        assert line.split() == ["1", "student", "2", "0.7", "1", "*", "5", "●", *line.split()[-8:]]
        assert re.search(r"baseline \(alpha = 0\) +— +0 ", told)
        for sentence in only(comparison).verdict:
            assert sentence in told
        assert "not over training seeds" in told
        assert str(folder / "compare.html") in told

    def test_the_same_runs_give_the_same_bytes(self, six, tmp_path, monkeypatch):
        folder = six[1]
        compare([folder], tmp_path / "one")
        monkeypatch.chdir(folder.parent)
        compare([Path(folder.name), folder / "alpha-0_0f0f0f"], tmp_path / "two")
        for name in FILES:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
            assert str(folder.parent) not in (tmp_path / "one" / name).read_text()

    def test_files_are_replaced_whole(self, tmp_path, monkeypatch):
        write_run(tmp_path / "run")
        compare([tmp_path], tmp_path)
        before = (tmp_path / "compare.csv").read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(MachineError, match=r"compare.csv: cannot be written: No space left") as error:
            compare([tmp_path], tmp_path)
        assert error.value.exit_code == 3
        assert (tmp_path / "compare.csv").read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, "run"])


class TestPage:
    def test_pictures(self, six):
        text = (six[1] / "compare.html").read_text()
        labels = [attrs["aria-label"] for tag, attrs in Tags(text).found if tag == "svg"]
        assert labels[0] == "CE against KL. On the Pareto front: τ 2, α 0.7; τ 2, α 0.3"
        assert labels[1:3] == [f"Held-out {m} over tokens, one line for each run" for m in ("KL", "CE")]
        measures = ["KL", "reverse KL", "agreement", "CE", "perplexity", "accuracy"]
        assert labels[3:] == [f"Heat map of {m} over temperature and alpha" for m in measures]
        assert re.search(r"<text [^>]*>τ 2, α 0.7</text>", text)

    def test_ids_are_single_and_the_pages_style_is_its_own(self, six):
        text = (six[1] / "compare.html").read_text()
        ids = [attrs["id"] for _, attrs in Tags(text).found if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert text.count("<style") == 1
        assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")

    def test_a_heat_map_needs_both_and_one_for_each_setting(self, tmp_path):
        write_sweep(tmp_path / "line", [2], [0.3, 0.7])
        compare([tmp_path / "line"], tmp_path)
        assert "Heat map" not in (tmp_path / "compare.html").read_text()
        for name in ("forward_kl", "reverse_kl"):
            write_sweep(tmp_path / name, [1, 2], [0.3, 0.7], baseline=False, loss__name=name)
        compare([tmp_path / "forward_kl", tmp_path / "reverse_kl"], tmp_path)
        assert (tmp_path / "compare.html").read_text().count("Heat map of KL over temperature and alpha, loss ") == 2

    def test_no_curves_without_evaluations(self, tmp_path):
        write_run(tmp_path / "run", curve=1)
        compare([tmp_path], tmp_path)
        text = (tmp_path / "compare.html").read_text()
        assert "train.eval_every=N measures every N steps" in text
        assert "over tokens" not in text

    def test_of_forty_few_are_coloured(self, tmp_path):
        folder = write_sweep(tmp_path / "s", [0.5, 1, 2, 4, 8], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0], curve=3)
        table = only(compare([folder], folder))
        looks = looks_of(table)
        named = [look.label for look in looks.values() if look.is_named]
        assert len(looks) == 41
        assert len(named) == 7
        assert {table.by("kl")[0].label, table.by("ce")[0].label, "baseline (alpha = 0)"} <= set(named)
        assert len({(look.colour, look.marker) for look in looks.values() if look.is_named}) == 7
        assert "34 others" in (folder / "compare.html").read_text()

    def test_samples_stand_side_by_side(self, six):
        text = (six[1] / "compare.html").read_text()
        assert text.count("What is the capital of France, and why do people go there?") == 1
        assert text.count("the the the of of") == 3
        assert text.count("I am fine at τ 2 and α 0.7") == 3


class TestFinding:
    def test_globs_folders_and_duplicates(self, six, tmp_path):
        folder = six[1]
        one = folder / "temperature-2_alpha-0.7_1a2b3c"
        for paths in (
            [folder, one, folder / ".." / folder.name],
            [folder / "*"],
            [folder.parent / "**"],
            [folder.parent, folder / "compare.csv"],
            sorted(folder.iterdir()),
        ):
            assert len(ranked(*paths).runs) == 7, paths
        assert [run.name for run in ranked(one).runs] == [one.name]

    def test_names_are_short_and_tell_runs_apart(self, six, tmp_path):
        write_run(tmp_path / "2026-11-24" / "02-45-09-123456", loss__alpha=0.4)
        write_run(tmp_path / "2026-11-25" / "02-45-09-123456", loss__alpha=0.5)
        names = {run.name for run in ranked(tmp_path).runs}
        assert names == {"2026-11-24/02-45-09-123456", "2026-11-25/02-45-09-123456"}

    def test_where_the_files_go(self, six, tmp_path):
        folder = six[1]
        assert default_out([folder]) == folder
        elsewhere = Path("comparison")
        assert default_out([folder, folder]) == elsewhere
        assert default_out([folder.parent]) == elsewhere
        assert default_out([folder / "alpha-0_0f0f0f"]) == elsewhere
        assert default_out([folder / "*"]) == elsewhere
        assert main([str(folder), "--out", str(tmp_path / "new" / "place")]) == 0
        assert {p.name for p in (tmp_path / "new" / "place").iterdir()} == set(FILES)

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            ([], "kdx compare: names no runs. As in: kdx compare outputs/sweeps/NAME"),
            (["runz"], "runz: does not exist. Did you mean runs?"),
            (["runs/tempp-1"], "runs/tempp-1: does not exist. Did you mean runs/temp-1?"),
            (["zzz/y"], "zzz/y: does not exist. This folder (*) has: empty/, runs/"),
            (["runs/x*"], "runs/x*: matches nothing. As in: kdx compare outputs/sweeps/NAME"),
            (["empty"], "empty: no run in it (a run has a status.json). As in: kdx compare outputs/sweeps/NAME"),
            (["--wat"], "kdx compare: unrecognized arguments: --wat. Usage: kdx compare PATH... [--out DIR] [--wandb]"),
        ],
    )
    def test_what_a_user_did_wrong(self, tmp_path, monkeypatch, words, line):
        write_run(tmp_path / "runs" / "temp-1")
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError) as error:
            main(words)
        assert str(error.value) == line.replace("(*)", f"({tmp_path})")
        assert error.value.exit_code == 2

    def test_all_missing_paths_are_named_at_once(self, tmp_path):
        with pytest.raises(KdxError) as error:
            ranked(tmp_path / "a", tmp_path / "b")
        assert len(error.value.lines) == 2

    def test_a_folder_without_runs_beside_others_is_said(self, six, tmp_path):
        (tmp_path / "empty").mkdir()
        assert ranked(six[1], tmp_path / "empty").notes == [f"no run in {tmp_path / 'empty'}"]

    def test_a_place_that_cannot_be_written(self, six, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(MachineError, match=r"file/compare\.csv: cannot be written.*--out"):
            compare([six[1]], tmp_path / "file")


def test_short_names():
    names = short_names(["loss.temperature", "loss.alpha", "loss.name", "optim.lr", "data.seed", "train.seed"])
    assert list(names.values()) == ["τ", "α", "loss", "lr", "data.seed", "train.seed"]


def test_what_changes_no_student_is_that_of_runs_and_sweeps():
    of_sweeps = [f"{name}." for name in sweep.NOT_IDENTITY]
    of_sweeps += [f"{group}.{key}" for group, keys in sweep.NOT_IDENTITY_IN.items() for key in keys]
    assert [key for key in of_sweeps if not key.startswith(drift.FREE)] == []


def test_torch_and_hydra_are_not_imported():
    program = (
        "import sys, kdx.compare, kdx.compare.page; print(sorted({'torch', 'hydra', 'omegaconf'} & sys.modules.keys()))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"
