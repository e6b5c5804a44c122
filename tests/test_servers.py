"""Real apps on real servers: what a user of the framework and of the server expects, through bridge.

The tables say what runs on what, tests/servers.py how each server is started, tests/apps.py what the apps do. A server
that is not installed is skipped; with BRIDGE_REQUIRE_SERVERS=1 it is a failure.

What a server or a framework cannot do is not listed by hand. Its native pair is asked the same, see
`Site.as_sent_or_as_natively`: a bare app of the server's own kind on that server, and the same app on a server of its
own kind, without bridge.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import os
import re
import ssl
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes

import httpx
import pytest

from tests.apps import BLOCK, DOCUMENT, DOWNLOAD_SIZE, ETAG, EVENTS, HINT, TRAILER, Board, Like
from tests.servers import LIMIT, MOUNT, SERVERS, Running, Server, read_response, trusting, until
from tests.table import WORKS, column_of, marks_in, row_of

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from h2.connection import H2Connection

# What runs on what. CherryPy takes "HTTP/2", as it is named without a minor version, for no protocol, and answers 500:
# it is driven on daphne, and `test_cherrypy_over_http2` asks what hypercorn makes of it by itself.

WSGI_APPS_ON_ASGI_SERVERS = {
    "flask": "uvicorn-h11 gunicorn-asgi",
    "django": "uvicorn-httptools-uvloop hypercorn-trio",
    "pyramid": "hypercorn-asyncio",
    "falcon": "granian-asgi",
    "bottle": "hypercorn-http2",
    "cherrypy": "daphne",
    "dash": "gunicorn-uvicorn-worker",
}
ASGI_APPS_ON_WSGI_SERVERS = {
    "fastapi": "gunicorn-sync gunicorn-gthread waitress uwsgi-threads nginx-gunicorn-tcp",
    "starlette": "mod_wsgi cheroot gevent-pywsgi nginx-gunicorn-unix-streaming",
    "django": "uwsgi-processes django-runserver gunicorn-gevent",
    "channels": "gunicorn-preload",
    "quart": "werkzeug",
    "litestar": "granian-wsgi",
    "falcon": "wsgiref",
}
# What differs from those above in one respect, and is asked for little more than that.
MORE_WSGI_SERVERS = "gunicorn-http2 nginx-gunicorn-tcp-streaming nginx-gunicorn-unix"
ASGI_SERVERS_OF_2_WORKERS = (
    "uvicorn-2-workers hypercorn-2-workers granian-asgi-2-workers gunicorn-asgi-2-workers "
    "gunicorn-uvicorn-worker-2-workers"
)
WSGI_SERVERS_OF_2_WORKERS = (
    "gunicorn-gthread-2-workers gunicorn-preload uwsgi-processes uwsgi-lazy-apps mod_wsgi-2-processes "
    "granian-wsgi-2-workers"
)

STEPS = ("startup", "shutdown")
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

# As the frameworks and bridge call it.
CLIENT_LEFT = re.compile(r"ClientDisconnect|UnreadablePostError|CancelledError|client disconnected prematurely")
# What a log may tell: what was asked for, what Pyramid and Litestar make of it, and that a server could not write to a
# client that had left.
EXPECTED = re.compile(
    rf"OnPurpose|{CLIENT_LEFT.pattern}|pyramid\.(httpexceptions\.HTTPNotFound|exceptions\.URLDecodeError)"
    r"|LitestarException: Exception caught after response started"
    r"|BrokenPipeError|ConnectionResetError|SSLEOFError"
)
TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)", re.MULTILINE)
# hypercorn forgets a stream that was answered, and falls over what its client has sent for it until then.
LATE_DATA = re.compile(
    r"^  \+ Exception Group Traceback .*\n(?:  [ |+].*\n)+?"
    r".*hypercorn/protocol/h2\.py.*\n.*await self\.streams\[event\.stream_id\].*\n(?:.*~.*\n)?    \| KeyError: \d+\n",
    re.MULTILINE,
)
# In groups Quart and Django raise from CPython 3.12 on, where newer ones of them are installed.
GROUP = re.compile(r"^  \+ Exception Group Traceback .*\n(?:  [ |+].*\n)+", re.MULTILINE)
GROUPED = re.compile(r"^ +\| (?!ExceptionGroup: )(\S.*)\n +\+-", re.MULTILINE)
# On CPython 3.14 and newer the end of cheroot's writer is heard, which has kept what its client has not taken.
UNWRITTEN = re.compile(
    r"^Exception ignored while calling deallocator <function IOBase.__del__ .*\nTraceback .*\n(?:  .*\n)+?"
    r".*cheroot/makefile\.py.*, in _flush_unlocked\n(?:  .*\n)+(?:OSError|BrokenPipeError|ConnectionResetError): .*\n",
    re.MULTILINE,
)
# What comes without a traceback; the last ones are errors of the logger "bridge".
COMPLAINT = re.compile(
    r".*(?:never retrieved|never awaited|was destroyed|Exception ignored|Group Traceback"
    r"|its client has left and it was cancelled|the app has not ended within|the app cannot be shut down"
    r"|the app refused to stop|the shutdown leaves alone).*"
)


@dataclass(frozen=True)
class Cell:
    """One line of the tables.

    Attributes:
        mounted: Whether the app is below MOUNT, and on a unix socket, by the server's own means if it has any.
    """

    app: str
    wrapper: str
    server: str
    mounted: bool = False

    @property
    def noted(self) -> tuple[str, str, str]:
        """What tests/table.py asks of it. A report has to get from one process to another."""
        return self.app, self.wrapper, self.server

    @property
    def application(self) -> str:
        """What the user writes in asgi.py or wsgi.py."""
        # An ASGI app brings its own lifespan.
        options = ", lifespan=lifespan" if self.wrapper == "WsgiToAsgi" else ""
        return self._module(f"from bridge import {self.wrapper}", f"{self.wrapper}({self.app}(){options})")

    @property
    def native_app(self) -> tuple[str, str]:
        """A bare app of the server's own kind, and the server."""
        app = "bare_asgi" if self.wrapper == "WsgiToAsgi" else "bare_wsgi"
        return self._module(f"from tests.apps.{app[-4:]} import {app}", f"{app}()"), self.server

    @property
    def native_server(self) -> tuple[str, str]:
        """The app, and a server of its own kind."""
        noting = f"noting_{self.app[-4:]}"
        server = "gunicorn-gthread" if self.app.endswith("wsgi") else "uvicorn-h11"
        return self._module(f"from tests.apps import {noting}", f"{noting}({self.app}())"), server

    def _module(self, imports: str, application: str) -> str:
        kind = self.app[-4:]
        lines = [imports, f"from tests.apps.{kind} import {self.app}", "from tests.apps import lifespan"]
        if self.mounted and not SERVERS[self.server].mounted:
            lines.append("from tests.apps import below")
            application = f"below({MOUNT!r}, {application}, {self.wrapper == 'WsgiToAsgi'})"
        return "\n".join([*lines, f"application = {application}", ""])


