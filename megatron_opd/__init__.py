"""On-policy distillation of large language models at cluster scale, on Megatron-core and SGLang.

For Python programs: `load_config`, `train`, `evaluate` and `read_run`, and the two losses (docs/api.md). Their imports
take seconds, so each is made when its name is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_opd.commands.python import RunTables, evaluate, load_config, read_run, train
    from megatron_opd.config import Config
    from megatron_opd.loss import distillation_loss, linear_distillation_loss

__version__ = "0.1.0"
__all__ = [
    "Config",
    "RunTables",
    "__version__",
    "distillation_loss",
    "evaluate",
    "linear_distillation_loss",
    "load_config",
    "read_run",
    "train",
]
_HOMES = {
    "Config": "megatron_opd.config",
    "distillation_loss": "megatron_opd.loss",
    "linear_distillation_loss": "megatron_opd.loss",
    **dict.fromkeys(("RunTables", "evaluate", "load_config", "read_run", "train"), "megatron_opd.commands.python"),
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that it is at home in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
