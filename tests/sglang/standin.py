"""A stand-in for an SGLang 0.5.23 server: the same schemas and errors, a made-up model, and faults on demand.

It runs in a thread of the test. The model's log-probabilities follow from a hash of the tokens before, and sampling
from the request's seed, so a test can compute what is right; two stand-ins give the same answers. `test_standin.py`
compares its answers with those recorded from the real server.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from aiohttp import web
from standin_faults import AFTER, BEFORE, KILLS
from standin_model import CONTEXT, END, VERSION, VOCAB_SIZE, b64, cut, draw, hidden, logps

from megatron_opd.config import ServersConfig
from megatron_opd.core.event_loop import Loop

PROBE_S = 0.05
"""Between looks at a server that failed, in place of the pool's own."""
KINDS = ("kv_cache", "weights", "cuda_graph")


class Refusal(Exception):
    """Becomes a 400 in the server's own words."""


@dataclass
class _Request:
    body: dict
    ids: list = field(default_factory=list)
    logps: list = field(default_factory=list)
    sampling_logps: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    versions: list = field(default_factory=list)
    aborted: bool = False


class StandIn:
    """One server. `faults` are names that the next /generate requests suffer, one each; see `standin_faults`."""

    def __init__(self, *, token_s=0.0, api_key="", admin_key="", cached=0, version=VERSION, port=0):
        self.token_s, self.api_key, self.admin_key = token_s, api_key, admin_key
        self.cached = cached
        """Prompt tokens that hidden states are never given for, as after an earlier request."""
        self.version = version
        self.faults = []
        self.always = None
        """A fault of every request."""
        self.seen, self.paths = [], []
        """Bodies of /generate and paths of all requests, as they came."""
        self.abort_after = None
        """Tokens after which requests are aborted."""
        self.running, self.done, self.deaths = {}, [], 0
        self.paused, self.session, self.groups = False, False, set()
        self.released, self.memory = set(), []
        """Kinds of memory that it has given back, and every request about them as (path, kinds)."""
        self.broken = set()
        """(path, n): the n-th request there ends with an internal error, and nothing has happened."""
        self.instead = {}
        """What is answered by path, with a 200, and nothing has happened."""
        self.port = port
        self._loop = Loop()
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Listen: on a free port at first, on the same one when it comes back."""
        self._loop.run(self._start(), 120)

    def kill(self):
        """As by SIGKILL: connections break, nobody listens."""
        self._loop.run(self._stop(), 120)

    def close(self):
        with contextlib.suppress(Exception):
            self.kill()
        self._loop.close()

    async def _start(self):
        app = web.Application(middlewares=[self._gate], client_max_size=64 << 20)
        app.add_routes([web.route("*", path, handler) for path, handler in self._routes().items()])
        self.running, self.paused, self.session, self.groups, self.released = {}, False, False, set(), set()
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self):
        for protocol in list(self._runner.server.connections):
            protocol.transport.abort()
        await self._runner.cleanup()

    def _routes(self):
        return {
            "/generate": self._generate,
            "/health": self._health,
            "/model_info": self._model_info,
            "/server_info": self._server_info,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush,
            "/abort_request": self._abort,
            "/begin_weight_update": self._begin,
            "/end_weight_update": self._end,
            "/init_weights_update_group": self._init_group,
            "/destroy_weights_update_group": self._destroy_group,
            "/update_weights_from_distributed": self._from_broadcast,
            "/update_weights_from_tensor": self._from_tensor,
            "/update_weights_from_disk": self._from_disk,
            "/update_weight_version": self._new_version,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._take_back,
            "/weights_checker": self._checksums,
        }

    @web.middleware
    async def _gate(self, request, handler):
        self.paths.append(request.path)
        if (request.path, self.paths.count(request.path)) in self.broken:
            return web.json_response({"error": {"message": "internal error"}}, status=500)
        if request.path in self.instead:
            return web.json_response(self.instead[request.path])
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        is_control = request.method == "POST" and request.path != "/generate"
        key = (self.admin_key if is_control else "") or self.api_key
        if request.path != "/health" and key and given != key:
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except Refusal as refusal:
            return web.json_response({"error": {"message": str(refusal)}}, status=400)
        except web.HTTPNotFound:
            return web.json_response({"detail": "Not Found"}, status=404)

    # /generate

    async def _generate(self, request):
        body = await request.json()
        self.seen.append(body)
        fault = self.faults.pop(0) if self.faults else self.always
        if fault in BEFORE or fault in KILLS:
            answer = await {**BEFORE, **KILLS}[fault](self, request)
            if answer is not None:
                return answer
        self._check(body)
        answer = await self._answer(body)
        if fault in AFTER:
            AFTER[fault](answer)
        self.done.append(body["rid"])
        return web.json_response([answer, answer] if fault == "two" else answer)

    def _check(self, body):
        ids, sampling = body["input_ids"], body["sampling_params"]
        if any(not 0 <= i < VOCAB_SIZE for i in ids) or body.get("top_logprobs_num", 0) > VOCAB_SIZE:
            self._die()
        if body["rid"] in self.running:
            raise Refusal(f"Duplicate request ID detected: {body['rid']}")
        if len(ids) >= CONTEXT:
            raise Refusal(
                f"The input ({len(ids)} tokens) is longer than the model's context length ({CONTEXT} tokens)."
            )
        if len(ids) + sampling["max_new_tokens"] > CONTEXT:
            raise Refusal(f"Requested token count exceeds the model's maximum context length of {CONTEXT} tokens.")

    async def _answer(self, body):
        run = self.running[body["rid"]] = _Request(body)
        try:
            await self._turn(run)
            run.aborted = run.aborted or self.abort_after == 0
            while len(run.ids) < body["sampling_params"]["max_new_tokens"] and not self._finish(run):
                await asyncio.sleep(self.token_s)
                await self._turn(run)
                if not run.aborted:
                    self._step(run)
                run.aborted = run.aborted or len(run.ids) == self.abort_after
        finally:
            self.running.pop(body["rid"], None)
        return self._say(run)

    async def _turn(self, run):
        """Until the server goes on."""
        while self.paused and not run.aborted:
            await asyncio.sleep(0.005)
        if self.released:
            self._die()

    def _die(self):
        """As when its scheduler meets what it does not expect."""
        self.deaths += 1
        asyncio.get_running_loop().create_task(self._stop())
        raise Refusal("the scheduler died")

    def _step(self, run):
        sampling = run.body["sampling_params"]
        temperature = sampling["temperature"]
        before = run.body["input_ids"] + run.ids
        logp = logps(before, temperature=temperature, bias=sampling.get("logit_bias"))
        if temperature == 0:
            token, left = int(logp.argmax()), np.where(np.arange(VOCAB_SIZE) == logp.argmax(), 0.0, -np.inf)
        else:
            left = cut(logp, sampling.get("top_p", 1.0), sampling.get("top_k", -1))
            uniform = draw(sampling.get("sampling_seed", 0), len(before))
            token = int(np.searchsorted(np.exp(left).cumsum(), uniform * np.exp(left).sum(), side="right"))
        run.ids.append(token)
        run.logps.append(float(logp[token]))
        run.sampling_logps.append(float(left[token]))
        run.masks.append(np.flatnonzero(np.isfinite(left)).tolist())
        run.versions.append(self.version)

    def _finish(self, run):
        stops = {END, *run.body["sampling_params"].get("stop_token_ids", [])}
        if run.ids and run.ids[-1] in stops:
            return {"type": "stop", "matched": run.ids[-1]}
        if run.aborted:
            return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        return None

    def _say(self, run):
        body, prompt = run.body, run.body["input_ids"]
        meta = {
            "id": body["rid"],
            "finish_reason": self._finish(run) or {"type": "length", "length": len(run.ids)},
            "prompt_tokens": len(prompt),
            "weight_version": self.version,
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": len(run.ids),
            "cached_tokens": 0,
            "e2e_latency": 0.01,
        }
        if run.ids or not run.aborted:
            meta["weight_versions"] = _spans(run.versions) or [{"version": self.version, "start": 0, "end": 0}]
        if body.get("return_logprob"):
            triples = zip(run.logps, run.ids, strict=True)
            meta["output_token_logprobs"] = [[logp, i, None] for logp, i in triples]
            meta["output_token_logprobs_length"] = len(run.ids)
            self._say_input(meta, body)
        if body.get("return_sampling_mask"):
            meta["output_token_sampling_mask"] = run.masks
            meta["output_token_sampling_logprobs"] = run.sampling_logps
            meta["output_token_sampling_mask_length"] = len(run.masks)
        if body.get("return_hidden_states"):
            first = min(self.cached, max(body["logprob_start_len"], 0))
            meta["cached_tokens"] = first
            rows = [hidden(prompt[: i + 1]).tolist() for i in range(first, len(prompt))]
            meta["hidden_states"] = [rows] if run.ids else []
        return {"output_ids": run.ids, "meta_info": meta}

    def _say_input(self, meta, body):
        prompt, start, k = body["input_ids"], body.get("logprob_start_len", -1), body.get("top_logprobs_num", 0)
        if start < 0:
            meta["input_token_logprobs"] = []
            return
        rows = [logps(prompt[:i]) for i in range(start + 1, len(prompt))]
        given = zip(rows, prompt[start + 1 :], strict=True)
        meta["input_token_logprobs"] = [
            [None, prompt[start], None],
            # As a placeholder of images would be: the last id of the vocabulary is shown as 0.
            *([float(row[i]), i % (VOCAB_SIZE - 1), None] for row, i in given),
        ]
        if k:
            top = [np.argsort(-row)[:k] for row in rows]
            values = [row[ids] for row, ids in zip(rows, top, strict=True)]
            meta |= {
                "input_top_logprobs_val_flat_b64": b64(values, "<f4"),
                "input_top_logprobs_idx_flat_b64": b64(top, "<i4"),
                "input_top_logprobs_val_flat_b64_dtype": "float32",
                "input_top_logprobs_idx_flat_b64_dtype": "int32",
                "input_top_logprobs_shape": [len(rows), k],
                "input_top_logprobs_null_prefix": 1,
                "output_top_logprobs": [],
            }

    # control

    async def _health(self, request):
        if self.paused:  # the real one computes a token for it, which waits
            await asyncio.sleep(0.2)
            return web.Response(status=503)
        if self.released:
            self._die()
        return web.Response(status=200)

    async def _model_info(self, request):
        return web.json_response({"model_path": "stand-in", "weight_version": self.version, "is_generation": True})

    async def _server_info(self, request):
        return web.json_response({"tp_size": 1, "context_length": CONTEXT, "weight_version": self.version})

    async def _pause(self, request):
        mode = (await request.json()).get("mode", "abort")
        if mode == "abort":
            for run in self.running.values():
                run.aborted = True
        self.paused = True
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request):
        self.paused = False
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush(self, request):
        busy = self.running and not self.paused
        deadline = asyncio.get_running_loop().time() + float(request.query.get("timeout", 0))
        while busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
            busy = self.running and not self.paused
        text = "Flush cache failed: there are running or waiting requests.\n" if busy else "Cache flushed.\n"
        return web.Response(text=text, status=400 if busy else 200)

    async def _abort(self, request):
        body = await request.json()
        for rid, run in self.running.items():
            # While it is paused, the real one does not know requests that it has not begun.
            if (body.get("abort_all") or body.get("rid") == rid) and (run.ids or not self.paused):
                run.aborted = True
        return web.Response(status=200)

    async def _begin(self, request):
        if self.session:
            return _outcome(False, "a weight-update session is already open; call end_weight_update() first")
        self.session = True
        return _outcome(True, "Success")

    async def _end(self, request):
        was, self.session = self.session, False
        return _outcome(was, "Success" if was else "no weight-update session is open; call begin_weight_update() first")

    async def _init_group(self, request):
        self.groups.add((await request.json())["group_name"])
        return _outcome(True, "Succeeded to initialize custom process group.")

    async def _destroy_group(self, request):
        name = (await request.json())["group_name"]
        if name not in self.groups:
            return _outcome(False, "The group to be destroyed does not exist.")
        self.groups.discard(name)
        return _outcome(True, "Succeeded to destroy custom process group.")

    async def _from_broadcast(self, request):
        """Receives nothing: a test has no process group with it."""
        body = await request.json()
        if self.session and body.get("group_name") not in self.groups:
            return _outcome(False, f"Failed to receive weights: Group {body.get('group_name')} not in [].")
        return self._update(request.path, body)

    async def _from_tensor(self, request):
        return self._update(request.path, await request.json())

    def _update(self, path, body):
        if not self.session:
            return _outcome(False, f"{path[1:]} must run between begin_weight_update() and end_weight_update()")
        return self._updated(body)

    async def _from_disk(self, request):
        body = await request.json()
        if body["model_path"] != "model" and not Path(body["model_path"]).is_dir():
            return _outcome(False, f"Failed to get weights iterator: '{body['model_path']}'", num_paused_requests=0)
        return self._updated(body, num_paused_requests=0)

    async def _release(self, request):
        tags = (await request.json()).get("tags") or KINDS
        self.memory.append((request.path, tags))
        if set(tags) & self.released or (self.running and not self.paused):
            self._die()
        self.released |= set(tags)
        return web.json_response(None)

    async def _take_back(self, request):
        tags = (await request.json()).get("tags") or KINDS
        self.memory.append((request.path, tags))
        if set(tags) - self.released:
            self._die()
        self.released -= set(tags)
        return web.json_response(None)

    def _updated(self, body, **more):
        if "weights" in self.released:
            self._die()
        self.version = body.get("weight_version") or self.version
        return _outcome(True, f"Success Weight version updated to {self.version}.", **more)

    async def _new_version(self, request):
        self.version = (await request.json())["new_version"]
        return web.json_response({"success": True, "message": "", "new_version": self.version})

    async def _checksums(self, request):
        checksums = {"lm_head.weight": hashlib.sha256(self.version.encode()).hexdigest()}
        return web.json_response({"success": True, "message": "Success.", "ranks": [{"checksums": checksums}]})


def _outcome(success, message, **more):
    return web.json_response({"success": success, "message": message, **more}, status=200 if success else 400)


def _spans(versions):
    spans = []
    for i, version in enumerate(versions):
        if spans and spans[-1]["version"] == version:
            spans[-1]["end"] = i + 1
        else:
            spans.append({"version": version, "start": i, "end": i + 1})
    return spans


def settings(servers, **changes):
    """A ServersConfig over stand-ins, quick in everything that waits."""
    quick = {"request_timeout_s": 10.0, "retries": 3, "patience_s": 2.0}
    return ServersConfig(urls=[server.url for server in servers], **{**quick, **changes})


def wait_for(condition, timeout_s=120.0):
    """Until it is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
