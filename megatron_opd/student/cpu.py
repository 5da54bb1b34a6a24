"""The one CPU shim: lets megatron-core run its real code on gloo ranks without a GPU.

`enable()` must be called before the first import of megatron.core and does nothing where CUDA exists. megatron-core
names CUDA in about thirty places (device="cuda" arguments, torch.cuda.current_device(), type strings compared with
"torch.cuda.FloatTensor", CUDA random states); here those mean the CPU and its generator. One defect of megatron-core
is mended too, on any device without Transformer Engine or NVIDIA's apex: DistributedOptimizer over torch's Adam can
be saved but not loaded (`_mend_distributed_optimizer`).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_opd.core import stacks
from megatron_opd.student import imports

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_ALWAYS_KEPT = 1 << 30, 32 << 20
"""Bytes of a tensor; older versions of glibc take no more than the second."""
_MEGATRON = os.path.join("megatron", "core") + os.sep


def enable() -> None:
    """Make megatron.core importable and runnable here. Safe to call more than once."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    for logger, line in stacks.here().idle_talk:
        logging.getLogger(logger).addFilter(_Other(line))
    imports.without_wandb()
    if not torch.cuda.is_available() and torch.cuda.current_device is not _current_device:
        _redirect_cuda()
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # it asks `is not None` of a name that it only has with Transformer Engine
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _mend_distributed_optimizer(distrib_optimizer.DistributedOptimizer)


@dataclass(frozen=True)
class _Other:
    """A filter of logs that lets all lines pass but those with one beginning. Equal ones count once for a logger."""

    line: str

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep a record."""
        return not record.getMessage().startswith(self.line)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, where tensors are in host memory.

    glibc returns large tensors to the system, and the next one's pages are made anew; a product that writes into fresh
    pages was seen to take three times as long. Tensors beyond 1 GiB (or 32 MiB) are still returned.
    """
    if torch.cuda.is_available():
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL("libc.so.6")
        # The second option alone would make things worse: it ends the growth of the first by itself.
        if any(library.mallopt(_M_MMAP_THRESHOLD, size) for size in _ALWAYS_KEPT):
            library.mallopt(_M_TRIM_THRESHOLD, _ALWAYS_KEPT[0])


class _Stream:
    """The one order in which a CPU does things."""

    def wait_event(self, event: Any) -> None:
        """Nothing: what was asked for before is done."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing, likewise."""


_STREAM = _Stream()


def _current_device() -> torch.device:
    return _CPU


def _redirect_cuda() -> None:
    # Megatron decorates small functions with torch.compile, which needs a C++ toolchain on the user's machine and
    # costs minutes on the first step; on a CPU there is nothing to win.
    torch._dynamo.config.disable = True
    generator = torch.default_generator
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    torch.cuda.current_stream = lambda *_, **__: _STREAM  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_, **__: generator.get_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, *_, **__: generator.set_state(state)  # type: ignore[assignment]
    torch.cuda.manual_seed = generator.manual_seed  # type: ignore[assignment]
    _CudaMeansCpu().__enter__()  # for the life of the process

    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *_, **__: generator.get_state()
    random._set_cuda_rng_state = lambda state, *_, **__: generator.set_state(state)
    logging.getLogger(random.__name__).addFilter(
        # True by construction here: both names are the one CPU generator.
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in torch calls to the CPU; costs about 3 microseconds a call."""

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):  # which is for faster copies to a GPU
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str) and _called_from_megatron():
            # The optimizers sort parameters by comparing with "torch.cuda.FloatTensor" and its siblings.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _called_from_megatron() -> bool:
    return _MEGATRON in sys._getframe(2).f_code.co_filename


def _mend_distributed_optimizer(cls: Any) -> None:
    """Three defects of megatron-core 0.16.1's DistributedOptimizer over torch.optim.Adam, all in saving and loading.

    1. state_dict() asserts on an optimizer that has not stepped yet, as it is when a checkpoint is to be loaded;
    2. loading copies "step" into parameter tensors and raises KeyError;
    3. after loading all parameters share one `step` tensor, which Adam then advances once per parameter.
    """
    if getattr(cls, "_opd_mended", False):
        return
    original_state_dict, original_load = cls.state_dict, cls.load_state_dict

    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {"step": torch.zeros(()), **zeros}
        return original_state_dict(self)

    def load_state_dict(self: Any, state: Any) -> None:
        original_load(self, state)
        for slot in self.optimizer.state.values():
            slot["step"] = slot["step"].clone()

    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main, **self.optimizer.state[main]}.items():
            if key in tensors:
                target.copy_(tensors[key])

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict
    cls._set_main_param_and_optimizer_states = set_states
    cls._opd_mended = True
