"""WebSockets on real servers, with real clients and frameworks [A22]."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.apps import Board
from tests.raw_websocket import CLOSE, PING, TEXT, Frame, RawWebSocket, close_data, frame
from tests.servers import LIMIT, SERVERS, Running, until
from tests.test_servers import require, unexpected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GEVENT = [name for name in SERVERS if "gevent" in name and not name.endswith("-tls")]
PLAIN = ["gunicorn-gthread-250", "werkzeug", "cheroot", "wsgiref", *GEVENT]
WITH_TLS = [*PLAIN, "gunicorn-gthread-tls", "werkzeug-tls", "gevent-pywsgi-tls"]

with_tls = pytest.mark.parametrize("lasting_site", WITH_TLS, indirect=True)
"""Of the clients those with one thread: the other one uses a TLS socket in two at once, which CPython 3.11 cannot do
(it hangs on uvicorn's own WebSockets, too)."""


UNCHECKED = ssl.create_default_context()
UNCHECKED.check_hostname, UNCHECKED.verify_mode = False, ssl.CERT_NONE


class Site:
    """A server with an app: its clients, and its log."""

    def __init__(self, name: str, app: str, directory: Path, options: str = "") -> None:
        self.name = name
        self.tls: ssl.SSLContext | None = None
        if name.endswith("-tls"):
            from werkzeug.serving import make_ssl_devcert

            make_ssl_devcert(str(directory / "tls"), cn="localhost")
            self.tls = UNCHECKED
        source = (
            f"from bridge import AsgiToWsgi\nfrom tests.websocket_apps import {app}\n"
            f"application = AsgiToWsgi({app}(){options})\n"
        )
        self.running = Running(SERVERS[name], source, directory)
        self.board = Board(self.running.board)
        self._log_read = 0

    def url(self, path: str, scheme: str = "ws") -> str:
        return f"{scheme}{'s' if self.tls else ''}://127.0.0.1:{self.running.port}{path}"

    def connect(self, path: str, **options: Any) -> ClientConnection:
        client: ClientConnection = connect(
            self.url(path), open_timeout=LIMIT, close_timeout=LIMIT, proxy=None, **options
        )
        return client

    def connect_async(self, path: str) -> Any:
        return connect_async(self.url(path), ssl=self.tls, open_timeout=3 * LIMIT, close_timeout=LIMIT, proxy=None)

    @contextlib.contextmanager
    def raw(self) -> Iterator[RawWebSocket]:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(self.running.connect())
            if self.tls:
                sock = stack.enter_context(self.tls.wrap_socket(sock))
            yield RawWebSocket(sock)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url(path, "http"), verify=UNCHECKED, timeout=LIMIT, trust_env=False)

    def new_log(self) -> str:
        start, self._log_read = self._log_read, self.running.log_size()
        return self.running.log(start)


@pytest.fixture(scope="module", params=PLAIN)
def lasting_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    require(request.param)
    site = Site(request.param, "fastapi_sockets", tmp_path_factory.mktemp(request.param))
    yield site
    site.running.stop()


def complaints(log: str) -> list[str]:
    """What a server or the app has logged as an error, and was not asked for."""
    errors = [line for line in log.splitlines() if "[ERROR]" in line or "ENGINE" in line]
    return errors + unexpected(log)


@pytest.fixture
def site(lasting_site: Site) -> Iterator[Site]:
    """The site. Its log must hold no errors."""
    lasting_site.new_log()
    yield lasting_site
    assert lasting_site.get("/hello").text == "hello"  # it serves on
    log = lasting_site.new_log()
    print(log[-20_000:])
    assert complaints(log) == []


def eventually(get: Callable[[], str | None]) -> str | None:
    for _ in until(LIMIT):
        if (value := get()) is not None:
            return value
    return None


