"""The loss of a batch and its gradients against plain float64 loops (tests/plain.py), and sums over micro-batches.

Single positions are in test_loss.py. N counted positions, V vocabulary, d / D width of student / teacher.
"""

import math
from types import SimpleNamespace

import plain
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import write_tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kdx import loss, objective
from kdx.causal_lm import Head
from kdx.check import PeakBytes
from kdx.data.batches import Batches, Row, collate, merged
from kdx.objective import Mix, Objective, chunks_of, distillation_loss, summed_loss
from kdx.store import Identity
from kdx.teacher import Answer, Teacher
from kdx.tokenizer import check_heads, common_ids
from kdx.train import State, Training

N, V, d, D = 7, 13, 5, 4
IGNORED = -100
each_name = pytest.mark.parametrize("name", sorted(plain.DEFINITIONS))


class Case:
    """Hidden states and heads of a random student and teacher; the student's are leaves."""

    def __init__(self, n=N, v=V, dtype=torch.float64, seed=0, spread=1.0, bias=True, **how):
        g = torch.Generator().manual_seed(seed)

        def random(*shape):
            return (spread * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

        self.hidden, self.weight = random(n, d).requires_grad_(), random(v, d).requires_grad_()
        self.bias = random(v).requires_grad_() if bias else None
        self.teacher_hidden, self.teacher_head = random(n, D), Head(random(v, D), random(v))
        self.labels = torch.randint(0, v, (n,), generator=g)
        self.how = how  # scale and softcap of the student's head

    @property
    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def to(self, dtype):
        """The same numbers in another dtype, as new leaves."""
        other = Case()
        other.hidden, other.weight, other.bias = (
            None if x is None else x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)
        )
        other.teacher_hidden = self.teacher_hidden.to(dtype)
        other.teacher_head = Head(self.teacher_head.weight.to(dtype), self.teacher_head.bias.to(dtype))
        other.labels, other.how = self.labels, self.how
        return other

    def loss(self, **options):
        options = {"alpha": 0.7, "temperature": 2.0} | options
        head = Head(self.weight, self.bias, **self.how)
        return distillation_loss(self.hidden, head, self.teacher_hidden, self.teacher_head, self.labels, **options)

    def logits(self):
        """Both models' logits [N, V], by the formula of a head."""
        z = F.linear(self.hidden, self.weight, self.bias) * self.how.get("scale", 1.0)
        cap = self.how.get("softcap")
        t = F.linear(self.teacher_hidden, self.teacher_head.weight, self.teacher_head.bias)
        return (z if cap is None else cap * (z / cap).tanh()), t

    def plain(self, name="forward_kl", alpha=0.7, temperature=2.0, **options):
        return plain.loss(*self.logits(), self.labels, name, alpha, temperature, **options)

    def value_and_gradients(self, value):
        return [value.detach(), *torch.autograd.grad(value, self.leaves)]


def assert_close(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# ---- value and gradients


@each_name
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("how", [{}, {"softcap": 3.0, "scale": 0.5}, {"bias": False}])
def test_any_chunk_size_gives_the_plain_value_and_gradients(name, dtype, tolerance, how):
    case = Case(**how)
    case.labels[2] = IGNORED
    expected = case.value_and_gradients(case.plain(name))
    ours = case.to(dtype)
    for chunk_size in (1, 2, 3, N):
        got = ours.value_and_gradients(ours.loss(name=name, chunk_size=chunk_size))
        assert [x.dtype for x in got] == [dtype] * len(got)
        assert_close(got, expected, tolerance)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jsd", {"beta": 0.2}),
        ("skew_forward_kl", {"skew": 0.6}),
        ("adaptive_kl", {"head_mass": 0.8}),
    ],
)
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_options_reach_the_divergence(name, options, alpha):
    case = Case()
    expected = case.value_and_gradients(case.plain(name, alpha, **options))
    assert_close(case.value_and_gradients(case.loss(name=name, alpha=alpha, chunk_size=3, **options)), expected, 1e-9)


