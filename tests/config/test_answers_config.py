"""Settings of answers and of teachers' prompts: what is refused, in which words, and the methods that are not."""

import copy

import pytest

from megatron_opd.config import file as cfg

MINIMAL = {
    "run": {"dir": "runs/x"},
    "student": {"model": "s"},
    "teachers": [{"name": "a", "model": "ta"}, {"name": "b", "model": "tb"}],
    "data": {"train": [{"name": "math", "path": "m.jsonl"}]},
    "train": {"steps": 10, "micro_batch_size": 1},
}


def tree(**sections):
    made = copy.deepcopy(MINIMAL)
    for name, settings in sections.items():
        made[name] = {**made.get(name, {}), **settings} if isinstance(settings, dict) else settings
    return made


def problems_of(**sections):
    with pytest.raises(cfg.ConfigError) as caught:
        cfg.from_dict(tree(**sections))
    return caught.value.problems


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"answers": {"lmbda": 0.5, "sft_alpha": 0.1}, "rollout": {"samples_per_prompt": 4}},
        {"answers": {"lmbda": 0, "sft_alpha": 1}, "teachers": []},
        {"answers": {"lmbda": 0}, "loss": {"beta": 0}},
        {"answers": {"lmbda": 0, "seq_kd": True, "teacher": "b", "sft_alpha": 1, "distill_alpha": 0}},
        {"answers": {"lmbda": 0.5, "sft_alpha": 1, "distill_alpha": 0}, "loss": {"kind": "sampled"}},
        {"answers": {"teacher_mixed_alpha": 0.2}, "loss": {"kind": "sampled"}},
        {"teachers": [{"name": "a", "model": "s", "prompt_template": "{{ prompt }}"}]},
    ],
    ids=["on-policy", "GKD", "SFT", "forward KL offline", "SeqKD", "SFT and sampled", "MiniLLM", "privileged"],
)
def test_methods(sections):
    cfg.from_dict(tree(**sections))


@pytest.mark.parametrize(
    ("sections", "wrong"),
    [
        (
            {"answers": {"lmbda": 1.2}},
            "answers.lmbda must lie between 0 and 1, not 1.2: 0 is off-policy, 1 is on-policy",
        ),
        ({"answers": {"lmbda": 0.5, "sft_alpha": -1}}, "answers.sft_alpha must not be negative, but is -1"),
        ({"answers": {"lmbda": 0.5, "distill_alpha": -1}}, "answers.distill_alpha must not be negative"),
        ({"answers": {"teacher_mixed_alpha": 1}}, "answers.teacher_mixed_alpha must lie in [0, 1), not 1"),
        ({"answers": {"sft_alpha": 0.1}}, "answers.sft_alpha has no effect while answers.lmbda is 1"),
        ({"answers": {"seq_kd": True}}, "answers.seq_kd has no effect while answers.lmbda is 1"),
        ({"answers": {"distill_alpha": 0.5}}, "answers.distill_alpha has no effect while answers.lmbda is 1"),
        ({"answers": {"teacher": "a"}}, "answers.teacher has no effect without answers.seq_kd or"),
        ({"answers": {"lmbda": 0.5, "distill_alpha": 0}}, "answers.sft_alpha and answers.distill_alpha are both 0"),
        (
            {"answers": {"lmbda": 0}, "rollout": {"samples_per_prompt": 2}},
            "rollout.samples_per_prompt (2) must be 1 with answers.lmbda 0",
        ),
        (
            {"answers": {"lmbda": 0.5}, "loss": {"kind": "sampled"}},
            "loss.kind: sampled is a policy gradient of tokens that the student sampled",
        ),
        ({"answers": {"lmbda": 0, "seq_kd": True, "teacher": "z"}}, "answers.teacher: there is no teacher 'z'"),
        ({"teachers": []}, "teachers: at least one teacher is needed"),
        ({"teachers": [], "answers": {"lmbda": 0}}, "teachers: at least one teacher is needed"),
        ({"teachers": [], "answers": {"lmbda": 0.5, "sft_alpha": 1}}, "teachers: at least one teacher is needed"),
        (
            {"teachers": [], "answers": {"lmbda": 0, "sft_alpha": 1, "seq_kd": True}},
            "teachers: at least one teacher is needed",
        ),
        (
            {"answers": {"teacher_mixed_alpha": 0.2}, "rollout": {"engine": "sglang"}},
            "answers.teacher_mixed_alpha needs rollout.engine: local",
        ),
        (
            {
                "answers": {"teacher_mixed_alpha": 0.2},
                "teachers": [{"name": "a", "model": "t", "backend": "sglang", "carrier": "hidden"}],
            },
            "answers.teacher_mixed_alpha needs teachers.0.backend: megatron, not sglang",
        ),
        (
            {
                "answers": {"teacher_mixed_alpha": 0.2},
                "teachers": [{"name": "a", "model": "t", "prompt_field": "hint"}],
            },
            "answers.teacher_mixed_alpha needs teacher and student to see one prompt, but teachers.0 has one",
        ),
        (
            {"answers": {"lmbda": 0.5, "seq_kd": True}, "rollout": {"engine": "sglang", "top_p": 0.9}},
            "answers.seq_kd: teachers.0 samples in the embedded engine, which does not support rollout.top_p",
        ),
        (
            {"teachers": [{"name": "a", "model": "t", "prompt_field": "x", "prompt_template": "y"}]},
            "teachers.0: prompt_field and prompt_template exclude each other",
        ),
        (
            {"teachers": [{"name": "a", "model": "t", "prompt_template": "{{ prompt"}]},
            "teachers.0.prompt_template is not a Jinja template: ",
        ),
        ({"log": {"completions_every": -1}}, "log.completions_every must not be negative"),
        ({"log": {"completions": 0}}, "log.completions must be at least 1, not 0"),
    ],
)
def test_what_is_refused(sections, wrong):
    assert [p for p in problems_of(**sections) if p.startswith(wrong)]


def test_routing_that_leaves_a_source_without_a_teacher_names_it():
    teachers = [{"name": "a", "model": "t", "sources": {"math": 0}}, {"name": "b", "model": "t", "sources": {"mth": 1}}]
    teachers[1]["weight"] = 0
    problems = problems_of(teachers=teachers)
    assert "teachers.1.sources: there is no prompt source 'mth'; did you mean 'math'?" in problems
    assert "teachers: every weight for prompt source 'math' is 0; give one teacher a weight" in problems


def test_routing_and_averaging_mix_source_by_source():
    """Two teachers average on one source, one of them alone teaches the second, and a third the last."""
    data = {"train": [{"name": name, "path": "x.jsonl"} for name in ("math", "code", "chat")]}
    teachers = [
        {"name": "a", "model": "t", "weight": 0, "sources": {"math": 1}},
        {"name": "b", "model": "t", "weight": 0, "sources": {"math": 3, "code": 1}},
        {"name": "c", "model": "t", "sources": {"math": 0, "code": 0}},
    ]
    config = cfg.from_dict(tree(data=data, teachers=teachers))
    assert config.teacher_weights("math") == [0.25, 0.75, 0]
    assert config.teacher_weights("code") == [0, 1, 0]
    assert config.teacher_weights("chat") == [0, 0, 1]
