"""AsgiToWsgi under the apps of real frameworks: what their users rely on, through the strict driver and real servers.

The apps stand in tests/framework_apps.py. Each test leaves nothing behind, as conftest.py sees to.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from bridge import AsgiToWsgi
from tests import framework_apps
from tests.drivers import LIMIT, FakeInput, FileWrapper, Signal, WsgiExchange, WsgiServer, make_environ, run_in_threads
from tests.framework_apps import Notes
from tests.servers import Running, Server, until

DATA = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(DATA).hexdigest()
NUMBERS = b"".join(b"%d," % number for number in range(10))
FACTORIES = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
GUNICORN = Server("gunicorn --threads 16 --bind 127.0.0.1:{port} application:application", "gunicorn")


@pytest.fixture(params=list(FACTORIES))
def factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return FACTORIES[request.param]


@pytest.fixture
def notes() -> Notes:
    return Notes()


def ask(application: Any, method: str, path: str, body: bytes | FakeInput = b"", **more: Any) -> WsgiExchange:
    """A whole request, of which nothing may fail."""
    path, _, query = path.partition("?")
    validate = more.pop("validate", True)
    environ = make_environ(method, path, query, body=body) | more
    exchange = WsgiServer(validate=validate).run(application, environ)
    for error in (exchange.error, exchange.close_error):
        if error is not None:
            raise error
    return exchange


def get(application: Any, path: str, **more: Any) -> WsgiExchange:
    return ask(application, "GET", path, **more)


def post(application: Any, path: str, body: bytes | FakeInput, kind: str = "text/plain", **more: Any) -> WsgiExchange:
    return ask(application, "POST", path, body, CONTENT_TYPE=kind, **more)


def multipart(data: bytes, name: str, filename: str) -> tuple[bytes, str]:
    request = httpx.Request("POST", "http://x", files={name: (filename, data)})
    return request.read(), request.headers["Content-Type"]


def wait_for(probe: Callable[[], object]) -> None:
    """Wait for what nothing tells of."""
    deadline = time.monotonic() + LIMIT
    while not probe():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.005)


def leave_early(application: Any, path: str, blocks: int = 2) -> None:
    """A client that goes away in the middle of an endless response."""
    with WsgiServer().start(application, make_environ(path=path)) as exchange:
        for _ in range(blocks):
            next(exchange)


# -- Starlette ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def starlette(factory: Callable[[], asyncio.AbstractEventLoop], notes: Notes) -> Iterator[AsgiToWsgi]:
    with AsgiToWsgi(framework_apps.starlette_app(notes), loop_factory=factory) as application:
        yield application
    assert (notes.all[0], notes.all[-1]) == ("startup", "shutdown")


AROUND = pytest.mark.parametrize("around", ["", "/around", "/gzip"], ids=["plain", "BaseHTTPMiddleware", "gzip"])


@AROUND
def test_starlette_answers(starlette: AsgiToWsgi, around: str) -> None:
    """[A1] [A3] [A6] [A19] State of the lifespan, sync and async endpoints, bodies whole and in pieces."""
    seen = json.loads(get(starlette, f"{around}/state").body)
    assert seen["started_in"] == seen["pid"]
    assert get(starlette, f"{around}/sync").body != threading.current_thread().name.encode()
    for path in ("/stream", "/sync_stream"):
        exchange = get(starlette, around + path)
        assert exchange.body == NUMBERS
        assert exchange.header("X-Around") == ("GET" if around == "/around" else None)
    expected = {"disconnected": False, "size": len(DATA), "sha256": DIGEST}
    assert json.loads(post(starlette, f"{around}/echo", DATA).body) == expected
    assert post(starlette, f"{around}/upload", DATA).body == DIGEST.encode()
    assert get(starlette, f"{around}/nowhere").status_code == 404


@AROUND
def test_starlette_compresses_for_who_takes_it(starlette: AsgiToWsgi, around: str) -> None:
    exchange = get(starlette, f"{around}/stream", HTTP_ACCEPT_ENCODING="gzip")
    assert exchange.header("Content-Encoding") == ("gzip" if around == "/gzip" else None)
    response = httpx.Response(200, headers=exchange.headers, content=exchange.body)
    assert response.content == NUMBERS


@AROUND
def test_starlette_works_in_the_background(starlette: AsgiToWsgi, notes: Notes, around: str) -> None:
    """[A10]"""
    assert get(starlette, f"{around}/background").status_code == 202
    wait_for(lambda: notes.all[1:] == ["async", "sync"])


@AROUND
def test_a_stream_of_starlette_ends_when_its_client_leaves(starlette: AsgiToWsgi, notes: Notes, around: str) -> None:
    """[A8] [A10]"""
    leave_early(starlette, f"{around}/endless")
    wait_for(lambda: "endless ended" in notes.all)


@AROUND
def test_server_sent_events(starlette: AsgiToWsgi, notes: Notes, around: str) -> None:
    """[A7] [A10]"""
    body = get(starlette, f"{around}/events?count=3").body
    assert [line for line in body.split(b"\r\n") if line.startswith(b"data")] == [b"data: 0", b"data: 1", b"data: 2"]
    assert notes.count("events ended") == 1
    leave_early(starlette, f"{around}/events")
    wait_for(lambda: notes.count("events ended") == 2)


@AROUND
def test_a_file_response(starlette: AsgiToWsgi, notes: Notes, around: str) -> None:
    """[A12] By the server's file wrapper, where nothing stands between; whole, by a range, and by its head alone."""
    content = Path(framework_apps.__file__).read_bytes()
    exchange = get(starlette, f"{around}/file", validate=False, **{"wsgi.file_wrapper": FileWrapper})
    assert exchange.body == content
    assert exchange.file is not None
    part = get(starlette, f"{around}/file", HTTP_RANGE="bytes=5-9", **{"wsgi.file_wrapper": FileWrapper})
    assert (part.status_code, part.body) == (206, content[5:10])
    head = ask(starlette, "HEAD", f"{around}/file", validate=False)
    assert head.body == b""
    assert head.header("Content-Length") == str(len(content))
    wait_for(lambda: notes.count("downloaded") == 3)


