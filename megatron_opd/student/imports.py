"""Keeps what Megatron imports from making temporary directories, which a run that is killed would leave behind."""

from __future__ import annotations

import sys
from types import FrameType


def without_wandb() -> None:
    """Megatron imports Weights & Biases wherever it is installed: it does not find it any more, while others do.

    To be called before the first import of megatron.core. Safe to call more than once.
    """
    if not any(isinstance(finder, _NoWandb) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoWandb())  # type: ignore[arg-type]  # it finds nothing, so it need not load


class _NoWandb:
    """A finder of modules that hides one from Megatron."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raises ModuleNotFoundError for what is hidden; others are left to the other finders."""
        if name == "wandb" and _importer(sys._getframe()).startswith("megatron."):
            raise ModuleNotFoundError(f"No module named '{name}' for Megatron", name=name)


def _importer(frame: FrameType | None) -> str:
    """The name of the module that has asked for the import."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name != __name__ and not name.startswith("importlib"):
            return name
        frame = frame.f_back
    return ""
