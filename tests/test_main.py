"""The command line: telling an app's kind, finding the app, serving it by real processes, stopping them."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi
import flask
import httpx
import pytest

from bridge import __main__
from bridge.__main__ import CommandError, ThreadedWSGIServer, listen, load_app, main, tell_kind
from bridge.kinds import Kind
from tests.ids import lasting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIEnvironment

LIMIT = 30.0  # seconds in which a process has to do what is waited for


# Telling an app's kind


def wsgi(environ: Any, start_response: Any) -> Any: ...


async def asgi(scope: Any, receive: Any, send: Any) -> None: ...


def test_what_can_be_told_is_told() -> None:
    assert tell_kind(wsgi) is Kind.WSGI
    assert tell_kind(asgi) is Kind.ASGI


@pytest.mark.parametrize(
    ("app", "words"),
    [
        (lambda *args: None, "cannot tell whether .*<lambda> .* say --wsgi or --asgi$"),
        (max, "say --wsgi or --asgi$"),
        (
            lambda: None,
            r"is no app: it takes no arguments; name what it makes, .*, or add --factory to have it called$",
        ),
        (fastapi.FastAPI, r"is no app: it is a class; name an instance of it, FastAPI\(\.\.\.\), or add --factory"),
        (flask.Flask, r"is no app: it is a class; name an instance of it, Flask\(\.\.\.\)$"),  # it wants a name
        (lambda scope: None, "as ASGI 2 apps do"),
        ("app", "'app' is no app: it is a string"),
        (None, "None is no app: it cannot be called$"),
    ],
    ids=lasting,
)
def test_what_is_no_app_or_may_be_both_is_told_plainly(app: object, words: str) -> None:
    with pytest.raises(CommandError, match=words):
        tell_kind(app)


# Finding the app


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of modules to import from; they are forgotten afterwards."""
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


MODULES = {
    "shop_main": """
import time

class site:
    @staticmethod
    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield f"Hello from {environ['PATH_INFO']}".encode("latin-1")

def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"Hello from {environ['PATH_INFO']}".encode("latin-1")]

def make():
    return application

async def make_async():
    return application

def fail():
    raise RuntimeError("no database")

def leave():
    raise SystemExit("no settings")

def endless(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    while True:
        yield b"tick"
        time.sleep(0.05)

def forever(environ, start_response):
    while True:
        time.sleep(1)

def slow(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"a"
    time.sleep(1)
    yield b"b"

def anything(*args):
    return application(*args)

text = "text"

class Lazy:
    @property
    def app(self):
        raise ValueError("no settings")

lazy = Lazy()
""",
    "shop_async": """
import asyncio
import time

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("stopping", flush=True)
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    if scope["path"] == "/endless":
        while True:
            await send({"type": "http.response.body", "body": b"tick", "more_body": True})
            await asyncio.sleep(0.05)
    await send({"type": "http.response.body", "body": f"Hello from {scope['path']}".encode()})

async def refuses(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})

async def slow(scope, receive, send):
    if scope["type"] == "lifespan":
        raise ValueError
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    await asyncio.sleep(1)
    await send({"type": "http.response.body", "body": b"b"})

async def interrupted_at_startup(scope, receive, send):
    import os, signal
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    except BaseException:
        raise ValueError

async def leaves(scope, receive, send):
    if scope["type"] == "lifespan":
        raise ValueError
    import os
    os._exit(0)

async def process(scope, receive, send):
    if scope["type"] == "lifespan":
        raise ValueError
    import os
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode(), "more_body": True})
    await receive()
    await receive()
""",
    "shop_broken": "import nowhere_to_be_found",
    "shop_syntax": "def app(:",
    "shop_script": "import sys\n\nsys.exit(3)",
    "shop_deep": """try:
    import shop_zero
except Exception as error:
    raise RuntimeError("no shop") from error
""",
    "shop_panic": """
class PanicError(BaseException):  # as PyO3's, of what is written in Rust
    pass

raise PanicError("no such table")
""",
    "shop_mute": """
class MuteError(Exception):
    def __str__(self):
        raise ValueError

raise MuteError
""",
    "shop_zero": "def divide():\n    return 1 / 0\n\ndivide()",
}


