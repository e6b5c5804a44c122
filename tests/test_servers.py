"""Real apps on real servers: what a user of the framework and of the server expects, through bridge.

The tables say what runs on what, tests/servers.py how each server is started, tests/apps.py what the apps do. A server
that is not installed is skipped; with BRIDGE_REQUIRE_SERVERS=1 it is a failure.

What a server or a framework cannot do is not listed by hand. Its native pair is asked the same, see
`Site.as_sent_or_as_natively`: a bare app of the server's own kind on that server, and the same app on a server of its
own kind, without bridge.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes

import httpx
import pytest

from tests.apps import BLOCK, DOWNLOAD_SIZE, EVENTS, SLOW, Board
from tests.servers import LIMIT, SERVERS, Running, read_response, until

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

# What runs on what

WSGI_APPS_ON_ASGI_SERVERS = {
    "flask": "uvicorn-h11 uvicorn-httptools-uvloop granian-asgi daphne gunicorn-asgi",
    "django": "hypercorn-asyncio hypercorn-trio",
}
ASGI_APPS_ON_WSGI_SERVERS = {
    "fastapi": "gunicorn-sync gunicorn-gthread waitress granian-wsgi",
    "starlette": "cheroot werkzeug",
    "django": "gunicorn-gthread wsgiref gunicorn-gevent",
}

WITHOUT_LIFESPAN = {"django_asgi"}

STEPS = ("startup", "shutdown")

# As the frameworks and bridge call it.
CLIENT_LEFT = re.compile(r"ClientDisconnect|UnreadablePostError")
# What a log may tell: what was asked for, and that a server could not write to a client that had left.
EXPECTED = re.compile(rf"OnPurpose|{CLIENT_LEFT.pattern}|BrokenPipeError|ConnectionResetError")
TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)", re.MULTILINE)
COMPLAINT = re.compile(r".*(?:never retrieved|never awaited|was destroyed|Exception ignored|Group Traceback).*")


@dataclass(frozen=True)
class Cell:
    """One line of the tables."""

    app: str
    wrapper: str
    server: str

    @property
    def application(self) -> str:
        """What the user writes in asgi.py or wsgi.py."""
        # An ASGI app brings its own lifespan.
        options = ", lifespan=lifespan" if self.wrapper == "WsgiToAsgi" else ""
        return (
            f"from bridge import {self.wrapper}\n"
            f"from tests.apps import {self.app}, lifespan\n"
            f"application = {self.wrapper}({self.app}(){options})\n"
        )

    @property
    def native_app(self) -> tuple[str, str]:
        """A bare app of the server's own kind, and the server."""
        return ("bare_asgi" if self.wrapper == "WsgiToAsgi" else "bare_wsgi"), self.server

    @property
    def native_server(self) -> tuple[str, str]:
        """The app, and a server of its own kind."""
        return self.app, "gunicorn-gthread" if self.wrapper == "WsgiToAsgi" else "uvicorn-h11"


def cells(table: dict[str, str], kind: str, wrapper: str) -> list[Any]:
    return [
        pytest.param(Cell(f"{framework}_{kind}", wrapper, server), id=f"{framework}-{server}")
        for framework, servers in table.items()
        for server in servers.split()
    ]


CELLS = cells(WSGI_APPS_ON_ASGI_SERVERS, "wsgi", "WsgiToAsgi") + cells(ASGI_APPS_ON_WSGI_SERVERS, "asgi", "AsgiToWsgi")


def require(server: str) -> None:
    missing = SERVERS[server].missing
    if missing and os.environ.get("BRIDGE_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{server} needs {', '.join(missing)}")
    if missing:
        pytest.skip(f"{server} needs {', '.join(missing)}")


