"""Reads the pickles of a torch_dist checkpoint with nothing but the classes that such checkpoints hold.

A pickle is a program: it names functions and calls them. Megatron's format has three kinds: `.metadata`; `common.pt`
and the entries of *.distcp files that are no tensors, in torch's own container; and the FP8 state of Transformer
Engine's layers within such entries. Each is read here with a list of classes, before or in place of the code that would
run whatever it finds.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

_DCP = "torch.distributed.checkpoint"
_PLANNER = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
_METADATA = (
    *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
    *("TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
)
_IN_METADATA = frozenset(
    [
        *((f"{_DCP}.metadata", name) for name in _METADATA),
        *((f"{_DCP}.planner", name) for name in _PLANNER),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        *(("torch.distributed._shard.sharded_tensor.metadata", n) for n in ("TensorProperties", "MEM_FORMAT_ENCODING")),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        *(("pathlib", name) for name in ("PosixPath", "PurePosixPath")),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    ]
)
_MEGATRONS_OWN = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): SavePlan,
}
"""What some versions of megatron-core wrote in place of torch's classes; read as those, without Megatron."""
_IN_FP8_STATES = frozenset(
    [
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("_codecs", "encode"),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    ]
)
_STORAGES = (
    ("torch.storage", "_load_from_bytes"),  # itself a torch.load without limits
    ("megatron.core.safe_globals", "safe_load_from_bytes"),  # what some versions of megatron-core put in its place
)
_RECIPES = "transformer_engine.common.recipe"


class Untrusted(ValueError):
    """A pickle names something that checkpoints have no use for."""


def _untrusted(where: object, name: str) -> Untrusted:
    return Untrusted(
        f"{where} asks for {name}, which no checkpoint needs: whoever made this directory may want to run code here; do"
        " not trust it"
    )


def metadata(file: IO[bytes], where: object) -> Metadata:
    """The `.metadata` of a checkpoint; errors call it `where`. Raises ValueError, also for what is damaged."""
    try:
        found = _Unpickler(file, where, _of_metadata).load()
    except (Untrusted, OSError):
        raise
    except Exception as error:  # a damaged pickle can make Python raise nearly everything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{where} is damaged or cut short: {reason}") from None
    _check(found, where)
    return found


def container(file: str | IO[bytes], where: object) -> Any:
    """The contents of a file of torch.save, on the CPU: plain data, tensors, classes that torch or Megatron calls safe.

    Raises ValueError, also for what is damaged; OSError where it cannot be read.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise explained(error, where) from None


def explained(error: Exception, where: object) -> ValueError:
    """What torch.load says of a file that is damaged, or not plain data, without its advice to load it all the same."""
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return _untrusted(where, named[1])
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason.startswith("Weights only"):
        reason = "it is not plain data and tensors"
    return ValueError(f"{where} is damaged or cut short: {reason}")


def check_fp8_state(state: object, where: object) -> None:
    """Look through the extra state of a layer, which Transformer Engine unpickles. Raises ValueError."""
    if isinstance(state, io.BytesIO):
        container(io.BytesIO(state.getvalue()), where)
    elif isinstance(state, torch.Tensor) and state.numel():
        if state.dtype != torch.uint8:
            raise ValueError(f"{where} is of type {state.dtype}, not bytes")
        try:
            _Unpickler(io.BytesIO(state.numpy().tobytes()), where, _of_fp8_states).load()
        except Untrusted:
            raise
        except Exception as error:
            raise ValueError(f"{where} is damaged: {str(error) or type(error).__name__}") from None


class _Unpickler(pickle.Unpickler):
    """Knows what `find` finds by (module, name); that gets no dotted names, and returns None for the rest."""

    def __init__(self, file: IO[bytes], where: object, find: Callable[[str, str, Callable[..., Any]], Any]) -> None:
        super().__init__(file)
        self._where, self._find = where, find

    def find_class(self, module: str, name: str) -> Any:
        found = self._find(module, name, super().find_class)
        if found is None:
            raise _untrusted(self._where, f"{module}.{name}")
        return found

    def persistent_load(self, pid: object) -> Any:
        raise _untrusted(self._where, f"the object {str(pid)[:40]!r} of somebody else")


def _of_metadata(module: str, name: str, look_up: Callable[..., Any]) -> Any:
    return look_up(module, name) if (module, name) in _IN_METADATA else _MEGATRONS_OWN.get((module, name))


def _of_fp8_states(module: str, name: str, look_up: Callable[..., Any]) -> Any:
    if (module, name) in _STORAGES:
        return lambda data: container(io.BytesIO(data), "a tensor in it")
    if module == _RECIPES and name.isidentifier():
        found = look_up(module, name)
        return found if isinstance(found, type) and found.__module__ == _RECIPES else None
    return look_up(module, name) if (module, name) in _IN_FP8_STATES else None


def _check(found: Any, where: object) -> None:
    """That it is a Metadata, and sends nobody to files outside of its directory."""
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise ValueError(f"{where} is damaged or cut short: it is no list of tensors")
    for info in found.storage_data.values() if isinstance(found.storage_data, dict) else [found.storage_data]:
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            shown = repr(str(name)[:80])
            raise ValueError(f"{where} names the file {shown}, which is not one of its directory: do not trust it")
