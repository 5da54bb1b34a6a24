"""The exchanges in tests/sglang/recorded/ are still what a real server says; the stand-in is checked against them.

A file is a list of exchanges in their order, {method, path, request, status, response}; requests name the directory of
the model "model". With MEGATRON_OPD_RECORD=1 the answers are written anew, from the requests that are there.
"""

import asyncio
import json
import os
from pathlib import Path

import pytest

RECORDED = Path(__file__).resolve().parents[1] / "sglang" / "recorded"
FILES = sorted(RECORDED.glob("*.json"))


@pytest.fixture(scope="module")
def exchange(models, serve, connect, loop):
    """(request of an exchange) -> the same with a real server's answer."""
    directory = models["qwen3"][1]
    with serve(directory, name="recorded") as (server, settings):
        client = connect(server.url, settings)

        async def send(asked):
            sent = json.dumps(asked["request"]).replace('"model"', json.dumps(directory)).encode()
            body = b"" if asked["request"] is None else sent
            status, received = await client._exchange(asked["method"], asked["path"], body, 60)
            text = received.decode().replace(json.dumps(directory), '"model"').replace(directory, "model")
            try:
                response = json.loads(text)
            except ValueError:
                response = text
            return {**asked, "status": status, "response": response}

        yield send


async def play(exchange, asked):
    """All exchanges of a file. One that was aborted was under way when those after it were sent."""
    answers = []
    for i, one in enumerate(asked):
        if finish(one) == "abort":
            under_way = asyncio.ensure_future(exchange(one))
            await asyncio.sleep(0.3)
            rest = asked[i + 1 :] or [{"method": "POST", "path": "/abort_request", "request": {"abort_all": True}}]
            later = await play(exchange, rest)
            return [*answers, await under_way, *later[: len(asked) - i - 1]]
        answers.append(await exchange(one))
    return answers


def finish(exchange):
    response = exchange.get("response")
    meta = response.get("meta_info", {}) if isinstance(response, dict) else {}
    return meta.get("finish_reason", {}).get("type")


def differences(now, before, where="answer"):
    """Names and types that are not the same, by place. What is null in one may be there in the other: what the prefix
    cache held differs; a longer list goes on as the other one ends."""
    if isinstance(now, dict) and isinstance(before, dict):
        other = [f"{where}.{name}" for name in now.keys() ^ before.keys()]
        return other + [d for n in now.keys() & before.keys() for d in differences(now[n], before[n], f"{where}.{n}")]
    if isinstance(now, list) and isinstance(before, list):
        last = len(before) - 1
        return [d for i, one in enumerate(now) if before for d in differences(one, before[min(i, last)], f"{where}[]")]
    both_numbers = isinstance(now, int | float) and isinstance(before, int | float)
    is_same = both_numbers or now is None or before is None or type(now) is type(before)
    return [] if is_same else [f"{where}: {now!r}, recorded {before!r}"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_real_server_says_what_is_recorded(exchange, loop, file):
    recorded = json.loads(file.read_text())
    answers = loop.run(play(exchange, recorded), 120)
    if os.environ.get("MEGATRON_OPD_RECORD"):
        file.write_text("[\n" + ",\n".join(json.dumps(answer) for answer in answers) + "\n]\n")
        recorded = answers
    for before, now in zip(recorded, answers, strict=True):
        assert now["status"] == before["status"], (now["path"], now["response"])
        assert finish(now) == finish(before)
        assert differences(now["response"], before["response"]) == [], now["path"]
