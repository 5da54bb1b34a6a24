"""Settings: what is refused, in which words, and what survives a round trip."""

import copy

import pytest
import yaml

from megatron_opd import config as c
from megatron_opd.config import file as cfg
from megatron_opd.config import other_names, retired, schema
from megatron_opd.config.checks_serving import check_vocabulary
from megatron_opd.config.schema import setting_at

MINIMAL = {
    "run": {"dir": "runs/x"},
    "student": {"model": "s"},
    "teachers": [{"name": "a", "model": "ta"}, {"name": "b", "model": "tb", "weight": 3, "sources": {"code": 0}}],
    "data": {"train": [{"name": "math", "path": "m.jsonl"}, {"name": "code", "path": "c.jsonl", "weight": 2}]},
    "train": {"steps": 10},
}


def tree_with(**settings):
    """A valid tree with `section__key` settings replaced."""
    tree = copy.deepcopy(MINIMAL)
    for name, value in settings.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    return tree


def tree_with_path(name, value):
    """`name` is a path of names, N for the first of a list."""
    tree = copy.deepcopy(MINIMAL)
    *parents, key = [0 if part == "N" else part for part in name.split(".")]
    node = tree
    for part in parents:
        node = node[part] if isinstance(part, int) else node.setdefault(part, {})
    node[key] = value
    return tree


def problems_of(tree):
    with pytest.raises(cfg.ConfigError) as caught:
        cfg.from_dict(tree)
    return caught.value.problems


def write(tmp_path, tree):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("tree", "wrong", "nearest"),
    [
        (tree_with(optim__lrr=1), "optim.lrr", "optim.lr"),
        (tree_with(train__eval_evry=1), "train.eval_evry", "train.eval_every"),
        ({**MINIMAL, "optin": {}}, "optin", "optim"),
        ({**MINIMAL, "teachers": [{"name": "a", "model": "t", "wieght": 1}]},
         "teachers.0.wieght", "teachers.0.weight"),
        ({**MINIMAL, "data": {"train": [{"name": "m", "path": "p", "wight": 1}]}},
         "data.train.0.wight", "data.train.0.weight"),
        (tree_with(optim__learning_rate=1), "optim.learning_rate", "optim.lr"),
        (tree_with(train__lr=1), "train.lr", "optim.lr"),
        (tree_with(train__max_grad_norm=1), "train.max_grad_norm", "optim.clip_grad"),
        (tree_with(rollout__num_generations=8), "rollout.num_generations", "rollout.samples_per_prompt"),
        (tree_with(parallel__tp=2), "parallel.tp", "parallel.tensor"),
        (tree_with(student__chat_template="x"), "student.chat_template", "data.chat_template"),
        ({**MINIMAL, "learning-rate": 1}, "learning-rate", "optim.lr"),
        ({**MINIMAL, "load": "x"}, "load", "train.resume_from"),
        (tree_with(rollout__servers={"tp": 2}), "rollout.servers.tp", "rollout.servers.tensor"),
        ({**MINIMAL, "teachers": [{"name": "a", "model": "t", "model_name_or_path": "x"}]},
         "teachers.0.model_name_or_path", "teachers.0.model"),
    ],
)  # fmt: skip
def test_unknown_setting_names_the_nearest_one(tree, wrong, nearest):
    (problem,) = problems_of(tree)
    assert problem.startswith(f"{wrong}: unknown setting")
    assert problem.endswith(f"did you mean {nearest}?")


def test_every_name_of_another_trainer_leads_to_a_setting_of_ours():
    names = [name for names in other_names.ELSEWHERE.values() for name in names.split()]
    assert len(names) == len(set(names))
    for setting in other_names.ELSEWHERE:
        assert setting_at(setting.split(".")), setting


@pytest.mark.parametrize(
    "wrong", ["optim.zzzz", "qqqq", "kl", "teachers.N.xyzzy", "train.weight", "teachers.N.lr", "data.path"]
)
def test_an_unknown_setting_that_is_near_to_nothing_gets_no_guess(wrong):
    (problem,) = problems_of(tree_with_path(wrong, 1))
    assert problem == f"{wrong.replace('N', '0')}: unknown setting"


