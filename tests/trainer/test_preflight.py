"""Bad input, as the command line answers it: before anything starts, all of it at once, naming what to change."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_opd.__main__ import main
from megatron_opd.config import OptimConfig, TrainConfig
from megatron_opd.config.file import from_dict, load
from megatron_opd.trainer import preflight

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples/quickstart"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def said(capsys, tmp_path):
    """Runs a command that must be refused, and returns the lines of its message."""

    def run(command, *overrides):
        run_dir = tmp_path / "run"
        assert main([command, "examples/quickstart.yaml", f"run.dir={run_dir}", *map(str, overrides)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.strip().splitlines()
        if lines[0].endswith("  checking the settings of examples/quickstart.yaml, its models and its data"):
            del lines[0]  # what a run says at once
        assert lines[0].startswith("error: ")
        assert "Traceback" not in err
        assert not run_dir.exists()
        return lines

    return run


@pytest.fixture
def student(tmp_path):
    """A copy of the student that a test may break."""
    return Path(shutil.copytree(QUICKSTART / "models/student", tmp_path / "student"))


def change_json(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def jsonl(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_check_prints_what_is_no_default(capsys, tmp_path):
    given = ["check", "examples/quickstart.yaml", f"run.dir={tmp_path / 'run'}", "optim.lr=5e-4", "optim.beta2=0.95"]
    assert main(given) == 0
    out, _ = capsys.readouterr()
    shown = yaml.safe_load(out)
    assert shown["optim"] == {"lr": 5e-4, "warmup_steps": 3}
    assert shown["teachers"][1] == {"name": "compare", "model": "examples/quickstart/models/teacher_compare"}
    assert "log" not in shown
    config = load("examples/quickstart.yaml", given[2:])
    assert from_dict({**shown, "method": "opd"}) == config
    assert "# all other settings have their defaults (--all prints them)\n" in out


@pytest.mark.parametrize(
    ("steps", "said"), [(2, "ends at a learning rate of 0.000667, below optim.lr (0.001)"), (3, "")]
)
def test_a_run_that_ends_within_its_warm_up_is_told(steps, said):
    optim, train = OptimConfig(lr=1e-3, warmup_steps=12), TrainConfig(steps=steps, minibatches=2, epochs=2)
    assert said in "".join(preflight._of_schedule(optim, train))
    assert bool(preflight._of_schedule(optim, train)) == bool(said)


def test_check_says_that_servers_have_no_interpreter_here(capsys, tmp_path):
    plain = tmp_path / "python"
    plain.write_text("")
    served = ["rollout.engine=sglang", "teachers.0.backend=sglang", f"teachers.0.servers.python={plain}"]
    given = ["check", "examples/quickstart.yaml", f"run.dir={tmp_path / 'run'}", *served]
    assert main([*given, f"rollout.servers.python={tmp_path / 'nowhere'}"]) == 0
    out, _ = capsys.readouterr()
    assert (
        f"# rollout.servers.python: {tmp_path / 'nowhere'} does not exist; `megatron-opd install-sglang` installs"
        in out
    )
    assert f"# teachers.0.servers.python: {plain} cannot be executed; `megatron-opd install-sglang` installs" in out
    plain.chmod(0o755)
    assert main([*given, f"rollout.servers.python={plain}"]) == 0
    assert "servers.python: /" not in capsys.readouterr().out


def test_check_prints_the_resolved_config_and_the_plan_and_starts_nothing(capsys, tmp_path):
    run_dir = tmp_path / "run"
    assert main(["check", "examples/quickstart.yaml", f"run.dir={run_dir}", "optim.lr=5e-4", "--all"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    resolved = yaml.safe_load(out)
    assert resolved["optim"]["lr"] == 5e-4
    assert resolved["optim"]["beta2"] == 0.95  # a default
    assert "# data.train: add: 400 prompts\n" in out
    command = f"python -m megatron_opd train examples/quickstart.yaml run.dir={run_dir} optim.lr=5e-4"
    assert f"# trainer: 4 ranks of `{command}`\n" in out
    assert not run_dir.exists()


@pytest.mark.parametrize("command", ["check", "train"])
def test_missing_config(command, capsys):
    assert main([command, "no/such.yaml"]) == 1
    assert "there is no such file: no/such.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "train"])
def test_everything_wrong_is_said_at_once(said, command, tmp_path, student):
    (student / "model.safetensors").unlink()
    head, *problems = said(
        command,
        f"student.model={student}",
        "teachers.0.model=no/teacher",
        "data.train.0.path=no/prompts.jsonl",
        f"data.train.1.path={jsonl(tmp_path, '{')}",
        "parallel.tensor=3",
        "parallel.pipeline=4",
    )
    assert head == f"error: config: {len(problems)} problems"
    text = "\n".join(problems)
    assert f"student.model: {student} has neither model.safetensors nor" in text
    assert "teachers.0.model: no/teacher is not a Hugging Face model directory" in text
    assert "there is no file no/prompts.jsonl" in text
    assert f"{tmp_path}/prompts.jsonl, line 1: not valid JSON" in text
    assert "parallel.tensor=3 does not divide the 4 attention heads of student.model" in text
    assert "parallel.pipeline=4 does not divide the 2 layers of teachers.1.model" in text
    assert len(set(problems)) == len(problems)


def test_unknown_settings_with_the_nearest_name(said):
    _, *problems = said("check", "optim.larning_rate=1", "trian.steps=3", "parallel.tenser=2")
    assert sorted(problems) == [
        "  - optim.larning_rate: unknown setting",
        "  - parallel.tenser: unknown setting; did you mean parallel.tensor?",
        "  - trian: unknown setting; did you mean train?",
    ]


@pytest.mark.parametrize("override", ["optim.lr", "=3", "teachers.7.weight=1", "optim.lr.x=1", "train.steps={"])
def test_override_that_cannot_be_applied(said, override):
    said("check", override)


# Directories of models.


def no_config(model):
    (model / "config.json").unlink()
    return "is not a Hugging Face model directory: there is no config.json in it"


def broken_config(model):
    (model / "config.json").write_text("{")
    return "config.json is not valid JSON"


def unknown_architecture(model):
    change_json(model / "config.json", architectures=["MambaForCausalLM"])
    return "architecture MambaForCausalLM is not supported; known: LlamaForCausalLM, "


def config_without_sizes(model):
    config = json.loads((model / "config.json").read_text())
    del config["hidden_size"]
    (model / "config.json").write_text(json.dumps(config))
    return "config.json: missing 'hidden_size'"


def no_weights(model):
    (model / "model.safetensors").unlink()
    return "has neither model.safetensors nor model.safetensors.index.json"


def truncated_weights(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors is damaged or cut short"


def garbage_weights(model):
    (model / "model.safetensors").write_bytes(b"\xff" * 1000)
    return "model.safetensors is damaged or cut short"


def empty_weights(model):
    (model / "model.safetensors").write_bytes(b"")
    return "model.safetensors is damaged or cut short"


def missing_shard(model):
    index = {"weight_map": dict.fromkeys(load_file(model / "model.safetensors"), "gone.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "the index names gone.safetensors, which does not exist"


def more_layers_than_tensors(model):
    change_json(model / "config.json", num_hidden_layers=4)
    return "'model.layers.2.input_layernorm.weight' is missing"


def fewer_layers_than_tensors(model):
    change_json(model / "config.json", num_hidden_layers=1)
    return "'model.layers.1.input_layernorm.weight' does not belong to the model of its config.json"


def other_shape(model):
    change_json(model / "config.json", intermediate_size=100)
    return "'model.layers.0.mlp.down_proj.weight' has shape [64, 192], but config.json says [64, 100]"


def embedding_without_all_rows(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:30].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return "'model.embed_tokens.weight' has shape [30, 64], but config.json says [32, 64]"


def no_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    return "has no tokenizer: none of "


def broken_tokenizer(model):
    (model / "tokenizer.json").write_text("{}")
    return "its tokenizer cannot be loaded"


def broken_generation_config(model):
    (model / "generation_config.json").write_text("[")
    return "generation_config.json cannot be read"


MODELS = [
    no_config,
    broken_config,
    unknown_architecture,
    config_without_sizes,
    no_weights,
    truncated_weights,
    garbage_weights,
    empty_weights,
    missing_shard,
    more_layers_than_tensors,
    fewer_layers_than_tensors,
    other_shape,
    embedding_without_all_rows,
    no_tokenizer,
    broken_tokenizer,
    broken_generation_config,
]


@pytest.mark.parametrize("damage", MODELS)
def test_model_directory(said, student, damage):
    fragment = damage(student)
    _, *problems = said("check", f"student.model={student}", "parallel.pipeline=1", "parallel.tensor=1")
    assert all(problem.startswith("  - student.model: ") for problem in problems)
    assert any(fragment in problem for problem in problems), problems


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"vocab_size": None},
        {"num_hidden_layers": -1},
        {"rope_parameters": 3},
        {"architectures": "Qwen3ForCausalLM"},
        {"architectures": []},
        {"num_key_value_heads": 3},
    ],
    ids=str,
)
def test_config_json_with_values_that_make_no_sense(said, student, settings):
    change_json(student / "config.json", **settings)
    _, *problems = said("check", f"student.model={student}")
    assert all("student.model" in problem for problem in problems)


def test_layout_that_does_not_divide_the_model(said):
    _, *problems = said("check", "parallel.tensor=3", "parallel.pipeline=4")
    assert "  - parallel.tensor=3 does not divide the 2 key-value heads of teachers.0.model" in problems
    assert "  - parallel.pipeline=4 does not divide the 2 layers of student.model" in problems
    (vocabulary,) = [p for p in problems if "vocabulary of student.model" in p]
    assert vocabulary.endswith("set student.vocab_multiple=3 to pad it")


def test_a_megatron_checkpoint_cannot_answer_for_its_accuracy(said, student):
    (student / ".metadata").touch()
    _, *problems = said("check", f"teachers.0.model={student}", "train.eval_teachers=true")
    assert any("teachers.0.model: train.eval_teachers needs a Hugging Face directory" in p for p in problems)
    _, *problems = said("check", f"teachers.0.model={student}", "train.eval_teachers=false")
    assert not any("train.eval_teachers" in p for p in problems)


@pytest.mark.parametrize(
    ("command", "options", "needed"),
    [
        ("check", ["--json"], "--json requires --plan"),
        ("check", ["--gpu", "A100", "--prompt", "5"], "--gpu, --prompt require --plan"),
        ("launch", ["--steps"], "--steps requires --slurm"),
        ("launch", ["--nodes", "2", "--sbatch=-A1", "--dry-run"], "--nodes, --sbatch require --slurm"),
    ],
)
def test_options_that_would_do_nothing_are_refused(said, command, options, needed):
    """`launch --steps` was to print something, and trained."""
    assert said(command, *options) == [f"error: {needed}"]


BESIDE = ["rollout.engine=sglang", "rollout.servers.colocated=true", "rollout.servers.args=[--mem-fraction-static=0.5]"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["rollout.sync=pigeon"], "rollout.sync must be one of broadcast, tensor, disk, not 'pigeon'"),
        (BESIDE, "rollout.sync: broadcast is not for rollout.servers.colocated, because NCCL takes a GPU into a group"),
    ],
    ids=["unknown", "colocated"],
)
@pytest.mark.parametrize("command", ["check", "train", "launch"])
def test_a_way_of_weights_that_does_not_reach_the_servers(said, command, settings, problem):
    _, listed, other = said(command, *settings, "data.train.0.path=nowhere.jsonl")
    assert listed.startswith(f"  - {problem}")
    assert "nowhere.jsonl" in other


def test_a_sampler_in_fp8_that_servers_do_not_take(said):
    engine = ["rollout.engine=sglang", "rollout.quantization=fp8"]
    _, *listed = said("check", *engine, "rollout.sync=disk")
    what = "  - rollout.quantization: fp8 needs "
    assert [line for line in listed if not line.startswith(what)] == []
    needed = [line.removeprefix(what).split(",")[0] for line in listed]
    assert needed[:3] == [
        "rollout.sync: broadcast or tensor",
        "bf16 for all else: set student.dtype or rollout.servers.dtype to bf16",
        "multiples of 128",
    ]
    (line,) = said("check", "rollout.quantization=fp8", "--settings-only")[1:]
    assert line == "  - rollout.quantization needs rollout.engine: sglang, not local"


@pytest.mark.parametrize(
    "command", [["check", "--settings-only"], ["check", "--plan"], ["launch", "--slurm", "--dry-run"], ["serve"]]
)
def test_a_way_of_weights_is_known_without_models(said, command):
    (line,) = said(*command, "rollout.engine=sglang", "rollout.sync=pigeon")
    assert line == "error: rollout.sync must be one of broadcast, tensor, disk, not 'pigeon'"


def test_teacher_with_another_tokenizer(said, tmp_path):
    teacher = Path(shutil.copytree(QUICKSTART / "models/teacher_carry", tmp_path / "teacher"))
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    text = json.dumps(tokenizer).replace('"7"', '"@"').replace('"8"', '"7"').replace('"@"', '"8"')
    (teacher / "tokenizer.json").write_text(text)
    _, problem = said("check", f"teachers.0.model={teacher}")
    assert "the tokenizer of teacher 'carry' is not the student's: 2 of 32 tokens have another id, first '" in problem
    assert problem.endswith("teachers.0.tokenizer: own compares them by their text")


# Prompt files.


@pytest.mark.parametrize(
    ("kind", "lines", "fragment"),
    [
        ("train", ['{"prompt": "1+1="}', "{broken"], "line 2: not valid JSON (Expecting property name"),
        ("train", ['{"prompt": "1+1="}', "", '["1+1="]'], 'line 3: expected an object with a text field "prompt"'),
        ("train", ['{"answer": "2"}'], 'line 1: expected an object with a text field "prompt"'),
        ("train", ['{"prompt": 11}'], 'line 1: expected an object with a text field "prompt"'),
        ("train", ['{"prompt": " \\n"}'], "line 1: the prompt is empty"),
        ("train", ["[" * 100_000], "line 1: not valid JSON (nested too deeply)"),
        ("train", ['{"prompt": "1+1=", "answer": ' + "9" * 5000 + "}"], "line 1: not valid JSON (Exceeds the limit"),
        ("train", [json.dumps({"prompt": "1" * 200})], "the limit is "),
        ("train", [], "has no prompts"),
        ("train", ["", " "], "has no prompts"),
        ("eval", ['{"prompt": "1+1=", "answer": "2"}', '{"prompt": "1+1="}'], 'line 2: evaluation needs a text field'),
        ("eval", ['{"prompt": "1+1=", "answer": 2}'], 'line 1: evaluation needs a text field "answer"'),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_prompt_file(said, tmp_path, kind, lines, fragment):
    path = jsonl(tmp_path, *lines)
    _, problem = said("check", f"data.{kind}.0.path={path}")
    assert str(path) in problem
    assert fragment in problem


def test_prompt_file_that_is_not_utf8(said, tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "1"}\n{"prompt": "é"}'.encode("latin-1"))
    _, problem = said("check", f"data.train.0.path={path}")
    assert f"{path}, line 2: " in problem


def test_prompt_longer_than_the_context_or_the_setting(said, tmp_path):
    path = jsonl(tmp_path, '{"prompt": "1+1="}', json.dumps({"prompt": "1" * 60}))
    _, problem = said("check", f"data.train.0.path={path}")
    assert "line 2: the prompt has" in problem
    assert problem.endswith("the limit is 56 (the models' context of 64 tokens less rollout.max_new_tokens)")
    only = [f"data.train=[{{name: add, path: {path}}}]", "data.eval=[]"]
    _, problem = said("check", *only, "data.max_prompt_tokens=5")
    assert problem.endswith("the limit is 5 (data.max_prompt_tokens)")


def test_answers_that_leave_no_room_for_a_prompt(said):
    _, problem = said("check", "rollout.max_new_tokens=100000")
    assert "rollout.max_new_tokens (100000) leaves no room for a prompt" in problem


def test_answers_in_bf16_are_said(capsys):
    config = str(QUICKSTART.parent / "quickstart.yaml")
    for more, said in (
        ([], "the divergence is exact at every token, on answers of the rounded model;"),
        (["loss.kind=sampled", "loss.beta=1"], "tokens are weighted by q/μ up to loss.importance_cap (2.0);"),
    ):
        assert main(["check", config, "rollout.dtype=bf16", *more]) == 0
        assert f"# rollout.dtype bf16: {said}" in capsys.readouterr().out


# The model that `eval` is given.


@pytest.mark.parametrize("damage", [no_config, truncated_weights, more_layers_than_tensors, no_tokenizer])
def test_eval_of_a_damaged_model(said, student, damage):
    fragment = damage(student)
    _, *problems = said("eval", "--model", student)
    assert all(problem.startswith("  - --model: ") for problem in problems)
    assert any(fragment in problem for problem in problems), problems


def test_eval_of_a_model_that_is_not_there_or_has_another_tokenizer(said, tmp_path, student):
    (problem,) = said("eval", "--model", "no/such")[1:]
    assert problem.startswith("  - --model: no/such is not a Hugging Face model directory")
    text = (student / "tokenizer.json").read_text()
    (student / "tokenizer.json").write_text(text.replace('"7"', '"@"').replace('"8"', '"7"').replace('"@"', '"8"'))
    (problem,) = said("eval", "--model", student)[1:]
    assert "--model: its tokenizer is not that of student.model: 2 of 32 tokens have another id" in problem


def test_eval_without_anything_to_evaluate_on(said):
    (problem,) = said("eval", "data.eval=[]")[1:]
    assert problem == "  - data.eval is empty: add a source to evaluate on"


def test_rows_without_what_their_reward_needs_are_named(said, tmp_path):
    path = jsonl(
        tmp_path, '{"prompt": "1+1=", "answer": "2", "tests": "assert f()"}', '{"prompt": "1+2=", "answer": "many"}'
    )
    (_, problem) = said("check", f"data.eval.0.path={path}", "data.eval.0.reward=gsm8k")
    assert f"{path}, line 2: the reward gsm8k needs a number" in problem
    (_, problem) = said("check", f"data.eval.0.path={path}", "data.eval.0.reward=code")
    assert f'{path}, line 2: the reward code needs a text field "tests"' in problem


def test_rewards_that_there_are_not(said):
    _, *problems = said("check", "data.eval.0.reward=exakt", "data.train.1.reward=a:b:c")
    assert len(problems) == 2
    known = "known: exact, gsm8k, math, code, ifeval, environment, none, or a function"
    assert f"data.eval.0.reward: there is no reward 'exakt'; {known}" in problems[1]
    _, problem = said("check", "data.eval.0.reward=no_such_module:f")
    assert "no_such_module cannot be imported" in problem


def test_what_confines_code_is_said(capsys, tmp_path):
    path = jsonl(tmp_path, '{"prompt": "def f():", "tests": "assert f() == 1"}')
    arguments = ["examples/quickstart.yaml", f"run.dir={tmp_path / 'run'}", f"data.eval.0.path={path}"]
    assert main(["check", *arguments, "data.eval.0.reward=code"]) == 0
    assert "# code runs confined by limits, " in capsys.readouterr().out


def test_rows_whose_tests_cannot_fail_are_named(said, tmp_path):
    path = jsonl(
        tmp_path, '{"prompt": "?", "tests": "assert f() == 1"}', '{"prompt": "?", "tests": "def verify(): assert f()"}'
    )
    (_, problem) = said("check", f"data.eval.0.path={path}", "data.eval.0.reward=code")
    assert f'{path}, row 2: the "tests" cannot tell a right answer from a wrong one: they never call' in problem


def test_no_reward_is_none_for_evaluation_and_an_error_where_rewards_are_learnt_from(said, capsys, tmp_path):
    none = ["data.train.0.reward=none", "data.eval.0.reward=none"]
    assert main(["check", "examples/quickstart.yaml", f"run.dir={tmp_path}/run", *none]) == 0
    capsys.readouterr()
    (problem,) = [line for line in said("check", *none, "rl.weight=1") if "none" in line]
    assert "answers to 'add' are not graded: its reward is none" in problem
    every = [f"data.eval.{i}.reward=none" for i in range(4)]
    assert any("no source has a reward" in line for line in said("eval", *every))
