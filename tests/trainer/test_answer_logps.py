"""Teachers' log-probabilities of whole answers, on every layout those of transformers in float64."""

import copy

import oracle
import pytest
import steps
import test_step_invariance as invariance
import torch
from test_step_invariance import paths  # noqa: F401

LAYOUTS = {
    "alone": {"tensor": 1},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "tp2pp2sp": {"tensor": 2, "pipeline": 2, "sequence": True},
    "dp2tp2": {"data": 2, "tensor": 2},
}
COUNT = 3
"""Answers of a replica: a micro-batch and a half."""


def wanted(config, rollout):
    found = {}
    for settings, (family, changes) in zip(config.teachers, invariance.TEACHERS, strict=True):
        model = copy.deepcopy(invariance.model(family, tuple(changes.items()))).double()
        start, ids = len(rollout.prompt.token_ids), torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1]
        logp = oracle.log_softmax(logits, invariance.VOCAB_SIZE, config.loss.temperature)
        is_asked = settings.weight_for(rollout.prompt.source) > 0
        found[settings.name] = logp.gather(-1, ids[0, start:, None]).sum().item() if is_asked else None
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_rank_knows_what_teachers_say_of_its_replicas_answers(ranks, paths, layout):  # noqa: F811
    config = invariance.config(paths, "qwen3", "forward")  # tempered
    made = invariance.rollouts()[2:]  # so that the first of every replica are of both sources
    tensor, pipeline, data = (layout.get(kind, 1) for kind in ("tensor", "pipeline", "data"))
    found = ranks.run(tensor * pipeline * data, steps.told, config, made, invariance.VOCAB_SIZE, COUNT, **layout)
    by_replica = [[wanted(config, r) for r in made[replica::data][:COUNT]] for replica in range(data)]
    assert {None} < {logp for rows in by_replica for row in rows for logp in row.values()}
    for rank, rows in enumerate(found):  # ranks count tensor first, then data, then pipeline
        for row, expected in zip(rows, by_replica[rank // tensor % data], strict=True):
            assert row == {name: x if x is None else pytest.approx(x, rel=1e-5) for name, x in expected.items()}