@AROUND
def test_is_disconnected_of_an_unread_body_waits_for_nothing(starlette: AsgiToWsgi, around: str) -> None:
    """[A4] A client that sends slowly gets its answer at once."""
    never = Signal("never")
    stream = FakeInput([never, b"abc"], fills=False)
    assert post(starlette, f"{around}/unread", stream, CONTENT_LENGTH="3").body == b"False"
    assert not stream.reads


@AROUND
def test_an_error_of_a_starlette_endpoint_is_a_page_and_reaches_the_server(
    starlette: AsgiToWsgi, caplog: pytest.LogCaptureFixture, around: str
) -> None:
    """[A9]"""
    exchange = WsgiServer().run(starlette, make_environ(path=f"{around}/error"))
    assert exchange.status_code == 500
    assert exchange.body == b"Internal Server Error"
    wait_for(lambda: exchange.close_error is not None or "on purpose" in caplog.text)


# -- FastAPI -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fastapi(factory: Callable[[], asyncio.AbstractEventLoop], notes: Notes) -> Iterator[AsgiToWsgi]:
    with AsgiToWsgi(framework_apps.fastapi_app(notes), loop_factory=factory) as application:
        yield application
    assert (notes.all[0], notes.all[-1]) == ("startup", "shutdown")


def test_dependencies_with_yield_are_opened_and_closed(fastapi: AsgiToWsgi, notes: Notes) -> None:
    """[A10] [A17] After the response, after an error, and around a stream."""
    seen = json.loads(get(fastapi, "/sync").body)
    assert seen["resource"] == "a resource"
    assert seen["thread"] != threading.current_thread().name
    wait_for(lambda: notes.all[1:] == ["opened", "closed"])
    assert get(fastapi, "/stream").body == NUMBERS
    wait_for(lambda: notes.all[3:] == ["opened", "closed"])
    failing = WsgiServer().run(fastapi, make_environ(path="/failing"))
    assert failing.status_code == 500
    wait_for(lambda: notes.all[5:] == ["opened", "closed"])


