"""The same rollouts through the real step on every layout: loss, gradient norm and next weights are those of one
process, and those are transformers' and plain torch's (`steps.Reference`)."""

import copy
from functools import cache

import pairwise
import pytest
import steps
import tiny
import torch
from safetensors.torch import load_file

VOCAB_SIZE = 90  # the smallest vocabulary of the three models
NUM_STEPS = 3
STUDENTS = {  # student model and what its layouts need
    "qwen3": {"vocab_size": 93},
    "qwen2": {},  # tied, biases
    "llama": {},
    "qwen3_moe": {"norm_topk_prob": True},
}
TEACHERS = (
    ("llama", {"hidden_size": 48, "vocab_size": 101, "num_hidden_layers": 4}),
    ("qwen3_tied", {"hidden_size": 24, "vocab_size": VOCAB_SIZE}),
)
WEIGHTS = ({"weight": 0.3, "sources": {"b": 1.0}}, {"weight": 0.7, "sources": {"b": 0.0}})
"""Source a is taught by both, source b by the first teacher alone."""
LOSSES = {
    "reverse": {"beta": 1.0, "ensemble": "logits"},
    "forward": {"beta": 0.0, "ensemble": "probs", "temperature": 2.0},
    "jsd": {"beta": 0.4, "ensemble": "probs", "chunk_tokens": 5},
    "jsd_logits": {"beta": 0.7, "ensemble": "logits", "temperature": 0.8},
}
OPTIM = {
    "lr": 2e-2, "min_lr": 2e-3, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "clip_grad": 0.2,
    "eps": 1e-2,  # near the gradients' size, so that updates are neither signs of gradients nor blind to their scale
}  # fmt: skip


@cache
def model(family, changes=()):
    return tiny.build(family, **dict(changes))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Where the models are, by name; teachers are t0 and t1."""
    root = tmp_path_factory.mktemp("models")
    made = {name: model(name, tuple(changes.items())) for name, changes in STUDENTS.items()}
    made |= {f"t{n}": model(family, tuple(changes.items())) for n, (family, changes) in enumerate(TEACHERS)}
    return {name: tiny.save(m, root / name) for name, m in made.items()}


def rollouts():
    """Eight, of two sources, in an order that gives replicas unequal token counts and one-source micro-batches."""
    made = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    made.sort(key=lambda r: (r.prompt.source, len(r.token_ids)))
    return made


def config(paths, student, loss="reverse", *, dtype="fp32", recompute="none", micro_batch_size=2, train=(), **optim):
    return tiny.config(
        paths[student],
        [{"name": f"t{n}", "model": paths[f"t{n}"], "dtype": dtype, **w} for n, w in enumerate(WEIGHTS)],
        student={"dtype": dtype, "recompute": recompute, "vocab_multiple": 4},
        loss=LOSSES[loss],
        optim={**OPTIM, **optim},
        train={"steps": 6, "micro_batch_size": micro_batch_size, **dict(train)},
    )


@pytest.fixture(scope="module")
def alone(ranks, paths):
    """Results of one process by (student, loss, dtype), each computed once."""

    @cache
    def compute(student, loss, dtype="fp32"):
        return ranks.run(1, steps.train, config(paths, student, loss, dtype=dtype), rollouts(), VOCAB_SIZE, NUM_STEPS)[
            0
        ]

    return compute


def assert_same(found, expected, *, rel=2e-6, atol=2e-6):
    """Two (metrics by step, evaluation, weights)."""
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert mine == pytest.approx(theirs, rel=rel, abs=rel)
    assert found[1] == pytest.approx(expected[1], rel=10 * rel, abs=10 * rel)
    assert found[2].keys() == expected[2].keys()
    for name, tensor in expected[2].items():
        torch.testing.assert_close(found[2][name], tensor, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def saved(trained, directory):
    """The weights of transformers' model under their names in files, where experts are apart."""
    return load_file(f"{tiny.save(trained, directory)}/model.safetensors")


