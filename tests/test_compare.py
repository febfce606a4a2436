"""Many runs in one comparison: what is ranked, how sure that is, and what the files and the page show."""

import csv
import io
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import write_run, write_sweep

from kdx.compare import ranking, tables
from kdx.compare.page import colors_of, heat_maps
from kdx.compare.ranking import ANSWERS, COLUMNS, Comparison, Ranking, compared
from kdx.compare.read import compare, find, main, read_run
from kdx.errors import ConfigError

FILES = [f"compare.{suffix}" for suffix in ("csv", "json", "md", "html")]


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
    return compared([read_run(name, folder) for name, folder in find(paths).items()])


def point(table: Ranking, label: str) -> ranking.Point:
    (found,) = [p for p in table.points if p.label == label]
    return found


def lines_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def edit(file: Path, change: Any) -> None:
    """Change a JSON file in place."""
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


class TestIntervals:
    def test_draws_are_of_rows_and_means_are_ratios_of_sums(self):
        """Against all 27 ways to draw three rows of three."""
        counted = np.array([[1.0, 7.0], [4.0, 2.0], [10.0, 3.0]])
        sums = np.array([[3.0, 1.0], [4.0, 2.0], [5.0, 30.0]])
        ways = [list(way) for way in itertools.product(range(3), repeat=3)]
        exact = np.array([sums[way].sum(0) / counted[way].sum(0) for way in ways])
        drawn = ranking.resampled_means(counted, sums, num=40_000)
        assert {tuple(row) for row in drawn.round(9)} == {tuple(row) for row in exact.round(9)}
        assert drawn.mean(0) == pytest.approx(exact.mean(0), rel=0.01)
        assert drawn.std(0) == pytest.approx(exact.std(0), rel=0.02)

    def test_the_interval_of_a_mean_is_the_textbooks(self):
        values = np.random.default_rng(1).normal(0.3, 2.0, (900, 1))
        low, high = ranking.interval(ranking.resampled_means(np.ones((900, 1)), values)[:, 0])
        half = 1.96 * values.std() / math.sqrt(900)
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)

    def test_rows_are_paired(self):
        """Hard rows are hard for both, so a difference that holds on each row is seen."""
        generator = np.random.default_rng(0)
        counted, hard = generator.integers(5, 50, 200).astype(float), generator.lognormal(0, 1, 200)
        sums = np.column_stack([counted * hard, counted * (hard + 0.02 + generator.normal(0, 0.05, 200))])
        means = ranking.resampled_means(np.column_stack([counted, counted]), sums)
        low, high = ranking.interval(means[:, 1] - means[:, 0])
        assert 0 < low < 0.02 < high < 0.04

    def test_the_draws_stay_the_same(self):
        counted, sums = np.tile(np.arange(1.0, 31.0), (2, 1)).T, np.random.default_rng(0).normal(3, 1, (30, 2))
        means = ranking.resampled_means(counted, sums, num=500)
        assert ranking.interval(means[:, 1] - means[:, 0]) == (0.0051995339, 0.0482084902)

    def test_what_is_clearly_worse_is_not_marked_and_what_is_close_is(self, tmp_path):
        for lr, kl in ((1e-3, 0.700), (2e-3, 0.701), (4e-3, 0.800)):
            write_run(tmp_path / f"lr-{lr}", optim__lr=lr, means={"kl": kl})
        table = only(ranked(tmp_path))
        assert [p.is_best("kl") for p in table.points] == [True, True, False]
        low, high = table.points[2].intervals["kl", "minus_best"]
        assert 0 < low < 0.1 < high < 0.15
        assert [row[1] for row in tables.grid(table, COLUMNS)[1:4]] == ["★ 0.700", "* 0.701", "0.800"]

    def test_each_setting_has_its_own_baseline(self, tmp_path):
        for lr, kl in ((1e-3, 0.9), (2e-3, 0.8)):
            write_run(tmp_path / f"base-{lr}", loss__alpha=0.0, optim__lr=lr, means={"kl": kl}, noise=0)
            write_run(tmp_path / f"run-{lr}", loss__alpha=0.5, optim__lr=lr, means={"kl": 0.7}, noise=0)
        write_run(tmp_path / "alone", loss__alpha=0.5, optim__lr=4e-3)
        table = only(ranked(tmp_path))
        for lr, difference in ((0.001, -0.2), (0.002, -0.1)):
            found = point(table, f"α 0.5, lr {lr}").intervals["kl", "minus_baseline"]
            assert np.mean(found) == pytest.approx(difference, abs=0.02)
        assert ("kl", "minus_baseline") not in point(table, "α 0.5, lr 0.004").intervals

    def test_a_student_without_adapters_or_answers_of_its_own_has_its_own_line_and_baseline(self, tmp_path):
        for adapter, level in (("none", 0.9), ("lora", 1.9)):
            write_run(
                tmp_path / f"base-{adapter}", loss__alpha=0.0, adapter__name=adapter, means={"kl": level}, noise=0
            )
            for share in (0, 0.5, 1):
                own = {"rollout__name": "student" if share else "none", "rollout__share": share or 0.5}
                means = {"kl": level - 0.1 * (1 + share)}
                write_run(tmp_path / f"{adapter}-{share}", adapter__name=adapter, means=means, noise=0, **own)
        table = only(ranked(tmp_path))
        assert len({p.label for p in table.points}) == 8
        for adapter in ("none", "lora"):
            for share, own in ((0, "none, α 0.7"), (0.5, "student, α 0.7, share 0.5"), (1, "student, α 0.7, share 1")):
                found = point(table, f"adapter {adapter}, rollout {own}").intervals["kl", "minus_baseline"]
                assert np.mean(found) == pytest.approx(-0.1 * (1 + share), abs=0.02)

    def test_the_interval_of_an_average_is_of_all_its_seeds(self, tmp_path):
        for lr, levels in ((1e-3, (0.5, 0.9)), (2e-3, (0.71, 0.71))):
            for seed, kl in enumerate(levels):
                write_run(tmp_path / f"{lr}-{seed}", optim__lr=lr, train__seed=seed, means={"kl": kl})
        low, high = only(ranked(tmp_path)).points[1].intervals["kl", "minus_best"]
        assert -0.02 < low < 0.01 < high < 0.04

    def test_equal_students_are_tied(self, tmp_path):
        for name, lr in (("one", 1e-3), ("two", 2e-3)):
            write_run(tmp_path / name, optim__lr=lr, noise=0)
        table = only(ranked(tmp_path))
        assert [p.rank["kl"] for p in table.points] == [1, 1]
        assert [p.intervals.get(("kl", "minus_best")) for p in table.points] == [None, (0, 0)]
        assert [row[1] for row in tables.intervals(table, COLUMNS)] == ["KL minus best", "", "tied"]


