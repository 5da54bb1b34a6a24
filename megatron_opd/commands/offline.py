"""Parts that commands on models and checkpoints share: ranks under torchrun that divide it, options of a layout."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_opd.core import torchrun

if TYPE_CHECKING:
    import torch

    from megatron_opd.config import ParallelConfig
    from megatron_opd.models.architecture import Architecture
    from megatron_opd.models.hub import Need

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Values of --dtype, with torch's names."""
_M_MMAP_THRESHOLD = -3  # as in malloc.h


@contextlib.contextmanager
def work() -> Iterator[None]:
    """Within the block, a process that is told to end removes what is half made, and rank 0 says errors for all."""
    before = signal.signal(signal.SIGTERM, _stop)
    _give_memory_back()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|megatron)\..*")
            yield
    except (ValueError, OSError):
        if torchrun.is_main():
            raise
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
        _leave_ranks()


def _stop(number: int, _: object) -> None:
    sys.exit(128 + number)


def _give_memory_back() -> None:
    """Let glibc return every large tensor to the system when it is freed: by default it learns to keep them, and a long
    conversion then grows by the holes between them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def join_ranks() -> None:
    """Under torchrun, let the ranks share the work (over gloo: nothing here needs a GPU). `work` ends it."""
    if torchrun.world_size() > 1:
        import datetime

        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))


def _leave_ranks() -> None:
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def examples(parser: argparse.ArgumentParser, text: str) -> None:
    """Show this text, as it is, at the end of the parser's --help."""
    parser.epilog, parser.formatter_class = text, argparse.RawDescriptionHelpFormatter


def add_layout(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--tp, --pp, --ep."""
    group = parser.add_argument_group("layout", purpose)
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        group.add_argument(f"--{name}", type=positive, default=1, metavar="N", help=f"{meaning}-parallel size")


def layout(arguments: argparse.Namespace, arch: Architecture, *, data: int = 1) -> ParallelConfig:
    """The layout of --tp, --pp and --ep. Raises ValueError when the model does not fit it."""
    from megatron_opd.config import ParallelConfig
    from megatron_opd.models.architecture import check_layout

    made = ParallelConfig(
        tensor=arguments.tp,
        pipeline=arguments.pp,
        data=data,
        expert=arguments.ep,
        sequence=bool(arch.num_experts) and arguments.tp > 1,
    )
    problems = check_layout(arch, made, what="the model")
    if problems:
        text = "\n".join(problems)
        for setting, option in (("tensor", "--tp"), ("pipeline", "--pp"), ("expert", "--ep")):
            text = text.replace(f"parallel.{setting}=", f"{option} ").replace(f"parallel.{setting}", option)
        raise ValueError(text)
    return made


def model_dir(text: str, need: Need = "weights") -> str:
    """The directory of a model that an option names, downloaded where it is a name of the hub."""
    from megatron_opd.models import hub

    return hub.directory(text, need, say=hub.to_stderr if torchrun.is_main() else lambda _: None)


def dtype(name: str | None) -> torch.dtype | None:
    """torch's type for a value of --dtype; None for none."""
    if name is None:
        return None
    import torch

    found: Any = getattr(torch, DTYPES[name])
    return found  # type: ignore[no-any-return]


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value
