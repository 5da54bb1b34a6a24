"""A server's log-probabilities of a prompt's tokens, by one request: for comparisons, without a pool or retries."""

from __future__ import annotations

import json
import urllib.error
import urllib.request


def ask(url: str, ids: list[int], timeout_s: float) -> list[float]:
    """An SGLang server's log-probability of every token but the first, in nats. Raises ValueError for what is none."""
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    request = urllib.request.Request(
        url.rstrip("/") + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            triples = json.load(answer)["meta_info"]["input_token_logprobs"]
        logps, echoed = [t[0] for t in triples[1:]], [t[1] for t in triples]
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace")
        raise ValueError(f"{url} answered {error.code} ({error.reason}): {said}") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{url} did not answer as an SGLang server: {error}") from None
    if echoed != ids or not all(isinstance(logp, float | int) for logp in logps):
        raise ValueError(f"{url} scored other tokens than were sent: {len(echoed)} of {len(ids)}")
    return [float(logp) for logp in logps]
