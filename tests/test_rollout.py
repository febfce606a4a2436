"""On-policy rows: what is generated, what it weighs, and that a run with it is exact."""

import copy
import json
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain
import pytest
import torch
from runs import config_of, lines, outcome, run_here, signal_at, words_of
from standins import DIALOGPT_TEMPLATE
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import kdx.data.batches
import kdx.generate
from kdx import distill, rollout, teacher
from kdx.causal_lm import head_of
from kdx.cli import _main, compose
from kdx.data.batches import Row
from kdx.data.encode import Encoder
from kdx.data.sources import Conversation
from kdx.errors import ConfigError
from kdx.evaluate import said_of
from kdx.generate import Sampling, generate
from kdx.objective import Mix, Objective
from kdx.rollout import Rollouts, as_message, register_sampler
from kdx.run.folder import Record
from kdx.run.identity import config_identity
from kdx.run.launch import build_accelerator
from kdx.store import open_shard, paths_in
from kdx.teacher import Answer, Teacher
from kdx.tokenizer import SharedTokenizer
from kdx.train import Training

GREEDY = Sampling(max_new_tokens=12)
ON_POLICY = ["rollout=student", "rollout.share=0.5", "rollout.max_new_tokens=6", "rollout.batch_size=2"]


def gpt2(seed: int, layers: int = 1, vocab: int = 40) -> Any:
    torch.manual_seed(seed)
    shape = GPT2Config(
        vocab_size=vocab, n_layer=layers, n_embd=16, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=[0, 7]
    )
    model: Any = GPT2LMHeadModel(shape).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)  # so that answers differ by prompt
    return model