@pytest.mark.parametrize(
    ("pairs", "on"),
    [
        ([(1, 3), (2, 2), (3, 1)], [1, 1, 1]),
        ([(1, 3), (2, 4), (3, 1)], [1, 0, 1]),
        ([(1, 1), (1, 2), (2, 1)], [1, 0, 0]),
        ([(1, 1), (1, 1)], [1, 1]),
    ],
)
def test_pareto(pairs, on):
    assert ranking.pareto(pairs) == [bool(x) for x in on]


class TestRanking:
    def test_by_kl_and_by_ce_side_by_side(self, six):
        points = only(six[0]).points
        for measure in ("kl", "ce"):
            ranked = sorted(points, key=lambda p: p.rank[measure])
            assert [p.rank[measure] for p in ranked] == list(range(1, 8))
            assert ranked == sorted(points, key=lambda p: p.measures[measure])
        assert points[0].label == "τ 2, α 0.7"
        assert min(points, key=lambda p: p.rank["ce"]).label == "τ 2, α 0.3"

    def test_teacher_and_untouched_students_are_references(self, six, tmp_path):
        references = only(six[0]).references
        assert references["teacher"]["ce"] == 2.81
        assert references["untouched student"]["kl"] == 5.8
        for layers in (5, 10):
            write_run(tmp_path / str(layers), student__layers=layers)
        labels = [*only(ranked(tmp_path)).references]
        assert labels == ["teacher", "untouched student layers 10", "untouched student layers 5"]

    def test_seeds_are_averaged(self, tmp_path):
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

    def test_other_training_rows_are_another_student(self, tmp_path):
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", train__seed=1)
        edit(tmp_path / "b" / "summary.json", lambda s: s["data"].update(fingerprint="other"))
        assert [len(p.runs) for p in only(ranked(tmp_path)).points] == [1, 1]

    @pytest.mark.parametrize(("held", "label"), [("plugins", "plugins"), ("student", "weights")])
    def test_other_contents_of_the_same_files_are_another_student(self, tmp_path, held, label):
        """But a baseline has no loss of one's own, and paths tell students apart already."""
        for seed, digest in enumerate(("a1" * 16, "b2" * 16)):
            for alpha in (0, 0.7):
                run = write_run(tmp_path / f"{alpha}-{seed}", loss__alpha=alpha, train__seed=seed, student__path="x")
                (run / "data.json").write_text(json.dumps({held: digest}))
        labels = {p.label: len(p.runs) for p in only(ranked(tmp_path)).points}
        assert {name: num for name, num in labels.items() if "baseline" not in name} == {
            f"α 0.7, {label} a1a1a1a1": 1, f"α 0.7, {label} b2b2b2b2": 1
        }  # fmt: skip
        assert len(labels) == (3 if held == "plugins" else 4)
        run = write_run(tmp_path / "other", student__path="y")
        (run / "data.json").write_text(json.dumps({"student": "c3" * 16}))
        assert not any("weights" in p.label for p in only(ranked(run, tmp_path / "0.7-0")).points)

    @pytest.mark.parametrize(
        "keys",
        [
            {"loss__temperature": 1.0, "loss__alpha": 0},  # a baseline, whatever the rest of its loss is
            {"tracking__mode": "offline", "sweep__name": "other", "train__log_every": 1},
        ],
    )
    def test_a_key_without_effect_is_no_difference(self, tmp_path, keys):
        write_run(tmp_path / "a", loss__alpha=keys.get("loss__alpha", 0.7))
        write_run(tmp_path / "b", train__seed=1, **keys)
        comparison = ranked(tmp_path)
        assert comparison.differing == ["train.seed"]
        assert [len(p.runs) for p in only(comparison).points] == [2]

    def test_without_a_teacher_ce_ranks_alone(self, tmp_path):
        nothing = dict.fromkeys(("kl", "reverse_kl", "agreement"))
        for lr in (1e-3, 2e-3):
            write_run(tmp_path / f"{lr}", means=nothing | {"ce": 3 + lr}, loss__alpha=0.0, optim__lr=lr)
        table = only(compare([tmp_path], tmp_path))
        assert [p.rank for p in table.points] == [{"ce": 1}, {"ce": 2}]

    @pytest.mark.parametrize("key", ["fingerprint", "digest", "precision"])
    def test_what_cannot_be_compared_is_not(self, tmp_path, key):
        write_run(tmp_path / "a", loss__alpha=0.3)
        write_run(tmp_path / "b", loss__alpha=0.7, **{key: "other"})
        comparison = ranked(tmp_path)
        for table in comparison.rankings:
            assert [p.rank for p in table.points] == [{"kl": 1, "ce": 1, "agreement": 1}]
        assert tables.as_markdown(comparison).startswith("Measures can be compared only on the same held-out rows")
        one, other = (table["measured_on"] for table in json.loads(tables.as_json(comparison))["tables"])
        assert len({*one.items()} - {*other.items()}) == 1

    def test_runs_of_another_length_are_marked(self, tmp_path, capsys):
        for lr in (1e-3, 2e-3):
            write_run(tmp_path / f"{lr}", optim__lr=lr)
        write_run(tmp_path / "long", optim__lr=3e-3, train__max_steps=416, steps=416, means={"kl": 0.1})
        assert main([str(tmp_path), "--out", str(tmp_path)]) == 0
        assert "† 416  † 302,000" in capsys.readouterr().out
        found = [[row[name] for name in ("steps", "tokens", "other_budget")] for row in lines_of(tmp_path / FILES[0])]
        assert found == [["416.0", "302000.0", "True"], *[["208.0", "151000.0", "False"]] * 2]

    def test_students_whose_mixture_was_the_same_are_named(self, tmp_path):
        """#2 and #3 started and ended alike; #1 ended like them from elsewhere."""
        for temperature, pulls in ((1, (0.9, 0.505)), (2, (0.62, 0.50)), (4, (0.60, 0.51))):
            run = write_run(tmp_path / f"{temperature}", loss__temperature=temperature, means={"kl": temperature})
            found = {"effective_alpha_start": pulls[0], "effective_alpha_end": pulls[1]}
            edit(run / "summary.json", lambda s, found=found: s["run"].update(found))
        table = only(compare([tmp_path], tmp_path))
        assert table.same_mixtures.endswith("last logged step: #2, #3.")
        assert "step: \\#2, \\#3." in (tmp_path / "compare.md").read_text()


