"""The programs that an answer may mean: its blocks of code, or its text, alone or as the rest of the prompt's function.

An answer counts by what it defines, however it is written. A reading is a list of cells that run one after the other
in one namespace, as in a notebook. Readings are tried in order, and the first that defines the function is the one; the
choice never looks at the tests. Code of the answer is only parsed here.
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass

_FENCE = re.compile(r"([ \t>]*)(?:(?:[-*+]|\d+[.)])[ \t]+)?(`{3,}|~{3,})[ \t]*([^`]*?)[ \t]*")
_ON_ONE_LINE = re.compile(r"[ \t]*```(?:python3?|py)?[ \t]+(\S.*?)[ \t]*```[ \t]*")
_CODE_BEGINS = re.compile(
    r"[ \t]*(?:(?:async )?def |class |import |from \S+ import|@\w|[A-Za-z_]\w*[ \t]*(?::[^=]+)?=[^=])"
)
_PYTHON = ("", "py", "python", "python2", "python3", "ipython", "sage")
_MAX_PARSES, _MAX_IN_VAIN, _MAX_CHARACTERS = 300, 100, 400_000


@dataclass(slots=True)
class _Block:
    """Lines between two fences."""

    language: str
    lines: list[str]


def readings(prompt: str, answer: str, entry_point: str | None) -> list[list[str]]:
    """The programs that the answer may mean, best first; each a list of cells."""
    answer = answer.replace("\r\n", "\n")
    if len(prompt) + len(answer) > _MAX_CHARACTERS:
        return []
    given = python_of(prompt)
    blocks, outside = _split(answer)
    sources = [[outside], ["\n".join(line for line in answer.split("\n") if not _FENCE.fullmatch(line))]]
    if blocks:
        sources.insert(0, blocks)
    found: list[list[str]] = []
    for texts in sources:
        whole, rest = _as_program(texts, given, entry_point), _as_completion(texts, given, entry_point)
        begins_inside = texts[0].lstrip("\n")[:1] in (" ", "\t")
        for reading in [rest, whole] if begins_inside else [whole, rest]:
            if reading and reading not in found:
                found.append(reading)
    return found


def python_of(prompt: str) -> str:
    """The Python of a prompt: its blocks of code, where it has some, or all of it."""
    blocks, _ = _split(prompt.replace("\r\n", "\n"))
    return "\n".join(blocks) if blocks else prompt


def preamble(given: str) -> str:
    """What runs of a prompt's Python: imports, helpers, and the function without its body where that is valid."""
    if parsed(given) is not None:
        return given
    return _longest_prefix(given.split("\n")) or ""


def parsed(source: str) -> ast.Module | None:
    """The syntax tree, or None where the source is no Python."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _split(text: str) -> tuple[list[str], str]:
    """(the Python blocks, the text outside of all blocks). A block that is not closed goes on to the end."""
    blocks: list[_Block] = []
    outside: list[str] = []
    fence, indent = "", 0
    for line in text.split("\n"):
        mark = _FENCE.fullmatch(line)
        one_line = _ON_ONE_LINE.fullmatch(line)
        if mark and fence and mark[2].startswith(fence):
            if mark[3]:  # the fence before was a stray one: this opens a block
                outside += blocks.pop().lines
                fence, indent = mark[2], len(mark[1])
                blocks.append(_Block(_language(mark[3]), []))
            else:
                fence = ""
        elif fence:
            blocks[-1].lines.append(line[min(indent, len(line) - len(line.lstrip(" \t>"))) :])
        elif mark:
            fence, indent = mark[2], len(mark[1])
            blocks.append(_Block(_language(mark[3]), []))
        elif one_line:
            blocks.append(_Block("", [one_line[1]]))
        else:
            outside.append(line)
    python = [block for block in blocks if block.language in _PYTHON] or blocks
    return ["\n".join(block.lines) for block in python], "\n".join(outside)


def _language(info: str) -> str:
    words = re.split(r"[\s{}.,:=]+", info.lower().strip("{}. "))
    return words[0] if words else ""


def _as_program(texts: list[str], given: str, entry_point: str | None) -> list[str] | None:
    """The texts' own code behind the prompt's, where it defines the function."""
    name = entry_point or _open_function(given)
    cells = [cell for text in texts for cell in _code_in(text)]
    trees = [tree for cell in cells if (tree := parsed(cell))]
    defined = {found for tree in trees for node in tree.body for found in _defined(node) if not _is_stub(node)}
    if not defined or (name is not None and name not in defined):
        return None
    cells = [_without(cell, [node for node in ast.parse(cell).body if _is_stub(node)]) for cell in cells]
    before = preamble(given)
    return [before, *cells] if before.strip() else cells


def _as_completion(texts: list[str], given: str, entry_point: str | None) -> list[str] | None:
    """The prompt's Python continued by the texts, where they are the body of its last function."""
    name = entry_point or _open_function(given)
    if name is None or f"def {name}" not in given:
        return None
    least = len(given.rstrip().split("\n")) + 1
    for text in texts:
        kept = [_longest_prefix(one.split("\n"), at_least=least) for one in _continuations(given, text)]
        # Prose may pass for a line of Python, so the way to indent that makes sense of the most lines is the right one.
        for source in sorted(filter(None, kept), key=lambda one: -len(one.split("\n"))):
            tree = parsed(source)
            of_name = [node for node in tree.body if name in _defined(node)] if tree else []
            whole = [node for node in of_name if not _is_stub(node)]
            if whole:  # a model that goes on may define the function once more; the first is the answer
                return [_without(source, [node for node in of_name if node is not whole[0]])]
    return None


