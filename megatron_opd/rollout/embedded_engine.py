"""The embedded engine: transformers with a KV cache inside the trainer's leader rank. For one machine, no servers.

Every random number is a function of (seed, prompt, sample, position) alone, so the same weights give the
same rollouts whatever the layout, the batch or the number of replicas; there is no generator state to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_opd.core.protocols import Talk, TurnAsked, TurnDrawn
from megatron_opd.core.types import Prompt, Rollout, Sampling
from megatron_opd.rollout import plain_answer
from megatron_opd.rollout.decoding import Begun, Ended, decode
from megatron_opd.rollout.drawing import uniforms
from megatron_opd.rollout.own_cache import OwnCacheReader
from megatron_opd.rollout.reading import BatchReader, ModelReader, has_rows
from megatron_opd.rollout.rounds import play_rounds

Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LocalEngine:
    """Samples from a Hugging Face model whose weights `load` replaces."""

    def __init__(
        self, model_dir: str | Path, *, eos_ids: tuple[int, ...], vocab_size: int, dtype: Dtype = "fp32"
    ) -> None:
        """Raises ValueError for a model that lacks weights, OSError and others of transformers' for one that it cannot
        read."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model: Any
        self.has_weights = any(Path(model_dir).glob("*.safetensors"))
        if self.has_weights:
            self.model, told = AutoModelForCausalLM.from_pretrained(
                model_dir,
                dtype=_DTYPES[dtype],
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            if told["missing_keys"]:  # which transformers fills with random numbers
                raise ValueError(f"{model_dir} has no weights for {', '.join(sorted(told['missing_keys'])[:3])}")
        else:  # a Megatron checkpoint: it has the config, and `load` brings the weights
            self.model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(model_dir, trust_remote_code=False), dtype=_DTYPES[dtype]
            )
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size
        self.version = 0

    @torch.no_grad()
    def load(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace the weights. Raises ValueError when a tensor is unknown, missing or has another shape."""
        own = _places(self.model)
        missing = set(own)
        for name, tensor in weights:
            if name not in own:
                raise ValueError(f"the engine's model has no weight '{name}'")
            if tensor.shape != own[name].shape:  # copy_ would broadcast some of them
                raise ValueError(f"weight '{name}' has shape {list(tensor.shape)}, not {list(own[name].shape)}")
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"weights that did not arrive at the engine: {', '.join(sorted(missing))}")
        self.version = version
        self.has_weights = True

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_finished: Callable[[Rollout], None] | None = None
    ) -> list[Rollout]:
        """All samples of all prompts, prompt-major. Log-probabilities are those of the tempered distribution; greedy
        (temperature 0) reports those of temperature 1."""
        self._check_weights()
        return rollouts(self.reader(), prompts, sampling, eos_ids=self.eos_ids, version=self.version, told=on_finished)

    def converse(self, talks: Sequence[Talk], sampling: Sampling) -> list[list[Rollout]]:
        """Play episodes, turn by turn: all first turns, all second ones. So the batches, and with them the bits, do not
        depend on how long an environment takes."""
        self._check_weights()
        draw = partial(turns, self.reader(), sampling, eos_ids=self.eos_ids, version=self.version)
        return play_rounds(talks, draw)

    def _check_weights(self) -> None:
        if not self.has_weights:
            raise ValueError(
                f"{self.model.name_or_path or 'the model'} is a Megatron checkpoint, which this engine cannot read:"
                " convert it with `megatron-opd convert megatron-to-hf`"
            )

    def reader(self) -> BatchReader:
        """The model, to be decoded with."""
        return self._reader

    @cached_property
    def _reader(self) -> BatchReader:
        """Made once: a family with a cache of its own is tried first (`OwnCacheReader`)."""
        kind = ModelReader if has_rows(self.model.config) else OwnCacheReader
        return kind(self.model, vocab_size=self.vocab_size)

    def release(self) -> None:
        """Nothing: the model is small, and stays."""

    def metrics(self) -> dict[str, float]:
        """Nothing happens here that the loop does not see."""
        return {}

    def close(self) -> None:
        """Nothing runs beside the caller."""


def rollouts(
    reader: BatchReader,
    prompts: list[Prompt],
    sampling: Sampling,
    *,
    eos_ids: tuple[int, ...],
    version: int,
    told: Callable[[Rollout], None] | None,
) -> list[Rollout]:
    """As `LocalEngine.generate`, from any reader. `version` is that of its weights."""
    asked = [
        plain_answer.asked(prompt, sample, sampling)
        for prompt in prompts
        for sample in range(sampling.samples_per_prompt)
    ]
    done: dict[int, Rollout] = {}

    def ended(number: int, drawn: TurnDrawn) -> None:
        done[number] = rollout = plain_answer.rollout(asked[number], drawn)
        if told:
            told(rollout)

    turns(reader, sampling, asked, ended, eos_ids=eos_ids, version=version)
    return [done[i] for i in range(len(asked))]


def turns(
    reader: BatchReader,
    sampling: Sampling,
    asked: Sequence[TurnAsked],
    told: Callable[[int, TurnDrawn], None],
    *,
    eos_ids: tuple[int, ...],
    version: int,
) -> None:
    """Draw turns, all in one batch. `told` gets each one's number and its tokens as soon as it ends."""

    def ended(number: int, answer: Ended) -> None:
        drawn = TurnDrawn(
            ids=tuple(answer.ids),
            logps=tuple(answer.logps),
            versions=(version,) * len(answer.ids),
            finish="stop" if answer.is_whole else "length",
        )
        told(number, drawn)

    begun = [
        Begun(one.ids, uniforms(sampling, one.prompt, one.sample, one.turn)[: one.max_new_tokens]) for one in asked
    ]
    decode(reader, begun, temperature=sampling.temperature, eos_ids=eos_ids, on_ended=ended)


def _places(model: Any) -> dict[str, torch.Tensor]:
    """Where a weight of each name goes. A tied head is listed once, under the embedding's name; experts, which
    transformers 5 stacks into one tensor a layer, are listed one by one under the names that checkpoints have."""
    places: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj" and parameter.dim() == 3:
            for e, expert in enumerate(parameter.data):
                gate, up = expert.chunk(2)
                places |= {f"{prefix}.{e}.gate_proj.weight": gate, f"{prefix}.{e}.up_proj.weight": up}
        elif kind == "down_proj" and parameter.dim() == 3:
            places |= {f"{prefix}.{e}.down_proj.weight": expert for e, expert in enumerate(parameter.data)}
        else:
            places[name] = parameter.data
    return places
