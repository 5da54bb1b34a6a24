"""Metrics of several updates as those of one step. On a rank, for the module that makes them needs Megatron."""

import pytest


def joined(_, metrics):
    from megatron_opd.trainer import updates

    return updates.joined(metrics)


def test_means_by_tokens_and_what_is_the_last_ones(ranks):
    first = {"num_tokens": 10.0, "loss": 1.0, "grad_norm": 2.0, "lr": 0.1, "loss_scale": 64.0, "step/skipped": 0.0}
    last = {"num_tokens": 30.0, "loss": 2.0, "grad_norm": 4.0, "lr": 0.2, "loss_scale": 32.0, "step/skipped": 0.0}
    (found,) = ranks.run(1, joined, [first, last])
    assert found == pytest.approx(
        {"num_tokens": 40, "loss": 1.75, "grad_norm": 3, "lr": 0.2, "loss_scale": 32, "step/skipped": 0}
    )


def test_an_update_that_was_skipped_has_no_norm(ranks):
    skipped = {"num_tokens": 10.0, "loss": 1.0, "lr": 0.1, "step/skipped": 1.0}
    made = {"num_tokens": 10.0, "loss": 2.0, "lr": 0.1, "grad_norm": 4.0, "step/skipped": 0.0}
    (found,) = ranks.run(1, joined, [skipped, made])
    assert found == pytest.approx({**made, "num_tokens": 20, "loss": 1.5, "step/skipped": 0.5})
    (found,) = ranks.run(1, joined, [skipped, skipped])
    assert "grad_norm" not in found
