"""The stand-in answers as the real server does: same status, and of what it says the same fields and types.

A file of `recorded/` is a list of exchanges with the real server in their order, each {method, path, request, status,
response}: the request's JSON (null for none) and the answer's JSON (a string where it is not JSON).
"""

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from standin_model import CONTEXT, END, VOCAB_SIZE

from megatron_opd.sglang.wire import Ask, Draw, ServerLimits, read_drawn, read_score

FILES = sorted((Path(__file__).parent / "recorded").glob("*.json"))
EXCHANGES = [(file.stem, exchange) for file in FILES for exchange in json.loads(file.read_text())]
ROOMY = ServerLimits(vocab_size=1 << 20, context=1 << 20)


def kind(value):
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def differences(ours, real, where="answer"):
    """What the stand-in says that the real server does not. It may leave things out."""
    if isinstance(ours, dict) and isinstance(real, dict):
        unknown = [f"{where}.{name} is made up" for name in ours if name not in real]
        return unknown + [d for name in ours if name in real for d in differences(ours[name], real[name], name)]
    if isinstance(ours, list) and isinstance(real, list) and ours and real:
        if where.endswith("]"):  # rows of one form each, like [logp, id, text]
            return [d for o, r in zip(ours, real, strict=False) for d in differences(o, r, where)]
        unlike = [min((differences(o, r, f"{where}[]") for r in real), key=len) for o in ours]
        return [d for found in unlike for d in found]
    return [] if kind(ours) == kind(real) else [f"{where} is a {kind(ours)}, really a {kind(real)}"]


def ask(server, exchange):
    """(status, answer) of the stand-in; ids are brought into its vocabulary."""
    body = exchange["request"]
    if body and "input_ids" in body:
        body = {**body, "input_ids": [i % VOCAB_SIZE for i in body["input_ids"]]}
        if exchange["status"] == 200:
            body["input_ids"] = body["input_ids"][-CONTEXT // 2 :]
            body["logprob_start_len"] = min(body.get("logprob_start_len", -1), len(body["input_ids"]) - 2)
            finish = exchange["response"]["meta_info"]["finish_reason"]["type"]
            server.abort_after = 5 if finish == "abort" else None
            room = min(body["sampling_params"]["max_new_tokens"], CONTEXT - len(body["input_ids"]))
            fitted = {"max_new_tokens": room, "stop_token_ids": [], "logit_bias": {str(END): -1e4}}
            body["sampling_params"] = {**body["sampling_params"], **fitted}
        if finish_is_stop(exchange):
            body["sampling_params"]["stop_token_ids"] = list(range(VOCAB_SIZE))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + exchange["path"], data, method=exchange["method"])
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            status, said = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, said = error.code, error.read().decode()
    try:
        return status, json.loads(said)
    except ValueError:
        return status, said


def finish_is_stop(exchange):
    said = exchange["response"]
    meta = said.get("meta_info", {}) if isinstance(said, dict) else {}
    return meta.get("finish_reason", {}).get("type") == "stop"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_stand_in_answers_like_the_real_server(servers, file):
    (server,) = servers(1)
    for exchange in json.loads(file.read_text()):
        status, said = ask(server, exchange)
        assert status == exchange["status"], (exchange["path"], said)
        assert differences(said, exchange["response"]) == [], exchange["path"]


def sampled_by_us(exchange):
    return exchange["path"] == "/generate" and exchange["status"] == 200 and exchange["request"].get("return_logprob")


@pytest.mark.parametrize("exchange", [e for _, e in EXCHANGES if sampled_by_us(e)])
def test_what_the_real_server_said_can_be_read(exchange):
    body, said = exchange["request"], exchange["response"]
    sampling, ids = body["sampling_params"], tuple(body["input_ids"])
    start = body.get("logprob_start_len", -1)
    if start >= 0:
        top_k = body.get("top_logprobs_num", 0)
        carrier = "hidden" if body.get("return_hidden_states") else "topk" if top_k else "sampled"
        score = read_score(Ask(rid="", ids=ids, first=start + 1, carrier=carrier, top_k=top_k), said, ROOMY)
        rows = {"hidden": "hidden_RD", "topk": "ids_RK", "sampled": "logp_R"}[carrier]
        assert len(getattr(score, rows)) == len(ids) - start - 1
    else:
        draw = Draw(
            rid="",
            ids=ids,
            max_new_tokens=sampling["max_new_tokens"],
            temperature=sampling["temperature"],
            top_p=sampling.get("top_p", 1.0),
            top_k=max(sampling.get("top_k", 0), 0),
            stop_ids=tuple(sampling["stop_token_ids"]),
        )
        drawn = read_drawn(draw, said, ROOMY)
        assert list(drawn.ids) == said["output_ids"]
        assert len(drawn.versions) == len(drawn.logps) == len(drawn.ids)
