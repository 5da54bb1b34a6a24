"""Scalars of a config: YAML 1.2 and strict types, paths, empty sections; the same in files and on the command line."""

import copy
import math

import pytest
import yaml

from megatron_opd.config import file as cfg
from megatron_opd.config import yaml_text
from megatron_opd.config.schema import schema

MINIMAL = {
    "run": {"dir": "runs/x"},
    "student": {"model": "s"},
    "teachers": [{"name": "a", "model": "ta"}],
    "data": {"train": [{"name": "math", "path": "m.jsonl"}]},
    "train": {"steps": 10},
}


def tree_with(setting, value):
    tree = copy.deepcopy(MINIMAL)
    *parents, last = setting.split(".")
    node = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return tree


@pytest.fixture(params=["file", "override"])
def load(request, tmp_path):
    """Reads a config with one more setting, as YAML wrote it: in the file, or behind `=` on the command line."""
    path = tmp_path / "run.yaml"

    def read(setting, text):
        marked = yaml_text.dump(tree_with(setting, "VALUE" if request.param == "file" else 1))
        path.write_text(marked.replace("VALUE", text))
        return cfg.load(path, [] if request.param == "file" else [f"{setting}={text}"])

    return read


def at(config, setting):
    for part in setting.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("log.wandb", "off", "off"),
        ("precision.fp8.student", "off", "off"),
        ("teachers.0.name", "no", "no"),
        ("data.system_prompt", "2026-03-04", "2026-03-04"),
        ("data.system_prompt", "12:45:10", "12:45:10"),
        ("optim.lr", "7e-6", 7e-6),
        ("optim.lr", "2E-3", 2e-3),
        ("optim.lr", "1", 1.0),
        ("train.steps", "0x1F", 31),
        ("train.steps", "0o17", 15),
        ("train.export", "False", False),
        ("run.seed", "-7", -7),
        ("teachers.0.sources", "{math: .5}", {"math": 0.5}),
        ("data.chat_template_options", "{a: on, b: true, c: 3, d: 0.5}", {"a": "on", "b": True, "c": 3, "d": 0.5}),
    ],
)
def test_words_and_numbers_of_yaml_1_2(load, setting, text, value):
    tree = {"data.chat_template": "tokenizer"} if setting.startswith("data.") else {}
    if tree:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cfg, "check", lambda config: [])
            found = at(load(setting, text), setting)
    else:
        found = at(load(setting, text), setting)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "text", "write"),
    [
        ("optim.lr", "yes", "write it in digits, e.g. 1e-5"),
        ("optim.weight_decay", "true", "write it in digits"),
        ("optim.eps", "'1e-9'", "write 1e-09"),
        ("train.steps", "010", "write 10"),
        ("train.steps", "1:30", "write it in digits, e.g. 8"),
        ("rollout.max_new_tokens", "1_024", "write 1024"),
        ("rollout.max_new_tokens", "4e2", "write 400"),
        ("rollout.top_k", "12.0", "write 12"),
        ("parallel.tensor", "true", "write it in digits"),
        ("parallel.pipeline", "off", "write it in digits"),
        ("train.packing", "yes", "write true"),
        ("train.packing", "0", "write false"),
        ("train.packing", "'False'", "write false"),
        ("log.wandb", "false", "should be 'off', 'offline' or 'online'"),
        ("optim.lr", "", "got nothing"),
    ],
)
def test_values_of_another_type_are_refused_with_what_to_write(load, setting, text, write):
    with pytest.raises(cfg.ConfigError) as caught:
        load(setting, text)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{setting}: ")
    assert write in problem


def _leaves(node, kinds, prefix=""):
    for name, setting in node["properties"].items():
        inner = setting.get("$ref")
        if inner:
            yield from _leaves(schema()["$defs"][inner.rpartition("/")[2]], kinds, f"{prefix}{name}.")
        elif setting.get("type") in kinds and "enum" not in setting:
            yield prefix + name


@pytest.mark.parametrize(
    ("kinds", "values"),
    [
        (("integer", "number"), [True, False, "3", "on"]),
        (("integer",), [2.5, 3.0]),
        (("boolean",), [0, 1, "true", "off"]),
        (("string",), [1, 0.5, True]),
    ],
    ids=str,
)
def test_no_setting_takes_a_value_of_another_type(kinds, values):
    """Every setting with a plain type, of every section; bounds and types alike name it."""
    settings = list(_leaves(schema(), kinds))
    assert len(settings) > 5
    for value in values:
        tree = copy.deepcopy(MINIMAL)
        for setting in settings:
            *parents, last = setting.split(".")
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        if "method" in settings:
            tree.pop("method")
        with pytest.raises(cfg.ConfigError) as caught:
            cfg.from_dict(tree)
        named = {problem.split(": ")[0] for problem in caught.value.problems}
        assert set(settings) - named - {"method"} == set()


@pytest.mark.parametrize(
    "text", ["off", "010", "1:30", "1e5", "0o7", "~", "null", "", "x #1", "yes", "=", "<<", "3.", "ä"]
)
def test_texts_survive_a_dump_for_readers_of_either_yaml(text):
    dumped = yaml_text.dump({"a": [text, {text: 1}], "b": 1e-7, "c": math.inf, "d": None})
    assert (
        yaml_text.load(dumped)
        == yaml.safe_load(dumped)
        == {"a": [text, {text: 1}], "b": 1e-7, "c": math.inf, "d": None}
    )