class TestAnswers:
    @pytest.fixture
    def three(self, tmp_path):
        """Students whose held-out KL is best where their own answers are worst."""
        for lr, (kl, rouge) in {1e-3: (0.50, 0.30), 2e-3: (0.30, 0.20), 4e-3: (0.301, 0.35)}.items():
            said = {"on_policy_kl": kl, "rouge_l": rouge}
            write_run(tmp_path / f"{lr}", optim__lr=lr, means={"kl": 0.6 + lr}, said=said)
        return tmp_path

    def test_they_have_a_table_and_a_ranking_of_their_own(self, three):
        table = only(compare([three], three))
        ranks = {p.number: (p.rank["kl"], p.rank["on_policy_kl"], p.rank["rouge_l"]) for p in table.points}
        assert ranks == {1: (1, 3, 2), 2: (2, 1, 3), 3: (3, 2, 1)}
        header, *rows = tables.grid(table, ANSWERS)
        assert header == ("student", "on-policy KL", "ROUGE-L", "length", "finished", "distinct bigrams")
        assert [row[0][:2] for row in rows[:3]] == ["#2", "#3", "#1"]
        assert [row[1][0] for row in rows[:3]] == ["★", "*", "0"]  # the second is not distinguishable from the best
        assert rows[1][2][0] == "★"
        title = "Greedy answers to 40 held-out prompts, ranked by on-policy KL and ROUGE-L"
        for form in ("md", "html"):
            text = (three / f"compare.{form}").read_text()
            assert title in text and all(cell in text for cell in rows[0])
        first = lines_of(three / "compare.csv")[0]
        assert (first["on_policy_kl_rank"], first["rouge_l_rank"], first["distinct_2"]) == ("3", "2", "0.025")
        assert float(first["on_policy_kl_minus_best_low"]) > 0

    def test_intervals_are_over_prompts_and_each_answer_has_its_own_length(self, three):
        worst, best, _ = only(ranked(three)).points
        draws = np.random.default_rng(5).integers(40, size=(4000, 40))
        means = []
        for p in (worst, best):
            kl, length = (np.array([line[x] for line in p.runs[0].answers]) for x in ("on_policy_kl", "answer_length"))
            means.append(kl[draws].sum(1) / length[draws].sum(1))
        expected = np.percentile(means[0] - means[1], (2.5, 97.5))
        assert worst.intervals["on_policy_kl", "minus_best"] == pytest.approx(tuple(expected), rel=0.05)

    def test_a_measure_ranks_only_where_all_runs_have_it(self, three):
        write_run(three / "cached", optim__lr=8e-3, said={"rouge_l": 0.4})
        table = only(ranked(three))
        assert [sorted(p.rank) for p in table.points] == [["agreement", "ce", "kl", "rouge_l"]] * 4
        assert [*table.sections][1].endswith(" 40 held-out prompts, ranked by ROUGE-L")
        for name, keys in (("fewer", {"said": {"rouge_l": 0.4}, "num_prompts": 30}), ("older", {})):
            write_run(three / name, optim__lr=16e-3, **keys)
            table = only(ranked(three))
            assert {name for p in table.points for name in p.rank} == {"ce", "kl", "agreement"}
            assert [*table.sections][1].endswith("not ranked: some students answered other prompts")


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ((-1e-9, 1e-9), "tied"),
        ((-0.00002, 0.00003), "-0.00002 to +0.00003"),
        ((-1e-9, 0.0123), "+0.000 to +0.012"),
    ],
)
def test_differences_have_as_many_digits_as_show_them(interval, text):
    assert tables.difference(interval) == text