@pytest.mark.parametrize(
    ("target", "factory", "words"),
    [
        ("shop_main", False, "expected module:app, got 'shop_main'; is it shop_main:app?"),
        ("shop_main:", False, "expected module:app, got 'shop_main:'; is it shop_main:app?"),
        (":app", False, "expected module:app, got ':app'"),
        ("./shop/main.py", False, "expected module:app, got './shop/main.py'; is it shop.main:app?"),
        (
            "shop_main.py:make",
            False,
            "expected a module's name before the colon, got 'shop_main.py'; is it shop_main:make?",
        ),
        (
            "/srv/shop/main.py:app",
            False,
            "expected a module's name before the colon, got '/srv/shop/main.py'; is it main:app, run in /srv/shop?",
        ),
        (".shop_main:make", False, "expected a module's whole name, got '.shop_main'; is it shop_main:make?"),
        ("shop_nowhere:app", False, "there is no module 'shop_nowhere' in "),
        ("shop_main.sub:app", False, "there is no module 'shop_main.sub' in "),
        ("shop_main:aplication", False, "shop_main has no 'aplication'; did you mean 'application'?"),
        ("shop_main:zzz", False, "shop_main has no 'zzz'; did you mean 'application'?"),
        ("shop_main:site.zzz", False, "shop_main.site has no 'zzz'; did you mean 'app'?"),
        ("shop_main:text.zzz", False, "shop_main.text has no 'zzz'"),
        ("shop_main:lazy.app", False, "shop_main.lazy.app cannot be had: ValueError: no settings ("),
        (
            "shop_broken:app",
            False,
            "shop_broken cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("shop_syntax:app", False, "shop_syntax cannot be imported: SyntaxError: "),
        ("shop_zero:app", False, "shop_zero cannot be imported: ZeroDivisionError: division by zero ("),
        ("shop_panic:app", False, "shop_panic cannot be imported: PanicError: no such table ("),
        ("shop_mute:app", False, "shop_mute cannot be imported: MuteError: <exception str() failed> ("),
        ("shop_script:app", False, "shop_script cannot be imported: SystemExit: 3 ("),
        (
            "shop_main:make_async",
            False,
            "shop_main.make_async is no app: it is async and takes no arguments; name what it gives when it is "
            "awaited: asyncio.run(make_async())",
        ),
        ("shop_main:make_async", True, "shop_main:make_async is no factory: it is async"),
        ("shop_main:text", True, "shop_main:text is no factory: it cannot be called"),
        ("shop_main:fail", True, "shop_main:fail made no app: RuntimeError: no database ("),
        ("shop_main:leave", True, "shop_main:leave made no app: SystemExit: no settings ("),
        ("shop_main:application", True, "shop_main:application is no factory: it has to be called without arguments"),
    ],
)
def test_what_cannot_be_found_is_told_with_status_2(
    modules: Path, capsys: pytest.CaptureFixture[str], target: str, factory: bool, words: str
) -> None:
    status = main([target, *(["--factory"] if factory else [])])

    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    *traceback, sentence = output.err.splitlines()
    assert sentence.startswith(f"python -m bridge: {words}")
    # The user's code has failed where there is an error in the sentence; with a word on where.
    assert bool(traceback) == ("Error: " in words or "SystemExit: " in words)
    assert not traceback or str(modules) in output.err


def test_an_error_in_the_users_module_is_told_with_its_place(modules: Path) -> None:
    with pytest.raises(CommandError, match=r"shop_zero\.py, line 2\)$"):
        load_app("shop_zero:app")


ZERO = """\
Traceback (most recent call last):
  File "{0}/shop_deep.py", line 2, in <module>
    import shop_zero
  File "{0}/shop_zero.py", line 4, in <module>
    divide()
  File "{0}/shop_zero.py", line 2, in divide
    return 1 / 0
ZeroDivisionError: division by zero

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "{0}/shop_deep.py", line 4, in <module>
    raise RuntimeError("no shop") from error
RuntimeError: no shop

python -m bridge: shop_deep cannot be imported: RuntimeError: no shop ({0}/shop_deep.py, line 4)
"""
SYNTAX = """\
  File "{0}/shop_syntax.py", line 1
    def app(:
SyntaxError: invalid syntax

python -m bridge: shop_syntax cannot be imported: SyntaxError: invalid syntax ({0}/shop_syntax.py, line 1)
"""


@pytest.mark.parametrize(("target", "said"), [("shop_deep:app", ZERO), ("shop_syntax:app", SYNTAX)])
def test_an_error_in_the_users_module_is_told_with_the_users_frames_and_no_others(
    modules: Path, capsys: pytest.CaptureFixture[str], target: str, said: str
) -> None:
    assert main([target]) == 2
    lines = capsys.readouterr().err.splitlines(keepends=True)
    # Which parts of a line are underlined is each CPython's own choice.
    assert "".join(line for line in lines if line == "\n" or line.strip(" ~^\n")) == said.format(modules)


@pytest.mark.parametrize("command", [[], ["check"]], ids=["serve", "check"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["shop_main:application", "--asgi"],
            "shop_main:application is a WSGI app, shop_main.application: leave --asgi",
        ),
        (["shop_async:app", "--wsgi"], "shop_async:app is an ASGI app, shop_async.app: leave --wsgi out"),
        (
            ["shop_main:make", "--wsgi"],
            "shop_main.make is no app: it takes no arguments; name what it makes, make(), or",
        ),
        (["shop_main:text", "--asgi"], "'text' is no app: it is a string"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_kind_that_is_wrong_for_sure_is_told_with_status_2(
    modules: Path, capsys: pytest.CaptureFixture[str], command: list[str], arguments: list[str], words: str
) -> None:
    assert main([*command, *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"python -m bridge: {words}")


@pytest.mark.parametrize(
    ("target", "factory"), [("shop_main:application", False), ("shop_main:site.app", False), ("shop_main:make", True)]
)
def test_apps_are_found_by_module_and_dotted_name_and_made_by_factories(
    modules: Path, target: str, factory: bool
) -> None:
    assert tell_kind(load_app(target, factory=factory)) is Kind.WSGI


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("8000", ("127.0.0.1", 8000)),
        (":8000", ("0.0.0.0", 8000)),
        ("*:8000", ("0.0.0.0", 8000)),
    ],
)
def test_addresses_are_read(text: str, address: tuple[str, int]) -> None:
    assert __main__.parse_address(text) == address


@pytest.mark.parametrize(
    "arguments",
    [
        ["m:app", "--bind", "::1:8000"],
        ["m:app", "--bind", "localhost"],
        ["m:app", "--bind", "localhost:65536"],
        ["m:app", "--bind", "localhost:\u0661"],
        ["m:app", "--threads", "0"],
        ["m:app", "--threads", "many"],
        ["m:app", "--wsgi", "--asgi"],
        ["m:app", "--check"],
        ["m:app", "--megabytes", "1"],
        ["--factory"],
        ["--threads", "3"],
        ["--workers", "3"],
        ["m:app", "--workers", "0"],
    ],
    ids=" ".join,
)
def test_arguments_that_make_no_sense_end_with_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("target", ["shop_main:application", "shop_async:app"])
def test_an_address_in_use_is_told_with_status_2(
    modules: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main([target, "--bind", address]) == 2
    assert capsys.readouterr().err == f"python -m bridge: cannot listen on {address}: Address already in use\n"


def test_a_host_that_nobody_knows_is_told_with_status_2(modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shop_main:application", "--bind", "[no::host]:1"]) == 2
    assert capsys.readouterr().err.startswith("python -m bridge: cannot listen on [no::host]:1: ")


@pytest.mark.parametrize("host", ["shop..example", "a" * 64], ids=["an empty label", "a long label"])
def test_a_name_that_no_host_can_have_is_told_with_status_2(
    modules: Path, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    assert main(["shop_main:application", "--bind", f"{host}:0"]) == 2
    words = f"python -m bridge: cannot listen on {host}:0: no host can have this name\n"
    assert capsys.readouterr().err == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("::1", "an IPv6 address goes in brackets, as in [::1]:8000, got '::1'"),
        ("::1:8000", "an IPv6 address goes in brackets, as in [::1]:8000, got '::1:8000'"),
        ("[::1]", "expected HOST:PORT, [IPV6]:PORT or PORT, got '[::1]'"),
        ("http://localhost:8000", "expected HOST:PORT, [IPV6]:PORT or PORT, got 'http://localhost:8000'"),
    ],
)
def test_an_address_that_is_none_is_told_with_one_that_would_be(text: str, words: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        __main__.parse_address(text)
    assert str(caught.value) == words


def test_a_missing_server_is_told_with_what_to_install(
    modules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["shop_main:application"]) == 2
    assert "pip install uvicorn" in capsys.readouterr().err


@pytest.mark.parametrize("missing", __main__.DEMO_MODULES)
def test_what_the_demo_misses_is_told_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["--check"]) == 2
    assert (
        capsys.readouterr().err == f'python -m bridge: the demo needs {missing}: pip install "wsgi-asgi-bridge[demo]"\n'
    )


def test_an_asgi_app_that_refuses_to_start_ends_with_status_1(
    modules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shop_async:refuses", "--bind", "127.0.0.1:0"]) == 1
    assert "shop_async:refuses did not start: " in (err := capsys.readouterr().err)
    assert "no database" in err


# The standard library's server, as it is made here


@contextlib.contextmanager
def serving(app: Callable[..., Iterable[bytes]], threads: int | None = None) -> Iterator[ThreadedWSGIServer]:
    with ThreadedWSGIServer(listen(__main__.Address("127.0.0.1", 0)), app, threads) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(LIMIT)


def get(server: ThreadedWSGIServer, path: str = "/") -> str:
    return httpx.get(f"http://127.0.0.1:{server.server_port}{path}", timeout=LIMIT, trust_env=False).text


def in_parallel(count: int, call: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)


def test_requests_are_served_in_parallel() -> None:
    meeting = threading.Barrier(8, timeout=LIMIT)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        meeting.wait()
        start_response("200 OK", [])
        return [b"all here"]

    answers: list[str] = []
    with serving(app) as server:
        in_parallel(8, lambda: answers.append(get(server)))
    assert answers == ["all here"] * 8


def test_threads_bounds_how_many_requests_are_in_the_app() -> None:
    inside = 0
    seen: list[int] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        nonlocal inside
        inside += 1
        seen.append(inside)
        start_response("200 OK", [])
        yield b"a"
        inside -= 1

    with serving(app, threads=1) as server:
        in_parallel(8, lambda: get(server))
    assert seen == [1] * 8


def test_a_stream_without_end_is_hung_up_on_when_its_time_of_grace_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "GRACE", 0.1)
    go_on, closed = threading.Event(), threading.Event()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            while not go_on.wait(0.01):
                yield b"tick"
        finally:
            closed.set()

    with serving(app) as server, socket.create_connection(("127.0.0.1", server.server_port), LIMIT) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(1) == b"H"
        server.drain()
        assert closed.wait(LIMIT)
        go_on.set()


def test_a_request_in_flight_may_end_in_its_time_of_grace() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        entered.set()
        go_on.wait(LIMIT)
        start_response("200 OK", [])
        return [b"done"]

    answers: list[str] = []
    with serving(app) as server:
        client = threading.Thread(target=lambda: answers.append(get(server)))
        client.start()
        assert entered.wait(LIMIT)
        threading.Timer(0.05, go_on.set).start()
        server.drain()
        client.join(LIMIT)
    assert answers == ["done"]


# Real processes


class Served:
    """`python -m bridge` at work."""

    def __init__(self, *arguments: str, program: str | None = None) -> None:
        start = ["-m", "bridge"] if program is None else ["-c", program]
        self.process = subprocess.Popen(
            [sys.executable, *start, *arguments, "--bind", "127.0.0.1:0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        # A process that hangs is killed, which ends whatever the test waits for: its workers as well, which hold on to
        # what it wrote to.
        self._watchdog = threading.Timer(LIMIT, self._kill)
        self._watchdog.start()
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.address = self.line.split()[-1] if self.line else ""

    def wait(self) -> tuple[int, str, str]:
        """Wait for the end: exit status, the rest of the output, and the errors."""
        out, err = self.process.communicate()
        return self.process.returncode, out, err

    def stop(self, signal_number: int) -> tuple[int, str, str]:
        self.process.send_signal(signal_number)
        return self.wait()

    def close(self) -> None:
        self._watchdog.cancel()
        self._watchdog.join()
        self._kill()
        self.process.communicate()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def serve(modules: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Served]]:
    # bridge is found where these tests found it, from any directory; and without asyncio's debug mode, which says on
    # stderr how slow a machine is.
    monkeypatch.setenv("PYTHONPATH", str(Path(__main__.__file__).parent.parent))
    monkeypatch.delenv("PYTHONASYNCIODEBUG", raising=False)
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, program: str | None = None) -> Served:
            served = Served(*arguments, program=program)
            stack.callback(served.close)
            return served

        yield start


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["shop_main:application"], "(WSGI, through WsgiToAsgi on uvicorn)"),
        (["shop_main:make", "--factory", "--threads", "2"], "(WSGI, through WsgiToAsgi on uvicorn)"),
        (["shop_main:anything", "--wsgi"], "(WSGI, through WsgiToAsgi on uvicorn)"),
        (["shop_async:app"], "(ASGI, through AsgiToWsgi on wsgiref)"),
        (["shop_async:app", "--asgi", "--threads", "2"], "(ASGI, through AsgiToWsgi on wsgiref)"),
        (["shop_main:application", "--workers", "2"], "(WSGI, through WsgiToAsgi on uvicorn)"),
        (["shop_async:app", "--workers", "2"], "(ASGI, through AsgiToWsgi on wsgiref)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_app_is_served_on_the_other_kind_of_server(
    serve: Callable[..., Served], target: list[str], words: str
) -> None:
    served = serve(*target)

    assert served.line.startswith(f"Serving {target[0]} {words} on http://127.0.0.1:")
    with httpx.Client(base_url=served.address, trust_env=False, timeout=LIMIT) as client:
        assert [client.get(f"/{n}").text for n in range(3)] == [f"Hello from /{n}" for n in range(3)]
    status, _, err = served.stop(signal.SIGTERM)
    assert (status, err) == (0, "")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("target", "last_words"), [("shop_main:application", ""), ("shop_async:app", "stopping\n")])
def test_a_signal_stops_cleanly(serve: Callable[..., Served], target: str, last_words: str, signal_number: int) -> None:
    served = serve(target)
    assert served.stop(signal_number) == (0, last_words, "")


@pytest.mark.parametrize("target", ["shop_main:endless", "shop_async:app"])
def test_a_stream_without_end_does_not_hold_up_the_stop(serve: Callable[..., Served], target: str) -> None:
    served = serve(target)
    with httpx.stream("GET", f"{served.address}/endless", trust_env=False, timeout=LIMIT) as response:
        assert next(response.iter_raw()).startswith(b"tick")
        status, _, err = served.stop(signal.SIGTERM)
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("target", "last_words"), [("shop_main:endless", ""), ("shop_async:app", "stopping\n")], ids=["WSGI", "ASGI"]
)
def test_a_second_interrupt_hangs_up_at_once(serve: Callable[..., Served], target: str, last_words: str) -> None:
    served = serve(target, program=PATIENT)
    with httpx.stream("GET", f"{served.address}/endless", trust_env=False, timeout=LIMIT) as response:
        assert next(response.iter_raw()).startswith(b"tick")
        served.process.send_signal(signal.SIGINT)
        wait_until_nobody_listens(served.address)  # the first one has come
        served.process.send_signal(signal.SIGINT)
        status, out, err = served.wait()
    assert (status, set(out.splitlines()), err) == (0, set(last_words.splitlines()), "")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_app_that_never_returns_does_not_hold_up_the_stop_for_ever(
    serve: Callable[..., Served], workers: str
) -> None:
    served = serve("shop_main:forever", "--workers", workers, program=IMPATIENT)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{served.address}/hangs", trust_env=False, timeout=1)
    status, _, err = served.stop(signal.SIGTERM)
    assert status == 0
    assert err.count("the shutdown leaves alone what has not ended in 0.3 s: 1 request in the app: 'GET /hangs'") == 1


