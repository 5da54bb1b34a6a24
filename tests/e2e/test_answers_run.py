"""Whole runs of the examples about where answers come from, and of one that is cut off in their middle."""

import json
import shutil

import pytest
from program import ALONE, ROOT, checkpoints, exported, opd, rows, train

STEPS = 14
EXAMPLES = {  # what every training step of it says
    "gkd": {"kl/carry", "kl/compare", "rollout/length", "answers/length_others", "mismatch/kl"},
    "sft": {"sft/nll", "answers/length_others"},
    "seqkd": {"sft/nll", "answers/length_others"},
    "forward_kl_offline": {"kl/carry", "kl/compare", "answers/length_others"},
    "self_distillation": {"kl/itself", "rollout/length"},
    "routed_teachers": {"kl/carry", "kl/compare", "rollout/length"},
}
QUICK = ("gkd", "self_distillation")  # what the others do on the way is a part of what these do


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EXAMPLES]
)
def test_an_example_teaches_what_it_promises(tmp_path, name):
    """Its first steps bring the greedy accuracy on held-out prompts from almost nothing to most of them."""
    done = opd(
        "train", f"examples/{name}.yaml", f"run.dir={tmp_path}", f"train.steps={STEPS}", f"train.eval_every={STEPS}",
        "log.completions_every=7", "log.completions=5", "train.eval_nll=true", env=ALONE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path)
    before, after = (row["eval/accuracy/all"] for row in found if "eval/accuracy/all" in row)
    assert before < 0.1
    assert after > 0.75
    sources = ["add", "subtract", "max", "min", "all"]
    before, after = ([row[f"eval/nll/{source}"] for source in sources] for row in found if "eval/nll/all" in row)
    assert all(y < x for x, y in zip(before, after, strict=True))  # teachers say what the data set says
    trained = [row for row in found if "loss" in row]
    assert len(trained) == STEPS
    assert all(EXAMPLES[name] <= set(row) for row in trained)
    assert trained[-1]["loss"] < trained[0]["loss"]
    is_off_policy = name in ("sft", "seqkd", "forward_kl_offline")
    assert all(("rollout/length" in row) != is_off_policy for row in trained)
    assert not is_off_policy or all("mismatch/kl" not in row for row in trained)
    table = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in table] == [7] * 5 + [14] * 5
    origins = {"gkd": {"student", "dataset"}, "seqkd": {"teacher"}}.get(name)
    assert {row["origin"] for row in table} == (origins or {"dataset" if is_off_policy else "student"})
    taught = [column.replace("kl/", "logprob/") for column in EXAMPLES[name] if column.startswith("kl/")]
    assert all(any(row[column] is not None for column in taught) for row in table if taught)
    opd_report = opd("report", tmp_path)
    assert opd_report.returncode == 0, opd_report.stderr


@pytest.mark.slow
def test_minillms_mixture_reaches_the_objective(tmp_path):
    """The mixture is another sampler than the student, and the trainer sees that; alone it is the same one."""
    steps = ["train.steps=2", "loss.kind=sampled"]
    mixed = ["answers.teacher_mixed_alpha=0.5", "answers.teacher=carry"]
    for alpha, more, least, most in ((0.0, [], -1e-9, 1e-6), (0.5, mixed, 1e-2, 1e9)):
        done = train(tmp_path / str(alpha), *steps, *more)
        assert done.returncode == 0, done.stderr
        first = next(row for row in rows(tmp_path / str(alpha)) if "loss" in row)
        assert least < first["mismatch/kl"] < most
        assert (abs(first["importance/mean"] - 1) < 1e-4) == (alpha == 0)


@pytest.mark.slow
@pytest.mark.parametrize("seq_kd", ["false", "true"])
def test_a_run_that_goes_on_between_mixed_answers_ends_bitwise_the_same(tmp_path, seq_kd):
    """On two ranks; what the student does not answer, the others answer again as before."""
    settings = [
        *("answers.lmbda=0.5", f"answers.seq_kd={seq_kd}", "answers.sft_alpha=0.2", "rollout.prompts_per_step=8"),
        *("train.steps=4", "train.save_every=2", "parallel.tensor=2", "log.completions_every=1"),
    ]
    done = train(tmp_path / "whole", *settings)
    assert done.returncode == 0, done.stderr
    assert checkpoints(tmp_path / "whole") == ["step_00000002", "step_00000004"]
    shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    for name in ("checkpoints/step_00000004", "hf"):
        shutil.rmtree(tmp_path / "copy" / name)
    done = train(tmp_path / "copy", *settings)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 2" in done.stderr
    assert rows(tmp_path / "copy") == rows(tmp_path / "whole")
    assert exported(tmp_path / "copy") == exported(tmp_path / "whole")
    tables = [(tmp_path / run / "completions.jsonl").read_bytes() for run in ("copy", "whole")]
    assert tables[0] == tables[1]
    tokens = [{x.name: x.read_bytes() for x in (tmp_path / run / "tokens").iterdir()} for run in ("copy", "whole")]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 4
    fractions = [row["answers/student_frac"] for row in rows(tmp_path / "whole") if "loss" in row]
    assert 0 < min(fractions) < 1


@pytest.mark.slow
def test_replicas_together_train_on_the_answers_of_one(tmp_path):
    """The same prompts are the student's, whatever the layout."""
    settings = ["answers.lmbda=0.5", "answers.sft_alpha=0.2", "rollout.prompts_per_step=8", "train.steps=2"]
    for name, layout in (("one", "parallel.data=1"), ("two", "parallel.data=2")):
        done = train(tmp_path / name, *settings, layout)
        assert done.returncode == 0, done.stderr
    pairs = zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True)
    for mine, theirs in pairs:
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_every_example_of_this_page_is_tested():
    named = {path.stem for path in ROOT.glob("examples/*.yaml") if "answers:" in path.read_text()}
    assert named <= {*EXAMPLES, "minillm"}
