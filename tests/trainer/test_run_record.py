"""What decides results is kept with a checkpoint; what differs at the next start is refused or said, by the setting."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from megatron_opd.config import SourceConfig
from megatron_opd.core import marker
from megatron_opd.core.marker import DamagedMarker
from megatron_opd.core.types import Prompt
from megatron_opd.prompts.fingerprint import DataRecord, Fingerprinting
from megatron_opd.trainer.conditions import Conditions
from megatron_opd.trainer.other_data import OtherData, check_newest
from megatron_opd.trainer.run_record import RunRecord, state_of

HERE = Conditions(
    loss_backend="native",
    loss_kernels="09cc",
    loss_note="",
    threads="1",
    device="x86_64 CPU with AVX512",
    versions={"python": "3.11.7", "torch": "2.13.0", "megatron-core": "0.16.1"},
    models={"student.model": "aa", "teacher 'carry'": "bb"},
)
PLACE = Path("runs/mine/checkpoints/step_00000040")


def source(*texts, name="add"):
    made = Fingerprinting(SourceConfig(name=name, path="x.jsonl"))
    made.rows({"prompt": text} for text in texts)
    made.prompts([Prompt(source=name, index=i, text=t, token_ids=(len(t),)) for i, t in enumerate(texts)])
    return made.done()


def record(*sources, on_change="error", **conditions):
    train = list(sources or [source("a", "bb", "ccc")])
    return RunRecord(DataRecord(train=train, eval=[]), dataclasses.replace(HERE, **conditions), on_change)


def saved(made):
    """The loop of a checkpoint of step 40, as it comes back from the file."""
    others = {"student": {}, "layout": [1, 1, 1]}
    return json.loads(json.dumps({**made.loop(40, {"add": 7}, 1), **others}))


def test_nothing_is_said_when_nothing_changed():
    loop = saved(record())
    record().check(PLACE, loop)
    assert record().differences(loop) == []
    state = state_of(loop)
    assert (state.version, state.prompts, state.skips) == (40, {"add": 7}, 1)


def test_other_prompts_are_refused_with_the_source_the_change_and_the_setting():
    cut = record(source("a", "bb"), source("x", name="max"))
    with pytest.raises(OtherData) as refused:
        cut.check(PLACE, saved(record(source("a", "bb", "ccc"), source("y", name="max"))))
    said = str(refused.value)
    assert said.startswith(f"{PLACE} was made with other prompts: data.train: source 'add' has changed: rows 3 -> 2")
    assert "data.train: source 'max' has changed: other rows among its 1, row 1 is the first that differs" in said
    assert said.endswith("or set data.on_change: accept to go on at the same place in the new ones")


def test_other_prompts_are_noticed_before_models_are_loaded(tmp_path):
    check_newest(tmp_path, record().data)
    checkpoint = tmp_path / "checkpoints/step_00000040"
    checkpoint.mkdir(parents=True)
    path = checkpoint / "loop.json"
    for harmless in ("", "[]", marker.text(saved(record()))):  # damage is for others to tell
        path.write_text(harmless)
        check_newest(tmp_path, record().data)
    with pytest.raises(OtherData, match=r"step_00000040 was made with other prompts: .* rows 3 -> 2"):
        check_newest(tmp_path, record(source("a", "bb")).data)


def test_other_prompts_that_are_accepted_are_said():
    other, loop = record(source("a", "bb"), on_change="accept"), saved(record())
    other.check(PLACE, loop)
    (line,) = other.differences(loop)
    assert line == (
        "changed since the checkpoint: data.train: source 'add' has changed: rows 3 -> 2, the first 2 are the same"
    )


def test_a_mixture_that_the_settings_changed_is_said():
    loop, more = saved(record()), record(source("a", "bb", "ccc"), source("x", name="max"))
    more.check(PLACE, loop)
    (line,) = more.differences(loop)
    assert line.startswith("changed since the checkpoint: data.train: source 'max' is new")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss_backend": "torch", "loss_kernels": "", "loss_note": "why"}, "loss backend native -> torch"),
        ({"loss_backend": "", "loss_kernels": ""}, "loss backend native -> none"),
        ({"loss_kernels": "77aa"}, "compiled kernels of the loss 09cc -> 77aa"),
        ({"threads": "8"}, "threads of a rank 1 -> 8"),
        ({"threads": "1, 2"}, "threads of a rank 1 -> 1, 2"),
        ({"device": "x86_64 CPU with AVX2"}, "device x86_64 CPU with AVX512 -> x86_64 CPU with AVX2"),
        ({"versions": {**HERE.versions, "torch": "2.14.1"}}, "torch 2.13.0 -> 2.14.1"),
        ({"versions": {**HERE.versions, "python": "3.12.1"}}, "python 3.11.7 -> 3.12.1"),
        ({"versions": {**HERE.versions, "triton": "3.4"}}, "triton none -> 3.4"),
        ({"versions": {"torch": "2.13.0", "python": "3.11.7"}}, "megatron-core 0.16.1 -> none"),
    ],
)
def test_each_condition_that_changed_is_a_line(changes, said):
    loop, now = saved(record()), record(**changes)
    now.check(PLACE, loop)
    assert now.differences(loop) == [f"changed since the checkpoint: {said}; last bits may differ"]


def test_other_models_under_the_same_path_are_said():
    """Those that the settings name anew, or no longer, the settings' changes tell."""
    loop = saved(record())
    now = record(models={"student.model": "a2", "teacher 'carry'": "b2", "teacher 'new'": "cc"})
    assert now.differences(loop) == [
        "changed since the checkpoint: the files of student.model are others than before",
        "changed since the checkpoint: the files of teacher 'carry' are others than before",
    ]


