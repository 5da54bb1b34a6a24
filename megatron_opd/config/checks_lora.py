"""Problems of adapters that the settings alone reveal."""

from __future__ import annotations

import difflib

from megatron_opd.config.lora import GROUPS, LORA_MODULES, LoraConfig

_NEVER = {
    "gate": "the router of a mixture of experts is never adapted",
    "router": "the router of a mixture of experts is never adapted",
    "embed_tokens": "embeddings are never adapted",
    "lm_head": "the output head is never adapted",
}


def check_lora(lora: LoraConfig) -> list[str]:
    """Problems of the section `lora`, each naming the setting to change."""
    problems = []
    known = [*LORA_MODULES, *GROUPS]
    for target in lora.targets:
        if target in _NEVER:
            problems.append(f"lora.targets: '{target}': {_NEVER[target]}; known: {', '.join(known)}")
        elif target not in known:
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            problems.append(f"lora.targets: there is no module '{target}'; {hint}")
    return problems
