"""What a contestant keeps in memory: each in a process of its own, so that nobody pays for another's.

Run as `python -m benchmarks.memory CASE CONTESTANT LOOP MIB` this is that process; it prints one line of JSON.

Blocks are made anew, so that each one kept counts, and both ends take a checksum. The slow end rests 5 ms a MiB.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from . import apps, asgi_to_wsgi, wsgi_to_asgi
from .rounds import WrongAnswer, explain, markdown

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["CASES", "Case", "table"]

MIB = 1024 * 1024
BLOCK = 65_536
REST = 0.005
WAITING = 2000  # requests at once in the waiting case


@dataclass
class Transfer:
    """A body on its way: what was given in at one end and what came out at the other."""

    size: int
    given: int = 0
    taken: int = 0
    given_checksum: int = 0
    taken_checksum: int = 0

    def begin(self, size: int) -> None:
        self.size = size
        self.given = self.taken = self.given_checksum = self.taken_checksum = 0

    def give(self, limit: int = BLOCK) -> bytes:
        """The next block; empty at the end."""
        block = bytes([self.given // BLOCK % 251]) * min(limit, self.size - self.given)
        self.given += len(block)
        self.given_checksum = zlib.crc32(block, self.given_checksum)
        return block

    def take(self, block: bytes) -> bool:
        """Counts a block; True after each MiB."""
        before = self.taken
        self.taken += len(block)
        self.taken_checksum = zlib.crc32(block, self.taken_checksum)
        return before // MIB != self.taken // MIB

    def check(self) -> None:
        if not self.size == self.given == self.taken:
            raise WrongAnswer(f"{self.given:,} of {self.size:,} bytes were given, {self.taken:,} taken")
        if self.given_checksum != self.taken_checksum:
            raise WrongAnswer("other bytes were taken than given")


# WSGI app, ASGI server


def down_to_asgi(contestant: str, loop: str, size: int) -> dict[str, float]:
    """A fast WSGI app, a slow client."""
    transfer = Transfer(size)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        while block := transfer.give():
            yield block

    async def send(message: dict[str, Any]) -> None:
        if transfer.take(message.get("body", b"")):
            await anyio.sleep(REST)

    asgi_app = wsgi_to_asgi.CONTESTANTS[contestant](app, loop)

    def request(size: int) -> None:
        transfer.begin(size)
        portal.call(asgi_app, wsgi_to_asgi.request_scope(0), wsgi_to_asgi.Exchange((b"",)).receive, send)
        transfer.check()

    with wsgi_to_asgi.open_loop(loop) as portal:
        return _peak(request, size)


def up_from_asgi(contestant: str, loop: str, size: int) -> dict[str, float]:
    """A fast client, a slow WSGI app."""
    transfer = Transfer(size)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        while block := environ["wsgi.input"].read(BLOCK):
            if transfer.take(block):
                time.sleep(REST)
        return apps.hello(environ, start_response)

    async def receive() -> dict[str, Any]:
        await anyio.sleep(0)
        body = transfer.give()
        if not body:
            await anyio.sleep_forever()
        return {"type": "http.request", "body": body, "more_body": transfer.given < transfer.size}

    async def send(message: dict[str, Any]) -> None:
        pass

    asgi_app = wsgi_to_asgi.CONTESTANTS[contestant](app, loop)

    def request(size: int) -> None:
        transfer.begin(size)
        portal.call(asgi_app, wsgi_to_asgi.request_scope(size), receive, send)
        transfer.check()

    with wsgi_to_asgi.open_loop(loop) as portal:
        return _peak(request, size)


def waiting(contestant: str, loop: str, size: int) -> dict[str, float]:
    """Many requests at once, none of which gets on: bytes each of them holds, scope and exchange included."""
    release = threading.Event()
    exchanges = [wsgi_to_asgi.Exchange((b"",)) for _ in range(WAITING)]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        release.wait()
        return apps.hello(environ, start_response)

    async def measure() -> dict[str, float]:
        began = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            await warm_up()
            gc.collect()
            tracemalloc.start()
            for exchange in exchanges:
                tasks.start_soon(asgi_app, wsgi_to_asgi.request_scope(0), exchange.receive, exchange.send)
            await anyio.sleep(1)  # all of them come to where they wait
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            release.set()
        for exchange in exchanges:
            exchange.check(apps.HELLO)
        return {"bytes": held / WAITING, "seconds": time.perf_counter() - began}

    async def warm_up() -> None:
        release.set()
        exchange = wsgi_to_asgi.Exchange((b"",))
        await asgi_app(wsgi_to_asgi.request_scope(0), exchange.receive, exchange.send)
        exchange.check(apps.HELLO)
        release.clear()

    asgi_app = wsgi_to_asgi.CONTESTANTS[contestant](app, loop)
    with wsgi_to_asgi.open_loop(loop) as portal:
        return portal.call(measure)


# ASGI app, WSGI server


def down_to_wsgi(contestant: str, loop: str, size: int) -> dict[str, float]:
    """A fast ASGI app, a slow client."""
    transfer = Transfer(size)

    async def app(scope: dict[str, Any], receive: apps.Receive, send: apps.Send) -> None:
        if scope["type"] != "http":
            raise ValueError(scope["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while block := transfer.give():
            await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    wsgi_app = asgi_to_wsgi.CONTESTANTS[contestant](app, loop)

    def request(size: int) -> None:
        transfer.begin(size)
        environ = asgi_to_wsgi.request_environ(b"") | {"wsgi.input": Upload(Transfer(0))}
        result = wsgi_app(environ, lambda status, headers, exc_info=None: lambda block: None)
        try:
            for block in result:
                if transfer.take(block):
                    time.sleep(REST)
        finally:
            if hasattr(result, "close"):
                result.close()
        transfer.check()

    return _peak(request, size)


def up_from_wsgi(contestant: str, loop: str, size: int) -> dict[str, float]:
    """A fast client, a slow ASGI app."""
    transfer = Transfer(size)

    async def app(scope: dict[str, Any], receive: apps.Receive, send: apps.Send) -> None:
        if scope["type"] != "http":
            raise ValueError(scope["type"])
        more_body = True
        while more_body:
            message = await receive()
            more_body = message["more_body"]
            if transfer.take(message["body"]):
                await asyncio.sleep(REST)
        await apps.async_hello(scope, receive, send)

    wsgi_app = asgi_to_wsgi.CONTESTANTS[contestant](app, loop)

    def request(size: int) -> None:
        transfer.begin(size)
        environ = asgi_to_wsgi.request_environ(b"x")
        environ |= {"wsgi.input": Upload(transfer), "CONTENT_LENGTH": str(size)}
        asgi_to_wsgi.check(*asgi_to_wsgi.call(wsgi_app, environ), apps.HELLO)
        transfer.check()

    return _peak(request, size)


class Upload:
    """A wsgi.input whose bytes are made as they are read."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer

    def read(self, size: int = -1) -> bytes:
        return self.transfer.give(size if size >= 0 else self.transfer.size)


