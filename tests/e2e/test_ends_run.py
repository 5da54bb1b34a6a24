"""A base student, an instruct teacher: an end of the teacher that does not end the student is said before the run."""

import json
import shutil

import pytest
from program import MODELS, here, train

OWN, OWN_ID, BASE_ID = "<unused4>", 7, 1


@pytest.fixture
def teacher(tmp_path):
    """The quickstart's teacher with an end of its own, beside the student's."""
    made = tmp_path / "instruct"
    shutil.copytree(MODELS / "teacher_carry", made)
    path = made / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": OWN}))
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [OWN_ID, BASE_ID]}))
    return made


def test_an_end_that_never_ends_the_student_is_said_before_the_run(tmp_path, teacher):
    given = f"teachers.0.model={teacher}"
    said = f"its own end of a response, '{OWN}' ({OWN_ID}), does not end one of the student"
    done = train(tmp_path / "run", "train.steps=1", given)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stderr.split())  # the console breaks lines
    assert "warning: teachers.0.model: teacher 'carry': its own end" in shown
    assert shown.index(said) < shown.index("step 1/1")
    log = (tmp_path / "run/train.log").read_text()
    assert log.index(said) < log.index("step 1/1")
    checked = here("check", "examples/quickstart.yaml", given, f"run.dir={tmp_path}/other")
    assert said in checked.stdout
    named = here("check", "examples/quickstart.yaml", f"run.dir={tmp_path}/other")
    assert "does not end one" not in named.stdout
