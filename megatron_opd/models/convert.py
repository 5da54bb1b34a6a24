"""Whole checkpoints between Hugging Face and Megatron's torch_dist, a parameter at a time.

Both directions go through the one table in `weight_map.py` on whole (unsharded) parameters: a torch_dist checkpoint
has no layout, so the result is loaded at any. A parameter is in memory only while it is read, rearranged and written,
so peak memory is a few times the largest parameter, whatever the size of the model. Under torchrun the ranks share
the work, and an error on one of them is raised on all.
Everything that names, shapes and sizes of files can reveal (missing, left over, cut short, contradicting config.json)
is checked before the first byte is written, and the output gets its name only when it is complete. Refuses a change of
type that would turn a finite weight into infinity.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from megatron_opd.config import yaml_text
from megatron_opd.core import hashed_files, marker
from megatron_opd.core.run_dir import CHECKPOINTS, CONFIG, MARKER, complete
from megatron_opd.models import hub, output_dir
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.models.checkpoint_keys import region
from megatron_opd.models.headers import check_tensors, weight_names
from megatron_opd.models.hf_dir import HFWriter
from megatron_opd.models.lora_checkpoint import open_checkpoint
from megatron_opd.models.safetensors_dir import READ_BYTES, TensorDir
from megatron_opd.models.torch_dist_dir import Region, TorchDistDir, is_torch_dist, write
from megatron_opd.models.weight_map import Rule, all_rules, hf_shapes

Progress = Callable[[int], None]
"""Called with the bytes of every parameter of this rank's share."""
_PEAK_PARAMETERS = 3
"""Copies of the largest parameter that may exist at once; tools/bench_convert.py measures it."""


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
class ConversionPlan:
    """What a conversion will do."""

    arch: Architecture
    parameters: list[Parameter]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the output."""
        return sum(p.numel for p in self.parameters) * self.dtype.itemsize

    @property
    def peak_bytes(self) -> int:
        """Bound of the memory that each process needs beside Python and its libraries."""
        largest = max(p.numel for p in self.parameters) * max(self.dtype.itemsize, 4)
        return _PEAK_PARAMETERS * largest + READ_BYTES


def parameters(arch: Architecture) -> list[Parameter]:
    """Every parameter of a model."""
    return [Parameter(name, rule, region(name, rule.shape, arch)) for name, rule in all_rules(arch).items()]


def plan_to_megatron(
    hf_dir: str | Path, *, vocab_multiple: int = 1, dtype: torch.dtype | None = None
) -> ConversionPlan:
    """Check a Hugging Face directory against its config.json. Raises ValueError listing every contradiction."""
    if is_torch_dist(hf_dir):
        raise ValueError(f"{hf_dir} is a Megatron checkpoint already")
    arch = read_architecture(hf_dir, vocab_multiple=vocab_multiple)
    _raise_if(check_tensors(hf_dir, arch))
    with TensorDir(hf_dir) as tensors:
        dtypes = {tensors.dtype(name) for name in weight_names(tensors, arch)}
    return ConversionPlan(arch, parameters(arch), dtype or _only(dtypes, hf_dir))


def to_megatron(
    plan: ConversionPlan, hf_dir: str | Path, out: str | Path, *, progress: Progress = lambda _: None
) -> None:
    """Write the torch_dist checkpoint `out`, which also gets config and tokenizer. Collective under torchrun."""
    by_place = {(p.region.key, p.region.offset): p for p in plan.parameters}

    def fill() -> None:
        with TensorDir(hf_dir) as tensors:

            def produce(wanted: Region) -> torch.Tensor:
                parameter = by_place[wanted.key, wanted.offset]
                tensor = cast(parameter.rule.split(tensors, 0, 1), plan.dtype, parameter.name)
                progress(tensor.numel() * tensor.element_size())
                return tensor

            write(output_dir.temporary(out), [p.region for p in plan.parameters], produce, plan.dtype)

    _in_steps(
        out,
        on_main_first=lambda: output_dir.start(out, like=hf_dir),
        on_all=fill,
        on_main_last=lambda: output_dir.finish(out, like=hf_dir, dtype=plan.dtype),
    )


def find_like(checkpoint_dir: str | Path, like: str | Path | None = None) -> str | Path:
    """The Hugging Face directory with the config and tokenizer of a checkpoint: `like` where given, the checkpoint
    itself when the converter made it, student.model of its run when a run did. Raises ValueError when there is none.
    """
    checkpoint = Path(checkpoint_dir)
    if not is_torch_dist(checkpoint):
        newest = complete(checkpoint / CHECKPOINTS)[-1:]
        hint = f"; it is the directory of a run: name one of its checkpoints, such as {newest[0]}" if newest else ""
        raise ValueError(f"{checkpoint} is not a torch_dist checkpoint: there is no .metadata in it{hint}")
    if like is not None or (checkpoint / "config.json").is_file():
        return like or checkpoint
    config = checkpoint.resolve().parent.parent / CONFIG
    if not config.is_file():
        raise ValueError(f"{checkpoint} has no config.json; name a directory of the same model with --like")
    try:
        student = str(yaml_text.load(config.read_text())["student"]["model"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is not the config of a run ({error}); name the model with --like") from None
    missing = f"{config} names {student} as student.model, which is not here; give its place with --like"
    try:
        place = hub.directory(student, "texts")
    except ValueError as error:
        raise ValueError(f"{missing} ({error})") from None
    if not (Path(place) / "config.json").is_file():
        raise ValueError(missing)
    return place


def plan_to_hf(checkpoint_dir: str | Path, *, like: str | Path, dtype: torch.dtype | None = None) -> ConversionPlan:
    """Check a torch_dist checkpoint against the config.json of `like`. Raises ValueError, all contradictions listed."""
    checkpoint = open_checkpoint(checkpoint_dir)
    arch = read_architecture(like)
    _raise_if([*_other_student(Path(checkpoint_dir), arch, like), *check_tensors(checkpoint_dir, arch)])
    arch = stored_architecture(arch, checkpoint)
    listed = parameters(arch)
    dtypes = {checkpoint.dtype(p.region.key) for p in listed}
    return ConversionPlan(arch, listed, dtype or _only(dtypes, checkpoint_dir))


def to_hf(
    plan: ConversionPlan,
    checkpoint_dir: str | Path,
    out: str | Path,
    *,
    like: str | Path,
    progress: Progress = lambda _: None,
) -> None:
    """Write the Hugging Face directory `out`, with the files of `like`. Collective under torchrun."""
    writer = HFWriter(out, hf_shapes({p.name: p.rule for p in plan.parameters}), plan.dtype, like=like)

    def fill() -> None:
        _check_hashes(Path(checkpoint_dir))
        checkpoint = open_checkpoint(checkpoint_dir)
        for parameter in plan.parameters[_rank() :: _world_size()]:
            for name, tensor in hf_tensors(parameter, checkpoint):
                writer.put(name, cast(tensor, plan.dtype, name))
            progress(parameter.numel * plan.dtype.itemsize)

    _in_steps(out, on_main_first=writer.create, on_all=fill, on_main_last=writer.finish)


def hf_tensors(parameter: Parameter, source: TensorDir | TorchDistDir) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of one parameter, from either kind of directory."""
    if isinstance(source, TorchDistDir):
        yield from parameter.rule.merge([source.read(parameter.region).reshape(parameter.rule.shape)])
    else:
        for name in hf_shapes({parameter.name: parameter.rule}):
            yield name, source.read(name)


