"""What a teacher sees: the student's prompt, or one of its own (`teachers.N.prompt_field`, `prompt_template`).

With its own, the teacher's sequence is that prompt and all tokens behind the student's (self-distillation with
privileged information; Snell et al. 2022, arXiv:2209.15189, call it context distillation). Row r still predicts
`learnt_ids[r]`.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_opd.core.types import Prompt, Rollout


def seen_by(teacher: str, prompt: Prompt) -> Prompt:
    """The prompt with the token ids that the teacher of this name sees."""
    ids = prompt.teacher_ids.get(teacher)
    return prompt if ids is None else replace(prompt, token_ids=ids)


def rollout_seen_by(teacher: str, rollout: Rollout) -> Rollout:
    """The rollout behind the prompt that the teacher of this name sees."""
    prompt = seen_by(teacher, rollout.prompt)
    return rollout if prompt is rollout.prompt else replace(rollout, prompt=prompt)
