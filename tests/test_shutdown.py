"""The end of real servers around WsgiToAsgi: what is in the app then, and that a crowd of streams holds up nobody."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.apps import Board
from tests.servers import LIMIT, SERVERS, Running, read_response, until
from tests.test_servers import require

if TYPE_CHECKING:
    import socket
    from pathlib import Path

APPLICATION = """
import contextlib, threading, time
from bridge import WsgiToAsgi
from tests.apps import board

@contextlib.asynccontextmanager
async def lifespan(_):
    yield {"from": "lifespan"}
    board.put("left", " ".join(t.name for t in threading.enumerate() if t.name.startswith("bridge-worker")))

def events():
    board.put("streaming")
    try:
        while True:
            yield b"data: event\\n\\n"
            time.sleep(0.05)
    finally:
        board.put("closed", str(board.get("left")))

def app(environ, start_response):
    if environ["PATH_INFO"] == "/events":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return events()
    if environ["PATH_INFO"] == "/held":
        board.put("held")
        board.wait("go")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["asgi.scope"]["state"]["from"].encode(), b", left: ", str(board.get("left")).encode()]

application = WsgiToAsgi(app, lifespan=lifespan, threads=4)
"""

NATIVE = "from tests.apps.asgi import bare_asgi\napplication = bare_asgi()\n"

# Their users give the servers a time after which they leave a stream that does not end by itself. Hypercorn on asyncio
# waits for ever before that time begins, from Python 3.12 on.
GRACE = {"uvicorn-h11": "--timeout-graceful-shutdown 1", "hypercorn-trio": "--graceful-timeout 1"}


def start(name: str, path: Path, application: str = APPLICATION, options: str = "") -> Running:
    require(name)
    server = SERVERS[name]
    path.mkdir()
    return Running(replace(server, command=f"{server.command} {options}"), application, path)


def normal_status(name: str, path: Path) -> int:
    """How the server ends without bridge; some of them by the signal itself."""
    with start(name, path, NATIVE) as running:
        with running.connect() as connection:  # granian listens before its worker hears of a signal
            get(connection, "/echo/it")
            assert read_response(connection)[0] == 200
        return running.stop()


def get(connection: socket.socket, path: str) -> None:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: tests\r\n\r\n".encode())


@pytest.mark.parametrize("name", ["uvicorn-h11", "uvicorn-httptools-uvloop", "hypercorn-trio", "granian-asgi"])
def test_request_in_the_app_ends_before_the_lifespan_does(name: str, tmp_path: Path) -> None:
    """[W22] SIGTERM lets it finish; then the lifespan ends, no thread is left, and the process ends as always."""
    with start(name, tmp_path / "bridge") as running, running.connect() as connection:
        board = Board(running.board)
        get(connection, "/held")
        board.wait("held")
        running.terminate()
        time.sleep(0.3)  # nothing happens that could be waited for
        assert board.get("left") is None
        board.put("go")
        assert read_response(connection) == (200, b"lifespan, left: None")
        status = running.stop()
    assert board.get("left") == ""
    assert "Traceback" not in running.log()
    assert status == normal_status(name, tmp_path / "native")


@pytest.mark.parametrize("name", GRACE)
def test_stream_without_end_is_closed_at_the_servers_end(name: str, tmp_path: Path) -> None:
    """[W22] [W16] The server leaves it, so its iterable is closed, and the lifespan ends after that."""
    with start(name, tmp_path / "bridge", options=GRACE[name]) as running, running.connect() as connection:
        board = Board(running.board)
        get(connection, "/events")
        board.wait("streaming")
        running.stop()
    assert board.get("closed") == "None"
    assert board.get("left") == ""


def test_forty_streams_at_once_hold_up_no_short_request(tmp_path: Path) -> None:
    """[W19] They come to four threads before it, and none of them ever ends."""
    with start("uvicorn-httptools-uvloop", tmp_path / "bridge") as running, contextlib.ExitStack() as stack:
        board = Board(running.board)
        for _ in range(40):
            get(stack.enter_context(running.connect()), "/events")
        begun = time.monotonic()
        connection = stack.enter_context(running.connect())
        get(connection, "/short")
        assert read_response(connection)[0] == 200
        assert time.monotonic() - begun < 2  # half a second where nothing else runs; ten at a second a place
        assert board.get("closed") is None
        stack.close()
        assert any(board.get("closed") for _ in until(LIMIT))