def open_weights(model_dir: str | Path) -> TensorDir | TorchDistDir:
    """The weights of either kind of directory."""
    return open_checkpoint(model_dir) if is_torch_dist(model_dir) else TensorDir(model_dir)


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor in another type. Raises ValueError when a finite value is too large for it."""
    if tensor.dtype == dtype:
        return tensor
    made = tensor.to(dtype)
    if not torch.isfinite(made).all() and torch.isfinite(tensor).all():
        largest, kind = f"{tensor.abs().max().item():.3g}", str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} has the value {largest}, which overflows {kind}; choose bf16 or fp32")
    return made


def stored_architecture(arch: Architecture, checkpoint: TorchDistDir) -> Architecture:
    """The architecture with the padding that the checkpoint's embedding has."""
    return dataclasses.replace(arch, padded_vocab_size=checkpoint.shape("embedding.word_embeddings.weight")[0])


def _other_student(checkpoint: Path, arch: Architecture, like: str | Path) -> list[str]:
    """Where a run's checkpoint says that its student was another model than `like`."""
    if not (checkpoint / MARKER).is_file():
        return []
    try:
        theirs = marker.read(checkpoint)["student"].items()
    except marker.DamagedMarker as error:
        return [f"{checkpoint / MARKER} is damaged: {error}"]
    ours = dataclasses.asdict(arch)
    return [
        f"{checkpoint}: its student's {key} is {value}, in the config.json of {like} it is {ours[key]}"
        for key, value in theirs
        if key in ours and ours[key] != value
    ]


def _check_hashes(checkpoint: Path) -> None:
    """Compare this process's share of the files with what the run that saved them has recorded, if it has.

    Raises ValueError naming those that differ.
    """
    if not (checkpoint / MARKER).is_file():
        return
    files = hashed_files.parsed(marker.read(checkpoint).get(hashed_files.KEY)) or {}
    mine = hashed_files.share(files, _rank(), _world_size())
    wrong = [line for name in mine if (line := hashed_files.difference(checkpoint / name, files[name]))]
    _raise_if([f"{checkpoint} is damaged: {line}" for line in wrong])


def _only(dtypes: set[torch.dtype], where: str | Path) -> torch.dtype:
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise ValueError(f"{where} mixes the types {names}; choose the output's with --dtype")
    return next(iter(dtypes))


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _in_steps(
    out: str | Path,
    *,
    on_main_first: Callable[[], object],
    on_all: Callable[[], object],
    on_main_last: Callable[[], object],
) -> None:
    """Three steps, each of which ends on all ranks before the next begins; removes the output if one fails anywhere."""
    try:
        for step, everywhere in ((on_main_first, False), (on_all, True), (on_main_last, False)):
            _together(step if everywhere or _rank() == 0 else lambda: None)
    except BaseException:
        output_dir.discard(out)
        raise


def _together(work: Callable[[], object]) -> None:
    """Do this rank's part. The first failure is raised on all ranks, so that none waits for one that is gone."""
    failure: Exception | None = None
    try:
        work()
    except (ValueError, OSError, RuntimeError) as error:
        failure = error
        if not dist.is_initialized():
            raise
    if dist.is_initialized():
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, failure and (str(failure) or type(failure).__name__))
        first = next((said for said in everyone if said is not None), None)
        if first is not None:
            raise ValueError(first) from failure


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
