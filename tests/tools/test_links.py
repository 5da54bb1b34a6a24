"""tools/check_links.py on made-up pages; this checkout's own are checked by `make lint`, and here."""

import sys

import pytest
from program import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import check_links

PAGE = """\
# A page: `code`, *style* & signs

## Twice

## Twice

Text <a id="set-by-hand"></a>

| table | |
|---|---|
| [inside](docs/other.md) | `docs/other.md` |
"""


@pytest.fixture
def found(tmp_path, capsys):
    """The lines about README.md when it ends with a text."""

    def check(text):
        (tmp_path / "README.md").write_text(PAGE + text)
        code, lines = check_links.main(["--root", str(tmp_path)]), capsys.readouterr().err.splitlines()
        assert code == bool(lines)
        return lines

    for name in ("docs/other.md", "docs/plot.png", "megatron_opd/rollout/ahead.py", "tools/with space.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# Other\n")
    (tmp_path / "megatron_opd/__init__.py").write_text('__all__ = ["train"]\n')
    (tmp_path / "Makefile").write_text(".PHONY: test\ntest: install ## all\n\tpytest\n")
    return check


@pytest.mark.parametrize(
    "text",
    [
        "[page](docs/other.md), [part](docs/other.md#other), ![plot](docs/plot.png), [folder](docs/)",
        "[here](#twice) [second](#twice-1) [title](#a-page-code-style--signs) [set](#set-by-hand)",
        "[space](tools/with%20space.py) [site](https://example.org/a?b#c) <https://example.org>",
        "[reference]\n\n[reference]: docs/other.md",
        "`rollout/ahead.py`, `ahead.py`, `make test`, `megatron_opd.rollout.ahead`, `python docs/other.md`, `docs/`",
        "`<run.dir>/a.py`, `examples/NAME.sh`, `docs/*.md`, `examples/{a,b}.md`, `make PYTHON=x test`, `make` it",
        "no code: docs/gone.md, make gone; `rollout/length`, `config.json`, `mine.yaml`, `and/or`",
        "    docs/other.md\n\n```\nmake test\n```",
        "\n```\ncat > mine.py <<END\nEND\npython mine.py\n```\n`mine.py`, `megatron_opd.train(x)`",
    ],
)
def test_what_is_fine(found, text):
    assert found(text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[x](docs/gone.md)", "12: docs/gone.md points to no file of this checkout"),
        ("[x](../outside.md)", "12: ../outside.md points to no file of this checkout"),
        ("some\n![x](gone.png)", "13: gone.png points to no file of this checkout"),
        ("[x](docs/other.md#gone)", "12: docs/other.md#gone points to no heading of docs/other.md"),
        ("[x](#Twice)", "12: #Twice points to no heading of README.md"),
        ("[x](docs/plot.png#other)", "12: docs/plot.png#other points to no heading of docs/plot.png"),
        ("[x](https://nowhere)", "12: https://nowhere is not the address of a page"),
        ("[x](htps://example.org)", "12: htps://example.org is not the address of a page"),
        ("\n[x]\n\n[x]: gone.md", "13: gone.md points to no file of this checkout"),
        ("`rollout/behind.py`", "12: there is no file rollout/behind.py"),
        ("`head.py`", "12: there is no file head.py"),
        ("`docs/gone/`", "12: there is no file docs/gone"),
        ("`megatron_opd.trains`", "12: megatron_opd.trains names no module of the package"),
        ("`megatron_opd.gone.x`", "12: megatron_opd.gone.x names no module of the package"),
        ("\n```\npython tools/gone.py\n```", "14: there is no file tools/gone.py"),
        ("\n    ls\n    make gone", "14: the Makefile has no target gone"),
    ],
)
def test_what_is_not(found, text, problem):
    assert found(text) == [f"README.md:{problem}"]


def test_the_changelog_may_name_files_that_are_gone(found, tmp_path):
    (tmp_path / "CHANGELOG.md").write_text("`gone.py`")
    assert found("") == []
    (tmp_path / "CHANGELOG.md").write_text("[x](gone.py)")
    assert found("") == ["CHANGELOG.md:1: gone.py points to no file of this checkout"]


def test_pages_can_be_named(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("[x](gone.md)")
    assert check_links.main(["--root", str(tmp_path), str(page)]) == 1
    assert capsys.readouterr().err == "page.md:1: gone.md points to no file of this checkout\n"


def test_this_checkout(capsys):
    assert check_links.main([]) == 0, capsys.readouterr().err