# One case, all contestants


@dataclass(frozen=True)
class Case:
    """One way of filling memory."""

    name: str
    run: Callable[[str, str, int], dict[str, float]]
    contestants: Iterable[str]


CASES = {
    case.name: case
    for case in [
        Case("wsgi_to_asgi/memory_down", down_to_asgi, wsgi_to_asgi.CONTESTANTS),
        Case("wsgi_to_asgi/memory_up", up_from_asgi, wsgi_to_asgi.CONTESTANTS),
        Case("wsgi_to_asgi/memory_waiting", waiting, wsgi_to_asgi.CONTESTANTS),
        Case("asgi_to_wsgi/memory_down", down_to_wsgi, asgi_to_wsgi.CONTESTANTS),
        Case("asgi_to_wsgi/memory_up", up_from_wsgi, asgi_to_wsgi.CONTESTANTS),
    ]
}


def measure(case: Case, contestant: str, loop: str, mib: int, seconds: float) -> dict[str, Any]:
    """Runs one contestant in its own process. Returns its figures, or the reason why there are none."""
    command = [sys.executable, "-m", "benchmarks.memory", case.name, contestant, loop, str(mib)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done within {seconds:g} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    except (IndexError, ValueError):
        return {"reason": f"exit status {done.returncode}: {(done.stderr.splitlines() or ['no output'])[-1]}"}


def table(case: Case, title: str, figures: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: MiB above idle, or KiB a waiting request, and seconds."""
    measured, unit = ("KiB a request", 1024) if case.run is waiting else ("MiB above idle", MIB)
    rows = [["", measured, "s"]]
    for name, entry in figures.items():
        if "reason" in entry:
            rows.append([name, "-", entry["reason"]])
        else:
            rows.append([name, f"{entry['bytes'] / unit:.1f}", f"{entry['seconds']:.1f}"])
    return f"{title}\n\n{markdown(rows)}\n"


# In the process of its own


def _peak(request: Callable[[int], None], size: int) -> dict[str, float]:
    """How far the resident memory grows above idle in one request of this size."""
    request(MIB)
    gc.collect()
    idle = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the peak starts anew
    began = time.perf_counter()
    request(size)
    return {"seconds": time.perf_counter() - began, "bytes": max(0, _status("VmHWM") - idle)}


def _status(name: str) -> int:
    """Bytes, from Linux's /proc."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def main(case: str, contestant: str, loop: str, mib: str) -> None:
    try:
        figures: dict[str, Any] = CASES[case].run(contestant, loop, int(mib) * MIB)
    except Exception as error:
        figures = {"reason": explain(error)}
    print(json.dumps(figures), flush=True)
    os._exit(0)  # whatever still hangs


if __name__ == "__main__":
    main(*sys.argv[1:])
