"""Where torch's compiler keeps its cache. Only the standard library: it is to be said before torch is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

_SETTING = "TORCHINDUCTOR_CACHE_DIR"


def keep_out_of_temporary(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have it in the user's cache, unless the environment names a place: torch takes one below the temporary directory
    and makes it as soon as it is imported, so that every run leaves something behind there."""
    if _SETTING in environ:
        return
    try:
        directory = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchinductor"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none that may be written to
        return
    if os.access(directory, os.W_OK | os.X_OK):
        environ[_SETTING] = str(directory)