def cells(table: dict[str, str], kind: str, wrapper: str) -> list[Any]:
    return [
        pytest.param(Cell(f"{framework}_{kind}", wrapper, server), id=f"{framework}-{server}")
        for framework, servers in table.items()
        for server in servers.split()
    ]


def mounted_cells(table: dict[str, str], more: str, kind: str, wrapper: str) -> list[Any]:
    servers = [*itertools.chain.from_iterable(servers.split() for servers in table.values()), *more.split()]
    return [pytest.param(Cell(f"bare_{kind}", wrapper, server, mounted=True), id=server) for server in servers]


CELLS = cells(WSGI_APPS_ON_ASGI_SERVERS, "wsgi", "WsgiToAsgi") + cells(ASGI_APPS_ON_WSGI_SERVERS, "asgi", "AsgiToWsgi")
DASH_CELLS = [cell for cell in CELLS if cell.values[0].app == "dash_wsgi"]
MOUNTED_CELLS = [
    *mounted_cells(WSGI_APPS_ON_ASGI_SERVERS, "", "wsgi", "WsgiToAsgi"),
    *mounted_cells(ASGI_APPS_ON_WSGI_SERVERS, MORE_WSGI_SERVERS, "asgi", "AsgiToWsgi"),
]
CELLS_OF_2_WORKERS = [
    *cells({"flask": ASGI_SERVERS_OF_2_WORKERS}, "wsgi", "WsgiToAsgi"),
    *cells({"fastapi": WSGI_SERVERS_OF_2_WORKERS}, "asgi", "AsgiToWsgi"),
]


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
        self.note: Callable[[tuple[str, object]], None] = lambda _: None  # for tests/table.py

    @property
    def has_wsgi_app(self) -> bool:
        return self.cell.wrapper == "WsgiToAsgi"

    @property
    def prefix(self) -> str:
        """What a path begins with, if the app is mounted."""
        return "" if SERVERS[self.cell.server].is_stripped else MOUNT

    @property
    def running(self) -> Running:
        return self._run(self.cell.application, self.cell.server)

    @property
    def board(self) -> Board:
        return Board(self.running.board)

    @property
    def native(self) -> Running:
        """The server with a bare app of its own kind."""
        return self._run(*self.cell.native_app)

    @property
    def on_native_server(self) -> Running:
        """The app on a server of its own kind."""
        return self._run(*self.cell.native_server)

    def as_sent_or_as_natively(self, sent: object, ask: Callable[[Running], object]) -> object:
        """Fail unless the app gets what was sent, or else no more without bridge, because of its server or by itself.

        Returns:
            What it gets.
        """
        seen = ask(self.running)
        if seen == sent:
            return seen
        natively = ask(self.native)
        if seen != natively:
            assert (seen, natively) == (ask(self.on_native_server), sent)
        self.note(("limit", "of the server" if seen == natively else "of the framework"))
        return seen

    def where_the_server_can(self, ask: Callable[[Running], bool]) -> bool:
        """Fail unless the app can what a bare app of the server's own kind can, if that can it.

        For what takes long to find out that it is not so.

        Returns:
            Whether the server can.
        """
        can = ask(self.native)
        if can:
            assert ask(self.running)
        else:
            self.note(("limit", "of the server"))
        return can

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
                running.terminate()  # all of them, before one is waited for
                stack.callback(running.stop)

    def _run(self, application: str, server: str) -> Running:
        running = self._started.get(application)
        if running is None or running.is_stopped:
            running = run(self.cell, application, server, self._tmp_path_factory.mktemp(server))
            self._started[application] = running
            if application == self.cell.application:
                self._log_read = 0
        return running


