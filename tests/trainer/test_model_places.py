"""Ranks agree on the directories of models by name: one of a machine downloads, and an error is everybody's."""

import os
import time

import hub_server
import pytest
from ranks import RankError

from megatron_opd.core.parallel import PeerError
from megatron_opd.trainer import model_places

NAMES = {"org/student": "weights", "org/teacher": "texts", "here/own": "weights"}
SETTINGS = {"org/student": "student.model", "org/teacher": "teachers.0.model", "here/own": "teachers.1.model"}
FILES = {"config.json": b"{}", "model.safetensors": b"x" * 100_000}


def settled(parallel, url, home, start, machines):
    """On each rank: the places, and what it said. `machines` ranks are the first of theirs."""
    os.chdir(start)
    patch = pytest.MonkeyPatch()
    hub_server.use(patch, hub_server.Hub(url=url), hub_server.Path(home))
    patch.setenv("LOCAL_RANK", "0" if parallel.rank in machines else "1")
    said = []
    try:
        return model_places.settle(NAMES, SETTINGS, parallel, say=said.append), said
    finally:
        patch.undo()


@pytest.fixture
def served(tmp_path):
    (tmp_path / "here/own").mkdir(parents=True)
    with hub_server.running() as found:
        yield found


def test_one_rank_downloads_and_all_have_the_same_commit(served, ranks, tmp_path):
    commits = {name: served.add(name, FILES) for name in ("org/student", "org/teacher")}
    told = ranks.run(3, settled, served.url, str(tmp_path / "home"), tmp_path, {0, 2}, context=3)
    places = [place for place, _ in told]
    assert places[0] == places[1] == places[2]
    cache = tmp_path / "home/hub"
    assert places[0] == {
        **{name: f"{cache}/models--{name.replace('/', '--')}/snapshots/{commit}" for name, commit in commits.items()},
        "here/own": "here/own",
    }
    assert len(served.downloads("safetensors")) == 1, "the teacher's weights are not read"
    said = [lines for _, lines in told]
    assert [line.split(" in")[0] for line in said[0][-2:]] == [
        f"student.model: org/student is the commit {commits['org/student']}",
        f"teachers.0.model: org/teacher is the commit {commits['org/teacher']}",
    ]
    assert not said[1]
    assert not said[2]


def test_an_error_of_one_is_the_error_of_all(served, ranks, tmp_path):
    served.add("org/student", FILES)
    with pytest.raises(RankError) as raised:
        ranks.run(2, settled, served.url, str(tmp_path / "home"), tmp_path, {0}, context=2)
    assert (
        "PeerError: teachers.0.model: org/teacher is not a Hugging Face model directory, and the hub has none"
        in str(raised.value)
    )
    assert (
        "ValueError: teachers.0.model: org/teacher is not a Hugging Face model directory, and the hub has none"
        in str(raised.value)
    )


def hanging(parallel, seconds):
    patch = pytest.MonkeyPatch()
    patch.setattr(model_places, "_LONGEST_S", 0.2)
    patch.setattr(model_places, "_LOOK_S", 0.05)
    patch.setattr(model_places.hub, "directories", lambda *_, **__: time.sleep(seconds))
    try:
        model_places.settle(NAMES, SETTINGS, parallel, say=print)
    except (ValueError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        patch.undo()


def test_nobody_waits_for_ever(ranks):
    told = ranks.run(2, hanging, 5.0, context=2)
    assert [line.split(" after")[0] for line in told] == [
        "ValueError: the models are not here",
        "PeerError: the models are not here",
    ]


def test_without_names_the_ranks_do_not_meet():
    assert model_places.settle({"/a/b": "weights"}, {}, None, say=print) == {"/a/b": "/a/b"}
