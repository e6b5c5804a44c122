"""Contestants take turns, round by round, and what they took becomes a table.

The machine is never quiet: contestants that are measured one after the other are measured on different machines. So
every round lets each of them play once, a contestant's figure is the median of its rounds, and a ratio is the median of
the ratios within each round.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = [
    "Figures",
    "Limits",
    "Player",
    "WrongAnswer",
    "alternate",
    "check_body",
    "describe_machine",
    "explain",
    "markdown",
    "table",
]


class WrongAnswer(Exception):
    """A contestant answered, but not what the app said."""


class Player(Protocol):
    """One contestant at one case, ready to play."""

    def play(self) -> float:
        """Plays one round: checks one answer, then takes the time. Returns seconds a request."""

    def close(self, *, hangs: bool) -> None:
        """Gives back loop and threads; of a contestant that hangs, only what can be had without waiting for it."""


@dataclass(frozen=True)
class Limits:
    """How long it may take."""

    rounds: int = 9
    seconds: float = 20.0  # a round that takes longer hangs: the contestant is out
    budget: float = 10.0  # a contestant that took longer in all plays no further rounds; those it has are its figure


@dataclass
class Figures:
    """What one contestant took, or why it could not."""

    name: str
    seconds: list[float] = field(default_factory=list)  # a request, one figure for each round
    reason: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds and not self.reason else None

    def ratio(self, reference: Figures | None) -> float | None:
        """How many times the reference's time this contestant takes."""
        if reference is None or self.median is None or reference.median is None:
            return None
        return statistics.median(mine / other for mine, other in zip(self.seconds, reference.seconds, strict=False))

    def as_json(self) -> dict[str, Any]:
        if self.median is None:
            return {"reason": self.reason}
        return {"median": self.median, "best": min(self.seconds), "rounds": self.seconds}


def check_body(got: bytes, expected: bytes) -> None:
    """Raises WrongAnswer unless the two are the same."""
    if got != expected:
        other = " others" if len(got) == len(expected) else ""
        raise WrongAnswer(f"{len(got):,} bytes came, the app answered {len(expected):,}{other}")


def alternate(contestants: Mapping[str, Callable[[], Player]], limits: Limits) -> list[Figures]:
    """Lets everybody play in turn: one round to warm up, then those that count."""
    figures = {name: Figures(name) for name in contestants}
    players: dict[str, Player] = {}
    spent = dict.fromkeys(contestants, 0.0)
    for name, enter in contestants.items():
        try:
            players[name] = enter()
        except Exception as error:
            figures[name].reason = explain(error)
    for number in range(limits.rounds + 1):
        for name, player in list(players.items()):
            if figures[name].seconds and spent[name] > limits.budget:
                continue
            began = time.perf_counter()
            try:
                seconds = player.play()
            except Exception as error:
                figures[name].reason = explain(error)
                players.pop(name).close(hangs=True)
                continue
            spent[name] += time.perf_counter() - began
            if number:
                figures[name].seconds.append(seconds)
    for player in players.values():
        player.close(hangs=False)
    return list(figures.values())


def explain(error: BaseException) -> str:
    """The reason in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    first = (str(error).splitlines() or [""])[0]
    name = "" if isinstance(error, TimeoutError) and first else type(error).__name__
    return ": ".join(filter(None, (name, first)))[:110]


def table(title: str, figures: Iterable[Figures], reference: str) -> str:
    """A Markdown table, readable as it stands: microseconds a request, and ratios to the limit and to bridge."""
    listed = list(figures)
    limit = next((entry for entry in listed if entry.name == reference), None)
    ours = next((entry for entry in listed if entry.name.startswith("bridge") and entry.median is not None), None)
    rows = [["", "µs a request", "best", f"/ {reference}", f"/ {ours.name if ours else 'bridge'}"]]
    for entry in listed:
        if entry.median is None:
            rows.append([entry.name, "-", "", "", entry.reason])
            continue
        ratios = [entry.ratio(limit), entry.ratio(ours)]
        rows.append([entry.name, *map(_microseconds, (entry.median, min(entry.seconds))), *map(_times, ratios)])
    return f"{title}\n\n{markdown(rows)}\n"


def markdown(rows: list[list[str]]) -> str:
    """Rows, the first of them the heading, as a Markdown table in straight columns; reasons may stick out."""
    figures = [row for row in rows if row[1] != "-"]
    widths = [max(len(row[column]) for row in figures) for column in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    rules = ["-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)]
    lines.insert(1, "|" + "|".join(rules) + "|")
    return "\n".join(lines)


def describe_machine(packages: Iterable[str]) -> dict[str, str]:
    """What the figures depend on, in words."""
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "packages": ", ".join(versions),
    }


def _microseconds(seconds: float) -> str:
    micros = seconds * 1e6
    return f"{micros:,.1f}" if micros < 1000 else f"{micros:,.0f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
