"""`python -m bridge check`: right apps have no faults, and of each broken one the report names what is broken."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi
import flask
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from bridge import check as check_module
from bridge.__main__ import main
from bridge.check import RULES, Report, check
from bridge.kinds import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT = [("Content-Type", "text/plain")]
BYTES = [(b"content-type", b"text/plain")]


def flask_app() -> flask.Flask:
    app = flask.Flask("shop")

    @app.route("/", methods=["GET", "POST"])
    def index() -> Any:
        return flask.request.form.to_dict()

    @app.get("/stream")
    def stream() -> flask.Response:
        return flask.Response(iter(["a", "b"]), mimetype="text/plain")

    @app.get("/empty")
    def empty() -> Any:
        return "", 204  # with a Content-Type, which the validator forbids and HTTP does not

    return app


def fastapi_app() -> fastapi.FastAPI:
    app = fastapi.FastAPI()

    @app.api_route("/", methods=["GET", "HEAD", "POST"])
    async def index(request: fastapi.Request) -> dict[str, Any]:
        return dict(await request.form())

    return app


async def stream(request: Any) -> StreamingResponse:
    async def blocks() -> Any:
        while True:
            yield b"tick"
            await asyncio.sleep(0.001)

    return StreamingResponse(blocks())


STARLETTE = Starlette(routes=[Route("/stream", stream), Route("/", lambda request: PlainTextResponse("hello"))])


def said(report: Report) -> str:
    return " ".join(report.text().split())


@pytest.mark.parametrize("path", ["/", "/stream", "/empty"])
def test_a_right_wsgi_app_has_no_faults(path: str) -> None:
    report = check(flask_app(), Kind.WSGI, path)
    assert report.findings == {}
    assert len(report.answers) == 7
    assert report.text().endswith("\n\nNo faults.")


@pytest.mark.parametrize(("app", "path"), [(fastapi_app(), "/"), (STARLETTE, "/"), (STARLETTE, "/stream")])
def test_a_right_asgi_app_has_no_faults(monkeypatch: pytest.MonkeyPatch, app: Any, path: str) -> None:
    monkeypatch.setattr(check_module, "STREAM_SECONDS", 0.05)
    report = check(app, Kind.ASGI, path)
    assert report.findings == {}
    assert len(report.answers) == 7


def answers(status: str) -> Any:
    """A WSGI app that has an answer to a POST, and to all else the one with this status."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response(status if environ["REQUEST_METHOD"] != "POST" else "200 OK", TEXT)
        return [b"an answer"]

    return app