@pytest.mark.parametrize(
    ("setting", "text"), [("teachers.0.name", "7"), ("run.dir", "2026"), ("data.train.0.reward", "true")]
)
def test_a_file_has_quotes_around_a_text_that_is_something_else_in_yaml(tmp_path, setting, text):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text.dump(tree_with(setting, "VALUE")).replace("VALUE", text))
    with pytest.raises(cfg.ConfigError, match=rf'{setting}: .* write it in quotes: "{text}"'):
        cfg.load(path)


@pytest.mark.parametrize(
    "text",
    ["{{ prompt }} Reference: {{ answer }}", "a: b, c", "# heading", "- item", "[1, 2", "7", "true", "null",
     "%d & *that", "!!binary aGk=", "it's", '"one" and "two'],
)  # fmt: skip
def test_a_text_on_the_command_line_is_taken_as_it_is(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text.dump(MINIMAL))
    config = cfg.load(path, [f"teachers.0.prompt_template={text}", f"log.wandb_project={text}"])
    assert (config.teachers[0].prompt_template, config.log.wandb_project) == (text, text)


@pytest.mark.parametrize(("text", "value"), [("'7'", "7"), ('"two\\nlines"', "two\nlines"), ("''", "")])
def test_quotes_around_a_whole_text_are_those_of_yaml(tmp_path, text, value):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text.dump(MINIMAL))
    assert cfg.load(path, [f"teachers.0.prompt_template={text}"]).teachers[0].prompt_template == value


@pytest.mark.parametrize("text", ["!!binary aGk=", "!!python/name:os.system ''", "!!timestamp 2026-01-01", "!!int x"])
def test_other_kinds_of_data_are_not_read(load, text):
    with pytest.raises(cfg.ConfigError, match=r"not valid YAML|cannot set"):
        load("train.steps", text)


# Paths.

PATHS = ["run.dir", "student.model", "teachers.0.model", "data.train.0.path", "rollout.servers.python"]


@pytest.mark.parametrize("setting", PATHS)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("~/deep/er", "/home/of/me/deep/er"),
        ("$SCRATCH/b", "/scratch/7/b"),
        ("a/${SCRATCH}", "a//scratch/7"),
        ("a/~b", "a/~b"),
        ("5$", "5$"),
    ],
)
def test_home_and_variables_in_paths(load, monkeypatch, setting, text, value):
    monkeypatch.setenv("HOME", "/home/of/me")
    monkeypatch.setenv("SCRATCH", "/scratch/7")
    if "servers" in setting:
        monkeypatch.setattr(cfg, "check", lambda config: [])
    assert at(load(setting, text), setting) == value


def test_home_in_a_directory_that_the_hubs_reader_takes(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    assert load("data.train.0.path", "hf:~/rows").data.train[0].path == "hf:/home/of/me/rows"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("$NOT_SET_HERE/x", "the environment variable NOT_SET_HERE in '$NOT_SET_HERE/x' is not set"),
        ("x/${NOR_THIS}", "the environment variable NOR_THIS"),
        ("~nobody-of-that-name/x", "the home directory in '~nobody-of-that-name/x' is not known"),
    ],
)
def test_a_path_that_would_lead_elsewhere_is_refused(load, text, wrong):
    with pytest.raises(cfg.ConfigError) as caught:
        load("student.model", text)
    assert caught.value.problems[0].startswith(f"student.model: {wrong}")


def test_texts_that_are_no_paths_stay_as_they_are(load, monkeypatch):
    monkeypatch.setattr(cfg, "check", lambda config: [])
    assert load("data.system_prompt", "$5 or ~").data.system_prompt == "$5 or ~"


# `#` on the command line.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x/run #1", "x/run #1"),
        ("#7", "#7"),
        ("a b # c", "a b # c"),
        ("'q #2'", "q #2"),
        ('"q" #2', '"q" #2'),
    ],
)
def test_a_hash_is_no_comment_in_an_override(tmp_path, text, value):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text.dump(MINIMAL) + "# a comment\nlog: {wandb: off} # another\n")
    assert cfg.load(path, [f"run.dir={text}"]).run.dir == value


def test_a_hash_within_lists_of_an_override(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text.dump(MINIMAL))
    found = cfg.load(path, ["data.train=[{name: math, path: rows #3/a.jsonl}]"])
    assert found.data.train[0].path == "rows #3/a.jsonl"


# Empty sections.


def test_an_empty_section_is_its_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text.dump(MINIMAL))
    plain = cfg.load(path)
    text = path.read_text().replace("  model: ta\n", "  model: ta\n  servers:\n  sources:\n")
    path.write_text(text + "optim:\nprecision:\n  fp8:\nlora:\nlog: # {wandb: off}\nrl: {}\nrewards:\n")
    assert cfg.load(path) == plain
    assert cfg.load(path, ["optim.lr=3e-3"]).optim.lr == 3e-3


def test_an_empty_section_with_a_required_setting_names_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text.dump({**MINIMAL, "run": None, "data": None}))
    with pytest.raises(cfg.ConfigError) as caught:
        cfg.load(path)
    assert sorted(caught.value.problems) == [
        "data.train: required, but not set",
        "run.dir: required, but not set",
    ]


def test_an_empty_section_keeps_what_the_method_sets(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml_text.dump({**MINIMAL, "method": "gkd", "loss": None}))
    whole = cfg.load(path)
    path.write_text(yaml_text.dump({**MINIMAL, "method": "gkd"}))
    assert cfg.load(path) == whole
