"""Packing: which outputs predict which tokens, and which teacher's rows and weights go with them."""

import pytest
import tiny
import torch

from megatron_opd.core.batching import NoTeacherLeft, pack, padded_length, renormalised
from megatron_opd.core.scores import Foreign, Hidden, Sampled, TopK

CPU = torch.device("cpu")
EOS = 0  # the same id as padding


def pack_all(rollouts, **kwargs):
    kwargs = {"micro_batch_size": len(rollouts), "length_multiple": 1, "device": CPU, **kwargs}
    return pack(rollouts, **kwargs)


def marked(rollout, teacher):
    """Scores whose rows say whose they are: [100 x teacher + index of the rollout, row]."""
    rows = [[100.0 * teacher + rollout.prompt.index, r] for r in range(len(rollout.token_ids))]
    return Hidden(torch.tensor(rows))


def test_rows_are_the_positions_before_the_response_tokens():
    (batch,) = pack_all([tiny.rollout((5, 6, 7), (8, 9)), tiny.rollout((4,), (3, 2, 1, 9))])
    assert batch.tokens_BS.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 1, 9]]
    assert batch.predicted_at_T.tolist() == [2, 3, 5, 6, 7, 8]
    assert batch.targets_T.tolist() == [8, 9, 3, 2, 1, 9]
    assert batch.targets_T.dtype == batch.tokens_BS.dtype == torch.int64


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("multiple", [1, 4])
def test_every_response_token_is_predicted_by_its_prefix(micro_batch_size, multiple):
    """A model that outputs the token after the position it stands on must see exactly the responses."""
    rollouts = tiny.rollouts(count=8)
    batches = pack_all(rollouts, micro_batch_size=micro_batch_size, length_multiple=multiple)
    assert [len(b.tokens_BS) for b in batches] == [
        len(rollouts[i : i + micro_batch_size]) for i in range(0, 8, micro_batch_size)
    ]
    seen = []
    for batch in batches:
        assert batch.tokens_BS.shape[1] == padded_length(rollouts, multiple)
        assert batch.tokens_BS.shape[1] % multiple == 0
        following = batch.tokens_BS.roll(-1, dims=1).flatten()
        assert torch.equal(following[batch.predicted_at_T], batch.targets_T)
        seen += batch.targets_T.tolist()
    assert seen == [t for r in rollouts for t in r.token_ids]
    logps = torch.cat([b.behaviour_logp_T for b in batches])
    torch.testing.assert_close(logps, torch.tensor([x for r in rollouts for x in r.logps]))


def test_eos_that_is_also_padding_is_trained_on_once():
    (batch,) = pack_all(
        [tiny.rollout((5, EOS), (7, EOS)), tiny.rollout((5, 6), (EOS,)), tiny.rollout((1, 2, 3), (4, 5, 6))]
    )
    assert batch.targets_T.tolist() == [7, EOS, EOS, 4, 5, 6]
    assert batch.predicted_at_T.tolist() == [1, 2, 7, 14, 15, 16]


