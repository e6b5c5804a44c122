"""AsgiToWsgi's memory: bounded by a window both ways, and flat over many requests. In processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PRELUDE = """
    import asyncio, gc, io, resource, sys, threading, time
    import uvloop
    from bridge import AsgiToWsgi
    from tests.drivers import FakeInput, WsgiServer, make_environ

    loop, factory = sys.argv[1], {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[sys.argv[2]]
    START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
    MIB = 1024 * 1024

    def wrap(app):
        return AsgiToWsgi(app, loop=loop, loop_factory=factory, lifespan="off")
"""


def run_script(code: str, *arguments: str) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"}  # it keeps traces
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        cwd=Path(__file__).parent.parent,
        env=environ,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


BOTH_WAYS = """
    async def app(scope, receive, send):
        size = int(scope["path"][1:])
        if scope["method"] == "POST":
            more = True
            while more:
                message = await receive()
                more = message["more_body"]
                if message["body"]:
                    taken.append(len(message["body"]))
                await asyncio.sleep(0)
            await send(START)
            await send({"type": "http.response.body", "body": b"%d" % sum(taken)})
        else:
            await send(START)
            for number in range(size // 65_536):
                block = bytes([number % 256]) * 65_536
                await send({"type": "http.response.body", "body": block, "more_body": True})
            await send({"type": "http.response.body"})

    def blocks(size):
        for number in range(size // 65_536):
            yield bytes([number % 256]) * 65_536

    def transfer(size):
        global taken
        taken = []
        with WsgiServer(keep=False).start(application, make_environ(path=f"/{size}")) as exchange:
            for number, block in enumerate(exchange):
                if number % 64 == 0:
                    time.sleep(0.001)  # a slow client
            assert exchange.body_length == size, exchange.body_length
        stream = FakeInput(blocks(size), fills=False)
        environ = make_environ("POST", f"/{size}", body=stream, CONTENT_LENGTH=str(size))
        exchange = WsgiServer().run(application, environ)
        assert exchange.error is None and exchange.body == b"%d" % size, (exchange.error, exchange.body)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    application = wrap(app)
    transfer(8 * MIB)
    before = peak()
    transfer(128 * MIB)
    application.close()
    print(peak() - before)
"""


@pytest.mark.parametrize("loop", ["shared", "request"])
def test_a_body_takes_a_window_of_memory_however_long_it_is(loop: str) -> None:
    """[A13] 128 MiB down to a slow client, and 128 MiB up: less than 2 MiB more than 8 MiB took."""
    mebibytes = float(run_script(BOTH_WAYS, loop, "asyncio"))
    print(f"{mebibytes:g} MiB more")
    assert mebibytes < 2


MANY = """
    async def app(scope, receive, send):
        kind = scope["path"]
        if kind == "/body":
            await receive()
        if kind == "/gone":
            await receive()
            watch = asyncio.ensure_future(receive())
        await send(START)
        try:
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await send({"type": "http.response.body"})
        except OSError:
            await watch
        if kind == "/background":
            await asyncio.sleep(0)

    def serve(environ):
        blocks = application(environ, lambda *arguments: None)
        try:
            if environ["PATH_INFO"] == "/gone":
                next(iter(blocks))
            else:
                for block in blocks:
                    pass
        finally:
            blocks.close()

    def visit(count):
        for number in range(count):
            kind = ("/plain", "/body", "/background", "/gone")[number % 4]
            serve(make_environ("POST", kind, body=b"a body"))

    def blocks_in_use():
        for _ in range(3):
            time.sleep(0.05)
            gc.collect()
        return sys.getallocatedblocks()

    def rss():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / MIB

    application = wrap(app)
    visit(2000)
    before = blocks_in_use(), rss()
    visit(10_000)
    after = blocks_in_use(), rss()
    application.close()
    print(after[0] - before[0], after[1] - before[1])
"""


@pytest.mark.parametrize(("loop", "factory"), [("shared", "asyncio"), ("shared", "uvloop"), ("request", "asyncio")])
def test_ten_thousand_requests_leave_memory_flat(loop: str, factory: str) -> None:
    """[A13] [S2] Plain ones, with bodies, with background work, and with clients that leave."""
    blocks, mebibytes = map(float, run_script(MANY, loop, factory).split())
    print(f"{blocks:g} blocks and {mebibytes:g} MiB more")
    assert blocks < 1000  # one kept thing a request would be 10,000
    assert mebibytes < 2
