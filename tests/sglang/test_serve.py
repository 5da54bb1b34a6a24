"""Which servers a run needs, and how its ranks find them; starting them is process.py's and has tests of its own."""

import contextlib
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_opd.config.file import load
from megatron_opd.core import run_dir
from megatron_opd.launch import local
from megatron_opd.sglang import process, serve

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples/quickstart.yaml"
SERVED = ["rollout.engine=sglang", "teachers.0.backend=sglang", "loss.chunk_tokens=8"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def config(run_dir, *overrides):
    return load(CONFIG, [*SERVED, f"run.dir={run_dir}", *overrides])


@pytest.fixture
def fake(monkeypatch):
    """process.start and friends, without processes."""
    calls = SimpleNamespace(started=[], stopped=[], see_all={}, fails=False)

    def start(servers, model, *, name, log_dir, context, extra, sees_all):
        calls.started.append((name, model, context, extra))
        calls.see_all[name] = sees_all
        return [SimpleNamespace(url=f"http://{servers.host}:{servers.port + i}") for i in range(servers.count)]

    def wait(started, servers, *, say):
        if calls.fails:
            raise ValueError("not ready")

    monkeypatch.setattr(process, "start", start)
    monkeypatch.setattr(process, "wait", wait)
    monkeypatch.setattr(process, "stop", calls.stopped.extend)
    return calls


def test_models_behind_servers_and_how_they_are_started(tmp_path):
    rollout, teacher = serve.needed(config(tmp_path))
    assert (rollout.name, rollout.arguments) == ("rollout", ())
    assert (teacher.name, teacher.arguments) == ("teacher-carry", ("--enable-return-hidden-states",))
    assert rollout.context <= 1024 + 8 + 8
    (only,) = serve.needed(load(CONFIG, ["teachers.1.backend=sglang", "loss.ensemble=probs",
                                         "teachers.1.carrier=topk", "teachers.1.top_k=4"]))  # fmt: skip
    assert (only.name, only.setting, only.arguments) == ("teacher-compare", "teachers.1.servers", ())


def test_samplers_compute_in_the_type_of_the_student(tmp_path):
    rollout, teacher = serve.needed(config(tmp_path, "student.dtype=bf16"))
    assert (rollout.servers.dtype, teacher.servers.dtype) == ("bf16", "auto")
    rollout, _ = serve.needed(config(tmp_path, "student.dtype=bf16", "rollout.servers.dtype=fp32"))
    assert rollout.servers.dtype == "fp32"


@pytest.mark.parametrize("sync", ["tensor", "disk"])
def test_servers_that_get_handles_see_the_trainers_gpus(tmp_path, fake, sync):
    with serve.running(config(tmp_path, f"rollout.sync={sync}"), say=print):
        assert fake.see_all == {"rollout": sync == "tensor", "teacher-carry": False}


def test_nothing_is_served_by_default():
    quickstart = load(CONFIG)
    assert serve.needed(quickstart) == []
    assert serve.with_urls(quickstart) == quickstart


def test_a_student_without_hugging_face_weights_starts_with_dummies(tmp_path):
    model = tmp_path / "torch_dist"
    model.mkdir()
    (model / "config.json").write_text((ROOT / "examples/quickstart/models/student/config.json").read_text())
    rollout, _ = serve.needed(config(tmp_path, f"student.model={model}"))
    assert rollout.arguments == ("--load-format", "dummy")


def test_servers_with_urls_are_not_ours_to_start(tmp_path):
    ours = serve.to_start(serve.needed(config(tmp_path, "rollout.servers.urls=[http://far:1]")))
    assert [served.name for served in ours] == ["teacher-carry"]
    with pytest.raises(ValueError, match="no servers named rollout; it starts: teacher-carry"):
        serve.to_start(serve.needed(config(tmp_path, "rollout.servers.urls=[http://far:1]")), only=["rollout"])


def test_ranks_find_what_was_started_and_nothing_afterwards(tmp_path, fake):
    asked = config(tmp_path, "rollout.servers.count=2", "rollout.servers.port=25000")
    with serve.running(asked, say=lambda _: None) as servers:
        assert len(servers) == 3
        found = serve.with_urls(asked)
        assert found.rollout.servers.urls == ["http://127.0.0.1:25000", "http://127.0.0.1:25001"]
        assert found.teachers[0].servers.urls == ["http://127.0.0.1:30000"]
        assert found.teachers[1] == asked.teachers[1]
    assert fake.stopped == servers
    with pytest.raises(ValueError, match=r"rollout\.servers: no servers for rollout are running; start them with"):
        serve.with_urls(asked)


def test_some_here_and_the_others_elsewhere(tmp_path, fake):
    asked = config(tmp_path)
    with contextlib.ExitStack() as opened:
        opened.enter_context(serve.running(asked, say=lambda _: None, only=["rollout"]))
        with pytest.raises(ValueError, match=r"teachers\.0\.servers: no servers for teacher-carry"):
            serve.with_urls(asked)
        opened.enter_context(serve.running(asked, say=lambda _: None, only=["teacher-carry"]))
        assert serve.with_urls(asked).teachers[0].servers.urls


def test_an_address_that_means_any_is_noted_as_this_host(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("MEGATRON_OPD_API_KEY", "secret")
    asked = config(tmp_path, "rollout.servers.host=0.0.0.0")
    with serve.running(asked, say=lambda _: None):
        assert serve.with_urls(asked).rollout.servers.urls == [f"http://{socket.gethostname()}:30000"]


def test_notes_of_a_machine_with_a_longer_name_are_its_own(tmp_path, fake):
    (tmp_path / "servers").mkdir()
    other = tmp_path / "servers" / f"rollout@{socket.gethostname()}-2-000"
    other.write_text("http://other:1")
    with serve.running(config(tmp_path), say=lambda _: None):
        assert other.exists()


def test_servers_that_do_not_get_ready_are_ended(tmp_path, fake):
    fake.fails = True
    with pytest.raises(ValueError, match="not ready"), serve.running(config(tmp_path), say=lambda _: None):
        raise AssertionError("it must not get here")
    assert len(fake.stopped) == len(fake.started) == 2


def test_on_gpus_shared_with_others_every_server_says_which(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(serve.torch.cuda, "is_available", lambda: True)
    asked = config(tmp_path, "rollout.servers.gpus=[1]")
    with pytest.raises(ValueError, match=r"teachers\.0\.servers\.gpus: say which"):
        serve.running(asked, say=print).__enter__()
    with serve.running(asked, say=print, only=["teacher-carry"]):
        pass
    with pytest.raises(ValueError, match="say which"):
        serve.running(asked, say=print, only=["teacher-carry"], beside_ranks=True).__enter__()


def test_colocated_servers_are_where_the_trainer_is(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(serve.torch.cuda, "is_available", lambda: True)
    beside = ["rollout.servers.colocated=true", "rollout.sync=tensor",
              "rollout.servers.args=[--mem-fraction-static, '0.4']", "rollout.servers.count=2"]  # fmt: skip
    asked = load(CONFIG, ["rollout.engine=sglang", *beside, f"run.dir={tmp_path}"])
    with serve.running(asked, say=print, beside_ranks=True) as servers:
        assert len(servers) == 2
    rollout, trainer = local.plan(asked, ["x.yaml"])
    assert str(rollout).startswith("SGLang servers for rollout: 2 ranks on the trainer's GPUs of ")
    assert "trainer's GPUs" not in str(trainer)


def test_notes_of_a_start_that_was_killed_are_forgotten(tmp_path, fake):
    asked = config(tmp_path)
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / f"rollout@{socket.gethostname()}-007").write_text("http://127.0.0.1:1")
    with serve.running(asked, say=lambda _: None):
        assert serve.with_urls(asked).rollout.servers.urls == ["http://127.0.0.1:30000"]


def test_a_second_start_leaves_the_servers_of_the_first_alone(tmp_path, fake):
    asked = config(tmp_path)
    with serve.running(asked, say=lambda _: None), run_dir.claimed(tmp_path):
        with pytest.raises(ValueError, match="another run is writing to"):
            local.launch(asked, [str(CONFIG)])
        assert serve.with_urls(asked).rollout.servers.urls
    assert len(fake.started) == 2


def test_the_plan_shows_servers_and_trainer(tmp_path):
    asked = config(tmp_path, "rollout.servers.count=2", "rollout.servers.tensor=2")
    rollout, teacher, trainer = local.plan(asked, ["x.yaml"])
    assert (rollout.ranks, teacher.ranks, trainer.ranks) == (4, 1, 4)
    assert "sglang.launch_server" in str(rollout)
    assert "examples/quickstart/models/student" in str(rollout)