IMPATIENT = """
import sys, bridge.__main__ as main, bridge.wsgi_to_asgi as wsgi_to_asgi
main.GRACE, wsgi_to_asgi.SHUTDOWN_SECONDS = 0.1, 0.3
sys.exit(main.main())
"""

# Requests in flight have far longer to end than the test.
PATIENT = "import sys, bridge.__main__ as main; main.GRACE = 1000.0; sys.exit(main.main())"


def wait_until_nobody_listens(address: str) -> None:
    url = httpx.URL(address)
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        try:
            socket.create_connection((url.host, url.port or 0), LIMIT).close()
        except ConnectionError:
            return
        time.sleep(0.01)
    pytest.fail(f"{address} still answers")


def test_an_interrupt_that_the_startup_has_caught_stops_all_the_same(serve: Callable[..., Served]) -> None:
    served = serve("shop_async:interrupted_at_startup")
    status, out, err = served.wait()
    assert (served.line, status, out, err) == ("", 0, "", "")


@pytest.mark.parametrize("target", ["shop_main:application", "shop_async:app"], ids=["WSGI", "ASGI"])
def test_an_interrupt_while_a_loop_is_made_stops_without_a_word(serve: Callable[..., Served], target: str) -> None:
    served = serve(target, program=INTERRUPTED)
    assert (served.line, *served.wait()) == ("", 130, "", "")


