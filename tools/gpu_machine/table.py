"""The table, a line at a time: what is measured is on the screen and on disk before the next check begins."""

from __future__ import annotations

import datetime
from pathlib import Path

from gpu_machine.figures import cell

_HEAD = "| check | what | result | figure | seconds |\n|---|---|---|---|---:|\n"


class Table:
    """A Markdown table on stdout and in a file, which later calls go on with."""

    def __init__(self, page: Path) -> None:
        self.page = page
        page.parent.mkdir(parents=True, exist_ok=True)
        is_new = not page.is_file() or not page.stat().st_size
        print(_HEAD, end="", flush=True)
        if is_new:
            self._append(f"{datetime.date.today().isoformat()}\n\n{_HEAD}")

    def add(self, name: str, what: str, *, result: str, figure: str = "", seconds: float = 0.0) -> None:
        """One line."""
        line = f"| {name} | {cell(what)} | {cell(result)} | {cell(figure)} | {seconds:.0f} |\n"
        print(line, end="", flush=True)
        self._append(line)

    def _append(self, text: str) -> None:
        with self.page.open("a") as file:
            file.write(text)
