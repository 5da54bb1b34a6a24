"""When the model learns, it is in training mode; when it is looked at, it is not, and nothing of it changes."""

import steps
import tiny

VOCAB_SIZE = 90


def modes(parallel, config, rollouts):
    """(by a step, an evaluation and a look at logits: the modes of the model at its head; whether looks change it)."""
    import torch

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    seen, batches = [], pack(rollouts)
    student.gpt.output_layer.register_forward_pre_hook(lambda module, _: seen.append(module.training))

    def during(look):
        seen.clear()
        look()
        return list(seen)

    learning = during(lambda: student.step(batches, objective))
    before = [p.detach().clone() for p in student.gpt.parameters()]
    looking = [during(lambda: student.evaluate(batches, objective)), during(lambda: student.logits(batches[0]))]
    same = all(torch.equal(a, b) for a, b in zip(before, student.gpt.parameters(), strict=True))
    return [learning, *looking], same


def test_modes(ranks, tmp_path):
    model = tiny.save(tiny.build("qwen3"), tmp_path / "model")
    config = tiny.config(model, [{"name": "t", "model": model}])
    found, same = ranks.run(1, modes, config, tiny.rollouts(count=4, vocab_size=VOCAB_SIZE))[0]
    assert found == [[True, True], [False, False], [False]]
    assert same