@each_name
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_finite_difference_over_gradient_is_1(name, temperature):
    case, step = Case(), 1e-6
    value, grad, *_ = case.value_and_gradients(case.loss(name=name, alpha=1.0, temperature=temperature))
    hidden, moved = case.hidden.detach(), []
    for sign in (1, -1):
        case.hidden = hidden + sign * step * grad
        moved.append(case.loss(name=name, alpha=1.0, temperature=temperature).item())
    ratio = (moved[0] - moved[1]) / (2 * step) / grad.square().sum().item()
    assert ratio == pytest.approx(1, abs=1e-5)
    # a gradient without τ² under a value with it would be off by just that
    case.hidden = hidden.requires_grad_()
    unscaled = case.loss(name=name, alpha=1.0, temperature=temperature, scale_by_temperature=False)
    torch.testing.assert_close(value, temperature**2 * unscaled.detach())
    torch.testing.assert_close(grad, temperature**2 * torch.autograd.grad(unscaled, case.hidden)[0])


def test_cross_entropy_alone_is_torchs():
    case = Case()
    case.labels[[0, 3]] = IGNORED
    expected = case.value_and_gradients(F.cross_entropy(case.logits()[0], case.labels))
    assert_close(case.value_and_gradients(case.loss(alpha=0.0, chunk_size=2)), expected, 1e-9)
    alone = distillation_loss(
        case.hidden, Head(case.weight, case.bias), None, None, case.labels,
        name="cross_entropy", alpha=0.0, temperature=1.0,
    )  # fmt: skip
    assert_close(case.value_and_gradients(alone), expected, 1e-9)


@each_name
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_bf16_is_no_further_from_float64_than_plain_bf16(name, chunk_size, alpha):
    ours_off, plain_off = [], []
    for seed in range(4):  # one rounding may be lucky
        low = Case(n=48, v=200, dtype=torch.bfloat16, seed=seed)
        exact = low.to(torch.float64)
        expected = exact.value_and_gradients(exact.loss(name=name, alpha=alpha))
        ours = low.value_and_gradients(low.loss(name=name, alpha=alpha, chunk_size=chunk_size))

        # the plain computation: torch's operations on bf16 tensors all the way, the divergence as the definition has it
        student, teacher = low.logits()
        s, t = (z.div(2.0).log_softmax(-1) for z in (student, teacher))
        assert s.dtype == torch.bfloat16
        kd = 4 * loss.get(name)(s, t).mean()
        plain_bf16 = low.value_and_gradients(alpha * kd + (1 - alpha) * F.cross_entropy(student, low.labels))
        ours_off.append([(a.double() - x).square().sum() for a, x in zip(ours, expected, strict=True)])
        plain_off.append([(a.double() - x).square().sum() for a, x in zip(plain_bf16, expected, strict=True)])
    assert (torch.tensor(ours_off).sum(0) <= torch.tensor(plain_off).sum(0)).all()


def test_the_denominator_is_not_rounded_to_bf16():
    case = Case(dtype=torch.bfloat16)
    sums = case.value_and_gradients(case.loss(num_tokens=1))
    means = case.value_and_gradients(case.loss(num_tokens=1021))  # 1/1021 is 0.2 % off in bf16
    torch.testing.assert_close(means[1], (sums[1].double() / 1021).bfloat16(), rtol=0, atol=0)


# ---- masks and the denominator


def test_uncounted_positions_change_nothing():
    case = Case()
    case.labels[[1, 4]] = IGNORED
    with torch.no_grad():
        case.hidden[1] = case.teacher_hidden[4] = math.inf  # not even through 0·∞
    value, grad_hidden, *grads = case.value_and_gradients(case.loss(chunk_size=2))
    assert (grad_hidden[[1, 4]] == 0).all()
    kept = [0, 2, 3, 5, 6]
    few = case.to(torch.float64)
    few.hidden = case.hidden.detach()[kept].requires_grad_()
    few.teacher_hidden, few.labels = case.teacher_hidden[kept], case.labels[kept]
    assert_close([value, grad_hidden[kept], *grads], few.value_and_gradients(few.plain()), 1e-9)