def test_uploads_to_async_and_sync_endpoints(fastapi: AsgiToWsgi) -> None:
    """[A3] Bigger than what is kept in memory, and in pieces as a slow client sends them."""
    data = DATA * 4
    body, kind = multipart(data, "file", "grüße.bin")
    expected = {"name": "grüße.bin", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for path in ("/upload", "/sync_upload"):
        pieces = FakeInput([body[start : start + 30_000] for start in range(0, len(body), 30_000)], fills=False)
        exchange = post(fastapi, path, pieces, kind, CONTENT_LENGTH=str(len(body)))
        assert json.loads(exchange.body) == expected


def test_an_http_client_made_at_startup_serves_sixteen_threads(fastapi: AsgiToWsgi) -> None:
    """[A16] httpx.AsyncClient, and its pool of connections."""

    def visit(number: int) -> None:
        assert get(fastapi, f"/proxied/{number}").body == b"/%d" % number

    run_in_threads(visit, 100, threads=16, timeout=45)


DATABASE = """
    import asyncio, json, sys
    import uvloop
    from bridge import AsgiToWsgi
    from tests.drivers import WsgiServer, make_environ, run_in_threads
    from tests.framework_apps import Notes, fastapi_app_with_a_database

    notes = Notes()
    app = fastapi_app_with_a_database(notes, sys.argv[1])
    factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[sys.argv[2]]

    def ask(*request, **more):
        exchange = WsgiServer().run(application, make_environ(*request, **more))
        for error in (exchange.error, exchange.close_error):
            if error is not None:
                raise error
        return json.loads(exchange.body)

    def visit(number):
        item = {"number": number, "name": f"item {number}"}
        data = json.dumps(item).encode()
        assert ask("POST", "/items", body=data, CONTENT_TYPE="application/json") == item
        assert ask("GET", f"/items/{number}") == item

    with AsgiToWsgi(app, loop_factory=factory) as application:
        run_in_threads(visit, 60, threads=16, timeout=40)
    assert notes.all[0] == "startup" and notes.all[-1] == "shutdown" and notes.count("created") == 60, notes.all
    print("done")
"""


def run_script(code: str, *arguments: str, options: tuple[str, ...] = ()) -> None:
    """Run a program in a process of its own, which must end well and without a complaint."""
    result = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    complaints = [line for line in result.stderr.splitlines() if re.search("Warning|never|destroyed", line)]
    assert not complaints, result.stderr


@pytest.mark.parametrize("factory_name", list(FACTORIES))
def test_a_database_engine_made_at_startup_serves_sixteen_threads(tmp_path: Path, factory_name: str) -> None:
    """[A16] SQLAlchemy's async engine with aiosqlite: greenlets must not be moved to another thread.

    In a process of its own: whoever has imported greenlet has loops that are bound to a thread, which others test.
    """
    run_script(DATABASE, str(tmp_path / "database"), factory_name)


# -- Quart and Litestar ------------------------------------------------------------------------------------------------


@pytest.fixture
def quart(factory: Callable[[], asyncio.AbstractEventLoop], notes: Notes) -> Iterator[AsgiToWsgi]:
    with AsgiToWsgi(framework_apps.quart_app(notes), loop_factory=factory) as application:
        yield application
    assert (notes.all[0], notes.all[-1]) == ("startup", "shutdown")


def test_quart(quart: AsgiToWsgi, notes: Notes) -> None:
    """[A3] [A6] [A9] [A10] [A19]"""
    assert json.loads(get(quart, "/hello/Zoë?q=%C3%A4").body) == {"hello": "Zoë", "query": "ä"}
    assert get(quart, "/sync").body != threading.current_thread().name.encode()
    assert post(quart, "/echo", DATA).body == DIGEST.encode()
    assert post(quart, "/upload", DATA).body == DIGEST.encode()
    assert json.loads(post(quart, "/form", b"a=1&b=%20", "application/x-www-form-urlencoded").body) == {
        "a": "1",
        "b": " ",
    }
    assert get(quart, "/stream").body == NUMBERS
    assert (
        get(quart, "/file", validate=False, **{"wsgi.file_wrapper": FileWrapper}).body
        == Path(framework_apps.__file__).read_bytes()
    )
    assert get(quart, "/error").status_code == 500
    assert get(quart, "/background").status_code == 202
    wait_for(lambda: "background" in notes.all)


def test_a_stream_of_quart_ends_when_its_client_leaves(quart: AsgiToWsgi, notes: Notes) -> None:
    """[A10]"""
    leave_early(quart, "/endless")
    wait_for(lambda: "endless ended" in notes.all)


@pytest.fixture
def litestar(factory: Callable[[], asyncio.AbstractEventLoop], notes: Notes) -> Iterator[AsgiToWsgi]:
    with AsgiToWsgi(framework_apps.litestar_app(notes), loop_factory=factory) as application:
        yield application
    assert (notes.all[0], notes.all[-1]) == ("startup", "shutdown")


def test_litestar(litestar: AsgiToWsgi, notes: Notes) -> None:
    """[A3] [A6] [A9] [A10] [A19]"""
    assert json.loads(get(litestar, "/hello/Zoë").body) == {"hello": "Zoë", "resource": "a resource"}
    wait_for(lambda: notes.all[1:] == ["opened", "closed"])
    assert get(litestar, "/sync").body != threading.current_thread().name.encode()
    assert post(litestar, "/echo", DATA).body == DIGEST.encode()
    body, kind = multipart(DATA, "data", "x.bin")
    expected = {"name": "x.bin", "size": len(DATA), "sha256": DIGEST}
    assert json.loads(post(litestar, "/upload", body, kind).body) == expected
    assert get(litestar, "/stream").body == NUMBERS
    assert get(litestar, "/file").body == Path(framework_apps.__file__).read_bytes()
    assert WsgiServer().run(litestar, make_environ(path="/error")).status_code == 500
    assert get(litestar, "/background").status_code == 202
    wait_for(lambda: "background" in notes.all)


def test_events_of_litestar_end_when_their_client_leaves(litestar: AsgiToWsgi, notes: Notes) -> None:
    """[A10]"""
    leave_early(litestar, "/events")
    wait_for(lambda: "events ended" in notes.all)


# -- MCP, through gunicorn ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    application = (
        "from bridge import AsgiToWsgi\nfrom tests.framework_apps import mcp_app\napplication = AsgiToWsgi(mcp_app())\n"
    )
    with Running(GUNICORN, application, tmp_path_factory.mktemp("mcp")) as running:
        yield running
        assert running.stop() == 0
        log = running.log()
        errors = [line for line in log.splitlines() if "ERROR" in line]
        # mcp logs what send() raises (A8), where a client that ends its session is quicker than the end of its stream.
        theirs = [line for line in errors if "Error in standalone SSE" in line or "SSE response error" in line]
        assert errors == theirs, log
        assert theirs or "Traceback" not in log, log


