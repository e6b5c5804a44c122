"""`python -m benchmarks.plot FIGURES.json`: the plot that README shows, light and dark, as SVG.

The figures are those of `python -m benchmarks --json FIGURES.json`; nothing is drawn that was not measured there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

__all__ = ["main", "panels"]

HERE = Path(__file__).parent

PANELS = {
    "WSGI app under ASGI": {
        "wsgi_to_asgi/hello": "hello",
        "wsgi_to_asgi/hello_64_at_once": "64 at once",
        "wsgi_to_asgi/echo": "1 KiB there and back",
        "wsgi_to_asgi/stream": "stream of 256 blocks",
        "wsgi_to_asgi/upload": "upload of 64 MiB",
    },
    "ASGI app under WSGI": {
        "asgi_to_wsgi/hello": "hello",
        "asgi_to_wsgi/hello_8_threads": "8 threads",
        "asgi_to_wsgi/echo": "1 KiB there and back",
        "asgi_to_wsgi/stream": "stream of 256 blocks",
        "asgi_to_wsgi/upload": "upload of 64 MiB",
        "asgi_to_wsgi/fastapi": "FastAPI's hello",
    },
}
"""The cases of each half, and what they are called there."""

NAMES = {"bridge": "bridge", "bridge shared": "bridge"}
"""What contestants are called; those of `ORDER` keep their names."""

ORDER = ["bridge", "asgiref", "a2wsgi", "starlette", "uvicorn", "hypercorn"]


class Theme(NamedTuple):
    """The colours of one plot."""

    name: str
    ink: str
    quiet: str
    line: str
    bridge: str
    peer: str


THEMES = [
    Theme("light", ink="#23302f", quiet="#61706e", line="#e2e0d8", bridge="#2a736e", peer="#c9cfcc"),
    Theme("dark", ink="#dfe7e5", quiet="#93a3a0", line="#2b3637", bridge="#7cc4bc", peer="#46524f"),
]


def panels(figures: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """By half, case and contestant: microseconds a request, the median of the rounds; who could not do it is out."""
    halves: dict[str, dict[str, dict[str, float]]] = {}
    for half, cases in PANELS.items():
        for entry in figures["cases"]:
            if entry["case"] not in cases or entry.get("loop") != "asyncio":
                continue
            bars = {
                NAMES.get(name, name): figure["median"] * 1e6
                for name, figure in entry["contestants"].items()
                if NAMES.get(name, name) in ORDER and "median" in figure
            }
            halves.setdefault(half, {})[cases[entry["case"]]] = {name: bars[name] for name in ORDER if name in bars}
        if half in halves:
            halves[half] = {name: halves[half][name] for name in cases.values() if name in halves[half]}
    return halves


def told(microseconds: float) -> str:
    return f"{microseconds / 1000:,.0f} ms" if microseconds >= 10_000 else f"{microseconds:,.0f} µs"


def draw(halves: dict[str, dict[str, dict[str, float]]], theme: Theme, path: Path) -> None:
    plt.rcParams |= {
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "bridge",  # the same figures make the same file
        "text.color": theme.ink,
    }
    columns = max(len(cases) for cases in halves.values())
    lines = [max(map(len, cases.values())) + 1.5 for cases in halves.values()]  # the titles take some, too
    figure, axes = plt.subplots(
        len(halves),
        columns,
        figsize=(2.15 * columns, 0.31 * sum(lines)),
        squeeze=False,
        layout="constrained",
        height_ratios=lines,
    )
    for row, height, (half, cases) in zip(axes, lines, halves.items(), strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, (case, bars) in zip(row, cases.items(), strict=False):
            axis.set_ylim(height - 1.5 - 0.4, -0.6)
            draw_case(axis, case, bars, theme)
        row[0].annotate(
            half, (0, 1), (0, 22), "axes fraction", "offset points", fontsize=11, fontweight="bold", color=theme.ink
        )
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def draw_case(axis: Any, case: str, bars: dict[str, float], theme: Theme) -> None:
    longest = max(bars.values())
    axis.set_title(case, loc="left", fontsize=9, color=theme.quiet, pad=4)
    axis.set_xlim(0, longest * 1.9)
    for number, (name, microseconds) in enumerate(bars.items()):
        own = name == "bridge"
        axis.barh(number, microseconds, height=0.7, color=theme.bridge if own else theme.peer, linewidth=0)
        axis.text(
            microseconds + longest * 0.04,
            number,
            f"{told(microseconds)}  {name}",
            va="center",
            fontsize=7.5,
            color=theme.bridge if own else theme.quiet,
            fontweight="bold" if own else "normal",
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.plot", description="Draw the plot that README shows.")
    parser.add_argument("figures", type=Path, metavar="FIGURES.json", help="of python -m benchmarks --json")
    parser.add_argument("--to", type=Path, default=HERE, metavar="FOLDER", help="where the two files go")
    options = parser.parse_args(arguments)
    halves = panels(json.loads(options.figures.read_text(encoding="utf-8")))
    for theme in THEMES:
        draw(halves, theme, options.to / f"plot-{theme.name}.svg")


if __name__ == "__main__":
    main()