@each_name
@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("num_tokens", [None, 0, 5])
def test_no_counted_position_is_exactly_0(name, n, num_tokens):
    case = Case(n=n)
    case.labels[:] = IGNORED
    value, *grads = case.value_and_gradients(case.loss(name=name, num_tokens=num_tokens))
    assert value.item() == 0
    assert [g.shape for g in grads] == [x.shape for x in case.leaves]
    assert all((g == 0).all() for g in grads)


# ---- a weight for each position and term


@each_name
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_weights_of_positions_are_those_of_the_plain_loop(name, alpha):
    case = Case()
    weights = {
        "kd": torch.tensor([1.0, 0, 2, 0.5, 1, 0, 3]).double(),
        "ce": torch.tensor([0.0, 1, 1, 2, 0, 0, 1]).double(),
    }
    expected = case.value_and_gradients(case.plain(name, alpha, weights=weights))
    for chunk_size in (2, N):
        got = case.value_and_gradients(weighted(case, weights, chunk_size, name, alpha))
        assert_close(got, expected, 1e-9)


def weighted(case, weights, chunk_size, name, alpha):
    answer = Answer(case.teacher_hidden, case.teacher_head)
    mix = Mix(name=name, alpha=alpha, temperature=2.0)
    head = Head(case.weight, case.bias, **case.how)
    return summed_loss(case.hidden, head, answer, case.labels, mix, chunk_size, weights)[0] / N


# ---- heads


@each_name
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_padding_rows_change_nothing(name, who):
    case = Case()
    expected = case.value_and_gradients(case.loss(name=name))
    wide = case.to(torch.float64)
    more = torch.full((4, d if who == "student" else D), 2.0).double()  # rows as a real checkpoint has them: not 0
    if who == "student":
        wide.weight = torch.cat([case.weight.detach(), more]).requires_grad_()
        wide.bias = F.pad(case.bias.detach(), (0, 4), value=1.0).requires_grad_()
    else:
        head = case.teacher_head
        wide.teacher_head = Head(torch.cat([head.weight, more]), F.pad(head.bias, (0, 4), value=1.0))
    value, grad_hidden, grad_weight, grad_bias = wide.value_and_gradients(wide.loss(name=name))
    assert_close([value, grad_hidden, grad_weight[:V], grad_bias[:V]], expected, 1e-12)
    assert (grad_weight[V:] == 0).all()
    assert (grad_bias[V:] == 0).all()


def test_rows_of_a_head_past_the_tokenizers_ids_are_padding(tmp_path):
    size = write_tokenizer(tmp_path)
    heads = {"teacher": Head(torch.zeros(size + 60, D)), "student": Head(torch.zeros(size + 8, d))}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    num_ids, foreign = common_ids(tokenizer, tokenizer)
    assert (check_heads(num_ids, heads), foreign) == (size, frozenset())


@each_name
@pytest.mark.parametrize("both", [True, False])
def test_excluded_tokens_are_finite(name, both):
    case = Case()
    case.labels.clamp_(max=V - 3)
    case.teacher_head.bias[-2:] = -math.inf
    if both:
        with torch.no_grad():
            case.bias[-2:] = -math.inf
    got = case.value_and_gradients(case.loss(name=name, chunk_size=2))
    assert all(x.isfinite().all() for x in got)
    if both:  # the same as without those tokens
        few = case.to(torch.float64)
        few.weight, few.bias = (x.detach()[: V - 2].requires_grad_() for x in (case.weight, case.bias))
        few.teacher_head = case.teacher_head.cut(V - 2)
        expected = few.value_and_gradients(few.plain(name))
        assert (got[2][-2:] == 0).all()
        assert_close([got[0], got[1], got[2][:-2], got[3][:-2]], expected, 1e-9)


