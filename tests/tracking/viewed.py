"""Run directories for tests of `view`: answers with made-up scores."""

import json

import numpy as np

from megatron_opd.tracking import token_file
from megatron_opd.tracking.token_file import ScoredAnswer

WORDS = [" the", " apples", "\n", " are", " 12", ".", " so", "<b>", " ↦", "\t", '"', "</s>", " 'x'", "&amp;", " a b"]
NASTY = (
    "</script ></script><script>document.title='owned'</script><!-- <img src=x onerror=alert(1)> \u2028 \u202e &lt; ]]>"
)
TEACHERS = ("big", "b&<i>")


def scored(number, step=10, *, length=12, teachers=TEACHERS, rng=None, **row):
    """One answer of `length` tokens, of which the last but one is not learnt; its KL grows with `number`."""
    rng = rng or np.random.default_rng(number)
    learnt = [True] * length
    learnt[-2] = False
    m = length - 1
    ids = rng.integers(0, len(WORDS), length)
    columns = {"logp_sampler": -rng.random(m), "advantage": np.full(m, np.nan), "entropy": rng.random(m)}
    columns |= {"kl": (1 + number) * rng.random(m), "logp": -3 * rng.random(m), "logp_target": -5 * rng.random(m)}
    for model in ("", *(f"/{name}" for name in teachers)):
        top = np.argsort(rng.random((m, len(WORDS))), axis=-1)[:, :5].astype(float)
        logps = np.sort(-4 * rng.random((m, 5)), axis=-1)[:, ::-1].copy()
        top[0, 3:] = logps[0, 3:] = np.nan
        columns |= {f"top_id{model}": top, f"top_logp{model}": logps}
        if model:
            columns |= {f"logp{model}": -4 * rng.random(m), f"kl{model}": number + rng.random(m)}
    known = {
        **{"step": step, "answer": number, "source": ("gsm8k", "chat")[number % 2], "index": number, "sample": 0},
        **{"turns": 1, "calls": 0, "ended": "", "part": 0, "origin": "student", "finish": "stop"},
        "reward": (None, 0.0, 0.5, 1.0)[number % 4],
        **{"prompt": f"question {number}", "response": "".join(WORDS[i] for i in ids)},
    }
    return ScoredAnswer(row=known | row, token_ids=ids.tolist(), learnt=learnt, columns=columns)


def run(path, tables):
    """A run directory; `tables`: the answers of each step."""
    path.mkdir(exist_ok=True)
    rows = [{"step": step, "loss": 2.0 / step, "kl/ensemble": 1.0 / step, "entropy": 0.5} for step in range(1, 13)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, answers in tables.items():
        token_file.write(token_file.path_of(path, step), answers, WORDS.__getitem__)
    return path