def test_retired_settings_and_choices_are_answered_with_what_to_write():
    for name, advice in retired.SETTINGS.items():
        problems = problems_of(tree_with_path(name, 1))
        assert problems == [f"{name.replace('.N.', '.0.')} is no longer a setting: {advice}"]
    for (name, value), advice in retired.CHOICES.items():
        assert problems_of(tree_with(**{name.replace(".", "__"): value})) == [f"{name}: {value} is refused: {advice}"]


def test_no_setting_of_today_is_retired():
    for name in retired.SETTINGS:
        *parents, key = [0 if part == "N" else part for part in name.split(".")]
        assert key not in schema.setting_at(parents)["properties"]


def test_unknown_setting_like_no_other_gets_no_guess():
    (problem,) = problems_of(tree_with(optim__zzzzzz=1))
    assert problem == "optim.zzzzzz: unknown setting"


def test_all_problems_are_reported_at_once():
    tree = tree_with(optim__lr="fast", student__dtype="fp8", train__stepz=1)
    del tree["run"]
    problems = problems_of(tree)
    assert {p.split(":")[0] for p in problems} == {"optim.lr", "student.dtype", "train.stepz", "run"}
    with pytest.raises(cfg.ConfigError, match="4 problems") as caught:
        cfg.from_dict(tree)
    assert all(problem in str(caught.value) for problem in problems)


def test_all_failed_checks_are_reported_at_once():
    problems = problems_of(tree_with(loss__beta=2, optim__eps=-1, parallel__sequence=True, train__steps=0))
    assert sorted(p.split()[0] for p in problems) == ["loss.beta", "optim.eps", "parallel.sequence", "train.steps"]


@pytest.mark.parametrize(
    "override",
    ["optim.lr=1e-4", "optim.lr=0.0001", "optim.lr=1.0e-4"],
)
def test_overrides_read_numbers_in_every_notation(tmp_path, override):
    # YAML 1.1 reads 1e-4, without a point, as text.
    assert cfg.load(write(tmp_path, MINIMAL), [override]).optim.lr == 1e-4


def test_scientific_notation_in_the_file_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optim: {lr: 3e-4, eps: 1e-6}\n")
    optim = cfg.load(path).optim
    assert (optim.lr, optim.eps) == (3e-4, 1e-6)


def test_overrides_reach_lists_new_sections_and_mappings(tmp_path):
    overrides = [
        "teachers.1.weight=0.5",
        "teachers.0.sources.code=2",
        "data.eval=[{name: math, path: e.jsonl}]",
        "parallel.tensor=2",
        "log.tensorboard=true",
        "run.dir=elsewhere",
        "teachers.1.weight=0.25",
    ]
    config = cfg.load(write(tmp_path, MINIMAL), overrides)
    assert config.teachers[1].weight == 0.25, "the last override wins"
    assert config.teachers[0].sources == {"code": 2.0}
    assert config.data.eval[0].path == "e.jsonl"
    assert (config.parallel.tensor, config.log.tensorboard, config.run.dir) == (2, True, "elsewhere")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("teachers.7.weight=1", "cannot set teachers.7.weight"),
        ("teachers.first.weight=1", "cannot set teachers.first.weight"),
        ("teachers.-1.weight=1", "'-1' is no place in this list, whose 2 entries are numbered from 0"),
        ("teachers.+1.weight=1", "'+1' is no place in this list"),
        ("data.train.2.path=x", "'2' is no place in this list"),
        ("teachers.01.weight=1", "'01' is no place in this list"),
        ("teachers.\u0661.weight=1", "'\u0661' is no place in this list"),
        ("optim={lr: 1e-4, beta1: 0.8, lr: 1e-5}", "optim.lr is set twice"),
        ("data.chat_template_options={a#: 1, b: [&x 3, *x], a#: 2}", "data.chat_template_options.a# is set twice"),
        ("teachers=[&x [*x]]", "cannot set teachers: maximum recursion depth"),
        ("teachers=[{name: a, model: m, name: b}]", "teachers.0.name is set twice"),
        ("train.steps.more=1", "cannot set train.steps.more"),
        ("optim.lr=[1", "cannot set optim.lr"),
        ("optim.lrr=1", "did you mean optim.lr?"),
    ],
)
def test_bad_overrides_say_which_one(tmp_path, override, message):
    with pytest.raises(cfg.ConfigError) as caught:
        cfg.load(write(tmp_path, MINIMAL), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("run: [1", "not valid YAML"), ("- 1\n", "expected a map"), ("", "expected a map")],
)
def test_unreadable_files_are_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(cfg.ConfigError, match=message) as caught:
        cfg.load(path)
    assert "broken.yaml" in str(caught.value)