def run(cell: Cell, application: str, server: str, directory: Path) -> Running:
    kind = SERVERS[server]
    unix = cell.mounted and bool(kind.unix) and not kind.behind and not kind.tls
    return Running(kind, application, directory, unix=unix, mounted=cell.mounted)


@pytest.fixture(scope="module", params=CELLS)
def lasting_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(request.param, tmp_path_factory)
    require(site.cell.server)
    yield site
    site.stop()


@pytest.fixture
def site(request: pytest.FixtureRequest, lasting_site: Site) -> Iterator[Site]:
    """The site, up and running. Its log is shown if the test fails, and must hold no errors but those asked for."""
    yield from watched(lasting_site, request)


@pytest.fixture(scope="module", params=MOUNTED_CELLS)
def lasting_mounted_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(request.param, tmp_path_factory)
    require(site.cell.server)
    yield site
    site.stop()


@pytest.fixture
def mounted_site(request: pytest.FixtureRequest, lasting_mounted_site: Site) -> Iterator[Site]:
    """A bare app below MOUNT, on a unix socket where the server can."""
    yield from watched(lasting_mounted_site, request)


def watched(site: Site, request: pytest.FixtureRequest) -> Iterator[Site]:
    site.note = request.node.user_properties.append
    site.note(("cell", site.cell.noted))
    assert not site.running.is_stopped
    site.new_log()
    yield site
    log = site.new_log()
    print(log[-20_000:])
    if any(name == "limit" for name, _ in request.node.user_properties):
        limits_noted.append((row_of(site.cell.server), column_of(request.node.nodeid)))
    assert unexpected(log) == []


def unexpected(log: str) -> list[str]:
    log = UNWRITTEN.sub("", LATE_DATA.sub("", log))
    log = GROUP.sub(lambda group: "" if is_expected_group(group[0]) else group[0], log)
    errors = [error for error in TRACEBACK.findall(log) if not EXPECTED.search(error)]
    return errors + COMPLAINT.findall(log)


def is_expected_group(group: str) -> bool:
    """Whether all the errors in a group's traceback are such as are expected."""
    errors = GROUPED.findall(group)
    return bool(errors) and all(EXPECTED.search(error) for error in errors)


@pytest.fixture
def client(site: Site) -> Iterator[httpx.Client]:
    with client_of(site.running) as client:
        yield client


def client_of(running: Running) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(running.path)) if running.path else None
    return httpx.Client(**options_of(running), transport=transport)


def options_of(running: Running) -> dict[str, Any]:
    """By HTTP/2 wherever there is TLS."""
    context = trusting() if running.url.startswith("https") else False
    return {
        "base_url": running.url,
        "timeout": LIMIT,
        "trust_env": False,
        "http2": bool(context),
        "verify": context,
    }


# RST_STREAM of a connection's first stream, by which a client of HTTP/2 leaves.
CANCEL = bytes.fromhex("000004 03 00 00000001 00000008")

limits_noted: list[tuple[str, str]] = []  # by row and column of README's tables
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


@dataclass(frozen=True)
class Reply:
    """A response, and what becomes of its connection.

    Attributes:
        is_sized: Whether it has a Content-Length.
    """

    status: int
    is_sized: bool
    then: str


SERVES_ON, SAYS_THAT_IT_ENDS, ENDS = "serves on", "ends, as the response says", "ends without a word"


def reply(running: Running, request_line: str) -> Reply:
    """On a raw connection: a client of HTTP would take another one without a word."""
    with running.connect() as connection:
        send(connection, f"{request_line} HTTP/1.1")
        response = http.client.HTTPResponse(connection, method=request_line.split()[0])
        response.begin()
        response.read()
        seen = (response.status, "Content-Length" in response.headers)
        if response.will_close:
            return Reply(*seen, SAYS_THAT_IT_ENDS)
        try:
            send(connection, "GET /hello HTTP/1.1")
            afterwards = read_response(connection)
        except ConnectionError:
            return Reply(*seen, ENDS)
    assert afterwards == (200, b"hello")
    return Reply(*seen, SERVES_ON)


def send(connection: socket.socket, *lines: str, body: bytes = b"") -> None:
    head = "".join(f"{line}\r\n" for line in (lines[0], "Host: tests", *lines[1:]))
    connection.sendall(head.encode("latin-1") + b"\r\n" + body)