def test_messages_go_both_ways(site: Site) -> None:
    with site.connect("/echo?key=both") as client:
        assert client.response is not None
        assert client.response.headers["X-Reply"] == "yes"
        for message in ("grüße", "", b"\x00\xff", b"x" * 1_000_000, "☃" * 100_000):
            client.send(message)
            assert client.recv(LIMIT) == message
        client.send(["in ", "three ", "fragments"])
        assert client.recv(LIMIT) == "in three fragments"
        assert client.ping().wait(LIMIT)
        client.close(3001, "bye")
    assert eventually(lambda: site.board.get("left-both")) == "3001"


@with_tls
def test_messages_go_both_ways_to_an_asyncio_client(site: Site) -> None:
    async def main() -> None:
        async with asyncio.timeout(3 * LIMIT), site.connect_async("/echo?key=asyncio") as client:
            for message in ("grüße", "", b"\x00\xff", b"x" * 1_000_000, "☃" * 100_000):
                await client.send(message)
                assert await client.recv() == message
            # Both at once, and more than either side takes: TLS has to write while it reads.
            texts = [f"{number}" + "x" * 50_000 for number in range(100)]
            sending = [asyncio.create_task(client.send(text)) for text in texts]
            assert [await client.recv() for _ in texts] == texts
            await asyncio.gather(*sending)
            await client.close(3001, "bye")

    asyncio.run(main())
    assert eventually(lambda: site.board.get("left-asyncio")) == "3001"


def test_subprotocol_is_chosen(site: Site) -> None:
    with site.connect("/echo", subprotocols=["a", "b"]) as client:
        assert client.subprotocol == "b"


def test_state_arrives_and_the_app_closes(site: Site) -> None:
    """[A19]"""
    with site.connect("/state") as client:
        assert json.loads(client.recv(LIMIT)) == {"motto": "from startup", "url": "/state"}
        with pytest.raises(ConnectionClosed) as caught:
            client.recv(LIMIT)
    assert caught.value.rcvd is not None
    assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4001, "that was all")


@with_tls
@pytest.mark.parametrize(("path", "status", "body"), [("/refuse", 403, b""), ("/deny", 401, b"not you")])
def test_handshake_is_denied(site: Site, path: str, status: int, body: bytes) -> None:
    with site.raw() as ws:
        ws.ask(path)
        assert ws.read_answer() == status
        assert ws.take(len(body)) == body


@with_tls
@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Sec_WebSocket_Version": "8"}, 426),
        ({"Sec_WebSocket_Key": None}, 400),
        ({"Sec_WebSocket_Key": "short"}, 400),
        ({"Content_Length": "0", "Sec_WebSocket_Key": "short"}, 400),
    ],
)
def test_wrong_handshake_is_refused(site: Site, changes: dict[str, str | None], status: int) -> None:
    with site.raw() as ws:
        ws.ask("/echo", b"", **changes)
        assert ws.read_answer() == status
        if status == 426:
            assert ws.header("Sec-WebSocket-Version") == "13"
            upgrade = None if site.name == "wsgiref" else "websocket"  # which lets no hop-by-hop header pass
            assert ws.header("Upgrade") == upgrade


def test_what_is_no_handshake_is_plain_http(site: Site) -> None:
    with site.raw() as ws:
        ws.ask("/hello", Connection="keep-alive")
        assert ws.read_answer() == 200


def test_policy_violation_is_said(site: Site) -> None:
    with site.connect("/policy") as client, pytest.raises(ConnectionClosed) as caught:
        client.recv(LIMIT)
    assert caught.value.rcvd is not None
    assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (1008, "a rule")


@with_tls
def test_frames_that_came_with_the_handshake_are_not_lost(site: Site) -> None:
    """In one segment, so that the server has read them before it calls the app."""
    with site.raw() as ws:
        ws.open("/echo?key=early", frame(TEXT, b"early") + frame(PING, b"p") + frame(TEXT, b"split")[:4])
        assert ws.read().data in (b"early", b"p")
        assert ws.read().data in (b"early", b"p")
        ws.sock.sendall(frame(TEXT, b"split")[4:])
        assert ws.read() == Frame(TEXT, b"split")
        ws.close()
        assert ws.read_close() == 1000
        ws.read_end()


