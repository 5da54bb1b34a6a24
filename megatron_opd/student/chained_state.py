"""The optimizer's state of a mixture, from a checkpoint of a layout with more or fewer optimizers in one.

Where experts are spread over ranks, Megatron gives them an optimizer of their own and numbers the states of the two;
elsewhere one optimizer has all weights and no number. The tensors have the same names either way. What lies beside them
(groups, steps, the loss scale) is filed under the numbers, so Megatron does not find it where the numbers differ. The
two optimizers of one step agree in all of that, so any of them can stand for the others.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import MegatronOptimizer

_TENSORS = ("param_state", "fp32_from_fp16_params")
"""Keys of a state that each optimizer reads for itself."""


def fit(parts: list[MegatronOptimizer], loaded: dict[Any, Any]) -> dict[Any, Any]:
    """The state that `load_state_dict` of the chained optimizers `parts` takes: `loaded`, where as many saved it.

    `loaded` is what Megatron's loading gives: tensors where these optimizers look, and all else where the optimizers
    that saved it had it.
    """
    numbered = {key: value for key, value in loaded.items() if isinstance(key, int)}
    alone = {key: value for key, value in loaded.items() if key not in numbered}
    if not numbered or not alone:
        return loaded
    if len(parts) == 1:
        return _fitted(parts[0], alone, numbered[min(numbered)])
    return {number: _fitted(part, numbered[number], alone) for number, part in enumerate(parts)}


def _fitted(part: MegatronOptimizer, mine: dict[Any, Any], theirs: dict[Any, Any]) -> dict[Any, Any]:
    """A whole state of `part`: the tensors in `mine`, with what `theirs` has beside its own."""
    made = {**{key: value for key, value in theirs.items() if key not in _TENSORS}, **mine}
    if "optimizer" not in made:  # fp32 weights: nothing is around the state of torch's optimizer
        return made | _inner(part, mine, theirs)
    made["optimizer"] = _inner(part, mine.get("optimizer", {}), theirs["optimizer"])
    return made


def _inner(part: MegatronOptimizer, mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The state of torch's optimizer. Groups are this optimizer's own: a checkpoint adds only the number of steps."""
    steps = {key: group[key] for group in theirs["param_groups"] for key in ("step",) if key in group}
    own = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
    loaded = mine.get("param_groups") or [{} for _ in own]
    made: dict[str, Any] = {"param_groups": [{**a, **steps, **b} for a, b in zip(own, loaded, strict=True)]}
    if "state" in mine:
        shared = {key: value for key, value in theirs["state"].items() if not isinstance(key, int)}
        made["state"] = {**mine["state"], **shared}
    return made
