"""Tiny random Hugging Face models, rollouts and configs for tests. Ranks never import transformers through it."""

import random
import shutil
from dataclasses import replace

import torch

from megatron_opd import config as c
from megatron_opd.core.types import MicroBatch, Prompt, Rollout

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "head_dim": 16, "max_position_embeddings": 16384},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},  # not hidden_size / num_attention_heads
    "qwen3_tied": {"head_dim": 6, "tie_word_embeddings": True},
}
MIXTURE = {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def hf_config(family, **changes):
    import transformers

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3_moe": "Qwen3Moe"}
    name = names.get(family, "Qwen3")
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 2,
        "attn_implementation": "eager",
        **({"experts_implementation": "eager"} if "moe" in family else {}),
    }
    return getattr(transformers, f"{name}Config")(**{**sizes, **FAMILIES.get(family, MIXTURE), **changes})


def build(family, *, seed=0, **changes):
    """A model whose norms and biases are not the ones and zeros that would hide a wrong mapping."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name or "head" in name else 0.15))
    return model.eval()


def save(model, directory, **kwargs):
    model.save_pretrained(directory, **kwargs)
    return str(directory)


def save_with_tokenizer(source, directory, *, vocab_size):
    """A tiny Qwen3 of another vocabulary beside the tokenizer files of the directory `source`; where it is."""
    save(build("qwen3", vocab_size=vocab_size, max_position_embeddings=64), directory)
    for file in source.iterdir():
        if "token" in file.name:
            shutil.copy(file, directory)
    return directory


def rollouts(*, count=8, vocab_size=90, seed=0, sources=("a", "b"), longest_prompt=9, longest_response=7):
    """Rollouts of unequal lengths with made-up behaviour log-probabilities, sources in turn."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        prompt = tuple(draw.randrange(vocab_size) for _ in range(draw.randint(2, longest_prompt)))
        response = tuple(draw.randrange(vocab_size) for _ in range(draw.randint(1, longest_response)))
        made.append(rollout(prompt, response, source=sources[i % len(sources)], index=i, draw=draw))
    return made


def rollout(prompt, response, *, learnt=None, source="a", index=0, draw=None, **changes):
    """One trajectory, all of whose tokens behind the prompt are learnt where `learnt` does not say which."""
    draw, learnt = draw or random.Random(0), tuple(bool(x) for x in learnt or [1] * len(response))
    return Rollout(
        prompt=Prompt(source=source, index=index, text="", token_ids=tuple(prompt)),
        token_ids=tuple(response),
        learnt=learnt,
        logps=tuple(-draw.random() * 5 for _ in range(sum(learnt))),
        versions=(0,) * sum(learnt),
        **{"sample": 0, "finish": "stop", **changes},
    )


def masked(rollout, seed=0):
    """The rollout with a random mask that learns one token at least."""
    draw = random.Random(f"{seed}/{rollout.token_ids}")
    learnt = [draw.random() < 0.5 for _ in rollout.token_ids]
    learnt[draw.randrange(len(learnt))] = True
    logps = tuple(x for x, is_learnt in zip(rollout.logps, learnt, strict=True) if is_learnt)
    return replace(rollout, learnt=tuple(learnt), logps=logps, versions=(0,) * len(logps))


def micro_batch(targets, behaviour_logp, weights, teachers, **changes):
    """A micro-batch of one sequence, for tests of the loss: neutral weights, and position t predicts token t."""
    num_tokens = len(targets)
    neutral = {
        "tokens_BS": torch.zeros(1, num_tokens, dtype=torch.long),
        "lengths": (num_tokens,),
        "is_packed": False,
        "row_length": num_tokens,
        "sequence_T": torch.zeros(num_tokens, dtype=torch.long),
        "predicted_at_T": torch.arange(num_tokens),
        "weights_T": {"distill": torch.ones(num_tokens)},
        "on_policy_T": torch.ones(num_tokens, dtype=torch.bool),
    }
    told = {"targets_T": targets, "behaviour_logp_T": behaviour_logp, "weights_TN": weights, "teachers": teachers}
    return MicroBatch(**{**neutral, **told, **changes})


def config(student_dir, teachers, **sections):
    """A run's config; `sections` hold the settings that differ, e.g. loss={"beta": 0.0}."""
    made = {
        "parallel": c.ParallelConfig,
        "lora": c.LoraConfig,
        "loss": c.LossConfig,
        "policy": c.PolicyConfig,
        "rl": c.RLConfig,
        "rollout": c.RolloutConfig,
        "answers": c.AnswersConfig,
        "optim": c.OptimConfig,
        "train": c.TrainConfig,
    }
    given = {"train": {"steps": 10, "micro_batch_size": 2}, **sections}
    return c.Config(
        run=c.RunConfig(dir="unused"),
        student=c.StudentConfig(model=student_dir, **given.pop("student", {})),
        teachers=[c.TeacherConfig(**teacher) for teacher in teachers],
        data=c.DataConfig(train=[c.SourceConfig(name=name, path="") for name in ("a", "b")]),
        **{name: made[name](**settings) for name, settings in given.items()},
    )
