"""`megatron-opd example`: which files an example needs, and that nothing of the user's is replaced."""

import pytest

from megatron_opd.__main__ import main
from megatron_opd.config import examples


def test_all_have_a_name_and_a_line(capsys):
    assert main(["example"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == examples.names()
    assert all(len(line) <= 120 and len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", examples.names())
def test_what_its_config_names_comes_with_it(name):
    """Every place below examples/ that its text names, a comment's too."""
    files = [f"examples/{path}" for path in examples.files(name)]
    assert f"examples/{name}.yaml" in files
    text = (examples.folder() / f"{name}.yaml").read_text()
    for place in {word.strip(",}{()[]'\"`") for word in text.split() if "examples/" in word}:
        assert any(file == place or file.startswith(f"{place}/") for file in files), place


def test_data_of_others_comes_with_its_licence():
    files = {str(path) for path in examples.files("llm/quickstart")}
    assert {"llm/data/LICENSE.gsm8k", "llm/data/LICENSE.instructions", "llm/data/README.md"} <= files


def test_nothing_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "examples/grpo.yaml"
    mine.parent.mkdir()
    mine.write_text("mine: true\n")
    assert main(["example", "grpo"]) == 0
    assert "; 1 were there and stay as they are" in capsys.readouterr().out
    assert mine.read_text() == "mine: true\n"
    assert (tmp_path / "examples/quickstart/models/student/model.safetensors").is_file()
    mine.unlink()
    assert main(["example", "examples/grpo.yaml"]) == 0  # as `example` itself prints it
    assert mine.read_bytes() == (examples.folder() / "grpo.yaml").read_bytes()


def test_an_example_that_there_is_not(capsys):
    assert main(["example", "nothing"]) == 1
    assert "error: there is no example 'nothing'; there are " in capsys.readouterr().err
