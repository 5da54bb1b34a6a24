"""docs/first_run.md as a newcomer follows it: its shell blocks, one after the other, with an installed wheel."""

import re
import subprocess
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_opd.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/first_run.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
NAMES = {module.__name__.rpartition(".")[2].replace("_", "-") for modules in COMMANDS.values() for module in modules}
TIMEOUT_S = 600
_SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def called(block):
    """The commands of ours in a block."""
    return re.findall(r"^megatron-opd (\S+)", block, re.MULTILINE)


def save_teacher(directory):
    """A random Llama of as many layers as the page's, with a tokenizer of bytes and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, *_SPECIAL])}, merges=[]))
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>")
    whole.chat_template = _TEMPLATE
    whole.save_pretrained(directory)
    end = whole.eos_token_id
    tiny.save(tiny.build("llama", vocab_size=len(whole), num_hidden_layers=30, eos_token_id=end), directory)


@pytest.fixture
def shell(installed, tmp_path):
    """Runs a block in the newcomer's folder, which has the teacher and, with time, what the blocks make."""
    save_teacher(tmp_path / "models/teacher")

    def run(block):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            env=installed,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


def test_its_commands_are_there():
    assert {name for block in BLOCKS for name in called(block)} <= NAMES


def test_it_is_short():
    assert len(PAGE.splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_blocks_run(shell, tmp_path):
    said = {}
    for block in BLOCKS:
        if "sglang" not in block:
            said |= dict.fromkeys(called(block), shell(block))
    assert "trainer: 1 rank of" in said["check"]
    assert "6 of 6 steps" in said["report"]
    assert "my_reward:brief" in (tmp_path / "runs/first/config.yaml").read_text()
    assert (tmp_path / "runs/lora/adapter/adapter_model.safetensors").is_file()
    assert "chats" in said["eval"]


@pytest.mark.sglang
@pytest.mark.timeout(1800)
def test_its_block_about_sglang_runs(shell, tmp_path):
    """In the environment that `make sglang` has made, so the installer has nothing left to do."""
    (tmp_path / ".venv-sglang").symlink_to(ROOT / ".venv-sglang")
    before = BLOCKS[: next(i for i, block in enumerate(BLOCKS) if "run.yaml <<" in block) + 1]
    for block in before:
        shell(re.sub(r"^megatron-opd (train|check|inspect) .*\n", "", block, flags=re.MULTILINE))
    (block,) = (block for block in BLOCKS if "sglang" in block)
    assert "SGLang is in .venv-sglang" in shell(block)
    assert (tmp_path / "runs/served/hf/model.safetensors").is_file()