MCP_CLIENT = """
    import asyncio, sys
    from mcp import Client, MCPError

    async def use(number):
        async with Client(sys.argv[1], mode=sys.argv[2]) as client:
            tools = await client.list_tools()
            assert sorted(tool.name for tool in tools.tools) == ["add", "count", "fail"], tools
            told = []
            async def progress(done, total, message):
                told.append((done, total))
            for step in range(3):
                result = await client.call_tool("add", {"a": number, "b": step})
                assert result.content[0].text == str(number + step), result
            result = await client.call_tool("count", {"to": 5}, progress_callback=progress)
            assert result.content[0].text == "counted to 5", result
            assert told == [(step, 5) for step in (1, 2, 3, 4, 5)], told
            result = await client.call_tool("fail", {})
            assert result.is_error and "on purpose" in result.content[0].text, result

    async def main():
        async with asyncio.timeout(40), asyncio.TaskGroup() as clients:
            for number in range(4):
                clients.create_task(use(number))
        print("done")

    asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.leaves("files")
def test_an_mcp_server_with_its_own_client(mcp_server: Running, mode: str) -> None:
    """[A4] [A7] [A16] Four sessions at once, each with a stream that stays open, by both of the protocol's eras."""
    run_script(MCP_CLIENT, f"{mcp_server.url}/mcp", mode)


# -- FastAPI, through gunicorn -----------------------------------------------------------------------------------------


@pytest.mark.leaves("files")
def test_fastapi_under_gunicorn_with_sixteen_threads(tmp_path: Path) -> None:
    """[A16] [A19] [A20] Its engine and its client serve all threads; it shuts down when gunicorn does."""
    application = (
        "from bridge import AsgiToWsgi\n"
        "from tests.framework_apps import Notes, fastapi_app, fastapi_app_with_a_database\n"
        "from werkzeug.middleware.dispatcher import DispatcherMiddleware\n"
        "class Printed(Notes):\n"
        "    def add(self, note): print(f'<{note}>', flush=True)\n"
        f"database = AsgiToWsgi(fastapi_app_with_a_database(Printed(), {str(tmp_path / 'database')!r}))\n"
        "application = DispatcherMiddleware(AsgiToWsgi(fastapi_app(Printed())), {'/database': database})\n"
    )
    with Running(GUNICORN, application, tmp_path) as running:
        with httpx.Client(base_url=running.url, trust_env=False, timeout=LIMIT) as client:

            def visit(number: int) -> None:
                item = {"number": number, "name": "x"}
                assert client.post("/database/items", json=item).json() == item
                assert client.get(f"/database/items/{number}").json() == item
                assert client.get(f"/proxied/{number}").text == f"/{number}"
                assert client.get("/stream").content == NUMBERS
                assert client.get("/sync").json()["resource"] == "a resource"
                files = {"file": ("x", DATA)}
                assert client.post("/upload", files=files).json()["sha256"] == DIGEST

            run_in_threads(visit, 48, threads=16, timeout=40)
        assert any(running.log().count("<closed>") == 96 for _ in until(LIMIT)), running.log()
        assert running.stop() == 0
        log = running.log()
        assert (log.count("<startup>"), log.count("<shutdown>"), log.count("<created>")) == (2, 2, 48), log
        assert "Traceback" not in log, log