SHARED = SharedTokenizer(SimpleNamespace(pad_token_id=0, eos_token_id=None), max_length=20, num_ids=40)
PROMPTS = [[5], [1, 2, 3], [9, 8, 7, 6, 5, 4], [11, 12], [30, 3, 30, 3]]
LONG = [[i % 7 + 1 for i in range(length)] for length in (20, 21, 30, 32)]  # the model reads 32 tokens


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(12, temperature=1.5), Sampling(12, temperature=1.5, top_p=0.8)])
def test_a_left_padded_batch_answers_as_row_by_row(sampling: Sampling) -> None:
    model, prompts = gpt2(0).train(), [*PROMPTS, *LONG]
    state = torch.get_rng_state()
    seeds = list(range(10, 19))
    together = generate(model, prompts, sampling, SHARED, seeds)
    alone = [generate(model, [p], sampling, SHARED, [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    if sampling == GREEDY:
        for prompt, answer in zip(prompts, together, strict=True):
            assert len(answer) == min(12, 32 - len(prompt)) or answer[-1] in (0, 7)
            said = [*prompt]
            for token in answer:  # without a cache, by the definition
                assert int(model.eval()(torch.tensor([said])).logits[0, -1].argmax()) == token
                said.append(token)


def test_samples_have_the_models_probabilities() -> None:
    model, num = gpt2(0, vocab=12).eval(), 4000
    sampling = Sampling(1, temperature=2.0)
    answers = generate(model, [[5, 3]] * num, sampling, replace(SHARED, num_ids=10), range(num))
    counts = torch.bincount(torch.tensor(answers).flatten(), minlength=12) / num
    expected = (model(torch.tensor([[5, 3]])).logits[0, -1, :10] / 2).softmax(0)
    assert counts[10:].sum() == 0  # ids that only pad the head
    torch.testing.assert_close(counts[:10].double(), expected, atol=0.03, rtol=0)


def test_every_stop_token_ends_an_answer() -> None:
    model = gpt2(0)
    free = copy.deepcopy(model)
    free.generation_config.eos_token_id = None
    free.config.eos_token_id = None
    long = generate(free, PROMPTS, GREEDY, SHARED)
    assert {len(answer) for answer in long} == {12}
    model.generation_config.eos_token_id = [long[1][3], long[2][5]]
    for answer, whole in zip(generate(model, PROMPTS, GREEDY, SHARED), long, strict=True):
        ends = [i for i, token in enumerate(whole) if token in model.generation_config.eos_token_id]
        assert answer == whole[: ends[0] + 1 if ends else None]


def made(student: Any, num_rows: int = 6, rank: int = 0, num_processes: int = 1, **words: Any) -> Rollouts:
    """Batches of rows with a prompt and a last turn, by a student that answers."""
    rows = plain.Rows(
        Row(str(i), [i + 1, 4, 6, 2 + i, 9, 0][: 4 + i % 3], [False, i % 2 == 0, False, True, True, True][: 4 + i % 3])
        for i in range(num_rows)
    )
    group = {"share": 0.6, "max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, "reuse_steps": 1, "batch_size": 2}
    asked = SimpleNamespace(**{**group, "sampler": None, **words})
    machine = SimpleNamespace(autocast=torch.no_grad, process_index=rank, num_processes=num_processes)
    objective = Objective(student, 40, Mix(alpha=0.3))
    return Rollouts(
        rows, 6, words.get("micro", 6), 0, True, 0, rank, num_processes,
        objective=objective, words=asked, shared=SHARED, machine=machine,
    )  # type: ignore[arg-type]  # fmt: skip


def gradient(objective: Objective, teacher: Any, step: Any, num_tokens: int) -> tuple[torch.Tensor, float]:
    objective.zero_grad()
    terms = 0.0
    for batch in step.micro_batches:
        hidden = teacher.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        answer = Answer(hidden.flatten(0, 1)[batch.positions].detach(), head_of(teacher))
        total, sums = objective(batch, answer, 1 / num_tokens)
        total.backward()
        terms += sums["own"].item() if "own" in sums else 0.0
    return torch.cat([p.grad.flatten() for p in objective.parameters()]), terms


def test_a_mixed_step_is_a_plain_computation_for_any_split() -> None:
    """One denominator counted after generation; own words have the divergence alone, in full."""
    student, teacher = gpt2(1), gpt2(2, layers=2).requires_grad_(False)
    steps = [next(made(student, micro=micro).steps(0, 1)) for micro in (1, 2, 6)]
    mix = Mix("jsd", 0.3, 2.0, options={"beta": 0.3})
    objective = Objective(student, 40, mix)
    batches = made(student)
    first = next(batches.steps(0, 1))
    assert first is not None
    answers = batches.kept["0"]
    assert 0 < len(answers) < 6
    student.zero_grad()
    total, own_sum, counted = torch.zeros((), dtype=torch.float64), 0.0, 0
    for i, row in enumerate(batches.rows):
        tokens, start = list(row.tokens), len(row.tokens)
        is_counted = list(row.counted)
        if str(i) in answers:
            start = max(j for j in range(len(tokens)) if not is_counted[j]) + 1
            tokens, is_counted = tokens[:start] + answers[str(i)], is_counted[:start] + [True] * len(answers[str(i)])
        logits, theirs = (m.eval()(torch.tensor([tokens])).logits[0] for m in (student, teacher))
        for j in range(1, len(tokens)):
            if is_counted[j]:
                counted += 1
                kd = plain.divergence("jsd", logits[j - 1 : j], theirs[j - 1 : j].detach(), 2.0, beta=0.3)[0]
                own_sum += kd.item() if j >= start else 0.0
                ce = -logits[j - 1].log_softmax(0)[tokens[j]]
                total = total + (kd if j >= start else 0.3 * kd + 0.7 * ce)
    (total / counted).backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    for step in [first, *steps]:
        assert step is not None
        assert step.num_tokens == counted
        found, own = gradient(objective, teacher, step, counted)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert own == pytest.approx(own_sum, rel=1e-9)
    assert first.figures["own_rows"] == len(answers)
    assert first.figures["own_tokens"] == sum(map(len, answers.values()))


def test_two_processes_have_the_rows_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    student = gpt2(1)
    alone = made(student)
    next(alone.steps(0, 1))
    said: list[Any] = []
    monkeypatch.setattr(kdx.generate, "gather_object", lambda part: said.extend(part) or said)
    ranks = [made(student, rank=rank, num_processes=2) for rank in range(2)]
    plans = [dict(batches.plan(0, 1)) for batches in ranks]
    for batches, steps in zip(ranks, plans, strict=True):
        with suppress(ValueError):  # the first has a part of the answers only
            batches._answer(steps)
    assert ranks[1].kept == alone.kept
    parts = [replace(ranks[1], rank=rank)._mixed(0, plans[0][0], 0.0) for rank in range(2)]
    assert parts[0].num_tokens == parts[1].num_tokens
    assert sum(len(b.positions) for part in parts for b in part.micro_batches) == parts[0].num_tokens


@pytest.mark.parametrize("reuse", [1, 3])
def test_kill_and_resume_is_bitwise_the_straight_run(place: Path, tmp_path: Path, reuse: int) -> None:
    words = [*ON_POLICY, f"rollout.reuse_steps={reuse}", "train.max_steps=7", "train.micro_batch_size=2"]
    words += ["eval.every=3", "tracking.samples=true"]
    config = config_of(place, *words, "train.save_every=100")
    assert run_here(config, tmp_path / "straight") == 0
    assert run_here(config, tmp_path / "stopped", signal_at(4)) == 143
    assert run_here(config, tmp_path / "stopped") == 0
    assert outcome(tmp_path / "straight") == outcome(tmp_path / "stopped")
    trained = [line for line in lines(tmp_path / "straight/metrics.jsonl") if "rollout/kl" in line]
    assert len(trained) == 7
    assert all(line["rollout/length"] <= 6 for line in trained if line["rollout/length"])
    assert all("speed/generation_seconds" in line for line in trained)
    said = lines(tmp_path / "straight/rollouts.jsonl")
    assert said == lines(tmp_path / "stopped/rollouts.jsonl")
    assert {line["step"] for line in said} == {3, 6, 7}
    page = (tmp_path / "stopped/samples.md").read_text()
    assert page.count("**step ") == len(said)


def test_share_0_is_bitwise_the_run_without_the_group(place: Path, tmp_path: Path) -> None:
    words = ["train.max_steps=4", "train.micro_batch_size=2"]
    assert run_here(config_of(place, *words), tmp_path / "without") == 0
    assert run_here(config_of(place, *words, "rollout=student", "rollout.share=0"), tmp_path / "with") == 0
    assert outcome(tmp_path / "without") == outcome(tmp_path / "with")


def test_own_rows_never_enter_the_store(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["teacher.store=on", f"teacher.store_dir={tmp_path / 'store'}", "train.max_steps=6", *ON_POLICY]
    asked = []
    live = Teacher.live
    monkeypatch.setattr(Teacher, "live", lambda self, batch: asked.append(batch) or live(self, batch))
    assert run_here(config_of(place, *words), tmp_path / "run") == 0
    own = [batch for batch in asked if "" in batch.row_digests]
    assert own
    (rows,) = (tmp_path / "store").glob("*/rows")
    stored = {digest for path in paths_in(rows) for digest in open_shard(path).checksums}  # type: ignore[union-attr]
    given = {d for batch in asked if "" not in batch.row_digests for d in batch.row_digests}
    assert stored == given


def test_a_sampler_of_ones_own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    @register_sampler
    def mine(model: Any, prompts: list[list[int]], step: int) -> list[list[int]]:
        assert not model.training
        calls.append((step, len(prompts)))
        return [[int(torch.randint(1, 99, ())), 0] for _ in prompts]

    words = ["rollout=student", "rollout.share=1", "rollout.sampler=mine", "train.max_steps=2"]
    assert run_here(config_of(place, *words), tmp_path / "run") == 0
    assert calls == [(0, 4), (1, 4)]
    assert lines(tmp_path / "run/metrics.jsonl")[0]["rollout/finished"] == 1
    monkeypatch.delitem(rollout._SAMPLERS, "mine")
    assert run_here(config_of(place, *words), tmp_path / "unknown") == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["rollout.share=1"], "rollout.share: has no effect: nothing is generated. Add rollout=student"),
        (["rollout=student", "loss.alpha=0"], "loss.alpha: is 0, and cross-entropy teaches nothing"),
        (["rollout=student", "data.assistant_only=false"], "data.assistant_only: is false"),
        (["rollout=teacher", "data=text"], "rollout: needs prompts to answer, and plain text has none"),
        (["eval.metric=on_policy_kl"], "eval.metric: is on_policy_kl, which needs eval.num_prompts"),
    ],
)
def test_what_makes_no_sense_is_refused(place: Path, words: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        distill.check_names(config_of(place, *words))
    assert reason in str(refused.value)


def test_the_teachers_answers_take_the_place_of_the_last_turns(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed twice nothing is generated the second time, by a sweep's other jobs neither; held-out rows stay."""
    words = ["rollout=teacher", "rollout.max_new_tokens=8", "rollout.temperature=0"]
    words += [f"teacher.store_dir={tmp_path / 'store'}", "teacher.store=on"]
    prompts, seen = list[Any](), list[Any]()
    monkeypatch.setattr(kdx.generate, "generate", lambda m, some, *a: prompts.extend(some) or generate(m, some, *a))
    monkeypatch.setattr(
        distill.Batches,
        "__init__",
        lambda self, rows, init=distill.Batches.__init__, **k: seen.append(rows) or init(self, rows, **k),
    )
    with monkeypatch.context() as patch:
        patch.setattr(kdx.data.batches, "WINDOW", 1)
        assert run_here(config_of(place, *words, "train.max_steps=2"), tmp_path / "short") == 0
    assert len(prompts) == 8  # those that two steps read
    assert run_here(config_of(place, *words, "train.max_steps=2"), tmp_path / "one") == 0
    assert len(prompts) == 36
    monkeypatch.setattr(rollout, "load_teacher", None)
    assert run_here(config_of(place, *words, "train.max_steps=2", "train.seed=1"), tmp_path / "two") == 0
    assert len(prompts) == 36
    one, two = ([(row.tokens, row.counted) for row in rows] for rows in seen[3::2])
    assert one == two
    teacher = GPT2LMHeadModel.from_pretrained(place / "teacher").float()
    for tokens, counted in one[:3]:
        start = counted.index(True)
        assert all(counted[start:])
        (answer,) = generate(
            teacher, [tokens[:start]], Sampling(8), replace(SHARED, num_ids=len(teacher.lm_head.weight))
        )
        assert tokens[start:] == answer
    summaries = [json.loads((tmp_path / name / "summary.json").read_text())["data"] for name in ("one", "two")]
    assert run_here(config_of(place, "train.max_steps=0"), tmp_path / "plain") == 0
    given = json.loads((tmp_path / "plain/summary.json").read_text())["data"]
    assert {s["validation_fingerprint"] for s in summaries} == {given["validation_fingerprint"]}
    assert summaries[0]["fingerprint"] == summaries[1]["fingerprint"] != given["fingerprint"]


def test_generate_writes_whole_answers_as_data(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that are cut, not plain text or rewritten are left out. Held-out rows may have the ids of training rows."""
    template = DIALOGPT_TEMPLATE.replace("message.content", "message.content.replace('K', 'k')")
    (tmp_path / "chat.jinja").write_text("{{ part }}" + template)
    for part in ("train", "held"):
        with (tmp_path / f"{part}.jsonl").open("w") as stream:
            for i in range(8):
                said = {"user": f"{part} {i}?", "assistant": "No."}
                turns = [{"role": role, "content": content, "weight": 0} for role, content in said.items()]
                turns += [{"role": role, "content": f"Since {i}."} for role in said]
                stream.write(json.dumps({"id": i, "part": part, "messages": turns}) + "\n")
    kinds = [[40, 41, 0], [40, 41], [40, 0, 41, 0], [0], [43, 0]]  # 0 is the end of text, 43 is K
    monkeypatch.setattr(kdx.generate, "generate", lambda model, some, *a: [kinds[i % 5] for i in range(len(some))])
    out, words = tmp_path / "answers.jsonl", words_of(place, "data=messages", f"data.path={tmp_path}/train.jsonl")
    words += [f"data.validation={tmp_path}/held.jsonl", f"data.chat_template={tmp_path}/chat.jinja"]
    assert _main(["generate", *words, "--out", str(out)]) == 0
    says = "2 cut before their end, 3 with special tokens or no text, 1 that the chat template rewrites"
    assert f"2 answers to the 8 training rows; left out: {says}" in capsys.readouterr().out
    for row in lines(out):
        asked, unlearned, _, answer = row["messages"]
        assert row["part"] == "train"
        assert asked["content"].startswith("train")
        assert unlearned == {"role": "assistant", "content": "No.", "weight": 0}
        assert answer["role"] == "assistant"
    with pytest.raises(ConfigError, match="required: --out"):
        _main(["generate", *words])


def test_an_answer_becomes_a_message_that_is_rendered_as_it_was_said(make_tokenizer: Any, data_config: Any) -> None:
    """Qwen's template would write a second thought before one that is in the content."""
    thought = "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    plain = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    plain += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    asked = Conversation("", [{"role": "user", "content": "Where is Cairo?"}], "")
    said = "<think>\nHm.\n</think>\n\nIn Egypt."
    apart = {"content": "In Egypt.", "reasoning_content": "Hm."}
    thinks = plain.replace("{{ m.content }}", thought + "{{ m.content }}")
    prompted = thinks.replace("<|assistant|>", "<|assistant|><think>\n")
    for template, answer, expected in (
        (plain, said, {"content": said}),
        (thinks, said, apart),
        (prompted, said.removeprefix("<think>\n"), apart),
        (thinks, "In Egypt.", None),  # it would begin with a thought
    ):
        tokenizer = make_tokenizer(template, ("<|user|>", "<|assistant|>", "<|end|>"))
        encoder = Encoder(SharedTokenizer(tokenizer, 100), data_config("messages"))
        message = as_message(encoder, asked, answer)
        assert message == (expected and {"role": "assistant", **expected})


def test_a_student_that_shares_no_stop_token_with_the_teacher_is_warned_of(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(place, *ON_POLICY)
    rollout.warn_about(config, gpt2(0), [7, 9])  # it stops at 0 and 7
    assert not caplog.records
    rollout.warn_about(config, gpt2(0), [9])
    assert "share no stop token" in caplog.text


def test_generation_is_measured_of_all_three(place: Path, tmp_path: Path) -> None:
    """ROUGE-L, length, share that ended, distinct bigrams, and the KL on own answers, against their definitions."""
    words = ["train.max_steps=2", "eval.num_prompts=3", "eval.on_policy_kl=true", "student.save_dtype=fp32"]
    assert run_here(config_of(place, *words, "tracking.samples=true"), tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    names = {"rouge_l", "answer_length", "finished", "distinct_2"}
    assert all(names <= summary[who].keys() for who in ("teacher", "untouched", "student"))
    assert summary["untouched"]["on_policy_kl"] > 0
    student = GPT2LMHeadModel.from_pretrained(tmp_path / "run/student").eval()
    teacher = GPT2LMHeadModel.from_pretrained(place / "teacher").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/student")
    kl: list[torch.Tensor] = []
    lengths, ends, pairs = [], [], []
    for sample in json.loads((tmp_path / "run/samples.json").read_text()):
        prompt = tokenizer.apply_chat_template(sample["prompt"], return_tensors="pt", return_dict=True)["input_ids"]
        said = student.generate(prompt, do_sample=False, max_new_tokens=48)
        assert tokenizer.decode(said[0, prompt.shape[1] :]) == sample["student"]
        s, t = (m(said).logits[0, prompt.shape[1] - 1 : -1].double().log_softmax(-1) for m in (student, teacher))
        kl.append((s.exp() * (s - t)).sum(-1))
        answer = said[0, prompt.shape[1] :].tolist()
        lengths.append(len(answer))
        ends.append(answer[-1] == 0)
        pairs += [*pairwise(answer)]
    found = summary["student"]
    assert found["on_policy_kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert found["answer_length"] == sum(lengths) / 3
    assert found["finished"] == sum(ends) / 3
    assert found["distinct_2"] == len(set(pairs)) / len(pairs)
    answers = lines(tmp_path / "run/eval_answers.jsonl")
    assert [line["on_policy_kl"] for line in answers] == pytest.approx([part.sum().item() for part in kl], rel=1e-4)
    assert [line["answer_length"] for line in answers] == lengths
    assert [line["finished"] for line in answers] == ends
    assert len({line["row"] for line in answers}) == 3
    assert sum(line["rouge_l"] for line in answers) / 3 == pytest.approx(found["rouge_l"])


def test_the_teacher_is_loaded_for_its_kl_after_training(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its answers cached, training needs no body; by then the student is saved and the optimizer empty."""
    words = ["teacher.store=on", f"teacher.store_dir={tmp_path / 'store'}", "train.max_steps=2", "eval.num_prompts=3"]
    assert run_here(config_of(place, *words), tmp_path / "filling") == 0
    assert run_here(config_of(place, *words), tmp_path / "auto") == 0
    assert "on-policy KL: not measured" in (tmp_path / "auto/kdx.log").read_text()
    seen: list[Any] = []
    free, load, run_dir = Training.free, teacher.load_causal_lm, tmp_path / "true"
    monkeypatch.setattr(Training, "free", lambda self: free(self) or seen.append(len(self.optimizer.state)))
    monkeypatch.setattr(
        teacher, "load_causal_lm", lambda *a, **k: seen.append((run_dir / "trained.json").exists()) or load(*a, **k)
    )
    assert run_here(config_of(place, *words, "eval.on_policy_kl=true"), run_dir) == 0
    assert seen == [0, True]
    filling, auto, true = (
        json.loads((tmp_path / f"{x}/summary.json").read_text()) for x in ("filling", "auto", "true")
    )
    assert filling["untouched"]["on_policy_kl"] > 0 and true["untouched"]["on_policy_kl"] is None
    assert auto["student"]["on_policy_kl"] is None
    assert true["student"]["on_policy_kl"] == pytest.approx(filling["student"]["on_policy_kl"], rel=1e-5)


@pytest.mark.parametrize(("metric", "sign"), [("on_policy_kl", 1), ("rouge_l", -1)])
def test_a_measure_of_answers_may_decide(place: Path, tmp_path: Path, metric: str, sign: int) -> None:
    """It is taken at each evaluation then, chooses the best weights, and is what a sweep compares."""
    words = [f"eval.metric={metric}", "eval.every=1", "eval.num_prompts=4", "train.keep=best", "train.max_steps=5"]
    store = ["teacher.store=on", f"teacher.store_dir={tmp_path / 'store'}", "optim.lr=0.05"]
    assert run_here(config_of(place, *store, "train.max_steps=5"), tmp_path / "filling") == 0
    summary = distill.distill(config_of(place, *words, *store), tmp_path / "run")
    *measured, last = [line for line in lines(tmp_path / "run/metrics.jsonl") if "eval/ce" in line]
    values = [sign * line[f"eval/{metric}"] for line in measured]
    assert len(values) >= 4
    assert last[f"eval/{metric}"] == summary.student[metric]
    assert summary.run["kept_step"] == measured[values.index(min(values))]["step"]
    assert summary.measure == sign * summary.student[metric]
    decides = [config_identity(config_of(place, *some)) for some in (words, [*words, "eval.metric=ce"][1:])]
    assert ["eval.num_prompts" in keys for keys in decides] == [True, False]


def test_rouge_is_of_the_peoples_answer(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    said = "The capital is Paris"
    prompt = {"text": "", "reference": "Paris is the capital"}
    found = said_of([tokenizer(said)["input_ids"]], [prompt], tokenizer, [0]).means()
    assert found["rouge_l"] == pytest.approx(0.5)  # of four words each, "the capital" is in the same order
    assert found["finished"] == 0
    other = {"text": "", "reference": "Столица Франции — Париж. 首都是巴黎"}
    tokens = tokenizer(other["reference"])["input_ids"]
    tokenizer.decode = lambda *a, **k: other["reference"]
    assert said_of([tokens], [other], tokenizer, [0]).means()["rouge_l"] == 1


def test_a_teacher_stops_where_the_rows_do() -> None:
    """Its own generation config may not know their stop token; without it, it would write the next turn too."""
    model = gpt2(0)
    (free,) = generate(model, [PROMPTS[2]], GREEDY, SHARED)
    assert len(free) > 4
    (stopped,) = generate(model, [PROMPTS[2]], replace(GREEDY, stops=(0, 7, free[3])), SHARED)
    assert stopped == free[: free.index(free[3]) + 1]


def test_adapters_roll_out(place: Path) -> None:
    """The base stays as it is, and every adapter gets a gradient from the answers that it gave itself."""
    words = ["adapter=lora", "adapter.r=4", "rollout=student", "rollout.share=1", "rollout.max_new_tokens=6"]
    config = config_of(place, *words, "train.max_steps=3")
    with distill.prepared(config, Record(), build_accelerator(config)) as training:
        base = {name: x.clone() for name, x in training.student.named_parameters() if "lora_" not in name}
        for batch in training.batches.steps(0, 2):
            if batch is None:
                break
            assert batch.figures["own_rows"] == 4
            training.forward_backward(batch, SimpleNamespace(signal=None))
            grads = {name: x.grad for name, x in training.student.named_parameters()}
            assert all(grads[name] is None for name in base)
            assert all(grad.abs().sum() > 0 for name, grad in grads.items() if "lora_B" in name)
            training.optimizer.step()
            training.optimizer.zero_grad()
        assert all(torch.equal(x, base[name]) for name, x in training.student.named_parameters() if name in base)


def test_the_published_recipe_composes() -> None:
    config = compose(["experiment=minillm_gpt2"])
    assert (config.rollout.name, config.rollout.share, config.loss.name) == ("student", 1.0, "reverse_kl")
    assert (config.train.max_steps, config.train.epochs, config.optim.lr) == (5000, None, 5e-6)
