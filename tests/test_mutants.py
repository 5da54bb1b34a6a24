"""The list of mutants: every text is still where it was, and the tests that are to notice it exist."""

import ast
from functools import cache

import pytest
from mutants import ROOT, Mutant, read

MUTANTS = read()


@cache
def functions(file):
    """The tests of a file, by name."""
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}


@cache
def source(file):
    return (ROOT / "megatron_opd" / file).read_text()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_current(mutant):
    text = source(mutant.file)
    assert text.count(mutant.old) == 1, f"change `old` in tests/mutants.toml to what megatron_opd/{mutant.file} has now"
    assert mutant.new != mutant.old
    ast.parse(text.replace(mutant.old, mutant.new))
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert not name or name.partition("[")[0] in functions(file), test


def test_names_are_used_once_and_begin_with_a_room():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
    assert all(name.count("/") == 1 for name in names)


def test_a_text_that_is_not_there_once_is_stale(tmp_path):
    mutant = Mutant("core/x", "x.py", "a = 1", "a = 2", ("tests/x.py",))
    (tmp_path / "megatron_opd").mkdir()
    file = tmp_path / "megatron_opd/x.py"
    for text in ("a = 1\na = 1\n", "b = 1\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"not once"):
            mutant.apply(tmp_path)
        assert file.read_text() == text
    file.write_text("a = 1\n")
    mutant.apply(tmp_path)
    assert file.read_text() == "a = 2\n"