@with_tls
@pytest.mark.parametrize("size", [4000, 8200, 16000, 40_000])
def test_long_frames_that_came_with_the_handshake_are_not_lost(site: Site, size: int) -> None:
    """Of which the server has read a part: what TLS has decrypted beyond that, no descriptor tells of."""
    with site.raw() as ws:
        ws.open("/echo", frame(TEXT, b"x" * size))
        assert ws.read() == Frame(TEXT, b"x" * size)


@with_tls
@pytest.mark.parametrize("how", ["end", "reset"])
def test_client_that_vanishes_is_noticed(site: Site, how: str) -> None:
    with site.raw() as ws:
        ws.open(f"/echo?key={how}")
        ws.send(TEXT, b"x")
        ws.read()
        if how == "reset":
            ws.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ws.sock.close()
    assert eventually(lambda: site.board.get(f"left-{how}")) == "1006"


@with_tls
@pytest.mark.parametrize("how", ["reading", "stalled"])
def test_client_that_resets_under_a_flood_ends_it(site: Site, how: str) -> None:
    """While the app sends, and while it waits for the client to read."""
    with site.raw() as ws:
        ws.open(f"/flood?key={how}")
        ws.read()
        if how == "stalled":
            time.sleep(0.5)  # enough for what the kernel holds
        ws.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ws.sock.close()
    assert eventually(lambda: site.board.get(f"flooded-{how}")) is not None


def test_client_that_vanishes_from_a_stream_ends_it(site: Site) -> None:
    with site.raw() as ws:
        ws.open("/ticks")
        assert ws.read() == Frame(TEXT, b"0")
        assert ws.read() == Frame(TEXT, b"1")


def test_a_frameworks_word_for_a_client_that_left_is_no_error(site: Site) -> None:
    with site.connect("/naive") as client:
        client.send("x")
        assert client.recv(LIMIT) == "x"


@with_tls
def test_threads_are_free_again(site: Site) -> None:
    """More connections one after the other than the server has threads; some end in bad ways."""
    for number in range(40):
        with site.raw() as ws:
            ws.open("/echo")
            ws.send(TEXT, b"x")
            assert ws.read() == Frame(TEXT, b"x")
            if number % 4 == 0:
                ws.send(3)
                assert ws.read_close() == 1002
            elif number % 4 == 1:
                ws.close()
                assert ws.read_close() == 1000


def test_members_of_a_room_hear_each_other(site: Site) -> None:
    """[A16]: on one loop, whichever of their threads runs it."""
    with site.connect("/room/anna") as anna, site.connect("/room/ben") as ben:
        ben.send("here I am")
        assert anna.recv(LIMIT) == ben.recv(LIMIT) == "ben: here I am"
        anna.send("hello")
        assert anna.recv(LIMIT) == ben.recv(LIMIT) == "anna: hello"


@pytest.mark.parametrize("path", ["/error", "/broken"])
def test_apps_error_is_logged(lasting_site: Site, path: str) -> None:
    lasting_site.new_log()
    if path == "/error":
        with lasting_site.raw() as ws:
            ws.ask(path)
            assert ws.read_answer() == 500
    else:
        with lasting_site.connect(path) as client, pytest.raises(ConnectionClosed) as closed:
            client.recv(LIMIT)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1011
    log = ""
    for _ in until(LIMIT):
        log += lasting_site.new_log()
        if "OnPurpose" in log:
            break
    assert "OnPurpose" in log
    assert unexpected(log) == []


@pytest.mark.parametrize(
    ("lasting_site", "count"),
    [("gunicorn-gthread-250", 200), ("gunicorn-gthread-tls", 20), *((name, 200) for name in GEVENT[:1])],
    indirect=["lasting_site"],
)
def test_many_connections_at_once(site: Site, count: int) -> None:
    """As many as the server has threads, less a few."""

    async def talk(number: int, all_here: asyncio.Barrier) -> None:
        async with site.connect_async("/echo") as client:
            await all_here.wait()
            for message in (f"{number}", b"x" * 10_000, f"{number} again"):
                await client.send(message)
                assert await asyncio.wait_for(client.recv(), 3 * LIMIT) == message

    async def main() -> None:
        all_here = asyncio.Barrier(count)
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(talk(number, all_here))

    asyncio.run(main())