def test_only_what_asks_for_a_gradient_gets_one():
    case = Case()
    expected = case.value_and_gradients(case.loss())
    case.weight.requires_grad_(False)
    value = case.loss()
    value.backward()
    assert case.weight.grad is None
    assert_close([value.detach(), case.hidden.grad, case.bias.grad], [expected[i] for i in (0, 1, 3)], 1e-12)
    with torch.no_grad():
        assert not case.loss().requires_grad


def test_mixed_precision_matches_heads_in_that_precision():
    case = Case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.value_and_gradients(case.loss())
    assert {x.dtype for x in got} == {torch.float32}
    expected = case.value_and_gradients(case.loss())
    assert_close(got, expected, 0.05)
    assert not torch.equal(got[0], expected[0])  # autocast did something


# ---- own losses, errors, words


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "kl"}, "choices: adaptive_kl, forward_kl"),
        ({"alpha": 1.5}, r"alpha is 1\.5 \(between 0 and 1\)"),
        ({"temperature": 0.0}, r"temperature 0\.0 \(above 0\)"),
        ({"name": "cross_entropy", "alpha": 0.5}, "it needs the teacher's hidden states, its head and a divergence"),
    ],
)
def test_errors_name_what_is_allowed(options, says):
    with pytest.raises(ValueError, match=says):
        Case().loss(**options)


@pytest.mark.parametrize(
    ("mix", "formula"),
    [
        (Mix(alpha=0.0), "loss = CE(student, labels)"),
        (Mix(alpha=0.25, temperature=2.0), "loss = 0.25·4·forward_kl(teacher, student; τ=2) + 0.75·CE(student, labels)"),
        (Mix(alpha=1.0, temperature=2.0, scale_by_temperature=False), "loss = forward_kl(teacher, student; τ=2)"),
        (
            Mix(name="jsd", alpha=1.0, options={"beta": 0.2, "how": "mine"}),
            "loss = jsd(teacher, student, beta=0.2, how=mine; τ=1)",
        ),
    ],
)  # fmt: skip
def test_formula(mix, formula):
    assert mix.formula() == formula


# ---- memory


def peak(compute):
    with PeakBytes() as measured:
        compute().backward()
    return measured.peak


def saves_memory(compute):
    """Whether 16 times the positions cost far less than the logits that they have."""
    v = 500
    few, many = (Case(n=n, v=v, dtype=torch.float32) for n in (32, 512))
    grown = peak(lambda: compute(many)) - peak(lambda: compute(few))
    return grown < (512 - 32) * v * 4 / 5  # bytes of the further logits of one model, a fifth of them


@each_name
def test_memory_does_not_grow_with_positions_times_vocabulary(name):
    assert saves_memory(lambda case: case.loss(name=name, chunk_size=16))
    assert not saves_memory(lambda case: case.loss(name=name, chunk_size=512))  # the measure sees whole chunks


# ---- whole models: micro-batches, processes, masks


END = 0  # ends a turn, ends a text, and pads: all three, as in GPT-2
ROWS = [  # very different numbers of counted tokens, one row with none to predict but the last
    Row("a", [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, END], [False] * 2 + [True] * 10),
    Row("b", [5, 6, END], [False, False, True]),
    Row("c", [16, 17, END, 18, END], [False, True, True, False, True]),
    Row("d", [9, 8, 7, 6, 5, 4, 3, END], [False] * 7 + [True]),
    Row("e", [3, END], [False, True]),
    Row("f", [21, 22, 23, 24, 25, 26, 27, 28, 29, END], [False] + [True] * 9),
    Row("g", [30, 31, 2], [True, False, True]),
    Row("h", [1, 2, 3, 4, 5, 6], [False, False, False, True, True, True]),
]
NUM_IDS = 32


def student_model(seed=0, kind="llama"):
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=NUM_IDS + 3, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=END, eos_token_id=END
        )
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=NUM_IDS + 3, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=16,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)  # fresh weights say nearly nothing
    return model


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def teacher():
    model = student_model(seed=1, kind="gpt2")
    return Teacher(lambda: model, Identity("w", "t", "fp64"))


