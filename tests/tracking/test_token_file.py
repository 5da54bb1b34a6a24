"""Files of scores of tokens: what pandas and `view` read is what was written; which files a run has."""

import numpy as np
import pandas
import pytest
import viewed

from megatron_opd.tracking import token_file


@pytest.fixture(scope="module")
def answers():
    return [viewed.scored(0), viewed.scored(1, length=5), viewed.scored(3, reward=None, prompt="a ↦ \u2028 b")]


def test_pandas_reads_a_row_an_answer(tmp_path, answers):
    for step in (10, 20):
        token_file.write(token_file.path_of(tmp_path, step), answers, viewed.WORDS.__getitem__)
    table = pandas.read_parquet(tmp_path / "tokens")
    assert len(table) == 6
    assert table["prompt"].tolist()[:3] == [answer.row["prompt"] for answer in answers]
    assert table["reward"].isna().tolist() == [True, False, True] * 2
    first = table.iloc[0]
    assert first["token"].tolist() == [viewed.WORDS[i] for i in answers[0].token_ids]
    learnt = first["learnt"]
    assert learnt.tolist() == answers[0].learnt
    np.testing.assert_allclose(first["kl"][learnt], answers[0].columns["kl"], rtol=1e-6)
    assert np.isnan(first["kl"][~learnt]).all()
    top = first["top_token/big"]
    assert [len(x) for x in top] == [3, *[5] * 9, 0, 5]
    assert top[1].tolist() == [viewed.WORDS[int(i)] for i in answers[0].columns["top_id/big"][1]]
    by_token = table.explode(["token", "kl", "logp", "logp/big"])
    assert len(by_token) == 2 * (12 + 5 + 12)


def test_steps_without_rewards_and_with_them_are_one_table(tmp_path):
    for step, reward in ((1, None), (2, 1.0)):
        answer = viewed.scored(0, step, reward=reward)
        token_file.write(token_file.path_of(tmp_path, step), [answer], viewed.WORDS.__getitem__)
    assert pandas.read_parquet(tmp_path / "tokens")["reward"].tolist()[1] == 1.0


def test_what_view_reads(tmp_path, answers):
    path = token_file.path_of(tmp_path, 10)
    token_file.write(path, answers, viewed.WORDS.__getitem__)
    table = token_file.read(path)
    assert table.rows == [dict(answer.row) for answer in answers]
    assert table.counts.tolist() == [12, 5, 12]
    assert table.texts == [viewed.WORDS[i] for answer in answers for i in answer.token_ids]
    assert np.isnan(table.numbers["kl"]).sum() == 3
    assert np.isnan(table.numbers["advantage"]).all()
    assert table.lists["top_logp"].counts.sum() == len(table.lists["top_token"].values)


def test_files_of_older_versions_have_plain_answers(tmp_path, answers):
    from pyarrow import parquet

    path = token_file.path_of(tmp_path, 10)
    token_file.write(path, answers, viewed.WORDS.__getitem__)
    parquet.write_table(parquet.read_table(path).drop_columns(["turns", "calls", "ended"]), path)
    assert token_file.read(path).rows == [dict(answer.row) for answer in answers]


def test_a_resume_leaves_one_version(tmp_path, answers):
    for step in (5, 10, 15):
        token_file.write(token_file.path_of(tmp_path, step), answers, viewed.WORDS.__getitem__)
    (tmp_path / "tokens/step_00000015_mine.parquet").touch()  # somebody's own
    token_file.rewind(tmp_path, 10)
    assert list(token_file.files(tmp_path)) == [5, 10]
    token_file.write(token_file.path_of(tmp_path, 10), answers[:1], viewed.WORDS.__getitem__)
    assert len(token_file.read(token_file.path_of(tmp_path, 10)).rows) == 1
    assert (tmp_path / "tokens/step_00000015_mine.parquet").is_file()
    token_file.rewind(tmp_path, -1)
    assert token_file.files(tmp_path) == {}


@pytest.mark.parametrize("damage", [b"", b"PAR1 and nothing", None])
def test_a_damaged_file_is_named(tmp_path, answers, damage):
    path = token_file.path_of(tmp_path, 10)
    token_file.write(path, answers, viewed.WORDS.__getitem__)
    if damage is None:  # a table of something else
        pandas.DataFrame({"x": [1]}).to_parquet(path)
    else:
        path.write_bytes(damage)
    with pytest.raises(
        ValueError, match=r"step_00000010\.parquet cannot be read as scores of tokens: .*; move it away"
    ):
        token_file.read(path)
