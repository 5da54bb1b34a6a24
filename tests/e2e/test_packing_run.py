"""A run with packed sequences as a user starts it: the numbers of the run without, and no padding."""

import json

import pytest
from program import rows, train

STEPS = ["train.steps=2", "train.eval_every=2", "train.eval_teachers=false", "train.micro_batch_size=4"]


def prompts(path):
    """Of 2 to 20 characters: those of the quickstart are all of one length."""
    made = [f"{'7' * (1 + 4 * (i % 3))}+{'12' * (1 + i % 5)}=" for i in range(8)]
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "0"}) + "\n" for prompt in made))
    return [f"data.{which}=[{{name: add, path: {path}}}]" for which in ("train", "eval")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], id="one rank"),
        pytest.param(["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"], id="tp2pp2sp"),
    ],
)
def test_a_packed_run_is_the_padded_one(tmp_path, layout):
    data, found = prompts(tmp_path / "prompts.jsonl"), {}
    for packing in ("false", "true"):
        done = train(tmp_path / packing, *STEPS, *data, *layout, f"train.packing={packing}")
        assert done.returncode == 0, done.stderr
        found[packing] = rows(tmp_path / packing)
    padding = {packing: [row.pop("batch/padding") for row in its if "loss" in row] for packing, its in found.items()}
    assert len(padding["false"]) == 2
    assert all(packed < padded for padded, packed in zip(padding["false"], padding["true"], strict=True))
    assert layout or padding["true"] == [0.0, 0.0]
    assert [row.keys() for row in found["true"]] == [row.keys() for row in found["false"]]
    for packed, padded in zip(found["true"], found["false"], strict=True):
        assert packed == pytest.approx(padded, rel=1e-4, abs=1e-6)
