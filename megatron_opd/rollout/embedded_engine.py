"""The embedded engine: transformers with a KV cache inside the trainer's leader rank. For one machine, no servers.

Every random number is a function of (seed, prompt, sample, position) alone, so the same weights give the
same rollouts whatever the layout, the batch or the number of replicas; there is no generator state to save.

Shape suffixes: B sequences decoded together, R response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megatron_opd.core.types import Prompt, Rollout, Sampling

MAX_BATCH = 256
"""Sequences decoded together; bounds the KV cache."""


class LocalEngine:
    """Samples from a Hugging Face model whose weights `load` replaces."""

    def __init__(self, model_dir: str | Path, *, eos_ids: tuple[int, ...], vocab_size: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model: Any
        self.has_weights = any(Path(model_dir).glob("*.safetensors"))
        if self.has_weights:
            self.model = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            )
        else:  # a Megatron checkpoint: it has the config, and `load` brings the weights
            self.model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(model_dir, trust_remote_code=False), dtype=torch.float32
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

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_finished: Callable[[Rollout], None] | None = None
    ) -> list[Rollout]:
        """All samples of all prompts, prompt-major. Log-probabilities are those of the tempered distribution; greedy
        (temperature 0) reports those of temperature 1."""
        if not self.has_weights:
            raise ValueError(
                f"{self.model.name_or_path or 'the model'} is a Megatron checkpoint, which this engine cannot read:"
                " convert it with tools/convert_checkpoint.py megatron-to-hf"
            )
        wanted = [(p, s) for p in prompts for s in range(sampling.samples_per_prompt)]
        order = sorted(range(len(wanted)), key=lambda i: len(wanted[i][0].token_ids))
        done: dict[int, Rollout] = {}
        # Prompts of one length decode together: no left padding, so no masks and no position arithmetic.
        for _, same_length in groupby(order, key=lambda i: len(wanted[i][0].token_ids)):
            indices = list(same_length)
            for start in range(0, len(indices), MAX_BATCH):
                part = indices[start : start + MAX_BATCH]
                done.update(zip(part, self._decode([wanted[i] for i in part], sampling), strict=True))
                for i in part if on_finished else ():
                    on_finished(done[i])
        return [done[i] for i in range(len(wanted))]

    def release(self) -> None:
        """Nothing: the model is small, and stays."""

    def metrics(self) -> dict[str, float]:
        """Nothing happens here that the loop does not see."""
        return {}

    def close(self) -> None:
        """Nothing runs beside the caller."""

    def _decode(self, wanted: list[tuple[Prompt, int]], sampling: Sampling) -> list[Rollout]:
        device = self.model.device
        uniform_BR = torch.stack([_uniforms(sampling, prompt, sample) for prompt, sample in wanted]).to(device)
        answers = [_Answer() for _ in wanted]
        ids_BS = torch.tensor([prompt.token_ids for prompt, _ in wanted], device=device)
        cache = None
        for r in range(sampling.max_new_tokens):
            logits_BV, cache = self._logits(ids_BS, cache, sampling.temperature)
            ids_B, logp_B = self._sample(logits_BV, uniform_BR[:, r], sampling.temperature)
            for answer, token, logp in zip(answers, ids_B.tolist(), logp_B.tolist(), strict=True):
                answer.add(token, logp, ends=token in self.eos_ids)
            if all(answer.ended for answer in answers):
                break
            ids_BS = ids_B[:, None]
        return [self._rollout(*key, answer) for key, answer in zip(wanted, answers, strict=True)]

    def _logits(self, ids_BS: torch.Tensor, cache: Any, temperature: float) -> tuple[torch.Tensor, Any]:
        """(logits of the token after `ids_BS`, float32 [B, vocab_size]; the cache with these). None: an empty cache."""
        out = self.model(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1, : self.vocab_size].float(), out.past_key_values

    def _sample(
        self, logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token and its log-probability by inverting the cumulative distribution at `uniform_B`."""
        logp_BV = torch.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
        if temperature == 0:
            ids_B = logits_BV.argmax(-1)
        else:
            # Summed in float64: in float32 the sum of a large vocabulary loses its unlikely tokens.
            cumulative_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
            at_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
            ids_B = torch.searchsorted(cumulative_BV, at_B1, right=True)[:, 0].clamp(max=self.vocab_size - 1)
        return ids_B, logp_BV.gather(-1, ids_B[:, None])[:, 0]

    def _rollout(self, prompt: Prompt, sample: int, answer: _Answer) -> Rollout:
        return Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=tuple(answer.ids),
            learnt=(True,) * len(answer.ids),
            logps=tuple(answer.logps),
            finish="stop" if answer.ended else "length",
            versions=(self.version,) * len(answer.ids),
        )


@dataclass(slots=True)
class _Answer:
    """A response in the making; tokens after its end are ignored."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ended: bool = False

    def add(self, token: int, logp: float, *, ends: bool) -> None:
        if not self.ended:
            self.ids.append(token)
            self.logps.append(logp)
            self.ended = ends


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


def _uniforms(sampling: Sampling, prompt: Prompt, sample: int) -> torch.Tensor:
    """The random numbers of one rollout, [R] in [0, 1)."""
    generator = torch.Generator().manual_seed(sampling.seed_of(prompt, sample))
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)
