"""Agreement with teachers of every carrier at every tensor-parallel size: the likeliest ids, counted token by token."""

import oracle
import pytest
import test_carriers as carriers
import torch
from test_carriers import NUM_TOKENS, SIZE, made
from test_objective import means_of

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.fused import FactoredLogits
from megatron_opd.loss.objective import Objective

MIXTURES = [i for i, (_, _, beta) in enumerate(carriers.CASES) if beta == 1.0]


def on_shard(parallel, index):
    """The metrics of this rank: of the student's logits, and of hidden states and head where the loss takes those."""
    case = made(index)
    term, here = carriers.term_here(case, parallel)
    objective = Objective(term, measures_agreement=True)
    forms = [case.logits[:, here]]
    if objective.takes_hidden:
        forms.append(FactoredLogits(torch.eye(NUM_TOKENS), case.logits[:, here].T.contiguous()))
    with torch.no_grad():
        return [means_of(objective, objective(case.batch, student)[2]) for student in forms]


def all_cases(parallel):
    return [on_shard(parallel, index) for index in MIXTURES]


@pytest.fixture(scope="module", params=[1, 2, 4], ids="tp{}".format)
def computed(request, ranks):
    return ranks.run(request.param, all_cases)


def likeliest(case, n, t):
    if case.carriers[n] == "hidden":
        return int(carriers.exact_at(case, n, t).argmax())
    known = {i: x for i, x in carriers.known_at(case.batch.teachers[n], t).items() if 0 <= i < SIZE}
    return max(known, key=known.get)


def of_all(case, asked, t):
    """The likeliest id of the teachers' average, over what all of them are known on."""
    weights = [case.batch.weights_TN[t, n].double() for n in asked]
    nobody = torch.zeros(SIZE, dtype=torch.float64)
    target = oracle.mean_probs(carriers.compared_at(case, nobody, asked, t)[1], weights)
    if all(case.carriers[n] == "hidden" for n in asked):
        return int(target.argmax())
    lists = [carriers.known_at(case.batch.teachers[n], t) for n in asked if case.carriers[n] == "topk"]
    ids = sorted({i for known in lists for i in known if 0 <= i < SIZE})
    return ids[int(target[: len(ids)].argmax())]


def expected(case):
    found = {}
    for t in range(NUM_TOKENS):
        asked = [n for n in range(len(case.carriers)) if case.batch.weights_TN[t, n] > 0]
        if any(case.carriers[n] == "sampled" for n in asked):
            continue
        mine = int(case.logits[t, :SIZE].argmax())
        found.setdefault("agreement/ensemble", []).append(of_all(case, asked, t) == mine)
        for n in asked:
            found.setdefault(f"agreement/t{n}", []).append(likeliest(case, n, t) == mine)
    return {name: sum(same) / len(same) for name, same in found.items()}


@pytest.mark.parametrize("at", range(len(MIXTURES)), ids=["+".join(carriers.CASES[i][1]) for i in MIXTURES])
def test_it_is_the_share_of_tokens_with_the_same_likeliest_id(computed, at):
    wanted = expected(made(MIXTURES[at]))
    assert wanted or "sampled" in carriers.CASES[MIXTURES[at]][1]
    for shard in computed:
        for found in shard[at]:
            counted = {name: x for name, x in found.items() if name.startswith("agreement/") and x is not None}
            assert counted == pytest.approx(wanted)


def test_it_is_off_by_default():
    case = made(0)
    term = Distillation(case.config, 1.0, VocabShard.whole(SIZE), case.teachers, tuple(case.heads))
    assert not any(name.startswith("agreement/") for name in Objective(term).metric_names())