def begin(
    connection: socket.socket, request_line: str, *headers: str, body: bytes = b""
) -> Callable[[], tuple[int, bytes]]:
    """Send a request by the connection's protocol: HTTP/2, if it is for that. A body may be a part of what it says.

    Returns:
        What reads the response's status and body.
    """
    if not is_for_http2(connection):
        send(connection, f"{request_line} HTTP/1.1", *headers, body=body)
        return functools.partial(read_response, connection)
    h2 = begin_by_http2(connection, request_line, *headers, body=body)

    def read() -> tuple[int, bytes]:
        answer = read_by_http2(connection, h2)
        return answer.status, answer.body

    return read


def is_for_http2(connection: socket.socket) -> bool:
    return isinstance(connection, ssl.SSLSocket) and connection.selected_alpn_protocol() == "h2"


def receive_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        chunk = connection.recv(65536)
        assert chunk, f"the connection ended after {received!r}"
        received += chunk
    return received


# Requests


def seen_at(running: Running, path: str) -> dict[str, Any]:
    """What the app tells of the request, or else the status."""
    with running.connect() as connection:
        send(connection, f"GET {path} HTTP/1.1", "Connection: close")
        status, body = read_response(connection)
    return json.loads(body) if body.startswith(b"{") else {"status": status}


def test_query_and_unicode_path_arrive(site: Site, client: httpx.Client) -> None:
    """[W2] [W3] [A1]"""
    seen = client.get("/echo/grüße/☃?q=ä&q=2&empty=").json()
    assert seen["path"] == "/echo/grüße/☃"
    assert seen["raw_path"] == quote("/echo/grüße/☃")
    assert seen["query"] == "q=%C3%A4&q=2&empty="


@pytest.mark.parametrize("what", ["path", "path_info", "raw_path", "query"])
@pytest.mark.parametrize("escape", ["%2F", "%FF"])
def test_escapes_arrive_exactly(site: Site, escape: str, what: str) -> None:
    """[W2] [W3] [A1]"""
    raw_path, query = f"/echo/a{escape}b/c%20d", f"x={escape}+%20"
    path = unquote_to_bytes(raw_path)
    sent = {
        "path": path.decode("utf-8", "replace"),
        "path_info": path.decode("latin-1") if site.has_wsgi_app else None,  # an ASGI app has none
        "raw_path": raw_path,
        "query": query,
    }

    def ask(running: Running) -> object:
        return seen_at(running, f"{raw_path}?{query}").get(what)

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


def repeats(site: Site) -> int:
    """ASGI servers bring a body sooner or later than its read. Over HTTP/2 each takes 40 ms, with or without bridge."""
    return 50 if site.has_wsgi_app and site.running.url.startswith("http:") else 1


def test_form_arrives(site: Site, client: httpx.Client) -> None:
    form = {"name": "Zoë & Co.", "text": "1 + 1 = 2\r\n%"}
    for _ in range(repeats(site)):
        assert client.post("/form", data=form).json() == form


def test_json_arrives(site: Site, client: httpx.Client) -> None:
    value = {"name": "Zoë", "list": [1, 2.5, None, True], "nested": {"☃": "\u0000"}}
    for _ in range(repeats(site)):
        assert client.post("/json", json=value).json() == value


def test_multipart_of_5_mb_arrives_whole(site: Site) -> None:
    """[W7] [A3]"""
    content = BLOCK * 80
    sent = {"name": "grüße.bin", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def ask(running: Running) -> object:
        with client_of(running) as client, contextlib.suppress(httpx.HTTPError, ValueError):
            return client.post("/multipart", data={"other": "field"}, files={"file": ("grüße.bin", content)}).json()
        return None

    if (seen := ask(site.running)) != sent:  # CherryPy takes the file's name for latin-1
        assert seen == ask(site.on_native_server)
        site.note(("limit", "of the framework"))


def test_chunked_request_body_arrives_whole(site: Site, key: str) -> None:
    """[W6] [W7] [A3]"""
    blocks = [b"first", BLOCK, b"last"]
    content = b"".join(blocks)
    sent = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    body = b"".join(b"%x\r\n%s\r\n" % (len(block), block) for block in (*blocks, b""))

    def ask(running: Running) -> object:
        with running.connect() as connection:
            send(connection, f"POST /upload/{key} HTTP/1.1", "Transfer-Encoding: chunked", "Connection: close")
            with contextlib.suppress(ConnectionError):  # the answer of one that knows no chunks comes before their end
                connection.sendall(body)
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                return json.loads(read_response(connection)[1]) == sent
        return False

    site.as_sent_or_as_natively(True, ask)


# Responses


@pytest.mark.parametrize(
    ("request_line", "status"), [("HEAD /hello", 200), ("GET /empty", 204), ("GET /unchanged", 304)]
)
def test_nothing_follows_a_head_without_a_body(site: Site, request_line: str, status: int) -> None:
    """[W10] [A6] Not even the end of a body in chunks."""
    with site.running.connect() as connection:
        send(connection, f"{request_line} HTTP/1.1", "Connection: close")
        received = receive_until(connection, b"\r\n\r\n")
        while chunk := connection.recv(65536):
            received += chunk
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.split()[1] == b"%d" % status
    assert rest == b""


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("HEAD /hello", 200),
        ("HEAD /nowhere", 404),
        ("GET /empty", 204),
        ("GET /unchanged", 304),
        ("GET /nowhere", 404),
        ("GET /error", 500),
    ],
)
def test_the_same_connection_serves_on(site: Site, request_line: str, status: int) -> None:
    """[W10] [W15] [A6] [A9] What does not belong to the one response would be taken for the next."""
    seen = reply(site.running, request_line)
    assert seen.status == status
    if seen.then == SERVES_ON:
        return
    # No more than the server does behind the same of a bare app.
    like = Like(status, seen.is_sized, error_that_comes_through(site) if status == 500 else "never")
    natively = reply(site.native, f"{request_line.split()[0]} /like/{like.path}")
    assert (seen.status, seen.then) == (natively.status, natively.then)
    site.note(("limit", "of the server"))