@pytest.mark.parametrize(
    ("student", "loss"),
    [("qwen3", "reverse"), ("qwen2", "forward"), ("llama", "jsd"), ("qwen3", "jsd_logits"), ("qwen3_moe", "reverse")],
)
def test_one_process_is_transformers_and_torch(alone, paths, student, loss, tmp_path):
    metrics, _, weights = alone(student, loss)
    teachers = [copy.deepcopy(model(family, tuple(changes.items()))) for family, changes in TEACHERS]
    mine = copy.deepcopy(model(student, tuple(STUDENTS[student].items())))
    reference = steps.Reference(config(paths, student, loss), mine, teachers, VOCAB_SIZE)
    for number, found in enumerate(metrics, start=1):
        expected = reference.step(rollouts(), number)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert expected["grad_norm"] > OPTIM["clip_grad"] or number > 1  # clipping is at work
    expected_weights, start = saved(reference.student, tmp_path / "m"), load_file(f"{paths[student]}/model.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name].double(), tensor, atol=1e-5, rtol=0, msg=name)
        assert (tensor - start[name]).abs().max() > 1e-4  # and it did move


EVERY_LAYOUT = {
    "tp2": ({"tensor": 2}, {}),
    "tp4": ({"tensor": 4}, {}),
    "pp2": ({"pipeline": 2}, {}),
    "tp2pp2": ({"tensor": 2, "pipeline": 2}, {}),
    "dp2": ({"data": 2}, {}),
    "dp2 plain optimizer": ({"data": 2}, {"distributed": False}),
    "dp4 one rollout at a time": ({"data": 4}, {"micro_batch_size": 1}),
    "dp2tp2": ({"tensor": 2, "data": 2}, {}),
    "dp2tp2sp plain optimizer": ({"tensor": 2, "data": 2, "sequence": True}, {"distributed": False}),
    "dp2pp2": ({"pipeline": 2, "data": 2}, {}),
    "tp2sp": ({"tensor": 2, "sequence": True}, {}),
    "tp2pp2sp full recompute": ({"tensor": 2, "pipeline": 2, "sequence": True}, {"recompute": "full"}),
    "tp2 selective recompute": ({"tensor": 2}, {"recompute": "selective"}),
    "tp2 plain optimizer": ({"tensor": 2}, {"distributed": False}),
    "one rollout at a time": ({"tensor": 1}, {"micro_batch_size": 1}),
    "four at a time": ({"pipeline": 2}, {"micro_batch_size": 4}),
    "all at once": ({"tensor": 1}, {"micro_batch_size": 8, "recompute": "full"}),
}
PACKED = {
    "all at once": ({"tensor": 1}, {"micro_batch_size": 8}),
    "tp2sp": ({"tensor": 2, "sequence": True}, {}),
    "pp2": ({"pipeline": 2}, {}),
    "dp2": ({"data": 2}, {}),
    "tp2pp2sp full recompute": ({"tensor": 2, "pipeline": 2, "sequence": True}, {"recompute": "full"}),
    "tp2 selective recompute": ({"tensor": 2}, {"recompute": "selective"}),
    "mixture tp2ep2sp": ({"tensor": 2, "expert": 2, "sequence": True}, {}),
}
"""Layouts where sequences go through the models in rows; `alone` pads them."""
CASES = [
    *[pytest.param("qwen3", "reverse", *case, id=f"qwen3-{name}") for name, case in EVERY_LAYOUT.items()],
    *[
        pytest.param(student, loss, *EVERY_LAYOUT[name], id=f"{student}-{name}")
        for student, loss, names in (
            ("qwen2", "forward", ("tp2", "pp2", "tp2pp2", "dp2tp2", "tp2sp", "dp2pp2")),
            ("llama", "jsd", ("tp4", "tp2pp2", "dp2tp2sp plain optimizer")),
            ("qwen3", "jsd_logits", ("tp2pp2sp full recompute",)),
        )
        for name in names
    ],
    *[
        pytest.param(student, loss, layout, {**settings, "train": {"packing": True}}, id=f"{student}-packed-{name}")
        for student, loss, names in (
            ("qwen3", "reverse", list(PACKED)[:-1]),
            ("qwen2", "forward", ("pp2",)),
            ("llama", "jsd", ("tp2sp",)),
            ("qwen3_moe", "reverse", ("mixture tp2ep2sp",)),
        )
        for name in names
        for layout, settings in [PACKED[name]]
    ],
    pytest.param("qwen3_moe", "reverse", {"data": 2}, {}, id="moe-dp2"),
    pytest.param("qwen3_moe", "reverse", {"tensor": 2, "expert": 2, "sequence": True}, {}, id="moe-tp2ep2sp"),
    pytest.param("qwen3_moe", "reverse", {"tensor": 4, "expert": 2, "sequence": True}, {}, id="moe-tp4ep2sp"),
    pytest.param("qwen3_moe", "reverse", {"tensor": 4, "expert": 4, "sequence": True}, {}, id="moe-tp4ep4sp"),
    pytest.param(
        "qwen3_moe", "reverse", {"tensor": 2, "pipeline": 2, "expert": 2, "sequence": True}, {}, id="moe-tp2pp2ep2sp"
    ),
    pytest.param(
        "qwen3_moe", "reverse", {"tensor": 2, "data": 2, "expert": 2, "sequence": True}, {}, id="moe-dp2tp2ep2sp"
    ),
]


@pytest.mark.parametrize(("student", "loss", "layout", "settings"), pairwise.thin(CASES))
def test_layouts_do_not_change_the_step(ranks, alone, paths, student, loss, layout, settings):
    size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    made = config(paths, student, loss, **settings)
    answers = ranks.run(size, steps.train, made, rollouts(), VOCAB_SIZE, NUM_STEPS, **layout)
    assert_same(answers[0], alone(student, loss))
    for metrics, evaluation, weights in answers[1:]:
        assert metrics == answers[0][0]  # every rank knows the same numbers
        assert evaluation == answers[0][1]
        for name, tensor in weights.items():  # and replicas stay bitwise equal
            assert torch.equal(tensor, answers[0][2][name])
    counts = [sum(len(r.token_ids) for r in rollouts()[d :: layout.get("data", 1)]) for d in (0, 1)]
    assert layout.get("data", 1) == 1 or counts[0] != counts[1]


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"data": 2}], ids=str)
def test_loss_that_is_not_a_number_stops_every_rank(ranks, paths, layout):
    """Before the optimizer has touched anything, also when only one rank has the bad number."""
    made = config(paths, "qwen3", train={"max_skipped": 0})
    assert ranks.run(2, steps.step_on_nan, made, rollouts(), VOCAB_SIZE, **layout) == [True, True]


