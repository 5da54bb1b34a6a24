"""The page of a run: its data, what texts can do to it, and what is said where there is nothing to show."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import viewed

from megatron_opd.__main__ import main
from megatron_opd.tracking import view


class Blocks(HTMLParser):
    """The scripts of a page by type, as a browser cuts them."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append([dict(attrs).get("type", ""), ""])

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1][1] += data


def made(path, tables, **how):
    run = viewed.run(path, tables)
    steps = view.view(run, run / "view.html", **{"most_steps": 20} | how)
    text = (run / "view.html").read_text(encoding="utf-8")
    return steps, text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def numbers(packed):
    whole = np.frombuffer(base64.b64decode(packed["data"]), "<i2")
    return np.where(whole == -32768, np.nan, whole * packed["scale"])


def test_the_data_of_a_page(tmp_path):
    answers = [viewed.scored(0), viewed.scored(1, length=5)]
    steps, _, data = made(tmp_path / "my run", {10: answers, 4: [viewed.scored(0, 4)]})
    assert steps == [4, 10] == [one["step"] for one in data["steps"]]
    assert (data["name"], data["teachers"], data["candidates"]) == ("my run", list(viewed.TEACHERS), 5)
    assert data["curves"]["kl/ensemble"][:2] == [[1, 1.0], [2, 0.5]]
    last = data["steps"][-1]
    assert [(one["tokens"], one["prompt"]) for one in last["answers"]] == [(12, "question 0"), (5, "question 1")]
    tokens = np.frombuffer(base64.b64decode(last["token"]), "<u2")
    assert [data["texts"][i] for i in tokens[:12]] == [viewed.WORDS[i] for i in answers[0].token_ids]
    kl = numbers(last["columns"]["kl"])[:12]
    assert np.isnan(kl).tolist() == [not learnt for learnt in answers[0].learnt]
    np.testing.assert_allclose(kl[~np.isnan(kl)], answers[0].columns["kl"], atol=1e-4)
    assert "advantage" not in last["columns"]  # nobody has one
    top = np.frombuffer(base64.b64decode(last["top"]["big"]["ids"]), "<u2").reshape(-1, 5)
    assert [data["texts"][i] for i in top[1]] == [viewed.WORDS[int(i)] for i in answers[0].columns["top_id/big"][1]]
    assert np.isnan(numbers(last["top"][""]["logps"]).reshape(-1, 5)[0]).tolist() == [False] * 3 + [True] * 2


def test_texts_stay_texts(tmp_path):
    answer = viewed.scored(0, prompt=viewed.NASTY, response=viewed.NASTY, source=viewed.NASTY)
    _, text, data = made(tmp_path / "a <b>&", {1: [answer]})
    blocks = Blocks(text)
    assert [kind for kind, _ in blocks.scripts] == ["application/json", ""]
    assert "img" not in blocks.tags
    assert "<" not in blocks.scripts[0][1]  # so nothing can end the block, or begin a comment in it
    assert data == json.loads(blocks.scripts[0][1])
    assert data["steps"][0]["answers"][0]["response"] == viewed.NASTY
    assert "<title>a &lt;b&gt;&amp;</title>" in text


def test_texts_that_look_like_the_frame(tmp_path):
    _, _, data = made(tmp_path / "run", {1: [viewed.scored(0, prompt="{{script}} {{data}}")]})
    assert data["steps"][0]["answers"][0]["prompt"] == "{{script}} {{data}}"


def test_the_page_needs_nothing_and_runs_its_own_script_alone(tmp_path):
    _, text, _ = made(tmp_path / "run", {1: [viewed.scored(0)]})
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", policy)
    assert not re.search(r"""(src|href)=["']?http|url\(|@import|fetch\(|XMLHttpRequest""", text)


def test_so_many_steps_evenly(tmp_path):
    tables = {step: [viewed.scored(0, step)] for step in range(1, 12)}
    steps, _, _ = made(tmp_path / "run", tables, most_steps=3)
    assert steps == [1, 6, 11]
    assert made(tmp_path / "run", tables, most_steps=1)[0] == [11]


def test_a_token_that_no_number_is_known_of(tmp_path):
    """Without teachers there is no KL; and a value that is not finite is none."""
    answer = viewed.scored(0, teachers=())
    answer.columns["kl"][:] = np.nan
    answer.columns["logp"][0] = -np.inf
    _, _, data = made(tmp_path / "run", {1: [answer]})
    assert data["teachers"] == []
    assert "kl" not in data["steps"][0]["columns"]
    assert np.isnan(numbers(data["steps"][0]["columns"]["logp"])[0])


def test_more_texts_than_16_bits_count(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "_MOST_SHORT", 3)
    _, _, data = made(tmp_path / "run", {1: [viewed.scored(0)]})
    assert data["wide"]
    assert len(base64.b64decode(data["steps"][0]["token"])) == 4 * 12


def called(capsys, *arguments):
    """(exit code, standard output, standard error) of `megatron-opd view`."""
    code = main(["view", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("has_answers", [False, True])
def test_a_run_without_scores(tmp_path, capsys, has_answers):
    run = viewed.run(tmp_path / "run", {})
    if has_answers:
        (run / "completions.jsonl").write_text('{"step": 1}\n')
    code, _, said = called(capsys, run)
    assert code == 1
    assert "no scores of" in said
    assert "set log.completions_every" in said
    assert ("has answers, but" in said) == has_answers


def test_the_command(tmp_path, capsys):
    run = viewed.run(tmp_path / "run", {3: [viewed.scored(0)], 6: [viewed.scored(0)]})
    assert called(capsys, run) == (0, f"{run / 'view.html'}: 2 steps, 3 to 6; open it in a browser\n", "")
    assert called(capsys, run, "--out", tmp_path / "x.html", "--steps", "1")[0] == 0
    assert (tmp_path / "x.html").stat().st_size > 20_000
    assert "--steps must be at least 1" in called(capsys, run, "--steps", "0")[2]
    assert "there is no run directory" in called(capsys, tmp_path / "nothing")[2]