def error_that_comes_through(site: Site) -> str:
    """When the framework lets its server have the error of /error, see `Like`."""
    running = site.on_native_server
    assert reply(running, "GET /error").status == 500
    for _ in until(LIMIT):  # a server may have answered before that is told
        if (raised := Board(running.board).get("raised")) is not None:
            return raised
    raise AssertionError("the framework was not called")


def test_304_keeps_its_etag(client: httpx.Client) -> None:
    response = client.get("/unchanged")
    assert response.status_code == 304
    assert response.headers["ETag"] == ETAG


def test_404_of_the_framework_comes_through(client: httpx.Client) -> None:
    assert client.get("/nowhere").status_code == 404


def test_exception_is_a_500_and_in_the_log(site: Site, client: httpx.Client) -> None:
    """[W15] [A9]"""
    logged = site.running.log_size()
    assert client.get("/error").status_code == 500
    assert any("OnPurpose: before the response" in site.running.log(logged) for _ in until(LIMIT))


@pytest.mark.slow
def test_exception_in_mid_response_aborts_it(site: Site, client: httpx.Client) -> None:
    """[W15] [A9]"""

    def is_aborted(running: Running) -> bool:
        with client_of(running) as client:
            try:
                client.get("/broken", timeout=3.0)
            except httpx.TimeoutException:  # as if more would come
                return False
            except (httpx.RemoteProtocolError, httpx.ReadError):
                return True
        return False

    site.where_the_server_can(is_aborted)
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


def test_file_arrives_whole(client: httpx.Client) -> None:
    """[W18] [A12]"""
    response = client.get("/document")
    assert response.headers["Content-Length"] == str(len(DOCUMENT))
    assert response.content == DOCUMENT


def sends_at_once(running: Running, prefix: str, key: str) -> bool:
    with client_of(running) as client:
        try:
            with client.stream("GET", f"{prefix}/events/{key}", timeout=2.0) as response:
                pieces = response.iter_raw()
                received = b""
                while EVENTS[0] not in received:
                    received += next(pieces)
                assert EVENTS[1] not in received
                Board(running.board).put(f"{key}-confirmed")
                assert EVENTS[1] in b"".join(pieces)
        except httpx.TimeoutException:
            Board(running.board).put(f"{key}-confirmed")  # that it may end
            return False
    return True


def test_first_event_arrives_before_the_second_is_made(site: Site, key: str) -> None:
    """[W12] [A7]"""

    site.where_the_server_can(lambda running: sends_at_once(running, "", key))


# Clients that leave, wait or come in crowds


def test_stream_is_closed_when_its_client_leaves(site: Site, client: httpx.Client, key: str) -> None:
    """[W13] [W16] [A10]"""

    def is_closed(running: Running) -> bool:
        with running.connect(timeout=2.0, protocol="h2") as connection:
            begin(connection, f"GET /ticks/{key}")
            try:
                receive_until(connection, b"tick")
            except TimeoutError:
                return False
            if is_for_http2(connection):
                connection.sendall(CANCEL)  # and the connection stays, as a browser's does
            else:
                connection.close()
            return any(Board(running.board).get(f"{key}-closed") is not None for _ in until(5.0))

    site.where_the_server_can(is_closed)
    assert client.get("/hello").text == "hello"


@pytest.mark.slow
def test_app_hears_that_its_client_left_in_mid_upload(site: Site, client: httpx.Client, key: str) -> None:
    """[W9] [A4]"""

    def heard(running: Running) -> str:
        board = Board(running.board)
        with running.connect(protocol="h2") as connection:
            begin(connection, f"POST /upload/{key}", f"Content-Length: {400 * len(BLOCK)}", body=8 * BLOCK)
            begun = any(board.get(f"{key}-begun") is not None for _ in until(patience(site, 1.0)))
        for _ in until(5.0 if begun else 0.2):
            if (failure := board.get(f"{key}-failed")) is not None:
                return "left" if CLIENT_LEFT.search(failure) else failure
            if board.get(f"{key}-whole") is not None:
                return "the end"
        return "nothing"

    if (seen := heard(site.running)) != "left":
        # Nothing, if the server or the framework wants it whole before the app begins. An end only if the framework
        # takes that for one, as Falcon does: some WSGI servers tell it so as well.
        if site.has_wsgi_app or seen != heard(site.on_native_server):
            assert (seen, heard(site.native)) == ("nothing", "nothing")
        site.note(("limit", "of the server or the framework"))
    assert client.get("/hello").text == "hello"