@pytest.mark.parametrize("lasting_site", ["gunicorn-gthread-250"], indirect=True)
def test_gunicorn_writes_a_101_into_its_access_log(site: Site) -> None:
    with site.connect("/echo?key=log"):
        pass
    for _ in until(LIMIT):
        if '"GET /echo?key=log HTTP/1.1" 101' in site.running.log():
            return
    pytest.fail(site.running.log())


@pytest.mark.parametrize(
    "server", ["gunicorn-gthread", "gunicorn-sync", *(name for name in GEVENT if "gunicorn" in name)]
)
def test_gunicorns_end_closes_connections_with_1012(tmp_path: Path, server: str) -> None:
    """[A20]: at once, and not after its time of grace, which is 30 seconds, and at the end of which it kills."""
    require(server)
    site = Site(server, "fastapi_sockets", tmp_path)
    try:
        with site.connect("/echo") as client:
            client.send("x")
            assert client.recv(LIMIT) == "x"
            os.kill(site.running.pid, signal.SIGTERM)
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(LIMIT)
    finally:
        status = site.running.stop()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1012
    assert status == 0
    assert site.board.get("shutdown") is not None
    assert complaints(site.running.log()) == []


def test_interrupt_of_gunicorns_sync_worker_closes_its_connection(tmp_path: Path) -> None:
    """[A20]: its thread is the connection's, and would write its 500 page into it.

    With 1012; with 1011, where the interrupt came in the middle of the app's own code.
    """
    site = Site("gunicorn-sync", "fastapi_sockets", tmp_path)
    try:
        with site.raw() as ws:
            ws.open("/echo", frame(TEXT, b"x"))
            assert ws.read() == Frame(TEXT, b"x")
            os.kill(site.running.pid, signal.SIGQUIT)
            assert ws.read() in (Frame(CLOSE, close_data(1012)), Frame(CLOSE, close_data(1011)))
            ws.read_end()
    finally:
        site.running.stop()


def test_starlettes_endpoint_on_gunicorns_sync_worker(tmp_path: Path) -> None:
    """Each of its workers has one thread, which is all that is needed."""
    site = Site("gunicorn-sync", "starlette_sockets", tmp_path)
    try:
        for number in range(3):
            with site.connect("/echo") as client:
                client.send(json.dumps(number))
                assert json.loads(client.recv(LIMIT)) == {"got": number}
        assert eventually(lambda: site.board.get("starlette-left")) == "1000"
        assert site.get("/hello").text == "hello"
    finally:
        site.running.stop()
    assert complaints(site.running.log()) == []


def test_channels_chat_on_gthread(tmp_path: Path) -> None:
    """Its layer in memory needs one loop for all connections; Channels knows no lifespan."""
    site = Site("gunicorn-gthread", "channels_chat", tmp_path)
    origin = site.url("", "http")
    try:
        for path in ("/ws/chat/lobby/", "/ws/sync/"):
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(site.connect(path, origin=origin)) for _ in range(5)]
                for number, client in enumerate(clients):
                    client.send(f"message {number}")
                    assert [other.recv(LIMIT) for other in clients] == [f"message {number}"] * 5
        assert eventually(lambda: site.board.get("left-chat_lobby")) == "1000"
        assert site.get("/hello").text == "hello"
        with site.raw() as ws:
            ws.ask("/ws/chat/lobby/", Origin="https://evil.example")
            assert ws.read_answer() == 403
    finally:
        site.running.stop()
    assert complaints(site.running.log()) == []


def test_server_without_sockets_serves_plain_http(tmp_path: Path) -> None:
    """waitress shows its socket to nobody."""
    site = Site("waitress", "fastapi_sockets", tmp_path)
    try:
        with site.raw() as ws:
            ws.ask("/hello")
            assert ws.read_answer() == 200
    finally:
        site.running.stop()
    assert "install" not in site.running.log()
