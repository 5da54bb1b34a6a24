"""A GGUF file as a Hugging Face directory, unpacked once by transformers and kept beside the hub's cache."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from megatron_opd.models import output_dir

_LOCK_S = 3600.0
"""Longest wait for another process that unpacks the same file."""
_KEPT = {"F32": torch.float32, "F16": torch.float16}
"""Types that stay as they are; all others become bf16."""


def unpacked(path: Path, *, say: Callable[[str], None]) -> Path:
    """The directory of a GGUF file. Raises ValueError for one that transformers cannot read, with its reason."""
    from filelock import FileLock, Timeout

    out = place_of(path)
    if (out / "config.json").is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{out}.lock", timeout=_LOCK_S):
            if not (out / "config.json").is_file():
                say(f"unpacking {path} into {out}")
                make(path, out)
    except Timeout:
        raise ValueError(f"{path}: another process has been unpacking it for {_LOCK_S / 60:.0f} minutes") from None
    return out


def place_of(path: Path) -> Path:
    """Where the directory of a file is kept; another version of the file has another place."""
    from huggingface_hub import constants

    real = path.resolve()
    facts = real.stat()
    digest = blake2b(f"{real} {facts.st_size} {facts.st_mtime_ns}".encode(), digest_size=8).hexdigest()
    return Path(constants.HF_HOME) / "megatron-opd" / "gguf" / f"{path.stem}-{digest}"


def make(path: Path, out: Path, *, tell: Callable[[Any], None] = lambda model: None) -> None:
    """Write the model and the tokenizer of a GGUF file to `out`, which appears whole.

    `tell` gets the model before it is written. Matrices in float32 and float16 keep their type; quantised ones are
    unpacked to bf16.
    """
    try:
        import accelerate  # noqa: F401
        import gguf
    except ImportError as error:
        raise ValueError(f"{path}: {error}: pip install 'megatron-opd[gguf]' brings what reads GGUF files") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = output_dir.temporary(out)
    try:
        types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}
        read: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        model = _plain(read).to(_KEPT[types.pop()] if len(types) == 1 and types <= _KEPT.keys() else torch.bfloat16)
        tell(model)
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(made)
        output_dir.put_in_place(made, out)
    except OSError:
        raise
    except Exception as error:  # of the reader, transformers and the tokenizers library
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: transformers cannot read this GGUF file: {said}") from None
    finally:
        output_dir.discard(out)


def _plain(read: Any) -> Any:
    """The same model without the marks of a quantised one."""
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    return model