def patience(site: Site, seconds: float) -> float:
    """How long to wait for what many servers cannot do; for long where the README says that this one can."""
    return 5.0 if marks_in(README).get((row_of(site.cell.server), "Streams in")) == WORKS else seconds


def answers_before_the_body(site: Site, running: Running) -> bool:
    with running.connect(timeout=patience(site, 0.5), protocol="h2") as connection:
        read = begin(connection, "POST /refuse", f"Content-Length: {800 * len(BLOCK)}", body=b"begun")
        with contextlib.suppress(TimeoutError):
            return read()[0] == 413
    return False


def test_refusal_does_not_wait_for_the_body(site: Site, client: httpx.Client) -> None:
    """[W7]"""
    does_not_wait(site, functools.partial(answers_before_the_body, site))
    assert client.get("/hello").text == "hello"


def test_refusal_comes_in_place_of_100_continue(site: Site) -> None:
    """[W7]"""

    def refuses(running: Running) -> bool:
        with running.connect(timeout=patience(site, 0.5)) as connection:
            send(connection, "POST /refuse HTTP/1.1", "Content-Length: 10", "Expect: 100-continue")
            with contextlib.suppress(TimeoutError):  # not every server knows of 100
                # To its end: hypercorn on trio falls over a client that leaves while it still sends.
                return read_response(connection)[0] == 413
        return False

    does_not_wait(site, refuses)


def does_not_wait(site: Site, ask: Callable[[Running], bool]) -> None:
    if ask(site.running):
        return
    if asks_before_it_answers(site):
        site.note(("limit", "of the framework"))
    else:
        site.as_sent_or_as_natively(True, ask)


def asks_before_it_answers(site: Site) -> bool:
    """Whether the framework asks for the body before it is needed: a WSGI server's thread does nothing else, then."""
    if site.has_wsgi_app:
        return False
    running = site.on_native_server
    with running.connect() as connection:
        send(connection, "POST /refuse HTTP/1.1", "Content-Length: 5", body=b"begun")
        assert read_response(connection)[0] == 413
    return Board(running.board).get("asked") is not None


@pytest.mark.slow
def test_20_slow_requests_are_served_at_once(site: Site, key: str) -> None:
    """[W19] [A15] [A17]"""

    async def get_20(running: Running) -> list[httpx.Response]:
        async with httpx.AsyncClient(**options_of(running)) as client:
            return await asyncio.gather(*(client.get(f"/slow/{key}-{number}-of-20") for number in range(20)))

    def are_served_at_once(running: Running) -> bool:
        assert [response.text for response in asyncio.run(get_20(running))] == 20 * ["slow"]
        return Board(running.board).get(f"alone-{key}") is None

    site.as_sent_or_as_natively(True, are_served_at_once)


@pytest.mark.parametrize("lasting_site", DASH_CELLS, indirect=True, scope="module")
def test_callback_of_a_dashboard_answers(client: httpx.Client) -> None:
    assert "_dash-config" in client.get("/dash/").text
    assert client.get("/dash/_dash-layout").json()["type"] == "Div"
    (dependency,) = client.get("/dash/_dash-dependencies").json()
    question = {
        "output": dependency["output"],
        "outputs": {"id": "greeting", "property": "children"},
        "inputs": [{"id": "name", "property": "value", "value": "Zoë"}],
        "changedPropIds": ["name.value"],
    }
    answer = client.post("/dash/_dash-update-component", json=question).json()
    assert answer["response"]["greeting"]["children"] == "hello, Zoë"


@pytest.mark.slow
def test_cherrypy_over_http2(tmp_path: Path) -> None:
    """[W5] It is served no worse than by hypercorn itself, which hosts WSGI apps too."""
    cell = Cell("cherrypy_wsgi", "WsgiToAsgi", "hypercorn-http2")
    require(cell.server)

    def status(application: str, kind: Server, name: str) -> int:
        directory = tmp_path / name
        directory.mkdir()
        with Running(kind, application, directory) as running, client_of(running) as client:
            return client.get("/hello").status_code

    server = SERVERS[cell.server]
    if (seen := status(cell.application, server, "bridge")) != 200:
        own = replace(server, app=f"wsgi:{server.app}")
        assert seen == status(cell.native_server[0], own, "hypercorn")


# What a server may offer, or may be asked for


def test_prefix_is_known_and_no_part_of_the_rest(mounted_site: Site) -> None:
    """[W2] [A1] [C3]"""

    def ask(running: Running) -> list[object]:
        # As it is sent by a proxy that leaves the prefix, and by one that strips it.
        seen = [seen_at(running, prefix + quote("/echo/grüße")) for prefix in (MOUNT, "")]
        return [(one.get("root_path"), one.get("path")) for one in seen]

    sent = (MOUNT, f"{MOUNT}/echo/grüße")
    seen = ask(mounted_site.running)
    assert sent in seen
    if seen != [sent, sent]:  # each server wants one or the other
        assert seen == ask(mounted_site.native)