class Site:
    """A cell of the tables at work: started when it is needed first, and again when a test has stopped it."""

    def __init__(self, cell: Cell, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.cell = cell
        self._tmp_path_factory = tmp_path_factory
        self._started: dict[str, Running] = {}
        self._log_read = 0  # bytes

    @property
    def has_wsgi_app(self) -> bool:
        return self.cell.wrapper == "WsgiToAsgi"

    @property
    def running(self) -> Running:
        return self._run(self.cell.application, self.cell.server)

    @property
    def board(self) -> Board:
        return Board(self.running.board)

    @property
    def native(self) -> Running:
        """The server with a bare app of its own kind."""
        return self._run_natively(*self.cell.native_app)

    def as_sent_or_as_natively(self, sent: object, ask: Callable[[Running], object]) -> object:
        """Fail unless the app gets what was sent, or else no more without bridge, because of its server or by itself.

        Returns:
            What it gets.
        """
        seen = ask(self.running)
        if seen != sent:
            natively = ask(self.native)
            if seen != natively:
                assert (seen, natively) == (ask(self._run_natively(*self.cell.native_server)), sent)
        return seen

    def new_log(self) -> str:
        """What was logged since the last call."""
        running = self._started.get(self.cell.application)
        if running is None:
            return ""
        start, self._log_read = self._log_read, running.log_size()
        return running.log(start)

    def stop(self) -> None:
        with contextlib.ExitStack() as stack:
            for running in self._started.values():
                stack.callback(running.stop)

    def _run_natively(self, app: str, server: str) -> Running:
        return self._run(f"from tests.apps import {app}\napplication = {app}()\n", server)

    def _run(self, application: str, server: str) -> Running:
        running = self._started.get(application)
        if running is None or running.is_stopped:
            running = Running(SERVERS[server], application, self._tmp_path_factory.mktemp(server))
            self._started[application] = running
            if application == self.cell.application:
                self._log_read = 0
        return running


@pytest.fixture(scope="module", params=CELLS)
def lasting_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(request.param, tmp_path_factory)
    require(site.cell.server)
    yield site
    site.stop()


@pytest.fixture
def site(lasting_site: Site) -> Iterator[Site]:
    """The site, up and running. Its log is shown if the test fails, and must hold no errors but those asked for."""
    assert not lasting_site.running.is_stopped
    lasting_site.new_log()
    yield lasting_site
    log = lasting_site.new_log()
    print(log[-20_000:])
    assert unexpected(log) == []


def unexpected(log: str) -> list[str]:
    errors = [error for error in TRACEBACK.findall(log) if not EXPECTED.search(error)]
    return errors + COMPLAINT.findall(log)


@pytest.fixture
def client(site: Site) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.running.url, timeout=LIMIT, trust_env=False) as client:
        yield client


_numbers = itertools.count()


@pytest.fixture
def key() -> str:
    """What no other test uses on the board."""
    return f"key{next(_numbers)}"


def eventually(client: httpx.Client, name: str, seconds: float = LIMIT) -> str:
    """What the app puts on the board by that name, asked for by requests: the server is usable, then."""
    for _ in until(seconds, pause=0.05):
        response = client.get(f"/board/{name}")
        if response.status_code == 200:
            return response.text
    raise AssertionError(f"{name} was not on the board within {seconds:g} s")


def send(connection: socket.socket, *lines: str, body: bytes = b"") -> None:
    head = "".join(f"{line}\r\n" for line in (lines[0], "Host: tests", *lines[1:]))
    connection.sendall(head.encode("latin-1") + b"\r\n" + body)


def receive_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        chunk = connection.recv(65536)
        assert chunk, f"the connection ended after {received!r}"
        received += chunk
    return received


# Requests


def test_query_and_unicode_path_arrive(site: Site, client: httpx.Client) -> None:
    """[W2] [W3] [A1]"""
    seen = client.get("/echo/grüße/☃?q=ä&q=2&empty=").json()
    assert seen["path"] == "/echo/grüße/☃"
    assert seen["raw_path"] == quote("/echo/grüße/☃")
    assert seen["query"] == "q=%C3%A4&q=2&empty="


