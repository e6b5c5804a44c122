"""`python -m benchmarks [CASE ...]`: chooses the cases, lets the contestants play, prints a table for each.

`--list` names the cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import asgi_to_wsgi, compositions, end_to_end, memory, rounds, wsgi_to_asgi

DIRECTIONS = {"wsgi_to_asgi": wsgi_to_asgi, "asgi_to_wsgi": asgi_to_wsgi, "compositions": compositions}

PACKAGES = "wsgi-asgi-bridge anyio asgiref a2wsgi starlette uvicorn hypercorn trio uvloop fastapi".split()


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["end_to_end"]:
        return end_to_end.main(arguments[1:])
    options = parser().parse_args(arguments)
    timed: dict[str, Any] = {}
    for direction, module in DIRECTIONS.items():
        timed |= {f"{direction}/{case.name}": (direction, case) for case in module.CASES}
    names = [name for name in [*timed, *memory.CASES] if chosen(name, options.cases)]
    if options.list or not names:
        print("\n".join([*timed, *memory.CASES, "end_to_end (by that name alone)"]))
        sys.exit(0 if options.list else "no such case")
    machine = rounds.describe_machine(PACKAGES)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    results = []
    for name in names:
        if name in timed:
            direction, case = timed[name]
            results += time_case(name, direction, case, options)
        else:
            results += measure_memory(memory.CASES[name], options)
        if options.json:
            options.json.write_text(json.dumps({"machine": machine, "cases": results}, indent=1) + "\n")
    return None


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        "python -m benchmarks", description="What a request costs through bridge and peers."
    )
    add = options.add_argument
    add("cases", nargs="*", help="words: the cases with one of them in their name; a whole name: that case; none: all")
    add("--list", action="store_true", help="name the cases")
    add("--contestants", type=words, metavar="A,B", help="those with one of these words in their name")
    add("--loop", type=words, metavar="LOOP,...", help="asyncio, uvloop, trio: instead of the case's own")
    add("--rounds", type=int, default=9, help="that each contestant plays (%(default)s)")
    add("--scale", type=float, default=1.0, help="times as many requests a round")
    add("--limit", type=float, default=20, metavar="S", help="seconds until a round counts as hanging (%(default)s)")
    add("--budget", type=float, default=10, metavar="S", help="seconds a contestant may play a case (%(default)s)")
    add("--mib", type=int, default=256, help="the size of the memory cases' bodies (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="keep all figures there")
    return options


def words(text: str) -> list[str]:
    return text.split(",")


def chosen(name: str, wanted: Iterable[str] | None) -> bool:
    """Whether a name is wanted: one of the words is in it. A word with a slash is a whole name."""
    return not wanted or any(word == name if "/" in word else word in name for word in wanted)


def time_case(name: str, direction: str, case: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    module = DIRECTIONS[direction]
    contestants = [entry for entry in module.CONTESTANTS if chosen(entry, options.contestants)]
    limits = rounds.Limits(min(options.rounds, case.rounds or options.rounds), options.limit, options.budget)
    unit = getattr(case, "at_once", 1) * getattr(case, "threads", 1)
    case = dataclasses.replace(case, requests=max(unit, int(case.requests * options.scale) // unit * unit))
    results = []
    for loop in options.loop or case.loops:
        figures = rounds.alternate(case.players(loop, limits, contestants), limits)
        title = f"{name} on {loop}: {limits.rounds} rounds of {case.requests:,} request{'s' * (case.requests > 1)}"
        print("\n" + rounds.table(title, figures, module.LIMIT), flush=True)
        results.append({"case": name, "loop": loop, "contestants": {entry.name: entry.as_json() for entry in figures}})
    return results


def measure_memory(case: memory.Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for loop in options.loop or ["asyncio"]:
        seconds = options.limit * max(1.0, options.mib / 256)
        figures = {
            contestant: memory.measure(case, contestant, loop, options.mib, seconds)
            for contestant in case.contestants
            if chosen(contestant, options.contestants)
        }
        size = f"{memory.WAITING:,} requests at once" if case.name.endswith("waiting") else f"{options.mib:,} MiB"
        print("\n" + memory.table(case, f"{case.name} on {loop}: {size}", figures), flush=True)
        results.append({"case": case.name, "loop": loop, "mib": options.mib, "contestants": figures})
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # threads of a contestant that hangs would hold the interpreter back for ever