class TestNeverRanked:
    def test_only_finished_runs_are(self, tmp_path):
        """A summary may be there from before: the state decides."""
        write_run(tmp_path / "good", loss__alpha=0.3)
        for state in ("diverged", "failed", "interrupted"):
            write_run(tmp_path / state, loss__alpha=0.7, means={"kl": 0.001})
            status = {"state": state, "reason": "step 3: because", "step": 3, "max_steps": 8}
            (tmp_path / state / "status.json").write_text(json.dumps(status))
        write_run(tmp_path / "running", state="running")
        comparison = compare([tmp_path], tmp_path)
        assert [p.runs[0].name for p in only(comparison).points] == ["good"]
        *stopped, running = comparison.not_ranked
        assert [(r.name, r.reason) for r in stopped] == [(r.state, "step 3: because") for r in stopped]
        assert running.reason == "step 57 of 208"
        for name in FILES[1:]:
            assert (tmp_path / name).read_text().count("step 3: because") == 3, name

    @pytest.mark.parametrize(
        ("file", "text", "why"),
        [
            ("eval_rows.jsonl", '{"row": 1', "cannot be read (ValueError: eval_rows.jsonl: Expecting"),
            ("summary.json", '{"student": {"ce": null}}', "nothing was held out"),
            ("summary.json", '{"student": {"ce": 1.0}}', "cannot be read (KeyError: "),
        ],
    )
    def test_runs_that_do_not_parse_are_named_and_the_rest_is_compared(self, tmp_path, file, text, why):
        write_run(tmp_path / "good", loss__alpha=0.3)
        write_run(tmp_path / "bad", loss__alpha=0.7)
        (tmp_path / "bad" / file).write_text(text)
        comparison = ranked(tmp_path)
        (run,) = comparison.not_ranked
        assert run.name == "bad"
        assert run.reason.startswith(why)
        assert [p.runs[0].name for p in only(comparison).points] == ["good"]