def test_server_and_protocol_are_known(mounted_site: Site) -> None:
    """[W5] [A1]"""
    is_secure = SERVERS[mounted_site.cell.server].tls
    with client_of(mounted_site.running) as client:
        response = client.get(f"{mounted_site.prefix}/echo/it")
    seen = response.json()
    assert seen["scheme"] == ("https" if is_secure else "http")
    assert seen["protocol"] in (["2"] if is_secure else ["1.0", "1.1"])
    assert response.http_version in (["HTTP/2"] if is_secure else ["HTTP/1.0", "HTTP/1.1"])
    if mounted_site.has_wsgi_app:
        name, port = seen["server"]
        assert name
        assert port.isdecimal()
    elif seen["server"] is not None:
        name, port = seen["server"]
        assert name
        assert port is None or isinstance(port, int)


def test_body_arrives_whole_below_a_prefix(mounted_site: Site, key: str) -> None:
    """[W7] [A3] On a unix socket, by HTTP/2, or through a proxy that holds it back or does not."""
    content = 20 * BLOCK
    with client_of(mounted_site.running) as client:
        response = client.post(f"{mounted_site.prefix}/upload/{key}", content=content)
        assert response.json() == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_first_event_is_sent_at_once_below_a_prefix(mounted_site: Site, key: str) -> None:
    """[W12] [A7]"""
    mounted_site.where_the_server_can(lambda running: sends_at_once(running, mounted_site.prefix, key))


@dataclass(frozen=True)
class Answer:
    """All of it: what comes before a response and behind it, too."""

    status: int
    hints: list[str]
    body: bytes
    trailers: list[tuple[str, str]]


def ask_for_all(running: Running, path: str) -> Answer:
    with running.connect(protocol="h2") as connection:
        if is_for_http2(connection):
            return read_by_http2(connection, begin_by_http2(connection, f"GET {path}"))
        send(connection, f"GET {path} HTTP/1.1", "Connection: close")
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    hints = []
    while received.startswith(b"HTTP/1.1 103 "):
        head, _, received = received.partition(b"\r\n\r\n")
        hints += re.findall(r"(?im)^link: (.*)$", head.decode().replace("\r", ""))
    head, _, body = received.partition(b"\r\n\r\n")
    return Answer(int(head.split()[1]), hints, body, [])


def begin_by_http2(connection: socket.socket, request_line: str, *headers: str, body: bytes = b"") -> H2Connection:
    """No more of the body than the server takes before it has said what it takes."""
    from h2.connection import H2Connection

    h2 = H2Connection()
    h2.initiate_connection()
    stream = h2.get_next_available_stream_id()
    method, path = request_line.split()
    pairs = [(":method", method), (":path", path), (":authority", "tests"), (":scheme", "https")]
    for header in headers:
        name, _, value = header.partition(": ")
        pairs.append((name.lower(), value))
    h2.send_headers(stream, pairs, end_stream=not body)
    body = body[: h2.local_flow_control_window(stream)]
    for start in range(0, len(body), h2.max_outbound_frame_size):
        h2.send_data(stream, body[start : start + h2.max_outbound_frame_size])
    connection.sendall(h2.data_to_send())
    return h2


def read_by_http2(connection: socket.socket, h2: H2Connection) -> Answer:
    from h2.events import DataReceived, InformationalResponseReceived, ResponseReceived, StreamEnded, TrailersReceived

    status, hints, body, trailers = 0, [], b"", []
    ended = False
    while not ended:
        connection.sendall(h2.data_to_send())
        chunk = connection.recv(65536)
        if not chunk:
            raise ConnectionError("the connection ended")
        for event in h2.receive_data(chunk):
            if isinstance(event, InformationalResponseReceived):
                hints += [value.decode() for name, value in event.headers or [] if name == b"link"]
            elif isinstance(event, ResponseReceived):
                status = int(dict(event.headers or [])[b":status"])
            elif isinstance(event, DataReceived):
                body += event.data or b""
            elif isinstance(event, TrailersReceived):
                trailers = [(name.decode(), value.decode()) for name, value in event.headers or []]
            ended |= isinstance(event, StreamEnded)
    return Answer(status, hints, body, trailers)


def test_early_hint_comes_before_the_response(mounted_site: Site) -> None:
    """[W6] [A12]"""

    def ask(running: Running) -> object:
        answer = ask_for_all(running, f"{mounted_site.prefix}/hints")
        assert answer.status == 200
        return answer.hints

    mounted_site.as_sent_or_as_natively([HINT], ask)


def test_trailer_comes_behind_the_response(mounted_site: Site) -> None:
    """[A12]"""

    def ask(running: Running) -> object:
        answer = ask_for_all(running, f"{mounted_site.prefix}/trailers")
        assert answer.status == 200
        return answer.trailers

    mounted_site.as_sent_or_as_natively([TRAILER], ask)