def step_of(rows, micro_batch_size, rank=0, num_processes=1):
    batches = Batches(
        plain.Rows(rows), batch_size=len(rows), micro_batch_size=micro_batch_size, seed=0, shuffle=False, pad_id=END,
        rank=rank, num_processes=num_processes,
    )  # fmt: skip
    return next(iter(batches.steps(0, 1)))


def naive_step(model, teacher, alpha, temperature, rows=ROWS):
    """One row after the other, without padding, from the model's own logits; labels shifted by hand."""
    total, counted = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.tokens])
        student = model(input_ids=ids).logits[0, :, :NUM_IDS]
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits[0, :, :NUM_IDS]
        for t in range(1, len(row.tokens)):
            if row.counted[t]:
                s, q = student[t - 1][None], theirs[t - 1][None]
                kd = plain.divergence("forward_kl", s, q, temperature)[0]
                total = total + alpha * kd - (1 - alpha) * s[0].log_softmax(0)[row.tokens[t]]
                counted += 1
    (total / counted).backward()
    return [p.grad for p in model.parameters()], (total / counted).item()


def forward_backward(accelerator, module, step, teacher):
    """The terms' means and the gradient's norm of one step, as the training loop takes them."""
    training = object.__new__(Training)
    training.machine, training.teacher, training._saved_at = accelerator, teacher, 0.0
    training.module = training.objective = module
    training.config = SimpleNamespace(train=SimpleNamespace(max_grad_norm=None, save_minutes=None, log_every=1))
    training.state, training.max_steps = State(), 4
    return training.forward_backward(step, SimpleNamespace(signal=None))


def gradients(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("micro_batch_size", [8, 4, 1])
def test_any_split_gives_the_same_gradient(accelerator, teacher, monkeypatch, kind, alpha, micro_batch_size):
    monkeypatch.setattr(objective, "chunk_size_of", lambda head: 5)
    expected, expected_loss = naive_step(student_model(kind=kind), teacher.model, alpha, 2.0)
    model = student_model(kind=kind)
    module = Objective(model, NUM_IDS, Mix(alpha=alpha, temperature=2.0))
    step = step_of(ROWS, micro_batch_size)
    assert step.num_tokens == sum(sum(row.counted[1:]) for row in ROWS)
    assert (
        len({len(batch.counted_labels) for batch in step.micro_batches}) == len(step.micro_batches)
        or micro_batch_size == 1
    )
    terms, norm = forward_backward(accelerator, module, step, teacher if alpha > 0 else None)
    assert module.mix.loss(terms) == pytest.approx(expected_loss, rel=1e-9)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-9)
    assert_close(gradients(model), expected, 1e-9)


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_any_share_of_processes_gives_the_same_gradient(teacher, num_processes):
    # 7 rows do not divide: some processes get fewer, and one may get an empty micro-batch
    rows = ROWS[:7]
    expected, _ = naive_step(student_model(), teacher.model, 0.6, 2.0, rows)
    model = student_model()
    module = Objective(model, NUM_IDS, Mix(alpha=0.6, temperature=2.0))
    for rank in range(num_processes):
        step = step_of(rows, 2, rank, num_processes)
        for batch in step.micro_batches:
            total, _ = module(batch, teacher.answer(batch))
            (total / step.num_tokens).backward()  # gradients add up, as over processes
    assert_close(gradients(model), expected, 1e-9)


def test_a_batch_without_counted_positions_gives_zero_gradients(accelerator, teacher):
    model = student_model()
    module = Objective(model, NUM_IDS, Mix())
    empty = [Row("x", [5, 6, 7], [True, False, False]), Row("y", [5, 6], [False, False])]
    assert forward_backward(accelerator, module, step_of(empty, 1), teacher) == ({"kd": 0.0, "ce": 0.0}, 0.0)
    assert all((g == 0).all() for g in gradients(model))


