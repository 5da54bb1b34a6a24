"""Real SGLang servers for tests. Each takes about 20 s and 1.6 GB, so a module shares them and ends them."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from megatron_opd.config import ServersConfig
from megatron_opd.core.event_loop import Loop
from megatron_opd.sglang import process
from megatron_opd.sglang.client import Client

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, VOCAB_SIZE = 300, 96
FAMILIES = ("qwen3", "llama", "qwen3_moe")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.sglang)
            item.add_marker(pytest.mark.timeout(600))  # servers start in the first test of a module


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{family: (model in transformers, its directory)}."""
    made = {}
    for family in FAMILIES:
        model = tiny.build(family)
        made[family] = model, tiny.save(model, tmp_path_factory.mktemp("models") / family)
    return made


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """`with serve(directory, tensor=2) as (server, settings):` a ready server of our own, in fp32."""
    logs = tmp_path_factory.mktemp("logs")

    @contextmanager
    def serve(directory, *, name="server", context=CONTEXT, **changes):
        python = ROOT / ".venv-sglang/bin/python"
        common = {"port": 30500, "start_timeout_s": 300.0, "request_timeout_s": 60.0, "dtype": "fp32"}
        settings = ServersConfig(python=str(python), **{**common, **changes})
        extra = ("--weight-version", "0", "--enable-return-hidden-states")
        started = process.start(settings, directory, name=name, log_dir=logs, context=context, extra=extra)
        try:
            process.wait(started, settings, say=print)
            yield started[0], replace(settings, urls=[s.url for s in started])
        finally:
            process.stop(started)

    return serve


@pytest.fixture(scope="session")
def loop():
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def connect(loop):
    """`client = connect(url, settings)`, closed at the end."""
    made = []

    def connect(url, settings):
        made.append(Client(url, settings, vocab_size=VOCAB_SIZE, context=CONTEXT))
        return made[-1]

    yield connect
    for client in made:
        loop.run(client.close(), 10)


@torch.no_grad()
def log_probs(model, ids, *, first, temperature=1.0):
    """[R, V] float64: what the model in transformers says about every position from `first` on."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1].double()
    return (logits / temperature).log_softmax(-1)


def taken(logp_RV, ids):
    """[R]: of the tokens that were taken."""
    return logp_RV.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