@pytest.mark.parametrize("what", ["path", "path_info", "raw_path", "query"])
def test_escapes_arrive_exactly(site: Site, what: str) -> None:
    """[W2] [W3] [A1]"""
    raw_path, query = "/echo/a%2Fb/%FF/c%20d", "x=%2F%FF+%20"
    path = unquote_to_bytes(raw_path)
    sent = {
        "path": path.decode("utf-8", "replace"),
        "path_info": path.decode("latin-1") if site.has_wsgi_app else None,  # an ASGI app has none
        "raw_path": raw_path,
        "query": query,
    }

    def ask(running: Running) -> object:
        with running.connect() as connection:
            send(connection, f"GET {raw_path}?{query} HTTP/1.1", "Connection: close")
            return json.loads(read_response(connection)[1]).get(what)

    site.as_sent_or_as_natively(sent[what], ask)


def test_headers_go_both_ways(client: httpx.Client) -> None:
    """[W4] [W11] [A1] [A6]"""
    response = client.get("/echo/it", headers={"X-Ask": "what is it?", "X-Empty": ""})
    seen = response.json()["headers"]
    assert ["x-ask", "what is it?"] in seen
    assert ["x-empty", ""] in seen
    assert response.headers["X-Reply"] == "what is it?"


def test_repeated_request_header_loses_no_value(site: Site) -> None:
    """[W4] [A1]"""

    def ask(running: Running) -> object:
        with running.connect() as connection:
            send(connection, "GET /echo/it HTTP/1.1", "X-Many: 1", "X-Many: 2", "Connection: close")
            seen = json.loads(read_response(connection)[1])["headers"]
        return ",".join(value for name, value in seen if name == "x-many").replace(" ", "")

    site.as_sent_or_as_natively("1,2", ask)


def test_headers_that_could_pass_for_others_do_not_reach_a_wsgi_app(site: Site) -> None:
    """[W4]"""
    with site.running.connect() as connection:
        send(connection, "GET /echo/it HTTP/1.1", "X_User: admin", "Proxy: http://evil", "Connection: close")
        seen = dict(json.loads(read_response(connection)[1])["headers"])
    assert "proxy" not in seen
    if site.has_wsgi_app:
        assert "x-user" not in seen


def test_repeated_set_cookie_stays_repeated(client: httpx.Client) -> None:
    """[W11] [A6]"""
    cookies = client.get("/echo/it").headers.get_list("Set-Cookie")
    assert [cookie.partition(";")[0] for cookie in cookies] == ["a=1", "b=2"]


def test_form_arrives(client: httpx.Client) -> None:
    form = {"name": "Zoë & Co.", "text": "1 + 1 = 2\r\n%"}
    assert client.post("/form", data=form).json() == form


def test_json_arrives(client: httpx.Client) -> None:
    value = {"name": "Zoë", "list": [1, 2.5, None, True], "nested": {"☃": "\u0000"}}
    assert client.post("/json", json=value).json() == value