# In the middle of making its loop. An import may keep asyncio.new_event_loop, so that is replaced first.
INTERRUPTED = """
import asyncio, os, signal, sys

class Loop(asyncio.SelectorEventLoop):
    def _make_self_pipe(self):
        os.kill(os.getpid(), signal.SIGINT)
        super()._make_self_pipe()

asyncio.new_event_loop = Loop

import bridge.__main__, uvicorn

uvicorn.Config.get_loop_factory = lambda self: Loop
sys.exit(bridge.__main__.main())
"""


def test_a_loop_can_be_made_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shutdown of an app that was interrupted may need one."""
    monkeypatch.setattr(__main__, "interrupted", threading.Event())
    __main__.interrupted.set()
    __main__.make_loop().close()


@pytest.mark.parametrize("target", ["shop_main:application", "shop_async:app"])
def test_the_end_of_stdin_stops_where_that_is_asked_for(serve: Callable[..., Served], target: str) -> None:
    served = serve(target, "--until-stdin-closes")
    assert served.process.stdin is not None
    served.process.stdin.close()
    served.process.stdin = None
    status, _, err = served.wait()
    assert (status, err) == (0, "")


@pytest.mark.parametrize(("target", "status"), [("shop_async:refuses", 1), ("shop_async:leaves", 1)])
def test_a_worker_that_ends_by_itself_ends_all(serve: Callable[..., Served], target: str, status: int) -> None:
    served = serve(target, "--workers", "2")
    if target.endswith("leaves"):
        with contextlib.suppress(httpx.TransportError):
            httpx.get(served.address, trust_env=False, timeout=LIMIT)
    returned, _, err = served.wait()
    assert returned == status
    assert re.search(r"^python -m bridge: worker \d+ ended by itself, with status [01]: so all end$", err, re.M)


def test_a_worker_that_is_interrupted_twice_does_no_more_than_end(serve: Callable[..., Served]) -> None:
    served = serve("shop_async:app", "--workers", "2", program=TWICE)
    status, out, err = served.wait()
    assert (status, out) == (1, "")
    assert re.fullmatch(r"python -m bridge: worker \d+ ended by itself, with status 0: so all end\n", err)


# The second comes in the midst of the end that the first has begun.
TWICE = """
import os, signal, sys
import bridge.__main__ as main

