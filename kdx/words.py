"""What people type: other tools' names for kdx's keys, old names, and the nearest key to a typo."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path

CONF = Path(import_module("kdx.conf").__path__[0]).resolve()
CHOICES = ("teacher", "student", "data", "loss", "optim", "adapter", "rollout", "experiment", "recipe", "pair")
OPTIONAL = CHOICES[-3:]  # groups of which nothing may be chosen
RENAMED = {"train.eval_every": "eval.every", "data.system": "data.system_prompt"}  # old names that still work

# kdx's name: the names that it has in HF Trainer, TRL, peft, axolotl, Lightning and papers.
MEANT = """
loss.alpha: distillation_weight distill_weight kd_alpha kd_weight kd_ratio alpha_kd
loss.temperature: kd_temperature distillation_temperature tau
loss=NAME: loss_fn loss_type divergence kd_loss
loss=forward_kl: loss=kl loss=kld loss=kl_div loss=fkl loss=kd
loss=cross_entropy: loss=ce loss=sft
loss=jsd: loss=js loss=gkd
loss.beta, with loss=jsd: beta
optim.lr: learning_rate base_lr max_lr
optim=NAME: optimizer optim_name
optim=adamw: optim=adamw_torch optim=adamw_torch_fused optim=adam
optim=adamw_8bit: optim=adamw_bnb_8bit optim=adamw8bit
optim=paged_adamw_8bit: optim=paged_adamw optim=paged_adamw8bit
optim.betas: adam_beta1 adam_beta2
optim.eps: adam_epsilon
optim.schedule: lr_scheduler_type lr_scheduler lr_schedule
optim.schedule_options: lr_scheduler_kwargs
optim.warmup_steps (below 1 it is a share of all steps): warmup_ratio num_warmup_steps warmup
train.micro_batch_size: per_device_train_batch_size per_device_eval_batch_size
train.micro_batch_size (a step accumulates train.batch_size rows): gradient_accumulation_steps accumulate_grad_batches
train.batch_size: train_batch_size global_batch_size effective_batch_size
train.epochs: num_train_epochs num_epochs max_epochs
train.max_steps: num_train_steps total_steps num_steps
train.max_grad_norm: gradient_clip_val grad_clip clip_grad_norm
train.compile: torch_compile
train.log_every: logging_steps log_every_n_steps
train.save_every or train.save_minutes: save_steps save_strategy
train.keep_checkpoints (the two newest are kept until a run is done): save_total_limit save_only_model
train.keep=best (the best is by eval.metric): load_best_model_at_end metric_for_best_model greater_is_better
train.early_stopping.patience: early_stopping_patience
train.precision=bf16: bf16
train.precision=fp16: fp16
train.precision: mixed_precision dtype student.precision student.dtype student.torch_dtype
eval.every: eval_steps eval.steps eval_strategy evaluation_strategy val_check_interval check_val_every_n_epoch
experiment=demo: fast_dev_run
teacher=none: teacher=null
teacher=hf teacher.path: teacher_spec teacher_model_name_or_path teacher_model teacher.name teacher.model_name_or_path
teacher.precision: torch_dtype teacher_dtype teacher.dtype
teacher.quantization=8bit: load_in_8bit
teacher.quantization=4bit, or adapter=qlora for the student: load_in_4bit
student=hf student.path: student_module model_name_or_path student_model model_name model_id model student.name
student.layers, with student=cut: student.num_layers student.num_hidden_layers
student.attn_implementation: flash_attention use_flash_attention_2 flash_attn
data.max_length: max_seq_length max_seq_len sequence_len cutoff_len block_size
data=NAME data.path: train_path dataset_name dataset_path dataset datasets train_file
data=text data.text_column: dataset_text_field
data.validation: val_set_size validation_file eval_dataset test_size max_eval_samples
data.take: max_train_samples max_samples
data.assistant_only: train_on_inputs assistant_only_loss completion_only_loss
data.shuffle (it groups rows by length): group_by_length
data.template_options: chat_template_kwargs enable_thinking reasoning_effort
adapter=lora: use_peft use_lora peft_config lora adapter=peft
adapter=lora adapter.r: lora_r lora_rank adapter.rank
adapter=lora student.path: lora_model_dir
adapter=qlora: use_qlora qlora
rollout.share, with rollout=student: lmbda on_policy_ratio rollout.fraction
rollout=student: on_policy rollout=on_policy rollout=true
rollout=teacher: seq_kd rollout=seqkd rollout=off_policy
rollout.max_new_tokens: max_completion_length
tracking.mode: report_to use_wandb logger wandb
tracking.project: wandb_project project_name
tracking.name: run_name wandb_name experiment_name
hydra.run.dir: output_dir out_dir save_dir default_root_dir logging_dir
run.resume: resume_from_checkpoint ckpt_path checkpoint
sweep.workers=2: n_jobs hydra/launcher=parallel hydra/launcher=joblib
No equivalent (rows are grouped by length, so packing would save little): packing sample_packing pad_to_sequence_len
No equivalent (several GPUs are used through torchrun or accelerate launch): deepspeed fsdp fsdp_config strategy ddp
No equivalent (nothing is uploaded; student/ is in the run folder): push_to_hub hub_model_id hub_token
No equivalent (a GPU is used if there is one; choose with CUDA_VISIBLE_DEVICES): device devices gpus no_cuda accelerator
No equivalent (the loss is distillation and cross-entropy alone): label_smoothing_factor neftune_noise_alpha
"""
FOREIGN: dict[str, str] = {}  # word → hint
for _meant, _, _words in (line.rpartition(": ") for line in MEANT.strip().splitlines()):
    _hint = _meant if _meant.startswith("No equivalent") else f"Did you mean {_meant}?"
    FOREIGN |= dict.fromkeys(_words.split(), _hint)


def hint_for(key: str, known: Sequence[str]) -> str:
    """Answer a dotted key that does not exist: another tool's word, the same name in another group, or a typo."""
    group, last = key.split(".")[0], key.rsplit(".", 1)[-1]
    if group in OPTIONAL:
        return f'Begin the YAML of that {group} with the line "# @package _global_"'
    same = [name for name in known if name.endswith(f".{last}")]
    foreign = [word for word in (key, last, *([] if same else [group])) if word in FOREIGN]
    if foreign:
        return FOREIGN[foreign[0]]
    names = {name.removeprefix(f"{group}."): name for name in known}
    near = get_close_matches(key, same, n=1, cutoff=0.7) or same  # the group is mistyped, or is another one
    near = near or [names[name] for name in get_close_matches(key.removeprefix(f"{group}."), names, n=1, cutoff=0.7)]
    near = near or [f"{choice}=NAME" for choice in get_close_matches(last, CHOICES, n=1, cutoff=0.7)]
    return f"Did you mean {' or '.join(near)}?" if near else "See all keys with: python -m kdx --cfg job"


@cache
def new_name(key: str) -> str:
    """Return the name that a key has now, and say so once if it was renamed."""
    if key in RENAMED:
        print(f"kdx: {key} is called {RENAMED[key]} now", file=sys.stderr)
    return RENAMED.get(key, key)


def key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def groups_in(config_dir: str | None = None) -> dict[str, list[str]]:
    """Find the config groups of conf/ and of one's own folder, and the options of each."""
    groups: dict[str, set[str]] = {}
    for root in [CONF, *([Path(config_dir)] if config_dir else [])]:
        for file in root.glob("*/**/*.yaml"):
            group, *option = file.relative_to(root).with_suffix("").parts
            groups.setdefault(group, set()).add("/".join(option))
    return {name: sorted(options) for name, options in sorted(groups.items()) if name != "hydra"}