def _continuations(given: str, text: str) -> list[str]:
    """The prompt's Python with the text behind it: as it is, and indented as a body must be."""
    text = text.rstrip()
    closed = given.rstrip() + "\n"
    body = text.strip("\n")
    first = body[: len(body) - len(body.lstrip())]
    deeper = textwrap.indent(textwrap.dedent(body), "    ")
    tries = [given + text, closed + body, closed + deeper]
    return tries if first else [*tries, f"{closed}    {body}"]


def _open_function(given: str) -> str | None:
    """The prompt's last function, where it has no body yet."""
    tree = parsed(given) or parsed(given.rstrip() + "\n    pass\n")
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)] if tree else []
    return functions[-1].name if functions and _is_stub(functions[-1]) else None


def _code_in(text: str) -> list[str]:
    """The Python of a text that may have prose before, between and behind it."""
    text = textwrap.dedent(text)
    if parsed(text) is not None:
        return [text]
    lines, found, at, in_vain = text.split("\n"), [], 0, 0
    while at < len(lines) and in_vain < _MAX_IN_VAIN:
        if _CODE_BEGINS.match(lines[at]):
            margin = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
            kept = _longest_prefix([line.removeprefix(margin) for line in lines[at:]])
            if kept:
                found.append(kept)
                at += kept.count("\n") + 1
                continue
            in_vain += 1
        at += 1
    return found


def _longest_prefix(lines: list[str], *, at_least: int = 1) -> str | None:
    """The most lines from the first on that are Python together; None where fewer than `at_least` are."""
    count = len(lines)
    for _ in range(_MAX_PARSES):
        if count < at_least:
            return None
        source = "\n".join(lines[:count])
        try:
            ast.parse(source)
        except SyntaxError as error:
            count = min(count - 1, (error.lineno or count) - 1)
        except (ValueError, MemoryError, RecursionError):
            return None
        else:
            return source
    return None


def _defined(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)} | {
        name for inner in getattr(node, "body", []) if isinstance(inner, ast.stmt) for name in _defined(inner)
    }


def _is_stub(node: ast.stmt) -> bool:
    """True for a function without a body: a docstring, `pass`, `...`, or an error that says that it is missing."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return all(
        isinstance(inner, ast.Pass | ast.Import | ast.ImportFrom)
        or (isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant))
        or (isinstance(inner, ast.Raise) and "NotImplemented" in ast.dump(inner))
        or (isinstance(inner, ast.FunctionDef) and inner.name == node.name)
        for inner in node.body
    )


def _without(source: str, nodes: list[ast.stmt]) -> str:
    """The source with the lines of these statements left empty."""
    lines = source.split("\n")
    for node in nodes:
        decorators = getattr(node, "decorator_list", [])
        begin = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        lines[begin - 1 : node.end_lineno] = [""] * ((node.end_lineno or begin) - begin + 1)
    return "\n".join(lines)
