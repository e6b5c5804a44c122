"""The plot shows what was measured, and nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plot

if TYPE_CHECKING:
    from pathlib import Path

FIGURES = {
    "machine": {},
    "cases": [
        {
            "case": "wsgi_to_asgi/echo",
            "loop": "asyncio",
            "contestants": {"hop": {"median": 1e-6}, "bridge": {"median": 87e-6}, "a2wsgi": {"reason": "it hung"}},
        },
        {"case": "wsgi_to_asgi/hello", "loop": "uvloop", "contestants": {"bridge": {"median": 1e-6}}},
        {
            "case": "asgi_to_wsgi/hello",
            "loop": "asyncio",
            "contestants": {"a2wsgi": {"median": 0.25}, "bridge shared": {"median": 31e-6}},
        },
        {"case": "memory_up", "loop": "asyncio", "contestants": {}},
    ],
}


def test_bars_are_the_medians_of_those_who_could() -> None:
    assert plot.panels(FIGURES) == {
        "WSGI app under ASGI": {"1 KiB there and back": {"bridge": pytest.approx(87)}},
        "ASGI app under WSGI": {"hello": {"bridge": pytest.approx(31), "a2wsgi": pytest.approx(250_000)}},
    }


@pytest.mark.leaves("files")  # matplotlib keeps its fonts open
def test_both_themes_are_drawn_with_the_figures_as_text(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(json.dumps(FIGURES))
    plot.main([str(tmp_path / "figures.json"), "--to", str(tmp_path)])
    for theme in plot.THEMES:
        text = (tmp_path / f"plot-{theme.name}.svg").read_text(encoding="utf-8")
        for words in ("87 µs  bridge", "31 µs  bridge", "250 ms  a2wsgi", "WSGI app under ASGI", theme.bridge):
            assert words in text