def serve_asgi_app(app, service):
    sys.stdout.flush = lambda: os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)

main.serve_asgi_app = serve_asgi_app
sys.exit(main.main())
"""


def worker_of(served: Served) -> int:
    """The process that answers."""
    with httpx.stream("GET", served.address, trust_env=False, timeout=LIMIT) as stream:
        return int(next(stream.iter_text()))


def test_a_worker_that_is_killed_is_named_with_its_signal(serve: Callable[..., Served]) -> None:
    served = serve("shop_async:process", "--workers", "2")
    worker = worker_of(served)
    os.kill(worker, signal.SIGKILL)
    status, _, err = served.wait()
    assert (status, err) == (1, f"python -m bridge: worker {worker} was ended by SIGKILL: so all end\n")


def test_workers_end_with_a_parent_that_is_killed(serve: Callable[..., Served]) -> None:
    served = serve("shop_async:process", "--workers", "2")
    assert worker_of(served) != served.process.pid
    served.process.kill()
    wait_until_nobody_listens(served.address)


@pytest.mark.parametrize("target", ["shop_main:slow", "shop_async:slow"])
def test_an_interrupt_of_the_whole_terminal_lets_requests_of_workers_end(
    serve: Callable[..., Served], target: str
) -> None:
    """It reaches all processes of a group, which is what a shell makes of a command."""
    served = serve(target, "--workers", "2")
    with httpx.stream("GET", served.address, trust_env=False, timeout=LIMIT) as response:
        text = response.iter_text()
        assert next(text) == "a"
        os.killpg(served.process.pid, signal.SIGINT)
        assert "".join(text) == "b"
    status, _, err = served.wait()
    assert (status, err) == (0, "")


def test_requests_are_served_by_more_than_one_worker(serve: Callable[..., Served]) -> None:
    served = serve("shop_async:process", "--workers", "2", "--threads", "1")
    with contextlib.ExitStack() as stack:
        # Each holds the only thread of its worker until it has been read.
        streams = [
            stack.enter_context(httpx.stream("GET", served.address, trust_env=False, timeout=LIMIT)) for _ in range(2)
        ]
        assert len({next(stream.iter_text()) for stream in streams}) == 2
    assert served.stop(signal.SIGTERM)[0] == 0
