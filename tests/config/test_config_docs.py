"""docs/config.md is what the source says."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Literal

import pytest

from megatron_opd import config as cfg
from megatron_opd.config.section import section

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("config_docs", ROOT / "tools" / "config_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@section
class Inner:
    """One."""

    x: Literal["a", "b"]
    """Which <one> | `<two>`."""
    on: bool = True
    """Whether."""
    lr: float = 1e-05
    """Rate."""
    by: dict[str, float] = dataclasses.field(default_factory=dict)
    """Each."""


@section
class Outer:
    """All."""

    parts: list[Inner]
    """Parts."""


@section
class Undocumented:
    """All."""

    a: int
    """Fine."""
    b: int = 1
    c: int = 2
    """Fine."""


@section
class AroundUndocumented:
    """All."""

    part: Undocumented
    """Part."""


def section_classes(cls):
    """All section classes below `cls`."""
    for field in dataclasses.fields(cls):
        kind = getattr(cfg, field.type.removeprefix("list[").removesuffix("]"), None)
        if dataclasses.is_dataclass(kind):
            yield kind
            yield from section_classes(kind)


def test_the_page_is_current(tool):
    assert tool.main(["--check"]) == 0, "run: python tools/config_docs.py"


def test_every_setting_is_on_the_page(tool):
    page = tool.render(cfg.Config)
    rows = page.count("\n| `")
    expected = {"method"} | {f.name for cls in section_classes(cfg.Config) for f in dataclasses.fields(cls)}
    assert [name for name in expected if f"\n| `{name}` |" not in page] == []
    assert rows == 1 + sum(len(dataclasses.fields(cls)) for cls in set(section_classes(cfg.Config)))


def test_rows_show_type_default_and_meaning(tool):
    page = tool.render(Outer)
    assert "## `parts.N`\n\nOne.\n" in page
    assert [line for line in page.splitlines() if line.startswith("| `")] == [
        "| `x` | `a` \\| `b` | required | Which &lt;one> \\| `<two>`. |",
        "| `on` | `true` \\| `false` | `true` | Whether. |",
        "| `lr` | number | `1e-5` | Rate. |",
        "| `by` | mapping of name to number | `{}` | Each. |",
    ]


def test_check_fails_on_a_stale_or_missing_page_and_writes_nothing(tool, tmp_path, capsys):
    page = tmp_path / "docs" / "config.md"
    assert tool.main(["--check", "--out", str(page)]) == 1
    assert not page.exists()
    assert tool.main(["--out", str(page)]) == 0
    assert tool.main(["--check", "--out", str(page)]) == 0
    page.write_text(page.read_text().replace("required", "optional", 1))
    assert tool.main(["--check", "--out", str(page)]) == 1
    assert "python tools/config_docs.py" in capsys.readouterr().err


def test_a_setting_without_a_line_of_documentation_is_an_error(tool):
    with pytest.raises(SystemExit, match=r"Undocumented\.b has no line of documentation"):
        tool.render(AroundUndocumented)
