"""Adapters: what they train, what is kept of them, and what is saved."""

import dataclasses
import json
from contextlib import ExitStack

import plain
import pytest
import torch
import transformers as hf
from runs import config_of, log_of, run_here, signal_at, summary_of
from safetensors.torch import load_file, save_file
from standins import write_dialogpt, write_llama

from kdx import check
from kdx.adapter import add_adapter, dequantise, is_adapted, merge_adapter, trained
from kdx.cli import compose
from kdx.data.batches import collate
from kdx.distill import prepared
from kdx.errors import ConfigError, KdxError, ModelError
from kdx.evaluate import Judge
from kdx.run import report
from kdx.run.folder import Record
from kdx.run.launch import build_accelerator
from kdx.student import load_saved, load_student

LORA = ["adapter=lora", "adapter.r=4", "optim.lr=1e-2"]


@pytest.fixture
def made():
    """Build the parts of a run, and close them."""
    with ExitStack() as stack:
        yield lambda config: stack.enter_context(prepared(config, Record(), build_accelerator(config)))


def batch_of(training):
    return next(iter(training.batches.steps(0, 1)))


class Asked:
    signal = None
    is_agreed = False

    def check(self):
        pass


def moved(training):
    """Let every adapter do something."""
    torch.manual_seed(3)
    for tensor in trained(training.student).values():
        tensor.data += 0.1 * torch.randn_like(tensor)


# ---- words


def test_a_key_of_adapter_without_an_adapter_is_refused(place):
    with pytest.raises(ConfigError, match=r"adapter\.r.*Add adapter=lora"):
        config_of(place, "adapter.r=8")
    assert config_of(place).adapter.name == "none"


def test_the_group_has_its_rate_and_a_cut_student_its_own():
    small = compose(["student=dialogpt_small", "teacher=dialogpt_medium", "adapter=qlora"])
    assert (small.optim.lr, small.adapter.quantization) == (2e-4, "4bit")
    assert compose(["adapter=lora"]).optim.lr == 1.5e-3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapter=lora", "adapter.save=adapter", "student=cut", "student.path=null"], r"Set adapter\.save=merged"),
        (["adapter=qlora", "student=cut", "student.path=null"], r"Set adapter\.quantization=none"),
        (
            ["teacher.adapter=x", "teacher.quantization=4bit"],
            "cannot be merged: there is no teacher, it is quantised, or the student is cut from it",
        ),
    ],
)
def test_contradictions(place, words, says):
    with pytest.raises(ConfigError, match=says):
        config_of(place, *words)


def test_qlora_needs_a_gpu(place, made):
    with pytest.raises(KdxError, match="needs a GPU"):
        made(config_of(place, "adapter=qlora"))


@pytest.mark.parametrize("layer", ["lm_head", "wte", "nothing"])
def test_layers_that_the_loss_would_not_see_are_refused(place, made, layer):
    with pytest.raises(ConfigError, match=r"adapter\.target_modules"):
        made(config_of(place, "adapter=lora", f"adapter.target_modules=[{layer}]"))


# ---- what is trained


def test_adapters_begin_as_nothing_and_are_all_that_is_trained(place, made):
    plain_student, ours = made(config_of(place)), made(config_of(place, *LORA))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(plain_student.student.eval()(ids).logits, ours.student.eval()(ids).logits)
    assert all("lora_" in name for name in trained(ours.student))
    held = sum(len(group["params"]) for group in ours.optimizer.param_groups)
    assert held == len(trained(ours.student)) == 2 * 2 * 4  # A and B beside four layers of each block


def test_a_base_is_in_the_dtype_it_computes_in_and_adapters_in_fp32(place, made):
    for precision, base, adapters in (("bf16", torch.bfloat16, torch.float32), ("fp32", *[torch.float32] * 2), ("fp64", *[torch.float64] * 2)):  # fmt: skip
        student = made(config_of(place, *LORA, f"train.precision={precision}")).student
        assert student.dtype == base
        assert {tensor.dtype for tensor in trained(student).values()} == {adapters}