# -- Django: its settings are the process's, so it runs in one of its own ----------------------------------------------

DJANGO = """
    import asyncio, json, sys, threading
    import django
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.core.signals import request_finished, request_started
    from django.db import connection, models
    from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
    from django.urls import path
    from bridge import AsgiToWsgi
    from tests.drivers import FakeInput, WsgiServer, make_environ, run_in_threads

    settings.configure(
        ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="of the tests", USE_TZ=True,
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1], "CONN_MAX_AGE": 0}},
        MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
        LOGGING={"version": 1, "disable_existing_loggers": False, "handlers": {"console": {"class":
            "logging.StreamHandler"}}, "loggers": {"django": {"handlers": ["console"], "level": "ERROR"}}},
    )
    django.setup()

    class Item(models.Model):
        name = models.CharField(max_length=20)
        class Meta:
            app_label = "tests"

    finished, left, threads = [], threading.Event(), set()
    request_finished.connect(lambda **_: finished.append(1), weak=False)

    def sync(request):
        threads.add(threading.get_ident())
        return JsonResponse({"name": Item.objects.get(pk=request.GET["pk"]).name})

    async def view(request):
        await asyncio.sleep(0)
        item = await Item.objects.aget(pk=request.GET["pk"])
        return JsonResponse({"name": item.name})

    async def echo(request):
        return HttpResponse(request.body)

    async def stream(request):
        async def blocks():
            for number in range(10):
                yield f"{number},"
                await asyncio.sleep(0)
        return StreamingHttpResponse(blocks())

    async def endless(request):
        async def blocks():
            try:
                while True:
                    yield "tick"
                    await asyncio.sleep(0.005)
            finally:
                left.set()
        return StreamingHttpResponse(blocks())

    async def error(request):
        raise LookupError("on purpose")

    urlpatterns = [path(view.__name__, view) for view in (sync, view, echo, stream, endless, error)]

    def run(path, query="", body=b""):
        exchange = WsgiServer().run(application, make_environ("POST" if body else "GET", path, query, body=body))
        for error in (exchange.error, exchange.close_error):
            if error is not None:
                raise error
        return exchange

    with connection.schema_editor() as editor:
        editor.create_model(Item)
    Item.objects.bulk_create([Item(name=f"item {number}") for number in range(64)])
    connection.close()

    with AsgiToWsgi(get_asgi_application()) as application:
        def visit(number):
            pk = number % 64 + 1
            name = {"name": f"item {pk - 1}"}
            assert json.loads(run("/sync", f"pk={pk}").body) == name
            assert json.loads(run("/view", f"pk={pk}").body) == name
            assert run("/echo", body=b"x" * (number + 1)).body == b"x" * (number + 1)
            assert run("/stream").body == b"0,1,2,3,4,5,6,7,8,9,"

        run_in_threads(visit, 48, threads=16, timeout=40)
        assert len(finished) == 48 * 4, len(finished)
        assert threading.get_ident() not in threads
        with WsgiServer().start(application, make_environ(path="/endless")) as exchange:
            assert next(exchange) == next(exchange) == b"tick"
        assert left.wait(10)
        assert run("/error").status_code == 500
    print("done")
"""


@pytest.mark.parametrize("options", [(), ("-X", "dev")], ids=["as usual", "dev mode"])
def test_django(tmp_path: Path, options: tuple[str, ...]) -> None:
    """[A3] [A6] [A10] [A17] [S3] Async and sync views, streams, the ORM, from 16 threads; each request ends once."""
    run_script(DJANGO, str(tmp_path / "database"), options=options)
