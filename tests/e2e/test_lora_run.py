"""Runs with adapters as a user has them: they learn, survive being killed, and leave files that others can read."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from program import MODELS, ROOT, assert_user_error, environment, exported, opd, rows, started, train
from safetensors.torch import load_file

CONFIG = "examples/lora.yaml"
FOUR_RANKS = ["parallel.tensor=2", "parallel.pipeline=2"]
SIX_STEPS = ["train.steps=6", "train.save_every=3", "optim.schedule=cosine", "optim.lr=1e-2", "lora.rank=4"]
SOME = "lora.targets=[q_proj, v_proj, o_proj, up_proj, down_proj]"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps on four ranks without an interruption."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = train(run_dir, *FOUR_RANKS, *SIX_STEPS, SOME)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def copy_of_whole(whole, tmp_path):
    """After step 3."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    for name in ("checkpoints/step_00000006", "hf", "adapter"):
        shutil.rmtree(copy / name)
    return copy


def adapters(run_dir):
    return load_file(run_dir / "adapter/adapter_model.safetensors")


def base():
    return load_file(MODELS / "student/model.safetensors")


def convert(command, *arguments):
    done = subprocess.run(
        [sys.executable, "tools/convert_checkpoint.py", command, *map(str, arguments)],
        cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), timeout=120, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_run_ends_bitwise_where_an_uninterrupted_one_ends(whole, tmp_path):
    with started(tmp_path, *FOUR_RANKS, *SIX_STEPS, SOME) as run:
        run.wait_for_step(4)
        run.kill_everyone()
    done = train(tmp_path, *FOUR_RANKS, *SIX_STEPS, SOME)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3" in done.stderr
    assert rows(tmp_path) == rows(whole)
    assert exported(tmp_path) == exported(whole)
    mine, theirs = adapters(tmp_path), adapters(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.tensor=1", "parallel.data=2"], ids=["TP1", "DP2"])
def test_another_layout_continues_to_the_same_numbers(whole, copy_of_whole, layout):
    done = train(copy_of_whole, *SIX_STEPS, SOME, layout)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3" in done.stderr
    for mine, theirs in zip(rows(copy_of_whole), rows(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for name, tensor in adapters(copy_of_whole).items():
        torch.testing.assert_close(tensor, adapters(whole)[name], rtol=1e-4, atol=1e-5)


def test_other_adapters_cannot_continue(copy_of_whole):
    done = train(copy_of_whole, *SIX_STEPS, SOME, "lora.rank=8")
    assert_user_error(done, "step_00000003", "its lora.rank is 4, by lora.rank it is 8 now; set lora.rank back")


def test_exported_files_are_the_base_and_what_the_adapters_add(whole):
    config = json.loads((whole / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 32.0, "LORA")
    assert config["target_modules"] == ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    found, merged = adapters(whole), load_file(whole / "hf/model.safetensors")
    changed = set()
    for name, weight in base().items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" not in found:
            assert torch.equal(merged[name], weight.float())
            continue
        changed.add(name.split(".")[-2])
        delta = 32.0 / 4 * found.pop(f"{stem}B.weight") @ found.pop(f"{stem}A.weight")
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(merged[name], weight.float() + delta, atol=1e-6, rtol=0)
    assert found == {}
    assert changed == set(config["target_modules"])


@torch.no_grad()
def test_peft_reads_the_adapters_and_merges_them_to_the_export(whole):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODELS / "student", dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(whole / "hf", dtype=torch.float32).eval()
    adapted = peft.PeftModel.from_pretrained(model, whole / "adapter").eval()
    ids = torch.arange(64).reshape(2, 32) % 16
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-5)
    theirs = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=0)


def test_checkpoint_converts_to_the_merged_model(whole, tmp_path):
    checkpoint = whole / "checkpoints/step_00000006"
    said = convert("inspect", checkpoint)
    assert re.search(r"adapters +LoRA of rank 4, alpha 32: q_proj, v_proj", said)
    convert("megatron-to-hf", "--checkpoint", checkpoint, "--out", tmp_path / "hf")
    mine, theirs = load_file(tmp_path / "hf/model.safetensors"), load_file(whole / "hf/model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-6, rtol=0)
    assert "the models are the same" in convert("verify", tmp_path / "hf", checkpoint)


def test_unmerged_checkpoint_is_not_taken_for_a_model(whole, ranks):
    layout = {"tensor": 1}
    assert ranks.run(1, refusal, whole / "checkpoints/step_00000006", **layout) == [True]


def refusal(parallel, checkpoint):
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import source
    from megatron_opd.student.model import build_gpt, transformer_config

    arch = read_architecture(MODELS / "student")
    model = build_gpt(arch, transformer_config(arch, parallel, dtype=torch.float32), parallel)
    with pytest.raises(ValueError, match="has LoRA adapters beside its weights; merge them"):
        source.load(model, arch, checkpoint, parallel)
    return True


@pytest.mark.slow
def test_adapters_learn(tmp_path):
    """The example, its first steps: accuracy and distance to the teachers, as its head promises for all of it."""
    short = ["train.steps=15", "train.eval_every=15", "train.save_every=0"]
    done = opd("train", CONFIG, f"run.dir={tmp_path}", *short)
    assert done.returncode == 0, done.stderr
    evaluated = [row for row in rows(tmp_path) if "eval/accuracy/all" in row]
    before, after = evaluated
    assert before["eval/accuracy/all"] < 0.1
    assert after["eval/accuracy/all"] > 0.6
    assert after["eval/kl/ensemble"] < before["eval/kl/ensemble"] / 3
    steps = [row for row in rows(tmp_path) if "mismatch/kl" in row]
    assert len(steps) == 15
    assert all(abs(row["mismatch/kl"]) < 1e-4 for row in steps)  # the engine samples from the merged weights