class TestFiles:
    def test_csv_and_json(self, six):
        comparison, folder = six
        points = only(comparison).points
        rows = lines_of(folder / "compare.csv")
        assert [row["baseline"] for row in rows] == ["False"] * 6 + ["True"]
        names = ("loss.temperature", "loss.alpha", "kl_rank", "kl_is_best", "pareto_front")
        assert [rows[0][name] for name in names] == ["2", "0.7", "1", "True", "True"]
        assert float(rows[0]["kl"]) == points[0].measures["kl"]
        low, high = points[1].intervals["kl", "minus_best"]
        assert [float(rows[1][f"kl_minus_best_{end}"]) for end in ("low", "high")] == [low, high]
        assert rows[6]["loss.temperature"] == rows[0]["kl_minus_best_low"] == ""
        (table,) = json.loads((folder / "compare.json").read_text())["tables"]
        assert [*table["measured_on"].values()] == ["5e1d0a7744bb9c02", "c0ffee0123456789", "fp32"]
        assert [s["label"] for s in table["students"]] == [p.label for p in points]
        assert table["references"]["teacher"]["ce"] == 2.81

    def test_markdown(self, six, tmp_path):
        text = (six[1] / "compare.md").read_text()
        first = "| \\#1 τ 2, α 0.7 | ★ 0.636 | 3.351 | ★ 0.613 | 208 | 151,000 | 0.700 | 0.3524 | "
        assert first in text
        assert "| \\#7 baseline (alpha = 0) | +0.247 to +0.306 |  | -0.037 to +0.059 |  |" in text
        write_run(tmp_path / "a", state="failed", reason="a | b <c>")
        compare([tmp_path], tmp_path)
        assert "| a | failed | a \\| b \\<c> |" in (tmp_path / "compare.md").read_text()

    def test_the_terminal(self, six, tmp_path, capsys, monkeypatch):
        """A row of such a table fits into 80 letters; the files of several paths are in a folder of their own."""
        monkeypatch.chdir(tmp_path)
        assert main([str(six[1]), str(six[1] / "alpha-0_0f0f0f")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert " #1 τ 2, α 0.7            ★ 0.636    3.351    ★ 0.613    208  151,000      ● " in lines
        assert {p.name for p in (tmp_path / "comparison").iterdir()} == set(FILES)

    def test_the_same_runs_give_the_same_bytes(self, six, tmp_path, monkeypatch):
        folder = six[1]
        monkeypatch.chdir(folder.parent)
        compare([Path(folder.name), folder / "alpha-0_0f0f0f"], tmp_path)
        for name in FILES:
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
            assert str(folder.parent) not in (tmp_path / name).read_text()


class TestPage:
    def test_pictures_heat_maps_and_samples(self, six):
        text = (six[1] / "compare.html").read_text()
        assert re.findall(r'<img src="data:image/svg\+xml;base64,[^"]*" alt="(.*)">', text) == [
            "CE against KL; the line is the Pareto front",
            "Held-out KL over tokens",
            "Held-out CE over tokens",
            "KL, lower is better",
            "CE, lower is better",
            "agreement, higher is better",
        ]
        assert text.count("the the the of of") == text.count("I am fine at τ 2 and α 0.7") == 3
        assert text.count('<tr class="best">') == 2

    def test_text_of_runs_is_escaped_and_nothing_is_loaded(self, tmp_path):
        hostile = "<script>alert(1)</script> {{ 7*7 }} $x^2$"
        for alpha in (0.3, 0.7):
            run = write_run(tmp_path / f"<b>{alpha}", loss__alpha=alpha, say=hostile, data__path=f"{hostile}{alpha}")
            edit(run / "samples.json", lambda s: s[0]["prompt"][0].update(role=hostile, content=hostile))
        write_run(tmp_path / "failed", state="failed", reason=hostile)
        compare([tmp_path], tmp_path)
        text = (tmp_path / "compare.html").read_text()
        assert not {*re.findall(r"<(\w+)", text)} & {"script", "link", "iframe", "image"}
        assert text.count("&lt;script&gt;alert(1)&lt;/script&gt; {{ 7*7 }}") > 4
        assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
        assert "http" not in text.replace("http-equiv", "")

    def test_heat_maps_need_two_numbers_that_vary_and_show_the_best_of_the_rest(self, tmp_path):
        write_sweep(tmp_path / "line", [2], [0.3, 0.7])
        assert [*heat_maps(only(ranked(tmp_path / "line")))] == []
        for lr, alpha, name in itertools.product((1e-3, 2e-3), (0.3, 0.7), ("forward_kl", "jsd")):
            kl = 1 + alpha + (name == "jsd")
            write_run(
                tmp_path / f"{lr}-{alpha}-{name}", optim__lr=lr, loss__alpha=alpha, loss__name=name, means={"kl": kl}
            )
        first, *others = heat_maps(only(ranked(*tmp_path.glob("0.*"))))
        assert len(others) == 2
        assert [text.get_text() for text in first.texts] == ["1.300", "1.300", "1.700", "1.700"]

    def test_of_forty_few_are_colored(self, tmp_path):
        folder = write_sweep(tmp_path / "s", [0.5, 1, 2, 4, 8], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0], curve=3)
        table = only(compare([folder], folder))
        colors = colors_of(table)
        assert {table.points[0], point(table, "baseline (alpha = 0)")} <= colors.keys()
        assert len(set(colors.values())) == len(colors) == 7
        assert (folder / "compare.html").read_text().count("I am fine at τ") == 6 * 3


class TestFinding:
    def test_folders_and_duplicates(self, six):
        folder = six[1]
        one = folder / "temperature-2_alpha-0.7_1a2b3c"
        for paths in ([folder, one, folder / ".." / folder.name], [folder.parent], sorted(folder.iterdir())):
            assert len(find(paths)) == 7, paths
        assert [*find([one])] == [one.name]

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            ([], "kdx compare: no runs found. Example: kdx compare outputs/sweeps/NAME"),
            (["runs/x*"], "runs/x*: does not exist. Example: kdx compare outputs/sweeps/NAME"),
            (["--wat"], "kdx compare: unrecognized arguments: --wat. See kdx compare --help"),
        ],
    )
    def test_what_a_user_did_wrong(self, words, line):
        with pytest.raises(ConfigError) as error:
            main(words)
        assert str(error.value) == line


def test_torch_and_hydra_are_not_imported():
    names = "{'torch', 'datasets', 'wandb', 'hydra', 'omegaconf'}"
    program = f"import sys, kdx.compare, kdx.compare.page; print(sorted({names} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
