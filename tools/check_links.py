#!/usr/bin/env python3
"""Check what the Markdown files point at: links, #anchors, paths in code, and targets of make.

    python tools/check_links.py                  # every page of this checkout; part of `make lint`
    python tools/check_links.py docs/design.md   # these pages alone

It works offline:

- A link to a file must lead to a file of the checkout, and its #anchor to a heading there, spelt as GitHub does.
- The address of another site must look like an address. Nothing is fetched.
- Within code, inline or in a block, a path to a source file must be the end of the path of a file, as
  `rollout/ahead.py` is, unless the page makes it (`cat > NAME`); `make NAME` must name a target of the Makefile, and
  `megatron_opd.NAME` a module or a public name. Paths with placeholders (<run.dir>, NAME, *) are skipped, and so is
  the changelog, which names files that are gone.

Prints a line for each problem and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

HERE = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CHANGELOG.md", "docs/**/*.md", "examples/**/*.md", "megatron_opd/**/*.md"]
HISTORY = "CHANGELOG.md"
SOURCES = ["docs", "examples", "megatron_opd", "slurm", "tests", "tools"]
_PATH = re.compile(r"(?<![\w./<>*{}$-])[\w-][\w.-]*(?:/[\w.-]+)*/?(?![\w/<>*{}])")
_MODULE = re.compile(r"(?<![\w.])megatron_opd\.[\w.]*\w")
_SOURCE = re.compile(r"\.(py|sh|cpp|h|md)$")
_MADE = re.compile(r"^cat > (\S+)", re.MULTILINE)
_MAKE = re.compile(r"(?<![\w-])make ((?!\w+=)[a-z][a-z-]*)")
_PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|…|\.\.\.")
_HTML_ANCHOR = re.compile(r"""\b(?:id|name)=["']([^"']+)["']""")


class Checkout:
    """The files that pages may point at. `root` is its folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._anchors: dict[Path, set[str]] = {}

    def pages(self) -> list[Path]:
        return sorted({path for pattern in PAGES for path in self.root.glob(pattern)})

    @cached_property
    def tails(self) -> set[str]:
        """Every path of a source file and folder, and every end of one."""
        top = [path for path in self.root.iterdir() if path.is_file()]
        below = [path for name in SOURCES for path in [self.root / name, *(self.root / name).rglob("*")]]
        parts = [path.relative_to(self.root).parts for path in [*top, *below]]
        return {"/".join(path[start:]) for path in parts for start in range(len(path))}

    @cached_property
    def targets(self) -> set[str]:
        makefile = self.root / "Makefile"
        text = makefile.read_text(encoding="utf-8") if makefile.is_file() else ""
        return set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))

    @cached_property
    def public(self) -> set[str]:
        """The names that the package itself has, as its `__all__` lists them."""
        package = self.root / "megatron_opd/__init__.py"
        tree = ast.parse(package.read_text(encoding="utf-8") if package.is_file() else "")
        lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        return {name for found in lists for name in ast.literal_eval(found)}

    def anchors(self, page: Path) -> set[str]:
        """What links to the page may have behind their #."""
        if page not in self._anchors:
            self._anchors[page] = set(anchors(page.read_text(encoding="utf-8")))
        return self._anchors[page]


def anchors(text: str) -> Iterator[str]:
    """The anchors that GitHub gives to the headings of a page, and those that the page sets itself in HTML."""
    seen: Counter[str] = Counter()
    tokens = _parsed(text)
    for token, after in pairwise(tokens):
        if token.type == "heading_open":
            shown = "".join(part.content for part in after.children or [] if part.type in ("text", "code_inline"))
            anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            yield f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor
            seen[anchor] += 1
    for token, _ in _flat(tokens):
        if token.type in ("html_block", "html_inline"):
            yield from _HTML_ANCHOR.findall(token.content)


def problems(page: Path, checkout: Checkout) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) on the page."""
    text = page.read_text(encoding="utf-8")
    made = {*_MADE.findall(text)}
    for token, line in _flat(_parsed(text)):
        target = token.attrGet("href") or token.attrGet("src")
        if target is not None and (wrong := _wrong_link(str(target), page, checkout)):
            yield line, wrong
        if token.type in ("code_inline", "code_block", "fence") and page.name != HISTORY:
            for offset, code in enumerate(token.content.splitlines()):
                at = line + offset + (token.type == "fence")
                yield from ((at, wrong) for wrong in _wrong_code(code, checkout, made))


def _parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def _flat(tokens: list[Token]) -> Iterator[tuple[Token, int]]:
    """All tokens, also those within lines, with the line where their block begins."""
    line = 1
    for token in tokens:
        line = token.map[0] + 1 if token.map else line
        yield token, line
        at = line
        for child in token.children or []:
            at += child.type in ("softbreak", "hardbreak")
            yield child, at


def _wrong_link(target: str, page: Path, checkout: Checkout) -> str:
    address = urlsplit(target)
    if address.scheme or address.netloc:
        fine = address.scheme in ("http", "https") and "." in address.netloc
        return "" if fine else f"{target} is not the address of a page"
    to = (page.parent / unquote(address.path)).resolve() if address.path else page
    if not to.is_relative_to(checkout.root) or not to.exists():
        return f"{target} points to no file of this checkout"
    if address.fragment and (to.suffix != ".md" or unquote(address.fragment) not in checkout.anchors(to)):
        return f"{target} points to no heading of {to.relative_to(checkout.root)}"
    return ""


def _wrong_code(text: str, checkout: Checkout, made: set[str]) -> Iterator[str]:
    """The fault of a line of code on a page that tells its reader to make the files `made`."""
    for found in _PATH.finditer(text):
        path = found[0].rstrip("./")
        is_source = _SOURCE.search(path) or path.startswith(tuple(f"{folder}/" for folder in SOURCES))
        if is_source and not _PLACEHOLDER.search(path) and path not in checkout.tails | made:
            yield f"there is no file {path}"
    for found in _MODULE.finditer(text):
        module = "/".join(found[0].split(".")[:2])
        if found[0].split(".")[1] not in checkout.public and not checkout.tails & {module, f"{module}.py"}:
            yield f"{found[0]} names no module of the package"
    for name in _MAKE.findall(text):
        if name not in checkout.targets:
            yield f"the Makefile has no target {name}"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="a Markdown file (default: all)")
    parser.add_argument("--root", type=Path, default=HERE, help="the checkout (default: this one)")
    arguments = parser.parse_args(argv)
    checkout = Checkout(arguments.root.resolve())
    count = 0
    for page in [path.resolve() for path in arguments.pages] or checkout.pages():
        for line, wrong in problems(page, checkout):
            count += 1
            print(f"{page.relative_to(checkout.root)}:{line}: {wrong}", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