def test_half_precision_is_close_on_two_ranks(ranks, alone, paths):
    found = ranks.run(2, steps.train, config(paths, "qwen3", dtype="bf16"), rollouts(), VOCAB_SIZE, NUM_STEPS)[0]
    expected = alone("qwen3", "reverse", "bf16")
    full = alone("qwen3", "reverse")
    for i in range(NUM_STEPS):
        for name in ("loss", "grad_norm", "kl/t0", "kl/t1"):
            assert found[0][i][name] == pytest.approx(expected[0][i][name], rel=0.05)
            assert found[0][i][name] == pytest.approx(full[0][i][name], rel=0.05)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found[2].values())


def test_a_run_may_end_within_its_warm_up(ranks, paths):
    """A short run takes the first steps of the long one, whatever the decay."""
    made = config(paths, "qwen3", schedule="cosine", warmup_steps=8, lr=4e-3, train={"steps": 2})
    found = ranks.run(1, steps.train, made, rollouts(), VOCAB_SIZE, 2)[0]
    assert [row["lr"] for row in found[0]] == pytest.approx([5e-4, 1e-3])


def test_twenty_steps_follow_the_reference(ranks, paths):
    """A wrong moment, bias correction or schedule shows only over many steps."""
    made = tiny.config(
        paths["qwen2"],
        [{"name": f"t{n}", "model": paths[f"t{n}"], **w} for n, w in enumerate(WEIGHTS)],
        loss=LOSSES["reverse"],
        optim={**OPTIM, "schedule": "linear", "warmup_steps": 4, "clip_grad": 0.0, "lr": 5e-3},
        train={"steps": 20, "micro_batch_size": 4},
    )
    found, _, weights = ranks.run(2, steps.train, made, rollouts(), VOCAB_SIZE, 20)[0]
    teachers = [copy.deepcopy(model(family, tuple(changes.items()))) for family, changes in TEACHERS]
    reference = steps.Reference(made, copy.deepcopy(model("qwen2")), teachers, VOCAB_SIZE)
    expected = [reference.step(rollouts(), number) for number in range(1, 21)]
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in expected], rel=1e-4)
    assert [m["lr"] for m in found] == pytest.approx([m["lr"] for m in expected], rel=1e-6)
    assert expected[-1]["loss"] < 0.7 * expected[0]["loss"]
    for name, parameter in reference.student.named_parameters():
        torch.testing.assert_close(weights[name].double(), parameter.data, atol=1e-4, rtol=0, msg=name)