def test_settings_that_are_there_twice_are_all_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: a}\ntrain:\n  steps: 4\n  steps: 8\ndata: {train: [{name: a, name: b}]}\nrun: {seed: 1}\n"
    )
    with pytest.raises(cfg.ConfigError) as caught:
        cfg.load(path)
    assert sorted(caught.value.problems) == [
        "data.train.0.name is set twice, in lines 5 and 5",
        "run is set twice, in lines 1 and 6",
        "train.steps is set twice, in lines 3 and 4",
    ]


def test_merged_and_recursive_yaml_sets_nothing_twice(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: &r {dir: a, seed: 1}\ntrain: {<<: *r, seed: 2}\ndata: &d [*d]\n")
    with pytest.raises(cfg.ConfigError) as caught:
        cfg.load(path)
    assert not any("twice" in problem for problem in caught.value.problems)


AT_LEAST_ONE = [
    "parallel.tensor", "parallel.pipeline", "parallel.context", "parallel.data", "parallel.expert",
    "student.vocab_multiple", "loss.chunk_tokens", "rollout.prompts_per_step", "rollout.samples_per_prompt",
    "rollout.max_new_tokens", "data.max_prompt_tokens", "train.steps", "train.micro_batch_size", "train.keep_last",
    "train.eval_samples", "rewards.code_memory_mb", "rewards.code_workers",
]  # fmt: skip
NOT_NEGATIVE = [
    "train.eval_every", "train.save_every", "optim.lr", "optim.min_lr", "optim.warmup_steps", "optim.weight_decay",
    "optim.clip_grad",
]  # fmt: skip
POSITIVE = ["loss.temperature", "rollout.temperature", "run.timeout_s", "optim.eps", "rewards.code_timeout_s"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [(s, 0) for s in AT_LEAST_ONE] + [(s, -1) for s in NOT_NEGATIVE] + [(s, 0) for s in POSITIVE]
    + [("loss.beta", -0.1), ("loss.beta", 1.1), ("run.seed", 2**62), ("run.seed", -(2**62))],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(setting, value):
    problems = problems_of(tree_with(**{setting.replace(".", "__"): value}))
    assert any(problem.startswith(f"{setting} must") for problem in problems)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("loss.beta", 0),
        ("loss.beta", 1),
        ("optim.clip_grad", 0),
        ("optim.warmup_steps", 9),
        ("train.steps", 1),
        ("run.seed", 2**62 - 1),
        ("run.seed", -1),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(setting, value):
    cfg.from_dict(tree_with(**{setting.replace(".", "__"): value}))


@pytest.mark.parametrize(
    ("tree", "fragments"),
    [
        (tree_with(train__save_best="eval/kl/a"),
         ["train.save_best: eval/kl/a is a metric of evaluations", "set train.eval_every and data.eval"]),
        (tree_with(train__save_best="kl/a"), ["train.save_best: 'kl/a' is no metric of an evaluation (eval/…)"]),
        (tree_with(train__save_best="eval/size"), ["train.save_best: it is not known whether a smaller"]),
        (tree_with(train__stop_when=["loss < 1", "loss is small"]), ["train.stop_when.1: 'loss is small' is no"]),
        (tree_with(train__stop_when=["eval/nll/all stalls 2"]), ["train.stop_when.0: eval/nll/all is a metric"]),
        (tree_with(optim__min_lr=0.1, optim__lr=0.01), ["optim.min_lr (0.1)", "optim.lr (0.01)"]),
        (tree_with(parallel__sequence=True), ["parallel.sequence needs parallel.tensor > 1"]),
        ({**MINIMAL, "parallel": {"tensor": 4, "expert": 3}}, ["parallel.expert (3) must divide parallel.tensor (4)"]),
        ({**MINIMAL, "parallel": {"data": 2, "expert": 2}}, ["parallel.expert (2) must divide parallel.tensor (1)"]),
        (tree_with(parallel__context=999, rollout__max_new_tokens=8), ["parallel.context=999", "1998 pieces"]),
        ({**MINIMAL, "parallel": {"context": 2}, "teachers": [{"name": "a", "model": "t", "tokenizer": "own"}]},
         ["parallel.context", "its own tokenizer"]),
        (tree_with(parallel__context=2, train__packing=True), ["train.packing does not work with parallel.context"]),
        (tree_with(parallel__data=3), ["rollout.prompts_per_step (16)", "parallel.data (3)"]),
        (tree_with(train__micro_batch_size=5), ["train.micro_batch_size (5)", "16 answers"]),
        ({**tree_with(train__micro_batch_size=16), "parallel": {"data": 2}},
         ["train.micro_batch_size (16)", "8 answers"]),
        ({**MINIMAL, "teachers": []}, ["teachers: at least one"]),
        ({**MINIMAL, "teachers": [{"name": "a", "model": "t"}] * 2}, ["teachers: the name 'a' is used twice"]),
        ({**MINIMAL, "teachers": [{"name": "a", "model": "t", "weight": -1}, {"name": "b", "model": "t", "weight": 2}]},
         ["teachers.0.weight must not be negative, but is -1"]),
        ({**MINIMAL, "teachers": [{"name": "a", "model": "t", "sources": {"cod": 1}}]},
         ["teachers.0.sources", "no prompt source 'cod'", "did you mean 'code'?"]),
        ({**MINIMAL, "teachers": [{"name": "a", "model": "t", "sources": {"code": 0}}]},
         ["every weight for prompt source 'code' is 0"]),
        (tree_with(data__train=[]), ["data.train: at least one source"]),
        (tree_with(data__eval=[{"name": "math", "path": "p"}] * 2), ["data.eval: the name 'math' is used twice"]),
        (tree_with(data__train=[{"name": n, "path": "p"} for n in ("code", "code")]), ["data.train: the name 'code'"]),
        (tree_with(data__train=[{"name": "code", "path": "p", "weight": 0}]),
         ["data.train.0.weight must be above 0, not 0"]),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(tree, fragments):
    text = " ".join(problems_of(tree))
    assert [f for f in fragments if f not in text] == []


def test_numbers_out_of_bounds_and_settings_that_contradict_each_other_are_listed_together():
    tree = tree_with(train__steps=0, optim__eps=0, loss__beta=1.5, optim__beta2=1, parallel__sequence=True)
    tree["teachers"][0]["sources"] = {"code": -2}
    assert sorted(problems_of(tree)) == [
        "loss.beta must lie between 0 and 1, not 1.5: 0 is forward KL, 1 is reverse KL",
        "optim.beta2 must lie in [0, 1), not 1",
        "optim.eps must be above 0, not 0",
        "parallel.sequence needs parallel.tensor > 1",
        "teachers.0.sources.code must not be negative, but is -2",
        "train.steps must be at least 1, not 0",
    ]


def test_nothing_more_is_said_about_a_setting_that_is_out_of_bounds():
    tree = tree_with(rollout__prompts_per_step=0, parallel__data=3, optim__warmup_steps=5, train__steps=-1)
    assert sorted(problems_of(tree)) == [
        "rollout.prompts_per_step must be at least 1, not 0",
        "train.steps must be at least 1, not -1",
    ]


def test_a_number_without_a_default_has_a_nearest_one_that_is_allowed():
    """`_further_problems` goes on with it."""
    for section in [schema.schema(), *schema.schema()["$defs"].values()]:
        for name, setting in section["properties"].items():
            if name in section.get("required", []) or "items" in setting:
                assert not {"exclusiveMinimum", "exclusiveMaximum"} & {*setting, *setting.get("items", {})}, name


def test_an_eval_only_source_needs_a_teacher_too():
    tree = tree_with(data__eval=[{"name": "prose", "path": "p"}])
    tree["teachers"] = [{"name": "a", "model": "t", "sources": {"prose": 0}}]
    assert "'prose'" in problems_of(tree)[0]


def test_teacher_weights_normalise_per_source():
    config = cfg.from_dict(MINIMAL)
    assert config.teacher_weights("math") == [0.25, 0.75]
    assert config.teacher_weights("code") == [1.0, 0.0], "a source of its own overrides the weight"


def test_dump_round_trips_through_load(tmp_path):
    tree = tree_with(optim__lr=1e-7, loss__beta=0.3, log__wandb="offline", run__dir="läufe/1")
    config = cfg.from_dict(tree)
    path = tmp_path / "resolved.yaml"
    path.write_text(cfg.dump(cfg.to_dict(config)), encoding="utf-8")
    assert cfg.load(path) == config
    assert cfg.dump(cfg.to_dict(cfg.load(path))) == cfg.dump(cfg.to_dict(config))


def test_dump_writes_every_default_out():
    text = yaml.safe_load(cfg.dump(cfg.to_dict(cfg.from_dict(MINIMAL))))
    assert text["optim"]["beta2"] == 0.95
    assert text["teachers"][0]["sources"] == {}


def test_a_config_cannot_be_changed_after_the_checks():
    config = cfg.from_dict(MINIMAL)
    with pytest.raises(AttributeError):
        config.optim.lr = 1.0


SERVED = {"backend": "sglang"}


def served(*teachers, loss=None, **rollout):
    """A valid tree whose teachers have these settings, and its rollouts those."""
    named = [{"name": f"t{i}", "model": "m", **teacher} for i, teacher in enumerate(teachers)]
    engine = {"engine": "sglang"} if rollout else {}
    return {**MINIMAL, "teachers": named or MINIMAL["teachers"], "loss": loss or {}, "rollout": {**engine, **rollout}}


def at_servers(**settings):
    return served({**SERVED, "servers": settings})


TOPK, SAMPLED = {**SERVED, "carrier": "topk"}, {**SERVED, "carrier": "sampled"}


@pytest.mark.parametrize(
    ("tree", "fragments"),
    [
        (served({"carrier": "topk"}), ["teachers.0.carrier: topk needs teachers.0.backend: sglang"]),
        (served({"carrier": "sampled"}, loss={"kind": "sampled"}),
         ["teachers.0.carrier: sampled needs teachers.0.backend"]),
        (served({"on_failure": "renormalise"}),
         ["teachers.0.on_failure: renormalise needs teachers.0.backend: sglang"]),
        (served({"servers": {"count": 2}}), ["teachers.0.servers needs teachers.0.backend: sglang"]),
        (served({**TOPK, "top_k": 0}), ["teachers.0.top_k must be at least 1, not 0"]),
        (served(SAMPLED), ["teachers.0.carrier: sampled needs loss.kind: sampled"]),
        (served({}, SAMPLED, loss={"ensemble": "probs"}), ["teachers.1.carrier: sampled needs loss.kind: sampled"]),
        (served(TOPK, loss={"temperature": 2.0}),
         ["teachers.0.carrier: topk needs loss.temperature: 1, not 2.0", "allowed for hidden"]),
        (served(SAMPLED, loss={"temperature": 0.5, "kind": "sampled"}),
         ["teachers.0.carrier: sampled needs loss.temperature"]),
        (served({}, TOPK), ["teachers.1.carrier: topk with several teachers needs loss.ensemble: probs"]),
        (served({}, SAMPLED, loss={"kind": "sampled"}),
         ["teachers.1.carrier: sampled with several", "loss.ensemble: probs"]),
        (tree_with(loss__kind="sampled", loss__beta=0.5), ["loss.kind: sampled is reverse KL, so loss.beta must be 1"]),
        (tree_with(loss__importance_cap=0.5),
         ["loss.importance_cap must be at least 1, not 0.5: fresh samples have weight 1"]),
        (served(top_p=0.0), ["rollout.top_p must be above 0 and at most 1"]),
        (served(top_p=1.5), ["rollout.top_p must be above 0 and at most 1"]),
        (served(top_k=-1), ["rollout.top_k must not be negative, but is -1: 0 means all tokens"]),
        (served(max_staleness=-1), ["rollout.max_staleness must not be negative"]),
        (served(partial=True), ["rollout.partial needs rollout.max_staleness"]),
        (served({**SERVED, "servers": {"urls": ["http://a:1", "http://a:1/"]}}),
         ["teachers.0.servers.urls names a server twice"]),
        (served(servers={"count": 0}), ["rollout.servers.count must be at least 1"]),
    ],
)  # fmt: skip
def test_what_carriers_and_engines_cannot_do_is_refused(tree, fragments):
    text = " ".join(problems_of(tree))
    assert [f for f in fragments if f not in text] == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [("top_p", 0.9), ("top_k", 20), ("max_staleness", 1), ("sync_verify", True), ("servers", {"count": 2})],
)
def test_settings_of_servers_are_not_for_the_embedded_engine(setting, value):
    (problem,) = problems_of(tree_with(**{f"rollout__{setting}": value}))
    assert problem == f"rollout.{setting} needs rollout.engine: sglang, not local"
    cfg.from_dict(served(**{setting: value}))


def test_servers_have_a_type_of_their_own():
    (problem,) = problems_of(served(dtype="bf16"))
    assert problem == "rollout.dtype needs rollout.engine: local, not sglang"
    cfg.from_dict(tree_with(rollout__dtype="bf16"))


BESIDE = {"colocated": True, "args": ["--mem-fraction-static", "0.5"]}


@pytest.mark.parametrize(
    ("tree", "fragment"),
    [
        (served({**SERVED, "servers": BESIDE}),
         "teachers.0.servers.colocated: only the student's servers can be; a teacher on the trainer's GPUs is"
         " teachers.0.backend: megatron"),
        (served(servers=BESIDE, sync="tensor", max_staleness=1),
         "rollout.max_staleness (1) needs servers with GPUs of their own"),
        (served(servers={"colocated": True}, sync="disk"), "rollout.servers.colocated needs --mem-fraction-static"),
        (served(servers={**BESIDE, "count": 2}, sync="disk"), "servers take 2 GPUs, but the trainer has 1"),
        (served(servers={**BESIDE, "gpus": [1]}, sync="disk"), "rollout.servers.gpus: [1] are not the trainer's"),
        ({**served(servers={**BESIDE, "count": 2, "gpus": [0, 2]}, sync="disk"), "parallel": {"pipeline": 4}},
         "rollout.servers.gpus must be 2 numbers in a row"),
    ],
)  # fmt: skip
def test_what_servers_on_the_trainers_gpus_cannot_do(tree, fragment):
    (problem,) = problems_of(tree)
    assert fragment in problem


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"args": ["--api-key", "hunter2"]}, "put it into the environment variable MEGATRON_OPD_API_KEY"),
        ({"args": ["--admin-api-key=hunter2"]}, "put it into the environment variable MEGATRON_OPD_ADMIN_KEY"),
        ({"args": ["--port", "5"]}, "rollout.servers.args: --port is set by rollout.servers.port"),
        ({"args": ["--tp-size=2"]}, "rollout.servers.args: --tp-size is set by rollout.servers.tensor"),
    ],
)
def test_arguments_that_servers_of_ours_are_not_given(settings, fragment):
    (problem,) = problems_of(served(servers=settings))
    assert fragment in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize("name", ["a/b", "../a", "a@b", "a*", "a\tb", "a\n"])