def test_file_goes_by_its_path(mounted_site: Site) -> None:
    """[W18] [A12]"""

    def ask(running: Running) -> object:
        with running.connect() as connection:
            send(connection, f"GET {mounted_site.prefix}/document HTTP/1.1", "Connection: close")
            with contextlib.closing(http.client.HTTPResponse(connection)) as response:
                response.begin()
                return response.status, response.headers["X-Wrapped"], response.read() == DOCUMENT

    mounted_site.as_sent_or_as_natively((200, "True", True), ask)


def test_app_that_does_not_send_hears_that_its_client_left(mounted_site: Site, key: str) -> None:
    """[W6] [A11]"""

    def hears(running: Running) -> bool:
        board = Board(running.board)
        with running.connect() as connection:
            send(connection, f"GET {mounted_site.prefix}/gone/{key} HTTP/1.1")
            assert any(board.get(f"{key}-begun") is not None for _ in until(LIMIT))
        for _ in until(5.0):
            if board.get(f"{key}-unseen") is not None:
                break
            if board.get(f"{key}-gone") is not None:
                return True
        return False

    mounted_site.where_the_server_can(hears)


# The life of a server


def test_state_of_the_lifespan_reaches_the_app(site: Site) -> None:
    """[W22] [A19]"""

    def ask(running: Running) -> bool:
        seen = seen_at(running, "/echo/it")
        return bool(seen["started_in"] == seen["pid"])

    site.as_sent_or_as_natively(True, ask)


@pytest.mark.slow
def test_sigterm_lets_a_request_end_then_the_lifespan_and_the_server(site: Site, key: str) -> None:
    """[W22] [A20]"""
    running, native = site.running, site.native
    answered, status = stop_with_a_request_in_flight(running, key)
    natively_answered, native_status = stop_with_a_request_in_flight(native, key)

    assert answered or not natively_answered
    if not answered:
        site.note(("limit", "of the server"))
    # Some end by the signal itself, with or without a chance for anybody to clean up.
    assert status in (0, native_status)
    assert unexpected(running.log()) == []
    board, native_board = Board(running.board), Board(native.board)
    if board.names("startup-"):
        assert_ran_once_in_each_process(board, ends=native_board.get("native-shutdown") is not None)
    elif native_board.get("native-startup") is not None:
        assert Board(site.on_native_server.board).names("startup-") == []


def stop_with_a_request_in_flight(running: Running, key: str) -> tuple[bool, int]:
    """Whether the request was answered, and the server's exit status."""
    with running.connect(protocol="h2") as connection:
        read = begin(connection, f"GET /slow/{key}")
        assert any(Board(running.board).get(f"{key}-begun") is not None for _ in until(LIMIT))
        running.terminate()
        try:
            answered = read() == (200, b"slow")
        except (http.client.HTTPException, OSError):
            answered = False
    return answered, running.stop()


def assert_ran_once_in_each_process(board: Board, *, ends: bool) -> list[str]:
    startups, shutdowns = ([name.partition("-")[2] for name in board.names(f"{step}-")] for step in STEPS)
    pids = [startup.partition("-")[0] for startup in startups]
    assert startups == [f"{pid}-0" for pid in dict.fromkeys(pids)] != []
    if ends:
        assert shutdowns == startups
    return pids


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS_OF_2_WORKERS)
def test_lifespan_runs_once_in_each_worker(cell: Cell, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """[W22] [A19] [A20]"""
    request.node.user_properties.append(("cell", cell.noted))
    require(cell.server)
    with run(cell, cell.application, cell.server, tmp_path) as running:
        seen: set[int] = set()
        for _ in until(LIMIT):
            seen.add(seen_at(running, "/echo/it")["started_in"])
            if len(seen) == 2:
                break
        if cell.server.startswith(("uwsgi", "granian")):
            # uWSGI runs no atexit handlers of a worker that is not yet through with its last request; one of granian's
            # serves before it hears of signals, and then never ends.
            time.sleep(0.5)
        running.stop()
        assert unexpected(running.log()) == []
    assert assert_ran_once_in_each_process(Board(running.board), ends=True) == sorted(map(str, seen))


def test_missing_server_is_skipped_or_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVERS, "another", Server("another", "no_such_module_nor_program sys"))
    monkeypatch.delenv("BRIDGE_REQUIRE_SERVERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"another needs no_such_module_nor_program$"):
        require("another")
    monkeypatch.setenv("BRIDGE_REQUIRE_SERVERS", "1")
    with pytest.raises(pytest.fail.Exception, match=r"another needs no_such_module_nor_program$"):
        require("another")


@pytest.mark.parametrize("cell", CELLS)
def test_readme_tells_of_a_cell(cell: Cell) -> None:
    """By `make table`, after a line of the tables has changed."""
    framework = re.escape(cell.app.rpartition("_")[0])
    row = rf"^\| {re.escape(cell.server)} [^|]*\|[^|]*\b{framework}\b"
    assert re.search(row, README, re.MULTILINE | re.IGNORECASE)


def test_readme_tells_of_each_limit() -> None:
    """Of those that the tests have come upon: where a native pair fails, bridge may fail as well, without a word."""
    told = marks_in(README)
    assert [limit for limit in limits_noted if told[limit] == WORKS] == []
