"""Through real servers: `wrk` asks for a hello over keep-alive connections, the servers take turns."""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import apps
from .rounds import WrongAnswer, describe_machine, explain, markdown

__all__ = ["SETUPS", "main"]

PACKAGES = "wsgi-asgi-bridge a2wsgi flask fastapi uvicorn uvloop httptools gunicorn granian waitress".split()

UVICORN = "uvicorn --factory {site} --port {port} --loop uvloop --http httptools --log-level error --no-access-log"
GUNICORN = "gunicorn {site}() --bind 127.0.0.1:{port} --log-level error --keep-alive 60 --no-control-socket"
SYNC = GUNICORN + " --worker-class sync"
GTHREAD = GUNICORN + " --worker-class gthread --threads 8"
WAITRESS = "waitress --listen 127.0.0.1:{port} --threads 8 --call {site}"
GRANIAN = "granian --interface wsgi --factory {site} --port {port} --log-level error"


@dataclass(frozen=True)
class Setup:
    """One site on one server."""

    group: str  # what it is compared within
    name: str
    command: str  # after `python -m`
    site: str


SETUPS = [
    Setup("Flask", "uvicorn, bridge", UVICORN, "flask_bridge"),
    Setup("Flask", "uvicorn, a2wsgi", UVICORN, "flask_a2wsgi"),
    Setup("Flask", "gunicorn gthread, native", GTHREAD, "flask"),
    Setup("Flask", "granian, native", GRANIAN, "flask"),
    Setup("FastAPI on gunicorn sync", "bridge", SYNC, "fastapi_bridge"),
    Setup("FastAPI on gunicorn sync", "a2wsgi", SYNC, "fastapi_a2wsgi"),
    Setup("FastAPI on gunicorn sync", "bare WSGI hello", SYNC, "bare_wsgi"),
    Setup("FastAPI on gunicorn gthread", "bridge", GTHREAD, "fastapi_bridge"),
    Setup("FastAPI on gunicorn gthread", "a2wsgi", GTHREAD, "fastapi_a2wsgi"),
    Setup("FastAPI on gunicorn gthread", "bare WSGI hello", GTHREAD, "bare_wsgi"),
    Setup("FastAPI on waitress", "bridge", WAITRESS, "fastapi_bridge"),
    Setup("FastAPI on waitress", "a2wsgi", WAITRESS, "fastapi_a2wsgi"),
    Setup("FastAPI on waitress", "bare WSGI hello", WAITRESS, "bare_wsgi"),
]


