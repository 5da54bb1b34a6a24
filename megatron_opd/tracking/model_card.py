"""The model card of a run's export: what was learnt from whom and how, measured how well, and how to load it.

It is made of what the run wrote: config.yaml, metrics.jsonl and the loop.json of its newest checkpoint. Directories are
told by their last part alone, because a card is for others, who have other disks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_opd.config import HUB, yaml_text
from megatron_opd.config.model_names import may_be_name
from megatron_opd.core.run_dir import CHECKPOINTS, MARKER, complete
from megatron_opd.tracking.report import accuracy_table, headline, kl_table
from megatron_opd.tracking.report_likeness import agreement_table, nll_table
from megatron_opd.tracking.report_run import RecordedRun
from megatron_opd.tracking.report_tables import to_markdown

_MAIN = (
    *("run.seed", "student.dtype", "lora.rank", "loss.divergence", "loss.beta", "loss.kind", "rl.algorithm"),
    *("answers.lmbda", "rollout.prompts_per_step", "rollout.samples_per_prompt", "rollout.max_new_tokens"),
    *("rollout.temperature", "optim.lr", "optim.schedule", "optim.warmup_steps", "train.steps"),
)
"""Settings that a card tells; those that a run does not have are left out."""


def make(run: RecordedRun, name: str, *, license_name: str, version: str) -> str:
    """The text of the card for the repository `name`. An empty `license_name` leaves that to its owner; `version` is
    the program's."""
    models = _models(run)
    tables = [t for t in (accuracy_table(run), agreement_table(run), kl_table(run), nll_table(run)) if t.lines]
    parts = [
        _front(run, models, license_name),
        f"# {name.rpartition('/')[2]}",
        _what(run, models),
        f"## How to load it\n\n{_loading(name)}",
        *map(to_markdown, tables),
        f"## How it was made\n\n{_settings(run, models)}\n\n{_command(run, version)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front(run: RecordedRun, models: Mapping[str, str], license_name: str) -> str:
    """The metadata that a hub reads."""
    base = models.get("student", "")
    told: dict[str, Any] = {"license": license_name} if license_name else {}
    told |= {"base_model": base.partition("@")[0]} if may_be_name(base) else {}
    told |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    told["tags"] = ["on-policy-distillation", "megatron-opd", str(run.config.get("method", "opd"))]
    sources = [str(source.get("path", "")) for source in (run.config.get("data") or {}).get("train") or ()]
    sets = dict.fromkeys(path.removeprefix(HUB) for path in sources if path.startswith(HUB))
    return f"---\n{yaml_text.dump(told | ({'datasets': [*sets]} if sets else {})).strip()}\n---"


def _what(run: RecordedRun, models: Mapping[str, str]) -> str:
    teachers = [f"{name} (`{place}`)" for name, place in models.items() if name != "student"]
    learnt = f" learned from {' and '.join(teachers)}" if teachers else " was trained"
    method = run.config.get("method", "opd")
    return f"`{models.get('student', 'A model')}`{learnt} by the method `{method}`: {headline(run)}."


def _loading(name: str) -> str:
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n```'
    )


def _settings(run: RecordedRun, models: Mapping[str, str]) -> str:
    rows = [
        ("base model", models.get("student", "")),
        *((f"teacher {n}", m) for n, m in models.items() if n != "student"),
    ]
    rows += [(f"`{name}`", str(value)) for name in _MAIN if (value := _setting(run.config, name)) not in (None, "")]
    rows += [
        (f"`data.train`: {s['name']}", _place(s.get("path", ""))) for s in _setting(run.config, "data.train") or ()
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)])


def _command(run: RecordedRun, version: str) -> str:
    command = f"megatron-opd train {run.dir.name}.yaml"
    return f"Made with megatron-opd {version}: `{command}`, with the config.yaml of the run as that file."


def _setting(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _models(run: RecordedRun) -> dict[str, str]:
    """The student and each teacher: a hub's name with its commit where the run has kept it, else a directory's name."""
    newest = complete(run.dir / CHECKPOINTS)[-1:]
    kept: dict[str, str] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):  # a checkpoint of an older version
        kept = json.loads((newest[0] / MARKER).read_text())["conditions"]["models"] if newest else {}
    commits = {of.partition("@")[0]: of for of in kept.values() if "@" in of}
    named = {"student": _setting(run.config, "student.model")}
    named |= {teacher["name"]: teacher["model"] for teacher in run.config.get("teachers") or ()}
    shown = {who: commits.get(str(model).partition("@")[0]) or _place(model) for who, model in named.items() if model}
    return shown


def _place(path: Any) -> str:
    """A hub's name as it is, and the last part of anything else."""
    text = str(path)
    is_name = text.startswith(HUB) or (may_be_name(text) and not Path(text).exists() and "." not in text.split("/")[0])
    return text if is_name else Path(text).name
