"""Writes what works on what into README.md, from a run of tests/test_servers.py:

    python -m tests.table              or: make table

The run must be whole: a server that is missing, or a test that fails, leaves README.md as it is.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers import SERVERS

__all__ = ["WORKS", "column_of", "marks_in", "row_of"]

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- the table of servers: made by `make table` -->", "<!-- end of the table of servers -->"
WORKS, PARTLY, NOT_NATIVELY = "yes", "partly", "no"

# The columns, and words in the names of the tests behind them. What has none of those words belongs to the first.
COLUMNS = {
    "Requests, responses": "",
    "Keeps connections": "same_connection",
    "Chunked upload": "chunked",
    "Aborts a broken response": "mid_response",
    "Streams out": "first_event",
    "Streams in": "mid_upload refusal",
    "Notices who left": "its_client_leaves does_not_send",
    "In parallel": "20_slow",
    "Prefix": "prefix_is",
    "Lifespan, SIGTERM": "lifespan",
    "Files by path": "by_its_path",
    "Early hints": "early_hint",
    "Trailers": "trailer",
}
FRAMEWORKS = {"cherrypy": "CherryPy", "fastapi": "FastAPI"}
SKIPPED_WORDS = re.compile(r"_(?:wsgi|asgi)$")


class Table:
    """A pytest plugin that collects how each test of a cell went."""

    def __init__(self) -> None:
        self.apps: dict[str, set[str]] = {}
        self.kinds: dict[str, str] = {}
        self.outcomes: dict[tuple[str, str], set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: list[tuple[str, Any]] = report.user_properties
        cells = [value for name, value in properties if name == "cell"]
        if report.when != "call" or not cells or not report.passed:
            return
        ((app, wrapper, server),) = cells
        row = row_of(server)
        if not app.startswith("bare_"):
            self.apps.setdefault(row, set()).add(framework(app))
        self.kinds[row] = wrapper
        limited = any(name == "limit" for name, _ in properties)
        self.outcomes.setdefault((row, column_of(report.nodeid)), set()).add(NOT_NATIVELY if limited else WORKS)

    def lines(self) -> Iterable[str]:
        for wrapper, title in ("WsgiToAsgi", "WSGI apps on ASGI servers"), ("AsgiToWsgi", "ASGI apps on WSGI servers"):
            yield f"**{title}, by `{wrapper}`**"
            yield ""
            yield "| " + " | ".join(["Server", "driven with", *COLUMNS]) + " |"
            yield "|---" * (len(COLUMNS) + 2) + "|"
            for row in (row for row in SERVERS if self.kinds.get(row) == wrapper):
                marks = [self._mark(row, column) for column in COLUMNS]
                yield "| " + " | ".join([named(row), ", ".join(sorted(self.apps.get(row, ()))), *marks]) + " |"
            yield ""

    def _mark(self, row: str, column: str) -> str:
        marks = self.outcomes.get((row, column), set())
        return PARTLY if len(marks) > 1 else next(iter(marks), "")


def row_of(server: str) -> str:
    """One with more workers belongs to the first of its kind."""
    kind = re.sub(r"-2-(?:workers|processes)$", "", server)
    return server if kind == server else next(name for name in SERVERS if name.startswith(kind))


def marks_in(text: str) -> dict[tuple[str, str], str]:
    """What the tables tell, by row and column."""
    marks = {}
    for line in text.partition(BEGIN)[2].partition(END)[0].splitlines():
        server, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if (row := server.partition(" ")[0]) in SERVERS:
            marks.update({(row, column): mark for column, mark in zip(COLUMNS, cells[1:], strict=True)})
    return marks


def framework(app: str) -> str:
    name = SKIPPED_WORDS.sub("", app)
    return FRAMEWORKS.get(name, name.capitalize())


def column_of(test: str) -> str:
    name = test.partition("::")[2].partition("[")[0].removeprefix("test_")
    for column, words in COLUMNS.items():
        if any(word in name for word in words.split()):
            return column
    return next(iter(COLUMNS))


def named(server: str) -> str:
    """With the version, where it is a package's."""
    package = SERVERS[server].needs.split()[0].removesuffix("-express")
    try:
        return f"{server} ({package} {version(package)})"
    except PackageNotFoundError:
        return server


def write(lines: Iterable[str], path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no place for the table: {BEGIN} and {END}")
    path.write_text("".join([before, begin, "\n", "\n".join(lines), end, after]), encoding="utf-8")


def main() -> int:
    os.environ["BRIDGE_REQUIRE_SERVERS"] = "1"
    table = Table()
    tests = ROOT / "tests" / "test_servers.py"
    # What is asked of README.md is asked of what is written here.
    others = [f"--deselect=tests/test_servers.py::test_readme_tells_of_{what}" for what in ("a_cell", "each_limit")]
    status = pytest.main([str(tests), *others, *sys.argv[1:]], plugins=[table])
    if status == 0:
        write(table.lines(), ROOT / "README.md")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