def test_names_of_teachers_are_names_of_files(name):
    (problem,) = problems_of(served({"name": name}))
    assert "is also in names of files" in problem


def test_a_directory_is_one_line():
    (problem,) = problems_of(tree_with(run__dir="runs/a\nb"))
    assert problem == "run.dir must not have line ends or tabs"


def test_servers_on_the_trainers_gpus():
    cfg.from_dict(served(servers=BESIDE, sync="tensor"))
    cfg.from_dict(served(servers={"colocated": True, "urls": ["http://a:1", "http://b:1"]}, sync="disk"))
    args = {**BESIDE, "args": ["--mem-fraction-static=0.5"], "tensor": 2, "gpus": [2, 3]}
    cfg.from_dict({**served(servers=args, sync="disk"), "parallel": {"pipeline": 4}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": ["node7:30000"]}, "node7:30000 must begin with http:// or https:// and a host"),
        ({"urls": ["http://"]}, "http:// must begin with http:// or https:// and a host"),
        ({"urls": ["http://node7:99999"]}, "http://node7:99999 is not an address"),
        ({"urls": ["http://node7:1/?a=b"]}, "http://node7:1/?a=b must have nothing after ? or #"),
        ({"tensor": 0}, "tensor must be at least 1, not 0"),
        ({"max_in_flight": 0}, "max_in_flight must be at least 1, not 0"),
        ({"retries": -1}, "retries must not be negative, but is -1"),
        ({"start_timeout_s": 0}, "start_timeout_s must be above 0"),
        ({"request_timeout_s": -1}, "request_timeout_s must be above 0"),
        ({"port": 70000}, "port must lie between 1 and 65535"),
        ({"python": ""}, "python must not be empty"),
        ({"gpus": [0, 1, 2], "count": 1, "tensor": 2}, "gpus names 3, but"),
        ({"gpus": [0, 0], "tensor": 2}, "gpus must be different numbers, not [0, 0]"),
        ({"gpus": [-1]}, "gpus.0 must not be negative, but is -1"),
    ],
)
def test_servers_that_cannot_be(settings, message):
    (problem,) = problems_of(at_servers(**settings))
    assert problem.startswith("teachers.0.servers.")
    assert message in problem
    (problem,) = problems_of(served(servers=settings))
    assert problem.startswith("rollout.servers.")
    assert message in problem


