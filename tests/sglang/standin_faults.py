"""What a stand-in can do wrong, by name: in place of an answer (`BEFORE`), and to one (`AFTER`)."""

import asyncio
import json
import os
import signal
from pathlib import Path

from aiohttp import web
from standin_model import HIDDEN_SIZE, VERSION, b64


async def _die(server, request):
    await asyncio.sleep(0.02)
    asyncio.get_running_loop().create_task(server._stop())
    await asyncio.sleep(10)


async def _killed(server, request):
    Path(os.environ["STANDIN_DIES_ONCE"]).touch()
    os.kill(os.getpid(), signal.SIGKILL)


async def _drop(server, request):
    request.transport.abort()
    return web.Response()


async def _hang(server, request):
    await asyncio.sleep(3600)


async def _garbage(server, request):
    return web.Response(text="<html>busy</html>")


async def _half(server, request):
    return web.Response(text=json.dumps({"output_ids": [1, 2, 3]})[:-4])


async def _error(server, request):
    return web.json_response({"error": {"message": "internal error"}}, status=500)


async def _full(server, request):
    return web.json_response({"detail": "The request queue is full."}, status=503)


async def _empty(server, request):
    return web.Response()


async def _error_when_long(server, request):
    """For a prompt of more than three tokens; a shorter one is answered."""
    return await _error(server, request) if len((await request.json())["input_ids"]) > 3 else None


BEFORE = {
    "die": _die,
    "drop": _drop,
    "hang": _hang,
    "garbage": _garbage,
    "half": _half,
    "error": _error,
    "full": _full,
    "empty": _empty,
    "long": _error_when_long,
}


KILLS = {"killed": _killed}
"""Of a stand-in that is a process of its own."""


def _shorten(answer):
    for name in ("output_token_logprobs", "input_token_logprobs"):
        if answer["meta_info"].get(name):
            answer["meta_info"][name].pop()


def _edit(name, column, value):
    def edit(answer):
        for entry in answer["meta_info"].get(name, [])[-1:]:
            entry[column] = value

    return edit


def _both(column, value):
    edits = [_edit(name, column, value) for name in ("output_token_logprobs", "input_token_logprobs")]
    return lambda answer: [edit(answer) for edit in edits]


def _set(name, value):
    return lambda answer: answer["meta_info"].update({name: value})


AFTER = {
    "short": _shorten,
    "wrong_ids": _both(1, 7777),
    "nan": _both(0, float("nan")),
    "null": _both(0, None),
    "positive": _both(0, 0.5),
    "text": _both(0, "-0.5"),
    "no_finish": _set("finish_reason", None),
    "odd_finish": _set("finish_reason", {"type": "banana"}),
    "no_versions": _set("weight_versions", None),
    "odd_version": _set("weight_versions", [{"version": "default", "start": 0, "end": 1}]),
    "short_versions": _set("weight_versions", [{"version": VERSION, "start": 0, "end": 1}]),
    "no_meta": lambda answer: answer.pop("meta_info"),
    "more_ids": lambda answer: answer["output_ids"].append(3),
    "short_top": _set("input_top_logprobs_val_flat_b64", b64([0.0], "<f4")),
    "no_base64": _set("input_top_logprobs_idx_flat_b64", "%%%"),
    "odd_shape": _set("input_top_logprobs_shape", [1, 1]),
    "ragged_hidden": _set("hidden_states", [[[1.0, 2.0], [1.0]] * 9]),
    "few_hidden": _set("hidden_states", [[[1.0] * HIDDEN_SIZE]]),
    "decoded_hidden": _set("hidden_states", [[1.0] * HIDDEN_SIZE]),
}