@pytest.mark.parametrize(
    ("app", "kind", "words"),
    [
        (
            answers("500 Internal Server Error"),
            Kind.WSGI,
            "No faults. But each GET of / was answered 500: only the app's own error page was checked.",
        ),
        (
            answers("404 Not Found"),
            Kind.WSGI,
            "No faults. But each GET of / was answered 404: only the app's own error page was checked. Say --path, for "
            "a page that is there.",
        ),
        (
            Starlette(),
            Kind.ASGI,
            "No faults. But each GET of / was answered 404: only the app's own error page was checked. Say --path, for "
            "a page that is there.",
        ),
        (answers("302 Found"), Kind.WSGI, "No faults."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_check_that_has_seen_nothing_but_error_pages_says_so(app: Any, kind: Kind, words: str) -> None:
    report = check(app, kind)
    assert report.findings == {}
    last = report.text().rpartition("\n\n")[2]
    assert last == words


def test_an_app_may_read_its_whole_input_and_may_start_twice_for_an_error() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        environ["wsgi.input"].read()
        start_response("200 OK", TEXT)
        try:
            raise ValueError
        except ValueError:
            start_response("500 Internal Server Error", TEXT, sys.exc_info())
        return [b"sorry"]

    assert check(app, Kind.WSGI).findings == {}


# Broken apps, each in one way. The name says what is found, as a rule of the check.


def wsgi_start(status: Any = "200 OK", headers: Any = TEXT, body: Any = (b"hello",), **more: Any) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        start_response(status, headers, **more)
        return body

    return app


def no_start(environ: Any, start_response: Any) -> Any:
    return [b"hello"]


def two_starts(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", TEXT)
    start_response("404 Not Found", TEXT)
    return [b"hello"]


def two_starts_in_secret(environ: Any, start_response: Any) -> Any:
    """The app catches what it is told."""
    start_response("200 OK", TEXT)
    try:
        start_response("404 Not Found", TEXT)
    except Exception:
        pass
    return [b"hello"]


def raises(environ: Any, start_response: Any) -> Any:
    raise LookupError("no such table")


class Mute(LookupError):
    def __str__(self) -> str:
        raise ValueError


def raises_without_words(environ: Any, start_response: Any) -> Any:
    raise Mute


def raises_a_timeout(environ: Any, start_response: Any) -> Any:
    raise TimeoutError("no answer of the database")


def raises_in_the_body(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", TEXT)
    yield b"a"
    raise LookupError("no such table")


def closes_input(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", TEXT)
    environ["wsgi.input"].close()
    return [b"hello"]


def goes_on_when_closed(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", TEXT)
    while True:
        try:
            yield b"tick"
        except GeneratorExit:
            yield b"tock"


def writes(block: Any, status: str = "200 OK") -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        start_response(status, TEXT if status == "200 OK" else [])(block)
        return []

    return app


def writes_text_in_secret(environ: Any, start_response: Any) -> Any:
    write = start_response("200 OK", TEXT)
    try:
        write("hello")
    except Exception:
        pass
    return [b"hello"]


def writes_bytes_to_errors(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", TEXT)
    environ["wsgi.errors"].write(b"no such table")
    return [b"hello"]


def reads_a_line_with_two_sizes(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", TEXT)
    environ["wsgi.input"].readline(1, 2)
    return [b"hello"]


class WrongLength(list[bytes]):
    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("app", "rule", "words"),
    [
        (no_start, "no start", "start_response"),
        (two_starts, "second start", "a second time without exc_info, with '404 Not Found'"),
        (two_starts_in_secret, "second start", "a second time"),
        (raises, "trapped", "raised LookupError: no such table ("),
        (raises_without_words, "trapped", "raised Mute: <exception str() failed> ("),
        (raises_a_timeout, "trapped", "raised TimeoutError: no answer of the database ("),
        (raises_in_the_body, "trapped", "raised LookupError: no such table ("),
        (closes_input, "input closed", "input.close() must not be called"),
        (writes("hello"), "write", "write() expected bytes, got 'hello'"),
        (writes_text_in_secret, "write", "write() expected bytes, got 'hello'"),
        (writes(b"hello", "204 No Content"), "no content", "the status 204, and a body"),
        (writes_bytes_to_errors, "errors", "expected assert_(type(s) is str), in write() ("),
        (reads_a_line_with_two_sizes, "trapped", "expected assert_(len(args) <= 1), in readline() ("),
        (goes_on_when_closed, "closed early", "generator ignored GeneratorExit"),
        (wsgi_start(body=["hello"]), "iterable", "'hello'"),
        (wsgi_start(body="hello"), "iterable", "should not return a string"),
        (wsgi_start(body=None), "iterable", "an iterable of bytes, returned None"),
        (wsgi_start(body=7), "iterable", "an iterable of bytes, returned 7"),
        (wsgi_start(body=WrongLength([b"a"])), "len", "yielded 1 blocks, len() of what it returned is 3"),
        (wsgi_start(status="OK"), "status", "'OK'"),
        (wsgi_start(status="200"), "status", "the status '200'"),
        (wsgi_start(status=200), "status", "must be of type str (got 200)"),
        (wsgi_start(headers=tuple(TEXT)), "header list", "must be of type list"),
        (wsgi_start(headers=[["Content-Type", "text/plain"]]), "header list", "must be of type tuple"),
        (wsgi_start(headers=[*TEXT, ("X-Count", 7)]), "header list", "must be of type str (got 7)"),
        (wsgi_start(headers=[*TEXT, ("X Space", "x")]), "header name", "'X Space'"),
        (wsgi_start(headers=[*TEXT, ("Status", "200")]), "header name", "Status header cannot be used"),
        (wsgi_start(headers=[*TEXT, ("X-A", "a\r\nX-B: b")]), "header value", "'a\\r\\nX-B: b'"),
        (wsgi_start(headers=[*TEXT, ("X-Price", "5 €")]), "latin-1", "'5 €'"),
        (wsgi_start(headers=[*TEXT, ("Connection", "close")]), "hop-by-hop", "'Connection'"),
        (wsgi_start(headers=[*TEXT, ("Content-Length", "3")]), "too long", "Content-Length is 3"),
        (wsgi_start(headers=[*TEXT, ("Content-Length", "9")]), "length", "Content-Length is 9"),
        (wsgi_start(headers=[*TEXT, ("Content-Length", "five")]), "length", "'five'"),
        (wsgi_start(status="204 No Content", headers=[]), "no content", "the status 204, and a body"),
        (wsgi_start(status="304 Not Modified", headers=[], body=iter([b"", b"a", b"b"])), "not modified", "status 304"),
        (wsgi_start(exc_info=None), "positional", "No keyword arguments allowed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_wsgi_app_does_wrong_is_named(monkeypatch: pytest.MonkeyPatch, app: Any, rule: str, words: str) -> None:
    monkeypatch.setattr(check_module, "STREAM_SECONDS", 0.05)
    report = check(app, Kind.WSGI)
    assert [(finding.rule, finding.severe) for finding in report.findings] == [(rule, True)]
    (finding,) = report.findings
    assert words in finding.what
    assert RULES[rule].sentence in said(report)
    assert report.text().endswith("\n\n1 fault.")


def writes_in_its_body(environ: Any, start_response: Any) -> Any:
    write = start_response("200 OK", TEXT)
    yield b"a"
    write(b"b")


def test_a_write_from_within_the_body_is_a_hint() -> None:
    report = check(writes_in_its_body, Kind.WSGI)
    assert [(finding.rule, finding.severe) for finding in report.findings] == [("write late", False)]
    assert check(writes(b"hello"), Kind.WSGI).findings == {}


def asgi_messages(*messages: Any) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError(scope["type"])
        for message in messages:
            await send(message)

    return app


def start(**keys: Any) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": BYTES} | keys


def body(**keys: Any) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"hello"} | keys


def plain(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise ValueError


async def in_secret(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise ValueError
    await send(start())
    await send(body())
    try:
        await send(body())
    except Exception:
        pass


async def fails(scope: Any, receive: Any, send: Any) -> None:
    raise LookupError("no such table")


async def refuses(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "lifespan":
        raise ValueError
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})


async def does_not_stop(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await speaks_http_to_all(scope, receive, send)
    elif scope["type"] != "lifespan":
        raise ValueError
    else:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": "Traceback:\n  no database"})


async def breaks_when_it_stops(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "lifespan":
        return await does_not_stop(scope, receive, send)
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    raise LookupError("no such pool")


async def exits_when_it_stops(scope: Any, receive: Any, send: Any) -> None:
    try:
        await breaks_when_it_stops(scope, receive, send)
    except LookupError:
        sys.exit("no such pool")


async def raises_a_cancellation(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise ValueError
    raise asyncio.CancelledError


async def speaks_http_to_all(scope: Any, receive: Any, send: Any) -> None:
    await send(start())
    await send(body())


async def says_nothing_to_others(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await speaks_http_to_all(scope, receive, send)


@pytest.mark.parametrize(
    ("app", "rule", "words"),
    [
        (asgi_messages(), "start first", "the app ended without sending a response"),
        (asgi_messages(start()), "start first", "after 'http.response.start', without any 'http.response.body'"),
        (asgi_messages(start(status=204), body()), "no content", "the status 204, and a body"),
        (asgi_messages(start(status=304), body(more_body=True), body()), "not modified", "the status 304"),
        (asgi_messages(start(), body(more_body=True)), "not ended", "before it had sent its whole body"),
        (asgi_messages(body()), "start first", "expected 'http.response.start', got 'http.response.body'"),
        (asgi_messages(start(), start(), body()), "start first", "expected 'http.response.body', got"),
        (asgi_messages(start(), body(), body()), "after the end", "no message after the end"),
        (in_secret, "after the end", "no message after the end"),
        (asgi_messages(start(status="200"), body()), "event", "as status, got '200'"),
        (asgi_messages(start(headers=[("a", "b")]), body()), "event", "bytes as header name, got 'a'"),
        (asgi_messages(start(headers=[(b"a", b"b\r\n")]), body()), "event", "CR, LF or NUL"),
        (asgi_messages(start(headers={b"a": b"b"}), body()), "event", "(name, value) of bytes"),
        (asgi_messages(start(headers=[(b":status", b"200")]), body()), "pseudo header", "b':status'"),
        (asgi_messages(start(), body(body="hello")), "event", "expected bytes as body, got 'hello'"),
        (asgi_messages(start(), body(more_body=0)), "event", "got 0 as more_body"),
        (asgi_messages({"type": "http.answer"}), "event", "'http.answer'"),
        (asgi_messages("hello"), "event", "expected a message with a type, got 'hello'"),
        (asgi_messages(start(headers=[(b"content-length", b"9")]), body()), "not ended", "Content-Length is 9"),
        (plain, "awaited", "the app returned None, which cannot be awaited"),
        (fails, "bubbled up", "raised LookupError: no such table ("),
        (raises_a_cancellation, "bubbled up", "the app raised CancelledError()"),
        (refuses, "startup failed", "no database"),
        (does_not_stop, "shutdown failed", "no database"),
        (breaks_when_it_stops, "shutdown failed", "raised LookupError: no such pool ("),
        (exits_when_it_stops, "shutdown failed", "raised SystemExit: no such pool ("),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_asgi_app_does_wrong_is_named(app: Any, rule: str, words: str) -> None:
    report = check(app, Kind.ASGI)
    severe = [finding for finding in report.findings if finding.severe]
    assert [finding.rule for finding in severe] == [rule]
    assert words in severe[0].what
    assert RULES[rule].sentence in said(report)


def test_what_the_check_itself_finds_has_no_place_in_the_apps_code() -> None:
    (finding,) = check(plain, Kind.ASGI).findings
    assert finding.what == "the app returned None, which cannot be awaited"


@pytest.mark.parametrize(
    ("app", "rules"),
    [
        (says_nothing_to_others, {"reject"}),
        (speaks_http_to_all, {"reject"}),
        (asgi_messages(start(headers=[(b"connection", b"close")]), body()), {"transfer-encoding"}),
        (asgi_messages(start(headers=[(b"Content-Type", b"text/plain")]), body()), {"lower-case"}),  # as Django's
        (asgi_messages(start(), body(body=memoryview(b"hello"))), {"event"}),
    ],
)
def test_what_goes_well_here_and_may_not_elsewhere_is_a_hint(app: Any, rules: set[str]) -> None:
    report = check(app, Kind.ASGI)
    assert {finding.rule for finding in report.findings} == rules
    assert report.severe == 0
    assert "(a hint):" in report.text()
    assert "No faults, 1 hint" in report.text() or "No faults, 2 hints" in report.text()


def test_a_wsgi_app_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "LIMIT", 0.05)

    go_on = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        go_on.wait(30)
        start_response("200 OK", TEXT)
        return [b""]

    report = check(app, Kind.WSGI)
    assert [finding.what for finding in report.findings] == ["the app did not answer within 0.05 s"]
    assert report.answers == [("GET /", "no answer")]
    go_on.set()


def test_the_place_of_a_finding_is_told_and_its_lines_are_set_in() -> None:
    text = check(does_not_stop, Kind.ASGI).text()
    assert "1. In lifespan:\n   the app failed to shut down: Traceback:\n     no database\n   ASGI, Lifespan" in text
    assert "1. In lifespan:\n   " in check(refuses, Kind.ASGI).text()
    assert "1. In each request:\n" in check(raises, Kind.WSGI).text()


def test_an_asgi_app_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "LIMIT", 0.05)
    go_on = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError
        while not go_on.is_set():
            await asyncio.sleep(0.01)

    report = check(app, Kind.ASGI)
    assert [finding.what for finding in report.findings] == ["the app did not answer within 0.05 s"]
    go_on.set()


HANGING = """
import sys, time
from bridge import check
from bridge.__main__ import main

def wsgi(environ, start_response):
    time.sleep(1000)

async def asgi(scope, receive, send):
    if scope["type"] != "http":
        raise ValueError
    time.sleep(1000)

async def startup(scope, receive, send):
    if scope["type"] != "lifespan":
        raise ValueError
    time.sleep(1000)

async def shutdown(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        time.sleep(1000)
    if scope["type"] != "http":
        raise ValueError
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})

check.LIMIT = 0.5
sys.exit(main(["check", f"__main__:{sys.argv[1]}"]))
"""


@pytest.mark.parametrize(
    ("app", "words"),
    [
        ("wsgi", "the app did not answer within 0.5 s"),
        ("asgi", "the app did not answer within 0.5 s"),
        ("startup", "the app did not answer lifespan.startup within 0.5 s"),
        ("shutdown", "the app did not answer lifespan.shutdown within 0.5 s"),
    ],
)
def test_an_app_that_blocks_for_ever_does_not_hold_up_the_end(app: str, words: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(Path(check_module.__file__).parent.parent), "PYTHONASYNCIODEBUG": ""}
    command = [sys.executable, "-c", HANGING, app]
    start = time.monotonic()
    done = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8", timeout=50)
    assert words in done.stdout
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.endswith("1 fault.\n")
    assert time.monotonic() - start < 10


LEAVING = """
import concurrent.futures, sys, threading, time
from bridge import check
from bridge.__main__ import run_process

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]

if sys.argv[1] == "pool":
    pool = concurrent.futures.ThreadPoolExecutor()
    pool.submit(print, end="").result()
else:
    threading.Thread(target=time.sleep, args=(1000,), name="poller").start()
check.LIMIT = float(sys.argv[2])
sys.argv[1:] = ["check", "__main__:app"]
run_process()
"""


@pytest.mark.parametrize(
    ("left", "limit", "said"),
    [
        ("thread", "3", "python -m bridge: the exit does not wait for what the app has left running: poller\n"),
        ("pool", "30", ""),
    ],
    ids=["thread", "pool"],
)
def test_threads_that_the_app_has_left_do_not_hold_up_the_end(left: str, limit: str, said: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(Path(check_module.__file__).parent.parent), "PYTHONASYNCIODEBUG": ""}
    command = [sys.executable, "-c", LEAVING, left, limit]
    start = time.monotonic()
    done = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8", timeout=50)
    assert done.stdout.endswith("No faults.\n")
    assert (done.returncode, done.stderr) == (0, said)
    assert time.monotonic() - start < 20


# The command line

MODULE = """
def right(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello from " + environ["PATH_INFO"].encode("latin-1")]

def make():
    return right

def broken(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return ["hello"]

def anything(*args):
    return right(*args)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "shop_to_check.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("shop_to_check", None)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["shop_to_check:right"], 0, "shop_to_check:right, a WSGI app, through WsgiToAsgi\n\nGET /  "),
        (["shop_to_check:right", "--path", "/a b"], 0, "GET /a b  "),
        (["shop_to_check:make", "--factory"], 0, "No faults.\n"),
        (["shop_to_check:anything", "--wsgi"], 0, "No faults.\n"),
        (["shop_to_check:broken"], 1, "Iterator yielded non-bytestring ('hello')"),
        (["shop_to_check:broken"], 1, '   PEP 3333, "Specification Details":\n   "When called by the server, the '),
    ],
)
def test_the_report_is_printed_and_the_status_tells(
    module: None, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: str
) -> None:
    assert main(["check", *arguments]) == status
    output = capsys.readouterr()
    assert words in output.out
    assert output.err == ""


@pytest.mark.parametrize("path", ["shop", "", "http://localhost/shop", "/shop\n", "/caf\udce9"], ids=ascii)
def test_a_path_that_is_none_ends_with_status_2(capsys: pytest.CaptureFixture[str], path: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", "shop_to_check:right", "--path", path])
    assert ended.value.code == 2
    assert f"expected a path such as /shop or /shop?page=2, got {path!r}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shop_to_check:anything"], "cannot tell whether shop_to_check.anything is a WSGI or an ASGI app"),
        (["shop_to_check:make"], "it takes no arguments; name what it makes, make(), or add --factory"),
        (["shop_to_check:nothing"], "shop_to_check has no 'nothing'"),
        (["shop_to_check"], "expected module:app"),
    ],
)
def test_what_cannot_be_checked_is_told_with_status_2(
    module: None, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["check", *arguments]) == 2
    assert words in capsys.readouterr().err