@pytest.mark.parametrize("size", [4, 1])
def test_gradients_are_those_of_the_whole_loss(place, made, size):
    words = ["train.precision=fp64", "teacher.precision=fp64", "loss.alpha=0.6"]
    training = made(config_of(place, *LORA, *words, f"train.micro_batch_size={size}", "train.max_grad_norm=null"))
    training.objective.eval()  # without dropout
    moved(training)
    batch = batch_of(training)
    training.forward_backward(batch, Asked())
    ours = {name: tensor.grad.clone() for name, tensor in trained(training.student).items()}

    def logits_of(model):
        outputs = [model(micro.input_ids, attention_mask=micro.attention_mask) for micro in batch.micro_batches]
        parts = zip(outputs, batch.micro_batches, strict=True)
        return torch.cat([output.logits.flatten(0, 1)[micro.positions] for output, micro in parts])

    labels, mix = torch.cat([micro.counted_labels for micro in batch.micro_batches]), training.objective.mix
    taught = logits_of(training.teacher.model)  # whose weights need no gradient
    total = plain.loss(logits_of(training.student), taught, labels, mix.name, mix.alpha, mix.temperature)
    expected = torch.autograd.grad(total, list(trained(training.student).values()))
    for grad, theirs in zip(ours.values(), expected, strict=True):
        torch.testing.assert_close(grad, theirs, rtol=1e-9, atol=1e-12)


def test_recomputed_activations_train_every_adapter(place, tmp_path):
    words = [*LORA, "adapter.save=adapter", "train.gradient_checkpointing=true", "train.max_steps=2"]
    assert run_here(config_of(place, *words), tmp_path / "run") == 0
    saved = load_file(tmp_path / "run" / "student" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    straight_run = config_of(place, *words, "train.gradient_checkpointing=false")
    assert run_here(straight_run, tmp_path / "other") == 0
    for name, tensor in load_file(tmp_path / "other" / "student" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, saved[name], rtol=1e-4, atol=1e-6)


TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPS = {"num_key_value_heads": 1, "head_dim": 8}
EYES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPES = {
    "llama": lambda: hf.LlamaConfig(**TINY, num_key_value_heads=1),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**TINY),
    "mixtral, fused experts": lambda: hf.MixtralConfig(**TINY, **GROUPS, num_local_experts=3),
    "gemma3, with eyes": lambda: hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TINY, **GROUPS),
        vision_config=hf.SiglipVisionConfig(**EYES, image_size=28, patch_size=14),
        image_token_index=39,
        mm_tokens_per_image=4,
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_any_text_model_has_adapters_and_takes_them_in(kind):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(SHAPES[kind]()).eval()
    names, ids = set(model.state_dict()), torch.arange(3, 20)[None]
    add_adapter(model, compose(["student=hf", "student.path=x", "adapter=lora"]).adapter, seed=0)
    assert trained(model) and not any("vision" in name for name in trained(model))
    for tensor in trained(model).values():
        tensor.data += 0.05 * torch.randn_like(tensor)
    model(ids).logits.logsumexp(-1).sum().backward()
    assert kind.startswith("mixtral") or all(tensor.grad.any() for tensor in trained(model).values())
    with torch.no_grad():
        before = model(ids).logits
        merge_adapter(model, torch.float32)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == names


# ---- what is left