def test_models_of_the_hub_are_compared_by_their_commits():
    loop = saved(record(models={"student.model": "org/s@11", "teacher 'carry'": "org/t@11", "teacher 'own'": "bb"}))
    now = record(models={"student.model": "org/s@11", "teacher 'carry'": "org/t@22", "teacher 'own'": "org/o@33"})
    assert now.differences(loop) == [
        "changed since the checkpoint: teacher 'carry' org/t@11 -> org/t@22",
        "changed since the checkpoint: the files of teacher 'own' are others than before",
    ]


def test_a_checkpoint_that_keeps_no_record_is_accepted_and_said():
    old = {"step": 40, "version": 40, "prompts": {"add": 7}, "skips": 0, "student": {}, "layout": [1, 1, 1]}
    for loop in (old, {name: value for name, value in old.items() if name != "skips"}):
        record().check(PLACE, loop)
        assert state_of(loop).skips == 0
        (line,) = record().differences(loop)
        assert line.startswith("the checkpoint does not say with which prompts, loss backend and versions it was made")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("version", 39, "version is 39, but step is 40"),
        ("version", None, "version is null"),
        ("version", "40", 'version is "40"'),
        ("prompts", None, "prompts is null"),
        ("prompts", [7], r"prompts is \[7\]"),
        ("prompts.add", -7, "prompts.add is -7"),
        ("prompts.add", 7.5, "prompts.add is 7.5"),
        ("prompts.add", "7", 'prompts.add is "7"'),
        ("prompts.add", True, "prompts.add is true"),
        ("skips", -1, "skips is -1"),
        ("skips", "none", 'skips is "none"'),
        ("data", [], r"data is \[\]"),
        ("data.train", {}, "data.train is"),
        ("data.train.0.rows", -1, "data.train.0.rows is -1"),
        ("data.train.0.content", 5, "data.train.0.content is 5"),
        ("data.train.0.every", 0, "data.train.0.every is 0"),
        ("data.train.0.colour", "red", "data.train.0.colour is not a key"),
        ("conditions", "native", "conditions is"),
        ("conditions.threads", 1, "conditions.threads is 1"),
        ("conditions.versions", {"torch": 2}, "conditions.versions.torch is 2"),
        ("colour", "red", "colour is not a key that this version knows"),
    ],
)
def test_a_wrong_value_is_named(path, value, said):
    loop = saved(record())
    *parents, last = path.split(".")
    node = loop
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    node[last] = value
    for read in (state_of, record().differences, lambda loop: record().check(PLACE, loop)):
        with pytest.raises(DamagedMarker, match=rf"^loop\.json: {said}"):
            read(loop)


@pytest.mark.parametrize(
    "path",
    ["version", "prompts", "data.train", "data.eval", "data.train.0.name", "data.train.0.marks", "conditions.device"],
)
def test_a_missing_key_is_named(path):
    loop = saved(record())
    *parents, last = path.split(".")
    node = loop
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    del node[last]
    with pytest.raises(DamagedMarker, match=rf"^loop\.json: {path} is missing$"):
        state_of(loop)


def places(node, path=()):
    """The path of everything in a tree of JSON, containers included."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def wrong_values(value):
    """What no save writes in place of a value; texts may be any text."""
    others = [None, True, -1, 1.5, "x", [None], {"x": None}]
    if isinstance(value, float):
        return [other for other in others if other != 1.5]
    return [other for other in others if type(other) is not type(value) or other in (-1, [None], {"x": None})]


def is_for_others(path, value):
    """Whether it is another student, which is compared elsewhere, or what older versions left out."""
    if path in (("data",), ("conditions",)):
        return value is None
    if path == ("student",):
        return isinstance(value, dict)
    return path[0] == "student" and not isinstance(value, list | dict)


def test_whatever_is_put_anywhere_is_one_error_that_names_the_place(tmp_path):
    checkpoint = tmp_path / "step_00000040"
    checkpoint.mkdir()
    whole = saved(record(source("a", "bb"), source("x", name="max")))
    whole["student"] = {"family": "qwen3", "hidden_size": 64}
    tried = 0
    for path in places(whole):
        *parents, last = path
        old = functools.reduce(lambda node, key: node[key], path, whole)
        for new in wrong_values(old):
            if is_for_others(path, new):
                continue
            loop = json.loads(json.dumps(whole))
            functools.reduce(lambda node, key: node[key], parents, loop)[last] = new
            (checkpoint / "loop.json").write_text(json.dumps(loop))
            named = ".".join(str(key) for key in path)
            with pytest.raises(DamagedMarker) as refused:
                pytest.fail(f"{named}: {state_of(marker.read(checkpoint))}")
            assert str(refused.value).startswith(f"loop.json: {path[0]}"), (named, new)
            assert named in str(refused.value), (named, new)
            tried += 1
    assert tried > 300
