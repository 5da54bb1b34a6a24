"""A teacher over stand-ins: every carrier for exactly the student's tokens, and what a lost server costs."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import steps
import tiny
import torch
from standin import PROBE_S, settings, wait_for
from standin_model import CONTEXT, HIDDEN_SIZE, VOCAB_SIZE, hidden, logps

from megatron_opd.config import Config, DataConfig, RunConfig, StudentConfig, TeacherConfig, TrainConfig
from megatron_opd.core.event_loop import Loop
from megatron_opd.core.scores import Hidden, Sampled, TopK
from megatron_opd.core.vocab import VocabShard
from megatron_opd.precision.fp8_plan import Products
from megatron_opd.precision.recipes import RECIPES
from megatron_opd.precision.scaled import ScaledHead
from megatron_opd.sglang.errors import Down, Refused
from megatron_opd.sglang.pool import connect
from megatron_opd.sglang.wire import ServerLimits
from megatron_opd.teachers.served_teacher import SGLangTeacher

LIMITS = ServerLimits(vocab_size=VOCAB_SIZE, context=CONTEXT)
ALONE = SimpleNamespace(share=lambda compute: compute(), is_last_stage=True)
ROLLOUTS = tiny.rollouts(count=10, vocab_size=VOCAB_SIZE)


@pytest.fixture
def make_teacher():
    """A teacher of one rank over stand-ins; settings of ServersConfig and TeacherConfig by name."""
    made = []

    def make(stand_ins, *, carrier="sampled", top_k=4, on_failure="fail", head_LD=None, probe_s=PROBE_S, **changes):
        config = TeacherConfig(
            name="t", model="there", backend="sglang", carrier=carrier, top_k=top_k, on_failure=on_failure
        )
        pool = connect(settings(stand_ins, **changes), LIMITS, name="teacher 't'")
        pool._pause_s, pool._probe_s = 0.05, probe_s
        made.append(SGLangTeacher(config, ALONE, pool, Loop(), head_LD=head_LD))
        return made[-1]

    yield make
    for teacher in made:
        teacher.close()


def before(rollout):
    """The tokens before each learnt token."""
    ids, rows = steps.place(rollout)
    return [tuple(ids[0, : row + 1].tolist()) for row in rows]


def right_logps(rollout):
    return np.array([logps(b)[i] for b, i in zip(before(rollout), steps.learnt(rollout), strict=True)])


def assert_right(scores, rollouts, *, carrier, top_k=4):
    for score, rollout in zip(scores, rollouts, strict=True):
        if carrier == "sampled":
            assert isinstance(score, Sampled)
            np.testing.assert_allclose(score.logp_R, right_logps(rollout), rtol=1e-5)
        elif carrier == "topk":
            assert isinstance(score, TopK)
            assert score.ids_RK.shape == (sum(rollout.learnt), top_k)
            rows = np.stack([logps(b) for b in before(rollout)])
            np.testing.assert_allclose(score.logp_RK, np.take_along_axis(rows, score.ids_RK.numpy(), -1), rtol=1e-5)
            assert (score.ids_RK == torch.tensor(steps.learnt(rollout))[:, None]).any(-1).all()
        else:
            assert isinstance(score, Hidden)
            np.testing.assert_array_equal(score.hidden_RD, np.stack([hidden(b) for b in before(rollout)]))


@pytest.mark.parametrize("carrier", ["sampled", "topk", "hidden"])
def test_scores_are_of_learnt_tokens_alone(servers, make_teacher, carrier):
    """Servers are asked about no token behind the last learnt one, nor about those before the first."""
    masks = [(0, 1, 1, 0), (1, 0, 0, 1, 1), (0, 0, 1), (1, 1, 1)]
    rollouts = [tiny.rollout((5, 6), (1, 7, 3, 9, 4)[: len(m)], learnt=m, index=i) for i, m in enumerate(masks)]
    (server,) = servers(1)
    teacher = make_teacher([server], carrier=carrier, head_LD=torch.zeros(VOCAB_SIZE, HIDDEN_SIZE))
    assert_right(teacher.score(rollouts), rollouts, carrier=carrier)
    asked = sorted((len(body["input_ids"]), body["logprob_start_len"]) for body in server.seen)
    assert asked == sorted([(5, 2), (7, 1), (5, 3), (5, 1)])


@pytest.mark.parametrize("carrier", ["sampled", "topk", "hidden"])
def test_scores_of_each_carrier(servers, make_teacher, carrier):
    head_LD = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)
    both = servers(2)
    teacher = make_teacher(both, carrier=carrier, head_LD=head_LD)
    assert teacher.score([]) == []
    assert_right(teacher.score(ROLLOUTS), ROLLOUTS, carrier=carrier)
    assert_right(teacher.score(ROLLOUTS[::-1]), ROLLOUTS[::-1], carrier=carrier)
    assert min(len(server.seen) for server in both) > 2
    assert {body["sampling_params"]["max_new_tokens"] for body in both[0].seen} == {int(carrier == "hidden")}


def test_hidden_states_have_the_head_s_type(servers, make_teacher):
    teacher = make_teacher(servers(1), carrier="hidden", head_LD=torch.zeros(3, HIDDEN_SIZE, dtype=torch.bfloat16))
    assert teacher.score(ROLLOUTS[:1])[0].hidden_RD.dtype == torch.bfloat16


def test_hidden_states_for_a_head_in_fp8_have_the_teacher_s_type(servers, make_teacher):
    rows = torch.ones(16, HIDDEN_SIZE, dtype=torch.bfloat16)
    head = ScaledHead(rows, Products(RECIPES["tensorwise"], backward=False))
    (told,) = make_teacher(servers(1), carrier="hidden", head_LD=head).score(ROLLOUTS[:1])
    assert told.hidden_RD.dtype == torch.bfloat16
    error = head.logits(told.hidden_RD).float() - told.hidden_RD.float() @ rows.float().T
    assert 0 < error.abs().max() < 0.5


def test_hidden_states_of_another_model_are_refused(servers, make_teacher):
    teacher = make_teacher(servers(1), carrier="hidden", head_LD=torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"teacher 't'.*6 numbers.*has 5.*another model"):
        teacher.score(ROLLOUTS[:1])


def test_hidden_states_that_fp16_does_not_know_are_refused(servers, make_teacher):
    (server,) = servers(1)
    say = server._say

    def large(run):
        said = say(run)
        said["meta_info"]["hidden_states"][0][-2][0] = 7e4
        return said

    server._say = large
    heads = (torch.zeros(3, HIDDEN_SIZE, dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
    half, wide = (make_teacher([server], carrier="hidden", head_LD=head_LD) for head_LD in heads)
    with pytest.raises(ValueError, match=r"teacher 't': what its servers tell has values above 65504.*dtype"):
        half.score(ROLLOUTS[:1])
    assert wide.score(ROLLOUTS[:1])[0].hidden_RD.isfinite().all()


def test_a_server_without_hidden_states_is_refused(servers, make_teacher):
    (server,) = servers(1)
    say = server._say

    def without(run):
        said = say(run)
        del said["meta_info"]["hidden_states"]
        return said

    server._say = without
    with pytest.raises(Refused, match="--enable-return-hidden-states"):
        make_teacher([server], carrier="hidden").score(ROLLOUTS[:1])


def test_scoring_starts_with_submit(servers, make_teacher):
    (server,) = servers(1)
    teacher = make_teacher([server])
    threads = [threading.Thread(target=teacher.submit, args=(rollout,)) for rollout in ROLLOUTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    deadline = time.monotonic() + 120
    while len(server.done) < len(ROLLOUTS):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert_right(teacher.score(ROLLOUTS), ROLLOUTS, carrier="sampled")
    assert len(server.seen) == len(ROLLOUTS)
    teacher.score(ROLLOUTS)
    assert len(server.seen) == 2 * len(ROLLOUTS)  # nothing is kept for longer than it is needed


def test_a_rollout_that_is_graded_after_submit_is_not_asked_about_again(servers, make_teacher):
    (server,) = servers(1)
    teacher = make_teacher([server])
    for rollout in ROLLOUTS:
        teacher.submit(rollout)
    graded = [replace(rollout, reward=0.5) for rollout in ROLLOUTS]
    assert_right(teacher.score(graded), ROLLOUTS, carrier="sampled")
    assert len(server.seen) == len(ROLLOUTS)


def test_a_rollout_that_is_there_twice_is_asked_about_once(servers, make_teacher):
    (server,) = servers(1)
    twice = [ROLLOUTS[0], ROLLOUTS[1], ROLLOUTS[0]]
    assert_right(make_teacher([server]).score(twice), twice, carrier="sampled")
    assert len(server.seen) == 2


@pytest.mark.parametrize("fault", ["die", "hang", "garbage", "short", "wrong_ids", "error"])
def test_a_server_lost_in_the_middle_costs_no_score(servers, make_teacher, fault):
    bad, good = servers(2)
    bad.faults = [None, None, fault]
    if fault == "hang":
        bad.always = "hang"
    teacher = make_teacher([bad, good], request_timeout_s=3.0 if fault == "hang" else 60.0, probe_s=60.0)
    assert_right(teacher.score(ROLLOUTS), ROLLOUTS, carrier="sampled")
    counted = teacher.metrics()
    assert counted["teacher/t/losses"] == 1
    assert counted["teacher/t/retries"] >= 1
    assert "teacher/t/unscored" not in counted


def test_none_left_stops_the_run_or_leaves_gaps(servers, make_teacher):
    (server,) = servers(1)
    server.kill()
    strict = make_teacher([server], retries=1, probe_s=60.0)
    strict.submit(ROLLOUTS[0])
    with pytest.raises(Down, match=f"teacher 't'.*\n.*{server.url}"):
        strict.score(ROLLOUTS)
    tolerant = make_teacher([server], retries=1, on_failure="renormalise", probe_s=0.05)
    assert tolerant.score(ROLLOUTS) == [None] * len(ROLLOUTS)
    assert tolerant.metrics()["teacher/t/unscored"] == len(ROLLOUTS)
    server.start()
    wait_for(tolerant._pool.up)
    assert_right(tolerant.score(ROLLOUTS), ROLLOUTS, carrier="sampled")


def test_only_what_failed_is_a_gap(servers, make_teacher):
    (server,) = servers(1)
    teacher = make_teacher([server], retries=0, on_failure="renormalise", max_in_flight=1)
    server.faults = [None, None, "garbage"]
    scores = teacher.score(ROLLOUTS[:3])
    assert [score is None for score in scores] == [False, False, True]
    assert_right(scores[:2], ROLLOUTS[:2], carrier="sampled")


def test_a_refused_request_is_never_a_gap(servers, make_teacher):
    (server,) = servers(1, api_key="sesame")
    with pytest.raises(Refused, match="401"):
        make_teacher([server], on_failure="renormalise").score(ROLLOUTS)


def test_metrics(servers, make_teacher):
    teacher = make_teacher(servers(1))
    teacher.score(ROLLOUTS)
    counted = teacher.metrics()
    assert counted["teacher/t/http/tokens"] == sum(len(r.token_ids) for r in ROLLOUTS)
    assert counted["teacher/t/http/bytes_received"] > 0
    assert counted["teacher/t/http/seconds"] > 0
    assert not any(teacher.metrics().values())


def on_a_rank(parallel, model_dir, urls, rollouts, carrier):
    """(scores, head rows, metrics) of a teacher that `build_teachers` makes."""
    from megatron_opd.config import ServersConfig
    from megatron_opd.teachers import build_teachers

    served = ServersConfig(urls=urls, request_timeout_s=10.0, retries=0)
    teacher = TeacherConfig(
        name="t", model=model_dir, backend="sglang", servers=served, carrier=carrier, on_failure="renormalise"
    )
    config = Config(
        run=RunConfig(dir="unused"),
        student=StudentConfig(model="unused"),
        teachers=[teacher],
        data=DataConfig(train=[]),
        train=TrainConfig(steps=1),
    )
    share = VOCAB_SIZE // parallel.tensor_size
    start = parallel.tensor_rank * share
    (made,) = build_teachers(config, parallel, VocabShard(start, start + share, VOCAB_SIZE))
    made.submit(rollouts[0])
    scores = made.score(rollouts)
    counted = made.metrics()
    made.close()
    return scores, made.head_LD, counted


@pytest.mark.parametrize("carrier", ["hidden", "sampled"])
def test_one_rank_asks_and_all_know(ranks, servers, tmp_path, carrier):
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny.build("llama", **sizes, max_position_embeddings=CONTEXT)
    (server,) = servers(1)
    server.faults = [None] * 9 + ["garbage"]
    model_dir = tiny.save(model, tmp_path / "t")
    answers = ranks.run(2, on_a_rank, model_dir, [server.url], ROLLOUTS, carrier, pipeline=2)
    assert len(server.seen) == len(ROLLOUTS)
    assert [bool(counted) for *_, counted in answers] == [True, False]
    (first, first_head_LD, _), (last, head_LD, _) = answers
    gaps = [i for i, score in enumerate(last) if score is None]
    assert len(gaps) == 1
    assert gaps == [i for i, score in enumerate(first) if score is None]
    told = [(score, rollout) for score, rollout in zip(last, ROLLOUTS, strict=True) if score is not None]
    assert_right([score for score, _ in told], [rollout for _, rollout in told], carrier=carrier)
    assert first_head_LD is None
    if carrier == "hidden":  # nothing dense where the loss is not computed
        assert all(score.hidden_RD is None for score in first if score is not None)
        torch.testing.assert_close(head_LD, model.lm_head.weight)


@pytest.mark.parametrize("carrier", ["sampled", "topk", "hidden"])
def test_a_teacher_that_sees_a_prompt_of_its_own(servers, make_teacher, carrier):
    """Rows are those of the same tokens behind its prompt; rollouts that are equal but for that are told apart."""
    teacher = make_teacher(servers(1), carrier=carrier, head_LD=torch.zeros(VOCAB_SIZE, HIDDEN_SIZE))
    own = {"t": (5, 4, 3, 2), "somebody else": (1,)}
    seen = [replace(r, prompt=replace(r.prompt, teacher_ids=own)) for r in ROLLOUTS[:3]]
    expected = [replace(r, prompt=replace(r.prompt, token_ids=own["t"])) for r in seen]
    assert_right(teacher.score(seen), expected, carrier=carrier)
    assert_right(teacher.score([*seen, *ROLLOUTS[:3]]), [*expected, *ROLLOUTS[:3]], carrier=carrier)