def test_merged_is_the_adapter_in_every_measure(place, made):
    training = made(config_of(place, *LORA, "student.save_dtype=fp32"))
    moved(training)
    judge = Judge(training, Asked())
    before, untouched = judge(training.student).means(), made(config_of(place))
    training.as_saved()
    assert not is_adapted(training.student)
    assert not any("lora" in name or "base_layer" in name for name in training.student.state_dict())
    after = judge(training.student).means()
    assert before == pytest.approx(after, abs=1e-6, rel=1e-6)
    assert abs(after["kl"] - Judge(untouched, Asked())(untouched.student).means()["kl"]) > 1e-4


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_a_stopped_run_goes_on_bit_for_bit_and_keeps_megabytes(place, tmp_path, save):
    words = [*LORA, "adapter.lora_dropout=0.1", f"adapter.save={save}", "train.max_steps=6", "train.eval_every=2"]
    words += ["train.keep=best"]
    config, file = config_of(place, *words), "model" if save == "merged" else "adapter_model"
    assert run_here(config, tmp_path / "straight") == 0
    assert run_here(config, tmp_path / "stopped", signal_at(3)) == 143
    (kept,) = (tmp_path / "stopped" / "checkpoints").glob("step-*")
    weights = load_file(kept / "model.safetensors")
    assert all("lora_" in name for name in weights)
    assert {p.name for p in kept.iterdir()} & {"config.json"} == set()  # not a model folder: it lacks the base
    assert run_here(config, tmp_path / "stopped") == 0
    one, other = (load_file(tmp_path / run / "student" / f"{file}.safetensors") for run in ("straight", "stopped"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert summary_of(tmp_path / "straight") == summary_of(tmp_path / "stopped")


def test_a_merged_student_is_an_ordinary_model_and_is_measured_as_saved(place, tmp_path):
    config = config_of(place, *LORA, "train.max_steps=3")
    assert run_here(config, tmp_path / "run") == 0
    folder = tmp_path / "run" / "student"
    assert not (folder / "adapter_config.json").exists()
    student, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert student.dtype == torch.float16  # as the student came
    before, status = summary_of(tmp_path / "run"), tmp_path / "run" / "status.json"
    (tmp_path / "run" / "summary.json").unlink()  # what came after the student was lost
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "failed"}))
    assert run_here(config, tmp_path / "run") == 0
    assert "training is finished" in log_of(tmp_path / "run")
    assert summary_of(tmp_path / "run")["student"] == before["student"]
    assert before["untouched"]["num_parameters"] == before["student"]["num_parameters"] == student.num_parameters()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks
def test_an_adapter_folder_loads_with_peft_is_trained_further_and_teaches(place, tmp_path, made, monkeypatch):
    from peft import PeftModel

    words = [*LORA, "adapter.save=adapter", "train.max_steps=3", "student.save_dtype=fp32"]
    assert run_here(config_of(place, *words), tmp_path / "run") == 0
    folder = (tmp_path / "run" / "student").rename(tmp_path / "first")
    card = (folder / "README.md").read_text()
    assert "base_model_relation: adapter" in card and "library_name: peft" in card
    base = hf.AutoModelForCausalLM.from_pretrained(place / "student", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder).eval()

    further = config_of(place, "adapter=lora", "adapter.r=4", f"student.path={folder}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "base_model: student\n" in report.model_card(further, summary)  # not the adapter's folder
    again = made(further)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(again.student.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
        moved(again)
        assert (again.student(ids).logits - expected).abs().max() > 1e-2
        load_saved(folder, again.student)
        torch.testing.assert_close(again.student(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert again.student.peft_config["default"].r == 4
    assert len(trained(again.student)) == 16
    with pytest.raises(ConfigError, match=r"adapter\.r: is 16, but the student's adapter has 4"):
        made(config_of(place, "adapter=lora", f"student.path={folder}"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="Add adapter=lora"):
        made(config_of(place, "student.path='~/first'"))

    taught = made(config_of(place, f"teacher.path={place / 'student'}", f"teacher.adapter={folder}"))
    with torch.no_grad():
        torch.testing.assert_close(taught.teacher.model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    untaught = made(config_of(place, f"teacher.path={place / 'student'}"))
    assert taught.teacher.identity.teacher != untaught.teacher.identity.teacher
    wide = write_dialogpt(tmp_path / "wide", 2, 32, pickled=False)
    with pytest.raises(ModelError, match=r"teacher\.adapter: .* of another shape, .*trained with: .*student$"):
        made(config_of(place, f"teacher.path={wide}", f"teacher.adapter={folder}"))
    with pytest.raises(
        ModelError, match=r"cannot load the adapter .*\. Name the base that the adapter was trained with"
    ):
        made(config_of(place, f"teacher.path={write_llama(tmp_path / 'llama')}", f"teacher.adapter={folder}"))

    words = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": ["ln_f"]}
    (folder / "adapter_config.json").write_text(json.dumps(words))
    with pytest.raises(ModelError, match=r"is not LoRA alone .*Merge it"):
        made(further)

    file = folder / "adapter_model.safetensors"
    save_file({name.replace("lora_A", "lora_X"): tensor for name, tensor in load_file(file).items()}, file)
    (folder / "adapter_config.json").write_text(json.dumps(words | {"modules_to_save": None}))
    with pytest.raises(ModelError, match=r"does not fit its base: 16 tensors are missing, unknown or of another shape"):
        made(further)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of bitsandbytes, without its kernels for CPUs
def test_a_quantised_base_takes_its_adapters_in_as_it_was(place, tmp_path, monkeypatch):
    wide = write_llama(tmp_path / "wide", layers=2, width=64)
    config = config_of(place, f"student.path={wide}", "adapter=qlora")
    how = {"dtype": torch.bfloat16, "attn_implementation": None, "seed": 0}
    small = load_student(config.student, config.teacher, **how, quantization="4bit")
    whole = load_student(config.student, config.teacher, **how)
    for model in (small, whole):
        add_adapter(model, config.adapter, seed=0)
        torch.manual_seed(3)
        for tensor in trained(model).values():
            assert tensor.dtype == torch.float32
            tensor.data += 0.1 * torch.randn_like(tensor)
    of_layer = 64 * 64 / 2 + 64 * 64 / 64 * 4  # 4 bits a weight, and a scale in float32 for each 64
    assert check.bytes_of(small.model.layers[0].self_attn.q_proj.base_layer) == pytest.approx(of_layer, rel=0.1)
    assert check.bytes_of(small) < 0.8 * check.bytes_of(whole)
    monkeypatch.setattr("kdx.causal_lm.check_split", None)  # with kernels of a GPU it would not run in main memory
    dequantise(small, config.adapter, config.student)
    for model in (small, whole):
        merge_adapter(model, torch.bfloat16)
    ours, theirs = small.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    small.to("cpu").save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


# ---- what fits


@pytest.mark.parametrize("store", ["off", "on"])
@pytest.mark.parametrize("adapter", [[], ["adapter=lora"]], ids=["full", "lora"])
def test_the_peak_that_check_predicts_is_that_of_a_step(tmp_path, place, made, adapter, store):
    write_dialogpt(tmp_path / "wide", 3, 64, pickled=False)
    words = [f"teacher.store={store}", "train.precision=bf16", "train.batch_size=8", "data.shuffle=false"]
    config = config_of(place, *words, f"student.path={tmp_path / 'wide'}", *adapter)
    training = made(config)
    if store == "on":
        for rows in (training.data.train, training.data.held_out):
            training.teacher.answer(collate(list(rows), 0))
        training.teacher.store.flush()
        training = made(config)
        assert not training.teacher.is_loaded
    rows, pad, kept = training.data.train, training.batches.pad_id, check.kept_in_memory(training)
    longest = [rows[int(i)] for i in rows.lengths.argsort(kind="stable")[-8:]]
    estimates = {size: check.predicted(check.rises(training, size, 1e12), size) for size in (4, 1)}
    for size, estimate in estimates.items():
        micro = [collate(longest[i : i + size], pad) for i in reversed(range(0, 8, size))]
        batch = dataclasses.replace(batch_of(training), micro_batches=micro)
        training.optimizer.state.clear()  # as if it was the first step
        with check.PeakBytes() as counted:
            for _ in range(3):
                training.objective.train()
                terms, norm = training.forward_backward(batch, Asked())
                training.update(batch, terms, norm)
        there = kept["weights"] + kept["teacher"]
        assert sum(kept.values()) + estimate == pytest.approx(there + counted.peak, rel=0.1)
