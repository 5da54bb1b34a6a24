"""How the sources of a run differ from those that its checkpoint was made with."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.prompts.fingerprint import DataRecord, Fingerprint


def other_prompts(before: DataRecord, now: DataRecord) -> list[str]:
    """The sources of data.train that have the same name and other contents, a sentence each."""
    return [f"data.train: {line}" for line in _changed(before.train, now.train)]


def other_mixture(before: DataRecord, now: DataRecord) -> list[str]:
    """What the settings changed about the sources, and sources of data.eval with other contents, a line each."""
    lines = []
    old, new = ({source.name: source for source in record.train} for record in (before, now))
    for name in old:
        if name not in new:
            lines.append(f"data.train: source '{name}' is gone; it would start at its beginning if it came back")
    for name, source in new.items():
        if name not in old:
            lines.append(
                f"data.train: source '{name}' is new: it starts at its beginning, and is drawn from alone until it has"
                " its share of the whole run"
            )
        elif source.weight != old[name].weight:
            lines.append(f"data.train: the weight of source '{name}': {old[name].weight:g} -> {source.weight:g}")
    kept = [[name for name in names if name in old and name in new] for names in (old, new)]
    if kept[0] != kept[1]:
        lines.append(f"data.train: the order of sources: {', '.join(kept[0])} -> {', '.join(kept[1])}")
    return lines + [
        f"data.eval: {line}; evaluations before and after are of different prompts"
        for line in _changed(before.eval, now.eval)
    ]


def _changed(before: Sequence[Fingerprint], now: Sequence[Fingerprint]) -> list[str]:
    old = {source.name: source for source in before}
    told = [(source.name, _difference(old[source.name], source)) for source in now if source.name in old]
    return [f"source '{name}' has changed: {difference}" for name, difference in told if difference]


def _difference(before: Fingerprint, now: Fingerprint) -> str:
    """The change of a source, in words; "" where nothing that the run reads changed."""
    is_asked, are_rows = before.asked != now.asked, (before.rows, before.content) != (now.rows, now.content)
    if not is_asked and (before.besides == now.besides or not are_rows):
        return ""  # what else is read of the same rows is the settings' doing
    if are_rows:
        return _of_rows(before, now)
    cause = "a chat template, a tokenizer or a setting changed, or the template writes the date"
    if before.prompts != now.prompts:
        return f"its rows are the same, but {before.prompts} -> {now.prompts} of them are prompts ({cause})"
    return f"its rows are the same, but other prompts are made of them ({cause})"


def _of_rows(before: Fingerprint, now: Fingerprint) -> str:
    if before.any_order == now.any_order:
        return f"the same {now.rows} rows in another order, {_where(before, now)}"
    count = f"rows {before.rows} -> {now.rows}" if before.rows != now.rows else f"other rows among its {now.rows}"
    return f"{count}, {_where(before, now)}"


def _where(before: Fingerprint, now: Fingerprint) -> str:
    """The first row that differs, from 1, as closely as the marks tell."""
    every = max(before.every, now.every)
    old, new = (f.mark_list[every // f.every - 1 :: every // f.every] for f in (before, now))
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    first, last = same * every + 1, min((same + 1) * every, max(before.rows, now.rows))
    if first > min(before.rows, now.rows):
        return f"the first {first - 1} are the same"
    return (
        f"row {first} is the first that differs" if first == last else f"the first that differs is in {first} to {last}"
    )
