"""The form of a model's name: a repository of the Hugging Face hub, maybe with a revision and a GGUF file."""

from __future__ import annotations

import re

NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[^@:\s]+))?(:(?P<file>[^:\s]+\.gguf))?", re.ASCII)


def may_be_name(text: str) -> bool:
    """Whether a model's place has the form of a name; the disk is not asked, so every machine says the same."""
    return NAME.fullmatch(text) is not None or text.endswith(".gguf")