def test_an_address_with_a_password_is_refused_and_not_repeated():
    for url in ("http://me:hunter2@node7:30000", "http://me:hunter2@node7:99999"):
        (problem,) = problems_of(at_servers(urls=[url]))
        assert problem.startswith("teachers.0.servers.urls")
        assert "MEGATRON_OPD_API_KEY" in problem
        assert "hunter2" not in problem


@pytest.mark.parametrize("host", ["0.0.0.0", "node7", "::", "192.168.1.4"])
def test_servers_that_others_can_reach_need_a_key(monkeypatch, host):
    monkeypatch.delenv("MEGATRON_OPD_API_KEY", raising=False)
    (problem,) = problems_of(at_servers(host=host))
    assert problem.startswith(f"teachers.0.servers.host: {host}")
    assert "MEGATRON_OPD_API_KEY" in problem
    monkeypatch.setenv("MEGATRON_OPD_API_KEY", "secret")
    cfg.from_dict(at_servers(host=host))
    monkeypatch.delenv("MEGATRON_OPD_API_KEY")
    cfg.from_dict(at_servers(host=host, urls=["http://node7:30000"]))  # which nobody starts here


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_servers_on_loopback_need_none(monkeypatch, host):
    monkeypatch.delenv("MEGATRON_OPD_API_KEY", raising=False)
    cfg.from_dict(at_servers(host=host))