def test_multipart_of_5_mb_arrives_whole(client: httpx.Client) -> None:
    """[W7] [A3]"""
    content = BLOCK * 80
    response = client.post("/multipart", data={"other": "field"}, files={"file": ("grüße.bin", content)})
    assert response.json() == {
        "name": "grüße.bin",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_chunked_request_body_arrives_whole(site: Site, key: str) -> None:
    """[W6] [W7] [A3]"""
    blocks = [b"first", BLOCK, b"last"]
    content = b"".join(blocks)
    body = b"".join(b"%x\r\n%s\r\n" % (len(block), block) for block in (*blocks, b""))

    def ask(running: Running) -> object:
        with running.connect() as connection:
            send(connection, f"POST /upload/{key} HTTP/1.1", "Transfer-Encoding: chunked", "Connection: close")
            with contextlib.suppress(ConnectionError):  # the answer of one that knows no chunks comes before their end
                connection.sendall(body)
            return json.loads(read_response(connection)[1])

    site.as_sent_or_as_natively({"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}, ask)


# Responses


def test_answer_to_head_has_no_body(site: Site) -> None:
    """[W10] [A6]"""
    with site.running.connect() as connection:
        send(connection, "HEAD /hello HTTP/1.1", "Connection: close")
        received = receive_until(connection, b"\r\n\r\n")
        while chunk := connection.recv(65536):
            received += chunk
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.split()[1] == b"200"
    assert rest == b""


def test_connection_serves_on_after_a_head_request(client: httpx.Client) -> None:
    assert client.head("/hello").content == b""
    assert client.get("/hello").text == "hello"


def test_204_has_no_body(client: httpx.Client) -> None:
    response = client.get("/empty")
    assert response.status_code == 204
    assert response.content == b""
    assert client.get("/hello").text == "hello"


def test_404_of_the_framework_comes_through(client: httpx.Client) -> None:
    assert client.get("/nowhere").status_code == 404


def test_exception_is_a_500_and_in_the_log(site: Site, client: httpx.Client) -> None:
    """[W15] [A9]"""
    logged = site.running.log_size()
    assert client.get("/error").status_code == 500
    assert client.get("/hello").text == "hello"
    assert any("OnPurpose: before the response" in site.running.log(logged) for _ in until(LIMIT))


def test_exception_in_mid_response_aborts_it(site: Site, client: httpx.Client) -> None:
    """[W15] [A9]"""

    def ask(running: Running) -> str:
        with running.connect(timeout=2.0) as connection:
            send(connection, "GET /broken HTTP/1.1")
            try:
                read_response(connection)
            except (http.client.IncompleteRead, ConnectionError):
                return "aborted"
            except TimeoutError:
                return "as if more would come"
        return "as if it were whole"

    site.as_sent_or_as_natively("aborted", ask)
    assert client.get("/hello").text == "hello"


def test_download_of_20_mb_arrives_whole(client: httpx.Client) -> None:
    """[W12] [W17] [A7] [A13]"""
    digest, expected = hashlib.sha256(), hashlib.sha256()
    with client.stream("GET", "/download") as response:
        for chunk in response.iter_raw():
            digest.update(chunk)
    for _ in range(DOWNLOAD_SIZE // len(BLOCK)):
        expected.update(BLOCK)
    assert digest.digest() == expected.digest()


def test_first_event_arrives_before_the_second_is_made(site: Site, client: httpx.Client, key: str) -> None:
    """[W12] [A7]"""
    with site.running.connect() as connection:
        send(connection, f"GET /events/{key} HTTP/1.1")
        assert EVENTS[1] not in receive_until(connection, EVENTS[0])
        assert client.post(f"/board/{key}-confirmed").status_code == 204
        receive_until(connection, EVENTS[1])


# Clients that leave, wait or come in crowds


def test_stream_is_closed_when_its_client_leaves(site: Site, client: httpx.Client, key: str) -> None:
    """[W13] [W16] [A10]"""
    with site.running.connect() as connection:
        send(connection, f"GET /ticks/{key} HTTP/1.1")
        receive_until(connection, b"tick")
    eventually(client, f"{key}-closed", 5.0)


def test_app_hears_that_its_client_left_in_mid_upload(site: Site, client: httpx.Client, key: str) -> None:
    """[W9] [A4]"""
    streams = site.as_sent_or_as_natively(True, answers_before_the_body)
    with site.running.connect() as connection:
        send(connection, f"POST /upload/{key} HTTP/1.1", f"Content-Length: {400 * len(BLOCK)}", body=8 * BLOCK)
        if streams:
            assert any(site.board.get(f"{key}-begun") is not None for _ in until(LIMIT))
    if streams:
        assert CLIENT_LEFT.match(eventually(client, f"{key}-failed"))
    assert client.get("/hello").text == "hello"
    assert site.board.get(f"{key}-whole") is None


def answers_before_the_body(running: Running) -> bool:
    with running.connect(timeout=0.5) as connection:
        send(connection, "POST /refuse HTTP/1.1", f"Content-Length: {800 * len(BLOCK)}", body=b"begun")
        with contextlib.suppress(TimeoutError):
            return read_response(connection)[0] == 413
    return False


def test_refusal_does_not_wait_for_the_body(site: Site, client: httpx.Client) -> None:
    """[W7]"""
    site.as_sent_or_as_natively(True, answers_before_the_body)
    assert client.get("/hello").text == "hello"


def test_refusal_comes_in_place_of_100_continue(site: Site) -> None:
    """[W7]"""

    def refuses(running: Running) -> bool:
        with running.connect(timeout=0.5) as connection:
            send(connection, "POST /refuse HTTP/1.1", "Content-Length: 10", "Expect: 100-continue")
            with contextlib.suppress(TimeoutError):  # not every server knows of 100
                # To its end: hypercorn on trio falls over a client that leaves while it still sends.
                return read_response(connection)[0] == 413
        return False

    site.as_sent_or_as_natively(True, refuses)


def test_20_slow_requests_are_served_at_once(site: Site) -> None:
    """[W19] [A15] [A17]"""
    if not SERVERS[site.cell.server].parallel:
        pytest.skip("the server takes one request at a time")
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(site.running.connect()) for _ in range(20)]
        start = time.monotonic()
        for connection in connections:
            send(connection, "GET /slow HTTP/1.1")
        statuses = {read_response(connection)[0] for connection in connections}
        elapsed = time.monotonic() - start
    assert statuses == {200}
    assert elapsed < 20 * SLOW / 2


# The life of a server


def test_state_of_the_lifespan_reaches_the_app(site: Site, client: httpx.Client) -> None:
    """[W22] [A19]"""
    seen = client.get("/echo/it").json()
    if site.cell.app not in WITHOUT_LIFESPAN and Board(site.native.board).get("native-startup") is not None:
        assert seen["started_in"] == seen["pid"]


def test_sigterm_ends_the_lifespan_and_the_server(site: Site, client: httpx.Client) -> None:
    """[W22] [A20]"""
    assert client.get("/hello").text == "hello"
    running, native = site.running, site.native
    with native.connect() as connection:
        send(connection, "GET /hello HTTP/1.1", "Connection: close")
        assert read_response(connection) == (200, b"hello")

    status = running.stop()

    # Some end by the signal itself, with or without a chance for anybody to clean up.
    native_status = native.stop()
    assert status in (0, native_status)
    assert unexpected(running.log()) == []
    board, native_board = Board(running.board), Board(native.board)
    if site.cell.app not in WITHOUT_LIFESPAN and native_board.get("native-startup") is not None:
        ends = native_board.get("native-shutdown") is not None
        assert_ran_once_in_each_process(board, ends=ends)


def assert_ran_once_in_each_process(board: Board, *, ends: bool) -> list[str]:
    startups, shutdowns = ([name.partition("-")[2] for name in board.names(f"{step}-")] for step in STEPS)
    pids = [startup.partition("-")[0] for startup in startups]
    assert startups == [f"{pid}-0" for pid in dict.fromkeys(pids)] != []
    if ends:
        assert shutdowns == startups
    return pids


def test_lifespan_runs_once_in_each_worker(tmp_path: Path) -> None:
    """[A19] [A20]"""
    server = "gunicorn-gthread-2-workers"
    require(server)
    with Running(SERVERS[server], Cell("fastapi_asgi", "AsgiToWsgi", server).application, tmp_path) as running:
        seen: set[int] = set()
        for _ in until(LIMIT):
            seen.add(httpx.get(f"{running.url}/echo/it", trust_env=False).json()["started_in"])
            if len(seen) == 2:
                break
        assert running.stop() == 0
    assert assert_ran_once_in_each_process(Board(running.board), ends=True) == sorted(map(str, seen))