def test_only_learnt_tokens_are_listed_and_context_predicts_them():
    """Context at the start, at the end, in the middle, and all but one token."""
    rollouts = [
        tiny.rollout((5, 6), (10, 11, 12), learnt=(0, 1, 1)),
        tiny.rollout((5,), (20, 21, 22, 23), learnt=(1, 0, 0, 1)),
        tiny.rollout((5, 6, 7), (30, 31, 32), learnt=(0, 1, 0)),
    ]
    weights = [[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]
    (batch,) = pack_all(rollouts, weights=weights)
    assert batch.lengths == (5, 5, 6)
    assert batch.tokens_BS.tolist() == [[5, 6, 10, 11, 12, 0], [5, 20, 21, 22, 23, 0], [5, 6, 7, 30, 31, 32]]
    assert batch.targets_T.tolist() == [11, 12, 20, 23, 31]
    assert batch.predicted_at_T.tolist() == [2, 3, 6, 9, 15]  # the first, the fourth and the last hold context
    assert batch.sequence_T.tolist() == [0, 0, 1, 1, 2]
    logps = [x for r in rollouts for x in r.logps]
    torch.testing.assert_close(batch.behaviour_logp_T, torch.tensor(logps))
    torch.testing.assert_close(batch.weights_TN, torch.tensor([weights[i] for i in (0, 0, 1, 1, 2)]))


def test_scores_are_of_learnt_tokens():
    rollouts = [tiny.rollout((1, 2), (3, 4, 5), learnt=(1, 0, 1)), tiny.rollout((1,), (5, 6), learnt=(0, 1), index=1)]
    top = TopK(torch.tensor([[9, 3], [5, 8]]), torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
    (batch,) = pack_all(rollouts, scores=[[top, None], [None, Sampled(torch.tensor([-5.0]))]], weights=[[1, 0], [0, 1]])
    assert batch.teachers[0].ids_RK.tolist() == [[9, 3], [5, 8], [0, 0]]
    assert batch.teachers[1].logp_R.tolist() == [0, 0, -5]
    wrong = TopK(torch.tensor([[9, 3], [4, 8]]), torch.zeros(2, 2))  # lists the token between them
    with pytest.raises(ValueError, match="lacks the token that was sampled"):
        pack_all(rollouts[:1], scores=[[wrong]], weights=[[1.0]])


def test_a_micro_batch_without_a_learnt_token():
    (batch,) = pack_all([tiny.rollout((1, 2), (3, 4), learnt=(0, 0))])
    assert batch.targets_T.shape == batch.predicted_at_T.shape == (0,)
    assert batch.targets_T.dtype == torch.int64


def test_padded_length_is_the_next_multiple():
    rollouts = [tiny.rollout((1, 2), (3,)), tiny.rollout((1, 2, 3), (4, 5))]
    assert [padded_length(rollouts, m) for m in (1, 2, 4, 5, 8)] == [5, 6, 8, 5, 8]


def test_weights_and_scores_follow_their_rollouts():
    rollouts = tiny.rollouts(count=5)
    weights = [[0.25, 0.75], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]
    scores = [[marked(r, n) if w[n] else None for r, w in zip(rollouts, weights, strict=True)] for n in (0, 1)]
    batches = pack_all(rollouts, micro_batch_size=2, scores=scores, weights=weights)
    for start, batch in zip((0, 2, 4), batches, strict=True):
        part = list(range(start, min(start + 2, 5)))
        tokens = [(i, r) for i in part for r in range(len(rollouts[i].token_ids))]
        torch.testing.assert_close(batch.weights_TN, torch.tensor([weights[i] for i, _ in tokens]))
        for n, hidden in enumerate(batch.teachers):
            if not any(weights[i][n] for i in part):
                assert hidden is None
            else:
                expected = [[100 * n + i, r] if weights[i][n] else [0, 0] for i, r in tokens]
                assert hidden.hidden_RD.tolist() == expected
    assert batches[2].teachers[1] is None  # the last micro-batch asked the first teacher only


def test_ranks_without_the_loss_carry_no_rows():
    rollouts = tiny.rollouts(count=3)
    scores = [[Hidden(None) for _ in rollouts], [None, Hidden(None), None]]
    (batch,) = pack_all(rollouts, scores=scores, weights=[[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    assert batch.teachers == (None, None)


def test_tokens_alone():
    (batch,) = pack_all(tiny.rollouts(count=3))
    assert batch.teachers == ()
    assert batch.weights_TN.shape == (len(batch.targets_T), 0)


def test_lists_and_sampled_tokens_follow_their_rollouts():
    """Zeros stand for rollouts that a teacher says nothing about; a teacher may be silent in a whole micro-batch."""
    rollouts = [tiny.rollout((1, 2), (3, 4)), tiny.rollout((1,), (5,), index=1), tiny.rollout((2,), (6, 7), index=2)]
    top = TopK(torch.tensor([[9, 3], [4, 8]]), torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
    sampled = Sampled(torch.tensor([-5.0]))
    scores = [[top, None, None], [None, sampled, None]]
    weights = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    first, last = pack_all(rollouts, micro_batch_size=2, scores=scores, weights=weights)
    lists, logps = first.teachers
    assert lists.ids_RK.tolist() == [[9, 3], [4, 8], [0, 0]]
    assert lists.logp_RK.tolist() == [[-1, -2], [-3, -4], [0, 0]]
    assert (lists.ids_RK.dtype, lists.logp_RK.dtype) == (torch.int64, torch.float32)
    assert logps.logp_R.tolist() == [0, 0, -5]
    assert last.teachers == (None, None)


def test_a_list_without_the_sampled_token_is_an_error():
    rollouts = [tiny.rollout((1, 2), (3, 4))]
    top = TopK(torch.tensor([[9, 3], [5, 8]]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="lacks the token that was sampled"):
        pack_all(rollouts, scores=[[top]], weights=[[1.0]])


def test_teachers_that_did_not_answer_leave_their_weight_to_the_others():
    rollouts = tiny.rollouts(count=3)
    there = Hidden(None)
    weights = [[0.2, 0.3, 0.5], [0.1, 0.9, 0.0], [0.7, 0.2, 0.1]]
    scores = [[there, None, there], [there, there, there], [None, None, there]]  # by teacher
    made = renormalised(rollouts, weights, scores)
    assert made[0] == pytest.approx([0.4, 0.6, 0.0])
    assert made[1] == [0.0, 1.0, 0.0]
    assert made[2] == weights[2]  # not a bit of it


def test_a_rollout_without_any_teacher_is_named():
    rollouts = tiny.rollouts(count=2)
    scores = [[Hidden(None), None], [None, None]]
    with pytest.raises(NoTeacherLeft, match="prompt 1 of source 'b'"):
        renormalised(rollouts, [[0.5, 0.5], [0.5, 0.5]], scores)
    with pytest.raises(NoTeacherLeft):  # the one that answered has no weight
        renormalised(rollouts[:1], [[0.0, 1.0]], [[Hidden(None)], [None]])


def test_spans_of_another_tokenizer_are_moved_past_answers_that_were_not_asked():
    """Student tokens count on over every answer, the teacher's own only over those that it was asked about."""
    rollouts = [tiny.rollout((1,), range(3, 3 + count), index=i) for i, count in enumerate((2, 3, 1, 2))]
    spans = [torch.tensor([[0, 1, 0, 1], [1, 3, 1, 4]]), torch.tensor([[0, 1, 0, 1], [1, 2, 1, 3]])]
    asked = [Foreign(torch.full((n, 1), float(i)), torch.arange(n), spans[i]) for i, n in enumerate((4, 3))]
    (batch,) = pack_all(rollouts, scores=[[None, asked[0], None, asked[1]]], weights=[[0.0], [1.0], [0.0], [1.0]])
    (told,) = batch.teachers
    assert told.spans_G4.tolist() == [[2, 3, 0, 1], [3, 5, 1, 4], [6, 7, 4, 5], [7, 8, 5, 7]]
    assert told.ids_Q.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert told.hidden_QD[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]