def test_the_end_of_a_turn_counts_though_it_pads(teacher):
    batch = collate(ROWS, END)
    ends = (batch.counted_labels == END).sum().item()
    assert (
        ends == sum(token == END and c for row in ROWS for token, c in zip(row.tokens, row.counted, strict=True)) == 7
    )
    model = student_model()
    hidden = {}
    module = Objective(model, NUM_IDS, Mix(alpha=0.0))
    model.base_model.register_forward_hook(lambda _, __, output: hidden.update(last=output.last_hidden_state))
    ce = module(batch, None)[1]["ce"]
    # labels made the other way: shifted by one, −100 where nothing counts, the mask from lengths alone
    labels = torch.full((8, 12), IGNORED)
    for i, row in enumerate(ROWS):
        for t in range(1, len(row.tokens)):
            if row.counted[t]:
                labels[i, t - 1] = row.tokens[t]
    logits = model.get_output_embeddings()(hidden["last"])[..., :NUM_IDS]
    torch.testing.assert_close(ce, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    for wrong in (
        labels.masked_fill(labels == END, IGNORED),  # a mask from the pad id: the student never learns to stop
        labels.roll(1, dims=1),  # labels not shifted
        labels.roll(-1, dims=1),  # labels shifted twice
    ):
        other = F.cross_entropy(logits.flatten(0, 1), wrong.flatten(), reduction="sum")
        assert (other - ce).abs() > 0.5


# ---- any shape


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    n=st.integers(0, 6), v=st.integers(1, 12), chunk_size=st.integers(1, 7), seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.1, 1.0, 20.0]), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    name=st.sampled_from(sorted(plain.DEFINITIONS)), alpha=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]), bias=st.booleans(), excluded=st.integers(0, 3), hidden_rows=st.sets(st.integers(0, 5)),
)  # fmt: skip
def test_any_case_is_finite_and_the_same_in_any_chunk(
    n, v, chunk_size, seed, spread, dtype, name, alpha, temperature, bias, excluded, hidden_rows
):
    case = Case(n=n, v=v, dtype=dtype, seed=seed, spread=spread, bias=bias)
    for row in hidden_rows:
        case.labels[row : row + 1] = IGNORED
    case.teacher_head.bias[1 : 1 + excluded] = -math.inf
    options = {"name": name, "alpha": alpha, "temperature": temperature}
    whole = case.value_and_gradients(case.loss(**options, chunk_size=100))
    assert all(x.isfinite().all() for x in whole)
    assert whole[0] >= -1e-4
    parts = case.value_and_gradients(case.loss(**options, chunk_size=chunk_size))
    assert all(x.isfinite().all() for x in parts)
    # products of another shape may round otherwise: in bf16 by whole logits, and a token at the edge of
    # adaptive_kl's tail changes sides
    if dtype == torch.bfloat16 or (name == "adaptive_kl" and dtype == torch.float32):
        return
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}[dtype]
    for a, b in zip(parts, whole, strict=True):
        size = b.double().abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("num_rows", [0, 1, 6, 7, 23])
