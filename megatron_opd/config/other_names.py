"""Unknown settings: which one was meant, by its spelling, by its place, or by what other trainers call it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_opd.config.schema import schema, section_of, setting_at

ELSEWHERE = {
    "optim.lr": "learning_rate",
    "optim.schedule": "lr_scheduler lr_scheduler_type scheduler lr_decay_style",
    "optim.warmup_steps": "warmup lr_warmup_steps lr_warmup_iters",
    "optim.clip_grad": "max_grad_norm grad_clip gradient_clip_val",
    "optim.weight_decay": "wd",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon adam_eps",
    "train.steps": "max_steps total_steps train_iters num_steps total_training_steps",
    "train.epochs": "ppo_epochs num_iterations",
    "train.micro_batch_size": "per_device_train_batch_size micro_batch_size_per_gpu",
    "train.eval_every": "eval_steps eval_interval eval_freq test_freq",
    "train.save_every": "save_steps save_interval save_freq",
    "train.keep_last": "save_total_limit keep_checkpoints",
    "train.resume_from": "resume_from_checkpoint resume load",
    "rollout.prompts_per_step": "batch_size train_batch_size rollout_batch_size global_batch_size prompts_per_batch",
    "rollout.samples_per_prompt": "num_generations n_samples_per_prompt group_size rollout_n num_samples",
    "rollout.max_new_tokens": "max_completion_length max_response_length max_tokens response_length",
    "rollout.engine": "backend inference_engine",
    "rollout.max_staleness": "max_off_policy_steps async_steps staleness",
    "data.max_prompt_tokens": "max_prompt_length",
    "parallel.tensor": "tp tensor_parallel_size tensor_model_parallel_size tp_size",
    "parallel.pipeline": "pp pipeline_parallel_size pipeline_model_parallel_size pp_size",
    "parallel.context": "cp context_parallel_size cp_size",
    "parallel.data": "dp data_parallel_size dp_size",
    "parallel.expert": "ep expert_parallel_size expert_model_parallel_size ep_size",
    "student.model": "model model_name model_name_or_path pretrained",
    "student.recompute": "gradient_checkpointing activation_checkpointing recompute_granularity",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.targets": "target_modules lora_target_modules",
    "loss.kind": "loss_type",
    "policy.kl_coef": "kl_loss_coef kl_penalty_coef",
    "policy.clip_low": "epsilon clip_range cliprange",
    "policy.clip_high": "epsilon_high",
    "run.dir": "output_dir save_dir default_local_dir",
    "log.wandb": "report_to use_wandb",
    "log.wandb_project": "project project_name",
}
"""Our settings, each with its names in TRL, verl, slime, ms-swift, NeMo-RL or Megatron-LM."""
_SHORT = 4
"""Letters of a name that half of may be those of anything."""


def meant_by(path: Sequence[str | int]) -> str:
    """The setting that was probably meant by an unknown one, with its whole name; empty where nothing is near."""
    *parents, name = path
    here, elsewhere = setting_at(parents).get("properties", {}), _elsewhere(str(name))
    for setting in elsewhere:
        if (last := setting.rpartition(".")[2]) in here:
            return _dotted(parents, last)
    # A setting of a list or of a section within one is meant there: `teachers.0.…` never answers for the student.
    if len(elsewhere) == 1 and len(parents) < 2:
        return elsewhere[0]
    near = _nearest(str(name), here)
    return _dotted(parents, near) if near else ""


def _elsewhere(name: str) -> list[str]:
    """The settings that other trainers call so; or else those that are called so here, in any section."""
    asked = "_".join(word for word in re.split(r"[^a-z0-9]+", name.lower()) if word)
    found = [setting for setting, names in ELSEWHERE.items() if asked in names.split()]
    return found or [setting for setting in _settings(schema()) if setting.rpartition(".")[2] == asked]


def _nearest(name: str, known: dict[str, Any]) -> str:
    cutoff = 0.5 if len(name) > _SHORT else 0.75
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")


def _dotted(parents: Sequence[str | int], name: str) -> str:
    return ".".join(map(str, [*parents, name]))


def _settings(node: dict[str, Any], name: str = "") -> Iterator[str]:
    """All settings that are not in lists, with their whole names."""
    node = section_of(schema(), node) or node if "$ref" in node else node
    if "properties" not in node and name:
        yield name
    for part, below in node.get("properties", {}).items():
        yield from _settings(below, f"{name}.{part}".lstrip("."))