@dataclass
class Figures:
    """What wrk saw of one setup, a figure for each round."""

    rates: list[float] = dataclasses.field(default_factory=list)  # requests a second
    latencies: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {"50%": [], "99%": []})  # seconds
    reason: str = ""  # why it is out


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    if shutil.which("wrk") is None:
        sys.exit("wrk, which does the asking, is not installed. On Debian and Ubuntu: sudo apt-get install wrk")
    wanted = options.only.lower().split()
    setups = [setup for setup in SETUPS if all(word in f"{setup.group} {setup.name}".lower() for word in wanted)]
    if not setups:
        sys.exit("no such setup")
    runs = f"median of {options.rounds} runs of {options.seconds} s"
    machine = describe_machine(PACKAGES)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    print(f"{options.connections} keep-alive connections, {runs}", flush=True)
    kept = []
    for group in dict.fromkeys(setup.group for setup in setups):
        figures = compare([setup for setup in setups if setup.group == group], options)
        print(f"\n{group}\n\n{table(figures)}", flush=True)
        contestants = {name: dataclasses.asdict(entry) for name, entry in figures.items()}
        kept.append({"group": group, "contestants": contestants})
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "cases": kept}, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser("python -m benchmarks end_to_end", description="Requests/s through real servers.")
    add = options.add_argument
    add("--only", default="", metavar="WORDS", help="setups with all these words in group and name, e.g. 'sync bridge'")
    add("--seconds", type=int, default=4, help="a run (%(default)s)")
    add("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    add("--connections", type=int, default=16, help="kept alive (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="keep all figures there")
    return options


def compare(setups: list[Setup], options: argparse.Namespace) -> dict[str, Figures]:
    """Lets the setups of one group take turns."""
    figures = {setup.name: Figures() for setup in setups}
    for _ in range(options.rounds):
        for setup in setups:
            entry = figures[setup.name]
            if entry.reason:
                continue
            try:
                with serve(setup) as port:
                    ask(port, 1, options.connections)  # warms up
                    rate, latencies = ask(port, options.seconds, options.connections)
                    check(port)
            except Exception as error:
                entry.reason = explain(error)
                continue
            entry.rates.append(rate)
            for percentile, seconds in latencies.items():
                entry.latencies[percentile].append(seconds)
    return figures


@contextmanager
def serve(setup: Setup) -> Iterator[int]:
    """Starts the server, waits until it answers rightly, and stops it at the end. Gives its port."""
    port = free_port()
    command = [sys.executable, "-m", *setup.command.format(site=f"benchmarks.sites:{setup.site}", port=port).split()]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(server, port)
            yield port
        except ServerFailed as error:
            log.seek(0)
            said = [line.strip() for line in log if line.strip()] or ["it said nothing"]
            errors = [line for line in said if re.match(r"\w*Error\b", line)]
            raise ServerFailed(f"{error}: {(errors or said)[-1]}") from None
        finally:
            stop(server)


class ServerFailed(Exception):
    """The server did not start, or not to answer rightly."""


def free_port() -> int:
    """A port nobody has at the moment. Should another process take it before the server does, the server says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    last: Exception | None = None
    until = time.monotonic() + 15
    while time.monotonic() < until:
        if server.poll() is not None:
            raise ServerFailed(f"the server ended with status {server.returncode}")
        try:
            return check(port)
        except (OSError, http.client.HTTPException, WrongAnswer) as error:
            last = error
            time.sleep(0.05)
    raise ServerFailed(f"no right answer within 15 s, the last was {last!r}")


def check(port: int) -> None:
    """Raises WrongAnswer unless the server says hello."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        got = response.status, response.read()
    finally:
        connection.close()
    if got != (200, apps.HELLO):
        raise WrongAnswer(f"expected {(200, apps.HELLO)}, got {got}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Asks the server to end; makes it and its workers, should it not."""
    server.terminate()
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)  # its own session: see start_new_session
        server.wait()


def ask(port: int, seconds: int, connections: int) -> tuple[float, dict[str, float]]:
    """One run of wrk: requests a second, and latencies in seconds by percentile."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", f"http://127.0.0.1:{port}/"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 10, check=True).stdout
    if wrong := re.search(r"Non-2xx or 3xx responses: (\d+)", said):
        raise WrongAnswer(f"{wrong[1]} responses were no 200")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    if not rate or not float(rate[1]):
        raise WrongAnswer("not one answer")
    units = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
    latencies = re.findall(r"^\s+(50%|99%)\s+([\d.]+)(us|ms|s)$", said, re.MULTILINE)
    return float(rate[1]), {percentile: float(number) * units[unit] for percentile, number, unit in latencies}


def table(figures: dict[str, Figures]) -> str:
    """Rates, the ratio to the first of the group (bridge), and latencies."""
    first = next(iter(figures.values()))
    rows = [["", "requests/s", "bridge / this", "50 %, ms", "99 %, ms"]]
    for name, entry in figures.items():
        if entry.reason:
            rows.append([name, "-", "", "", entry.reason])
            continue
        ratios = [] if first.reason else [ours / rate for ours, rate in zip(first.rates, entry.rates, strict=False)]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        latencies = [f"{statistics.median(entry.latencies[percentile]) * 1000:.1f}" for percentile in ("50%", "99%")]
        rows.append([name, f"{statistics.median(entry.rates):,.0f}", ratio, *latencies])
    return markdown(rows) + "\n"
