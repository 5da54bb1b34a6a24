"""Whole checkpoints between Hugging Face and Megatron's torch_dist, a parameter at a time, and what is in either.

Both directions go through the one table in `weight_map.py` on whole (unsharded) parameters: a torch_dist checkpoint
has no layout, so the result is loaded at any. A parameter is in memory only while it is read, rearranged and written,
so peak memory is a few times the largest parameter, whatever the size of the model. Under torchrun the ranks share
the work.
Everything that names and shapes can reveal (tensors missing, left over, or of a shape that contradicts config.json) is
checked before the first byte is written, and the output gets its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opd.student.architecture import Architecture, read_architecture
from megatron_opd.student.checkpoint_keys import region
from megatron_opd.student.headers import check_tensors, weight_names
from megatron_opd.student.hf_dir import CHECKPOINT_FILES, WEIGHT_FILES, HFWriter
from megatron_opd.student.safetensors_dir import TensorDir
from megatron_opd.student.torch_dist_dir import Region, TorchDistDir, is_torch_dist, write
from megatron_opd.student.weight_map import Rule, all_rules, hf_shapes

Progress = Callable[[int], None]
"""Called with the bytes of every parameter that has been written."""

@dataclass(frozen=True, slots=True)
class Parameter:
    """One of Megatron's parameters, whole."""

    name: str
    rule: Rule
    region: Region
    """Where it lies in a torch_dist checkpoint."""

    @property
    def numel(self) -> int:
        return math.prod(self.rule.shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will do."""

    arch: Architecture
    parameters: list[Parameter]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the output."""
        return sum(p.numel for p in self.parameters) * self.dtype.itemsize

    @property
    def largest_bytes(self) -> int:
        """Size of the largest parameter in the output; peak memory is at most about four of these."""
        return max(p.numel for p in self.parameters) * self.dtype.itemsize


def parameters(arch: Architecture) -> list[Parameter]:
    """Every parameter of a model."""
    return [Parameter(name, rule, region(name, rule.shape, arch)) for name, rule in all_rules(arch).items()]


def plan_to_megatron(hf_dir: str | Path, *, vocab_multiple: int = 1, dtype: torch.dtype | None = None) -> Plan:
    """Check a Hugging Face directory against its config.json. Raises ValueError listing every contradiction."""
    arch = read_architecture(hf_dir, vocab_multiple=vocab_multiple)
    _raise_if(check_tensors(hf_dir, arch))
    with TensorDir(hf_dir) as tensors:
        dtypes = {tensors.dtype(name) for name in weight_names(tensors, arch)}
    if dtype is None and len(dtypes) > 1:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise ValueError(f"{hf_dir} mixes the types {names}; choose the output's with --dtype")
    return Plan(arch, parameters(arch), dtype or dtypes.pop())


def to_megatron(plan: Plan, hf_dir: str | Path, out: str | Path, *, progress: Progress = lambda _: None) -> None:
    """Write the torch_dist checkpoint `out`, which also gets config and tokenizer. Collective under torchrun."""
    by_place = {(p.region.key, p.region.offset): p for p in plan.parameters}
    temporary = _temporary(out)
    if _is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(hf_dir, temporary, ignore=shutil.ignore_patterns(*WEIGHT_FILES, *CHECKPOINT_FILES))
    _barrier()
    with TensorDir(hf_dir) as tensors:

        def produce(wanted: Region) -> torch.Tensor:
            parameter = by_place[wanted.key, wanted.offset]
            tensor = parameter.rule.split(tensors, 0, 1).to(plan.dtype)
            progress(tensor.numel() * tensor.element_size())
            return tensor

        regions = [p.region for p in plan.parameters]
        _finish_or_clean(lambda: write(temporary, regions, produce, plan.dtype), temporary, out)


def plan_to_hf(checkpoint_dir: str | Path, *, like: str | Path, dtype: torch.dtype | None = None) -> Plan:
    """Check a torch_dist checkpoint against the config.json of `like`. Raises ValueError, all contradictions listed."""
    checkpoint = TorchDistDir(checkpoint_dir)
    arch = read_architecture(like)
    _raise_if(check_tensors(checkpoint_dir, arch))
    listed = parameters(_as_stored(arch, checkpoint))
    return Plan(arch, listed, dtype or checkpoint.dtype(listed[0].region.key))


def to_hf(
    plan: Plan, checkpoint_dir: str | Path, out: str | Path, *, like: str | Path, progress: Progress = lambda _: None
) -> None:
    """Write the Hugging Face directory `out`, with the files of `like`. Collective under torchrun."""
    writer = HFWriter(out, hf_shapes({p.name: p.rule for p in plan.parameters}), plan.dtype)

    def fill() -> None:
        if _is_main():
            writer.create(like)
        _barrier()
        checkpoint = TorchDistDir(checkpoint_dir)
        for parameter in plan.parameters[_rank() :: _world_size()]:
            for name, tensor in hf_tensors(parameter, checkpoint):
                writer.put(name, tensor)
            progress(parameter.numel * plan.dtype.itemsize)

    try:
        fill()
        _barrier()
        if _is_main():
            writer.finish()
        _barrier()
    except BaseException:
        shutil.rmtree(writer.temporary, ignore_errors=True)
        raise


def hf_tensors(parameter: Parameter, source: TensorDir | TorchDistDir) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of one parameter, from either kind of directory."""
    if isinstance(source, TorchDistDir):
        yield from parameter.rule.merge([source.read(parameter.region).reshape(parameter.rule.shape)])
    else:
        for name in hf_shapes({parameter.name: parameter.rule}):
            yield name, source.read(name)


def open_weights(model_dir: str | Path) -> TensorDir | TorchDistDir:
    """The weights of either kind of directory."""
    return TorchDistDir(model_dir) if is_torch_dist(model_dir) else TensorDir(model_dir)


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _as_stored(arch: Architecture, checkpoint: TorchDistDir) -> Architecture:
    """The architecture with the padding that the checkpoint's embedding has."""
    return dataclasses.replace(arch, padded_vocab_size=checkpoint.shape("embedding.word_embeddings.weight")[0])


def _finish_or_clean(work: Callable[[], None], temporary: Path, out: str | Path) -> None:
    try:
        work()
        _barrier()
        if _is_main():
            temporary.rename(out)
        _barrier()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(out: str | Path) -> Path:
    return Path(out).with_name(Path(out).name + ".tmp")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _is_main() -> bool:
    return _rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
