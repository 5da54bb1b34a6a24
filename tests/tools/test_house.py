"""tools/house.py on a small made-up package, and the goals that this one has reached."""

import json
import sys

import pytest
from program import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import house
from house_figures import figures, source

REACHED = ["rooms", "floors", "upward", "loose", "shared_names"]
SIZES = ["function_lines_p90", "function_lines_max", "file_lines_max", "parameters_max"]
FILES = {
    "megatron_opd/__init__.py": "",
    "megatron_opd/__main__.py": """
        from megatron_opd.loop.run import train

        def main(argv):
            train(argv)
            return 0
        """,
    "megatron_opd/stray.py": "class Batch:\n    pass\n",
    "megatron_opd/config/__init__.py": "class Config:\n    pass\n",
    "megatron_opd/config/answers.py": "",
    "megatron_opd/data/__init__.py": "",
    "megatron_opd/data/answers.py": """
        from megatron_opd.config import Config

        def read(config: Config, self, *, where=None):
            def inner(config: "Config | None"):
                import megatron_opd.loop.run
                return megatron_opd

            return [inner]

        def unused(config: list[Config]): pass
        """,
    "megatron_opd/data/batch.py": "class Batch:\n    pass\n\nclass _Batch:\n    pass\n",
    "megatron_opd/loop/__init__.py": "",
    "megatron_opd/loop/run.py": """
        import torch
        from megatron_opd.data import answers
        from .part import loss

        def train(argv):
            setup()
            for _ in range(2):
                _step()

        def setup():
            return [lambda: 1]

        def _step():
            answers.read(None, None)
            loss()
            torch.autograd.backward()
            after()

        def after():
            pass
        """,
    "megatron_opd/loop/part.py": "import functools\n\n@functools.cache\ndef loss():\n    return 1\n",
    "torch/__init__.py": "import torch.autograd\n",
    "torch/autograd/__init__.py": "def backward():\n    pass\n",
    "tools/tool.py": "from megatron_opd import config\n",
    "tests/program.py": 'CONFIG = "c.yaml"\nSMALL = ["a=1"]\nALONE = {"RANK": "0"}\n',
    "tests/test_architecture.py": 'ROOMS = {"config": "settings", "data": "prompts", "loop": "steps"}\n',
    "tests/extensions/test_metric.py": 'TOUCHES = ["loop/run.py", "data/answers.py"]\n',
    "tests/extensions/test_term.py": '"""A term.\n\n    loop/term.py    the term\n    loop/run.py\n"""\n',
    "tests/extensions/test_other.py": "",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix("        ") for line in text.strip("\n").split("\n")) + "\n")
    return tmp_path


def test_figures_of_the_source(root):
    found = house.counted(root)
    assert found["rooms"] == ["__main__", "config", "data", "loop", "stray", "tools"]
    assert found["floors"] == ["__main__", "data = loop", "config"]
    assert found["upward"] == ["megatron_opd/data/answers.py:5 data -> loop"]
    assert found["loose"] == ["stray"]
    assert found["config"] == ["data/answers.py:3 read", "data/answers.py:4 inner"]
    assert found["shared_names"] == {"Batch": ["data/batch.py", "stray.py"]}
    assert (found["function_lines_max"], found["parameters_max"]) == (6, 2)
    assert found["file_lines_max"] == 21
    assert found["touched_metric"] == ["loop/run.py", "data/answers.py"]
    assert found["touched_term"] == ["loop/term.py", "loop/run.py"]
    assert "touched_other" not in found


def test_modules_share_names_but_for_sections(root):
    (root / "megatron_opd/loop/answers.py").touch()
    assert figures.shared_names(source.read(root))["answers"] == ["data/answers.py", "loop/answers.py"]


def test_a_chain_counts_a_circle_as_one_floor():
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"b", "d"}, "d": set(), "e": {"d"}}
    assert figures.longest_chain(edges) == ["a", "b = c", "d"]
    assert figures.longest_chain({}) == []


def test_lines_to_the_first_gradient(root):
    found = house.read_step(root)
    # main, train and _step, read with its inner function, loss with its decorator; _step ends after backward began.
    assert found["way_files"] == {"loop/run.py": 9, "data/answers.py": 6, "__main__.py": 3, "loop/part.py": 3}
    assert found["way_lines"] == 21
    assert found["way_functions"]["loop/part.py: loss"] == 3
    assert found["everything_files"]["loop/run.py"] == 11
    assert found["everything_lines"] == 23


def test_a_failed_step_is_an_error(root, capsys):
    (root / "megatron_opd/loop/part.py").write_text("def loss():\n    raise ValueError('no loss')\n")
    assert house.main(["--root", str(root), "--reading"]) == 1
    assert "no loss" in capsys.readouterr().err


def test_the_command_line(root, capsys):
    assert house.main(["--root", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["floors"] == 3
    assert house.main(["--root", str(root), "--details", "loose"]) == 0
    assert capsys.readouterr().out == "stray\n"
    assert house.main(["--root", str(root)]) == 0
    assert "touched metric" in capsys.readouterr().out
    assert house.main(["--root", str(root), "--details", "lose"]) == 1
    assert "figures: rooms, floors" in capsys.readouterr().err
    assert house.main(["--root", str(root / "tests")]) == 1
    assert "--root" in capsys.readouterr().err


def test_without_an_order_of_rooms(root):
    (root / "tests/test_architecture.py").unlink()
    assert house.size(house.counted(root)["upward"]) is None


@pytest.fixture(scope="module")
def found():
    return house.counted(ROOT)


@pytest.mark.parametrize("figure", [*REACHED, *SIZES])
def test_what_is_reached_stays(figure, found):
    assert house.size(found[figure]) <= house.GOALS[figure], "\n".join(house.details(found[figure]))
