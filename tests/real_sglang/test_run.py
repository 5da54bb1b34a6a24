"""A whole run over real servers that `train` starts and ends by itself: what `make quickstart-sglang` does, shorter."""

import re

import psutil
from program import CONFIG, exported, opd, rows

STEPS = 4
SERVED = [
    "rollout.engine=sglang",
    "rollout.sync_verify=true",
    "teachers.0.backend=sglang",
    "teachers.0.servers.port=31000",
    "optim.warmup_steps=0",
    f"train.steps={STEPS}",
    "train.eval_every=0",
    "train.save_every=0",
]


def test_a_run_starts_its_servers_uses_them_and_ends_them(tmp_path):
    done = opd("train", CONFIG, f"run.dir={tmp_path}", *SERVED, timeout=580)
    assert done.returncode == 0, done.stderr
    trained = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    # Sampler and trainer are one model in one type: what is left is rounding.
    assert all(row["mismatch/kl"] < 1e-8 and row["rollout/version_lag"] == 0 for row in trained)
    assert all(row["rollout/retries"] == row["teacher/carry/retries"] == 0 for row in trained)
    assert trained[-1]["kl/ensemble"] < trained[0]["kl/ensemble"]
    assert exported(tmp_path)
    urls = re.findall(r"(http://\S+) is ready", done.stderr)
    assert len(urls) == 2
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if "launch_server" in " ".join(p.info["cmdline"] or [])
            and any(url.rsplit(":", 1)[1] in p.info["cmdline"] for url in urls)]  # fmt: skip
    assert not left, f"servers that are still there: {left}"
    assert not list((tmp_path / "servers").iterdir())