def test_servers_need_their_client(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems_of(served(TOPK, max_staleness=1))
    assert problem == "rollout.servers, teachers.0.servers: servers need the package aiohttp, which is not installed"
    cfg.from_dict(MINIMAL)


@pytest.mark.parametrize(
    "tree",
    [
        served(TOPK),
        served(TOPK, loss={"beta": 0.3}),
        served({}, TOPK, {**SERVED, "carrier": "hidden"}, loss={"ensemble": "probs"}),
        served(TOPK, loss={"kind": "sampled"}),
        served(SAMPLED, loss={"kind": "sampled"}),
        served({}, TOPK, SAMPLED, loss={"kind": "sampled", "ensemble": "probs"}),
        served({}, {**SERVED, "on_failure": "renormalise"}, loss={"temperature": 2.0}),
        served({}, loss={"kind": "sampled", "temperature": 2.0}),
        served(max_staleness=2, partial=True, top_p=0.9, top_k=50),
        at_servers(urls=["http://node7:30000", "https://node8:30000/", "http://[::1]:30001"]),
        at_servers(tensor=2, count=2, gpus=[4, 5, 6, 7], host="localhost"),
    ],
)
def test_what_carriers_and_engines_can_do_is_allowed(tree):
    cfg.from_dict(tree)


def test_nothing_asks_for_more_tokens_than_there_are():
    config = cfg.from_dict(served({}, {**TOPK, "top_k": 100}, loss={"ensemble": "probs"}, top_k=101))
    assert check_vocabulary(config.rollout, config.teachers, 101) == []
    (problem,) = check_vocabulary(config.rollout, config.teachers, 100)
    assert problem.startswith("rollout.top_k (101) must not be above 100")
    both = check_vocabulary(config.rollout, config.teachers, 99)
    assert [p.split()[0] for p in both] == ["rollout.top_k", "teachers.1.top_k"]


def test_names_that_differ_by_a_hash_are_two(tmp_path):
    options = cfg.read(write(tmp_path, MINIMAL), ["data.chat_template_options={a#: 1, a_: 2}"])
    assert options["data"]["chat_template_options"] == {"a#": 1, "a_": 2}


def test_only_what_differs_in_its_place_is_shown():
    """A source's environment has another default than the run's."""
    none, tools = (c.EnvironmentConfig(name=name) for name in ("none", "tools"))
    sources = [c.SourceConfig(name="a", path="p"), c.SourceConfig(name="b", path="p", environment=none)]
    assert cfg.not_defaults(c.DataConfig(train=sources)) == {
        "train": [{"name": "a", "path": "p"}, {"name": "b", "path": "p", "environment": {"name": "none"}}]
    }
    assert cfg.not_defaults(c.SourceConfig(name="a", path="p", environment=tools))["environment"] == {"name": "tools"}