def test_chunks_are_all_rows_in_order_and_of_nearly_one_length(num_rows, size):
    lengths = [len(range(num_rows)[chunk]) for chunk in chunks_of(num_rows, size)]
    assert [i for chunk in chunks_of(num_rows, size) for i in range(num_rows)[chunk]] == list(range(num_rows))
    assert all(0 < length <= size for length in lengths)
    assert not lengths or max(lengths) - min(lengths) <= 1
    assert len(lengths) == -(-num_rows // size)


@pytest.mark.parametrize("how", [{}, {"softcap": 3.0}])
@pytest.mark.parametrize(("cache_bytes", "head_rows"), [(1, 2), (4 * V * 3, 7)])
def test_how_many_rows_a_block_has_changes_nothing(monkeypatch, how, cache_bytes, head_rows):
    """Softmaxes are taken a block of rows at a time, in place of the product; the head's gradient some ids at a time."""
    case = Case(n=13, **how)
    whole = case.value_and_gradients(case.loss(chunk_size=6))
    monkeypatch.setattr(objective, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(objective, "HEAD_ROWS", head_rows)
    assert_close(case.value_and_gradients(case.loss(chunk_size=6)), whole, 1e-12)


def test_merged_micro_batches_are_one_batch_of_all_rows(teacher):
    parts = [collate(ROWS[:2], END), collate(ROWS[2:3], END), collate(ROWS[3:], END)]
    together = merged(parts)
    whole = collate(ROWS, END)
    assert together.row_ids == whole.row_ids and together.row_digests == whole.row_digests
    assert together.num_counted == [n for part in parts for n in part.num_counted] == whole.num_counted
    assert torch.equal(together.counted_labels, whole.counted_labels)
    assert torch.equal(together.positions, whole.positions)
    torch.testing.assert_close(teacher.answer(together).hidden, teacher.answer(whole).hidden, rtol=0, atol=0)
    one_by_one = torch.cat([teacher.answer(part).hidden for part in parts])
    torch.testing.assert_close(teacher.answer(together).hidden, one_by_one, rtol=1e-9, atol=1e-12)


# ---- the compiled stage of a GPU, here on a CPU and without its compiler


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Do what a GPU does with a chunk, traced whole as it is there: nothing is looked at on the way."""
    torch.compiler.reset()
    traced = torch.compile(objective.gradient_in_place, dynamic=False, backend="eager", fullgraph=True)
    monkeypatch.setattr(loss, "_may_exclude", lambda _: True)
    monkeypatch.setattr(objective, "compiled", lambda: traced)
    monkeypatch.setattr(objective, "COMPILED_ON", {"cpu"})


@pytest.mark.parametrize(
    ("name", "options", "temperature", "how", "alpha"),
    [
        ("forward_kl", {}, 2.0, {}, 0.0),
        ("forward_kl", {}, 2.0, {}, 1.0),
        ("reverse_kl", {}, 1.0, {"softcap": 3.0, "scale": 0.5}, 0.4),
        ("jsd", {"beta": 0.2}, 2.0, {"bias": False}, 0.4),
        ("skew_forward_kl", {}, 4.0, {"softcap": 3.0}, 0.4),
        ("skew_reverse_kl", {"skew": 0.6}, 0.5, {"scale": 2.0}, 0.4),
    ],
)
def test_the_compiled_stage_and_the_blocks_agree(as_on_a_gpu, monkeypatch, name, options, temperature, how, alpha):
    exact = Case(**how)
    weights = {"kd": torch.rand(N).double(), "ce": torch.rand(N).double()}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        case = exact.to(dtype)
        results = []
        for devices in ({"cpu"}, set()):
            monkeypatch.setattr(objective, "COMPILED_ON", devices)
            whole = case.loss(name=name, alpha=alpha, temperature=temperature, chunk_size=3, **options)
            parts = weighted(case, weights, 4, name, alpha)
            results.append(case.value_and_gradients(whole) + case.value_and_gradients(parts))
        assert_close(*results, tolerance)


def test_one_compiled_function_serves_all_numbers_of_positions_and_weights(as_on_a_gpu):
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (7, 3, 12):
            Case(n=n).loss(alpha=0.05 * n, temperature=n / 2).backward()


def test_a_loss_that_cannot_be_compiled_is_computed_in_blocks(as_on_a_gpu, monkeypatch, caplog):
    def failing(*_):
        raise torch._dynamo.exc.InternalTorchDynamoError("no C compiler\nat all")

    monkeypatch.setattr(objective, "compiled", lambda: failing)
    case = Case()
    for _ in range(2):
        assert_close(case.value_and_gradients(case.loss()), case.value_and_gradients(case.plain()), 1e-9)
    assert [record.message for record in caplog.records] == [
        "the loss cannot be compiled here, and is slower without: no C compiler"
    ]
