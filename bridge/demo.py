"""The demo: one site written twice, as a Flask app and as a FastAPI app, and a client that drives both.

`run` starts each app in a process of its own by `python -m bridge`, so on the other kind of server, and takes the steps
of `STEPS` on both. Each step measures, and raises `Wrong` where the answer is not what it should be.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import html
import itertools
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import fastapi
import flask
import httpx
from fastapi.responses import HTMLResponse, StreamingResponse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = ["APPS", "MEGABYTES", "STEPS", "Server", "Visit", "Wrong", "fastapi_app", "flask_app", "run"]

MB = 1_000_000

# The upload's size unless told otherwise.
MEGABYTES = 50

BLOCK = 65536  # bytes in a block of an upload or download; what servers read at once

DOWNLOAD_BLOCKS = 320  # 21 MB

# Beside the apps' answers, so that nothing is cached and no proxy collects the events.
UNCACHED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


# --- What both apps are made of -----------------------------------------------------------------------------------


def block(number: int) -> bytes:
    """Give the download's block of that number: each one differs, so that a lost or swapped one changes the hash."""
    return hashlib.sha256(number.to_bytes(8, "big")).digest() * (BLOCK // 32)


@functools.cache
def download_sha256(blocks: int = DOWNLOAD_BLOCKS) -> str:
    digest = hashlib.sha256()
    for number in range(blocks):
        digest.update(block(number))
    return digest.hexdigest()


def greeting(name: str, message: str) -> dict[str, Any]:
    return {"name": name, "message": message, "characters": len(message)}


@dataclass
class Streams:
    """Counts an app's event streams. Flask's run in many threads, hence the lock, which guards the numbers."""

    app: str
    since: float = field(default_factory=time.time)
    started: int = 0
    open: int = 0
    closed_early: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def counted(self) -> Generator[None]:
        """Count one stream. One that is left by an exception was closed early: GeneratorExit, or a cancellation."""
        with self._lock:
            self.started += 1
            self.open += 1
        early = 1
        try:
            yield
            early = 0
        finally:
            with self._lock:
                self.open -= 1
                self.closed_early += early

    def status(self) -> dict[str, Any]:
        with self._lock:
            return {
                "app": self.app,
                "uptime": round(time.time() - self.since, 1),
                "streams": {"started": self.started, "open": self.open, "closed_early": self.closed_early},
            }

    def event(self, number: int) -> str:
        """Make one server-sent event. By the time in `made`, a client on this machine sees whether it was held back."""
        data = {"number": number, "made": time.time(), **self.status()}
        return f"event: tick\nid: {number}\ndata: {json.dumps(data)}\n\n"


def numbers(count: int) -> Iterator[int]:
    """Count from 1 to `count`, for 0 without end."""
    return iter(range(1, count + 1)) if count else itertools.count(1)


# --- The Flask app ------------------------------------------------------------------------------------------------


def flask_app() -> flask.Flask:
    """Make the WSGI app."""
    app = flask.Flask(__name__, static_folder=None)
    streams = Streams("Flask")

    @app.get("/")
    def index() -> str:
        return page("Flask", "a WSGI app", "uvicorn, an ASGI server", "WsgiToAsgi")

    @app.get("/both")
    def both() -> str:
        return both_pages(flask.request.args.get("port", 0, type=int))

    @app.get("/status")
    def status() -> dict[str, Any]:
        return streams.status()

    @app.post("/form")
    def form() -> dict[str, Any]:
        return greeting(flask.request.form["name"], flask.request.form["message"])

    @app.post("/upload")
    def upload() -> dict[str, Any]:
        size, digest = 0, hashlib.sha256()
        while piece := flask.request.stream.read(BLOCK):
            size += len(piece)
            digest.update(piece)
        return {"size": size, "sha256": digest.hexdigest()}

    @app.get("/download")
    def download() -> flask.Response:
        blocks = (block(number) for number in range(DOWNLOAD_BLOCKS))
        return flask.Response(blocks, headers=download_headers())

    @app.get("/events")
    def events() -> flask.Response:
        every = flask.request.args.get("every", 1.0, type=float)
        count = flask.request.args.get("count", 0, type=int)

        def ticks() -> Iterator[str]:
            with streams.counted():
                for number in numbers(count):
                    yield streams.event(number)
                    if number != count:
                        time.sleep(max(every, 0.01))

        return flask.Response(ticks(), mimetype="text/event-stream", headers=UNCACHED)

    @app.get("/slow")
    def slow() -> dict[str, Any]:
        seconds = flask.request.args.get("seconds", 0.5, type=float)
        time.sleep(min(seconds, 10))
        return {"slept": seconds}

    return app


# --- The FastAPI app ----------------------------------------------------------------------------------------------


def fastapi_app() -> fastapi.FastAPI:
    """Make the ASGI app. Its counts live in the lifespan's state: without a lifespan most of it does not work."""

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncGenerator[dict[str, Any]]:
        streams = Streams("FastAPI")
        yield {"streams": streams}
        print(f"{LIFESPAN_ENDED} after {streams.started} streams", flush=True)

    app = fastapi.FastAPI(title="The demo of bridge", lifespan=lifespan)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> str:
        return page("FastAPI", "an ASGI app", "wsgiref, the standard library's WSGI server", "AsgiToWsgi")

    @app.get("/both", response_class=HTMLResponse)
    async def both(port: int = 0) -> str:
        return both_pages(port)

    @app.websocket("/echo")
    async def echo(socket: fastapi.WebSocket) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(text)

    @app.get("/status")
    async def status(request: fastapi.Request) -> dict[str, Any]:
        streams: Streams = request.state.streams
        return streams.status()

    @app.post("/form")
    async def form(name: Annotated[str, fastapi.Form()], message: Annotated[str, fastapi.Form()]) -> dict[str, Any]:
        return greeting(name, message)

    @app.post("/upload")
    async def upload(request: fastapi.Request) -> dict[str, Any]:
        size, digest = 0, hashlib.sha256()
        async for piece in request.stream():
            size += len(piece)
            digest.update(piece)
        return {"size": size, "sha256": digest.hexdigest()}

    @app.get("/download")
    async def download() -> StreamingResponse:
        async def blocks() -> AsyncIterator[bytes]:
            for number in range(DOWNLOAD_BLOCKS):
                yield block(number)

        return StreamingResponse(blocks(), headers=download_headers())

    @app.get("/events")
    async def events(request: fastapi.Request, every: float = 1.0, count: int = 0) -> StreamingResponse:
        streams: Streams = request.state.streams

        async def ticks() -> AsyncGenerator[str]:
            with streams.counted():
                for number in numbers(count):
                    yield streams.event(number)
                    if number != count:
                        await asyncio.sleep(max(every, 0.01))

        return _EventStream(ticks())

    @app.get("/slow")
    async def slow(seconds: float = 0.5) -> dict[str, Any]:
        await asyncio.sleep(min(seconds, 10))
        return {"slept": seconds}

    return app


LIFESPAN_ENDED = "lifespan ended"


class _EventStream(StreamingResponse):
    """Closes its generator once the client has gone. Starlette leaves that to the garbage collector."""

    def __init__(self, ticks: AsyncGenerator[str]) -> None:
        super().__init__(ticks, media_type="text/event-stream", headers=UNCACHED)
        self._ticks = ticks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._ticks):
            await super().__call__(scope, receive, send)


def download_headers() -> dict[str, str]:
    return {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(DOWNLOAD_BLOCKS * BLOCK),
        "Content-Disposition": 'attachment; filename="bridge-demo.bin"',
    }


# --- The drive: steps that measure and check ----------------------------------------------------------------------


class Wrong(Exception):
    """Raised by a step for an answer that is not as it should be."""


@dataclass
class Visit:
    """One app being driven: a client for it, its process, where there is one, and the upload's size."""

    client: httpx.Client
    pid: int | None = None
    megabytes: int = MEGABYTES
    grown: float | None = None  # by how many MB the process's peak memory grew in the upload


def expect(what: str, expected: object, got: object) -> None:
    if got != expected:
        raise Wrong(f"{what}: expected {shortened(expected)}, got {shortened(got)}")


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def answer(response: httpx.Response) -> Any:
    """Give the JSON of an answer that has to be a 200."""
    expect(f"status of {response.request.url.path}", 200, response.status_code)
    return response.json()


def index_page(visit: Visit) -> str:
    start = time.perf_counter()
    response = visit.client.get("/")
    expect("status of the page", 200, response.status_code)
    expect("type of the page", "text/html; charset=utf-8", response.headers.get("content-type"))
    expect("end of the page", "</html>", response.text.rstrip()[-7:])
    return took(start)


def form_posted(visit: Visit) -> str:
    name, message = "Zoë & Łukasz", "½ + ½ = 1 <b>日本</b> + 100%"
    start = time.perf_counter()
    got = answer(visit.client.post("/form", data={"name": name, "message": message}))
    text = took(start)
    expect("form", greeting(name, message), got)
    return text


def first_event(visit: Visit) -> str:
    """See the first event before the second is made. Both are stamped by one clock, so nothing is guessed."""
    start = time.perf_counter()
    with visit.client.stream("GET", "/events", params={"every": 0.5, "count": 2}) as response:
        expect("type of the events", "text/event-stream; charset=utf-8", response.headers.get("content-type"))
        stamps: list[tuple[float, float]] = []
        text = ""
        for event in read_events(response):
            stamps.append((event["made"], time.time()))
            text = text or took(start)
    expect("number of events", 2, len(stamps))
    (_, first_here), (second_made, _) = stamps
    if first_here >= second_made:
        raise Wrong(
            f"the first event came {first_here - second_made:.3f} s after the second was made: it was held back"
        )
    return text


def read_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def upload(visit: Visit) -> str:
    blocks = visit.megabytes * MB // BLOCK
    digest = hashlib.sha256()

    def body() -> Iterator[bytes]:
        for number in range(blocks):
            piece = block(number)
            digest.update(piece)
            yield piece

    before = peak_memory(visit.pid)
    start = time.perf_counter()
    got = answer(visit.client.post("/upload", content=body(), headers={"Content-Length": str(blocks * BLOCK)}))
    text = f"{took(start)}, {speed(blocks * BLOCK, start)}"
    after = peak_memory(visit.pid)
    if before is not None and after is not None:
        visit.grown = after - before
    expect("upload", {"size": blocks * BLOCK, "sha256": digest.hexdigest()}, got)
    return f"{text}, SHA-256 right"


def memory_for_upload(visit: Visit) -> str:
    if visit.grown is None:
        return "not known on this system"
    # A wrapper that holds the body takes at least its size, mostly two or three times that. 16 MB is for the allocator.
    limit = max(16.0, visit.megabytes / 2)
    if visit.grown > limit:
        raise Wrong(
            f"memory grew by {visit.grown:.1f} MB in an upload of {visit.megabytes} MB, expected at most {limit:.0f}"
        )
    return f"{visit.grown:.1f} MB more"


def download(visit: Visit) -> str:
    size, digest = 0, hashlib.sha256()
    start = time.perf_counter()
    with visit.client.stream("GET", "/download") as response:
        expect("status of the download", 200, response.status_code)
        for piece in response.iter_bytes():
            size += len(piece)
            digest.update(piece)
    text = f"{took(start)}, {speed(size, start)}"
    expect("size of the download", DOWNLOAD_BLOCKS * BLOCK, size)
    expect("SHA-256 of the download", download_sha256(), digest.hexdigest())
    return f"{text}, SHA-256 right"


AT_ONCE = 20
SLEEP = 0.5


def slow_at_once(visit: Visit) -> str:
    def ask(_: int) -> Any:
        return answer(visit.client.get("/slow", params={"seconds": SLEEP}))

    start = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        got = list(pool.map(ask, range(AT_ONCE)))
    seconds = time.perf_counter() - start
    expect("slow answers", [{"slept": SLEEP}] * AT_ONCE, got)
    # In parallel they take little more than one alone; a third of the time in turn leaves a busy machine its room.
    limit = AT_ONCE * SLEEP / 3
    if seconds > limit:
        raise Wrong(f"{AT_ONCE} requests of {SLEEP} s at once took {seconds:.2f} s, expected at most {limit:.2f}")
    return f"{seconds * 1000:.0f} ms, of {SLEEP * 1000:.0f} slept"


NOTICE_LIMIT = 5.0


def client_leaves(visit: Visit) -> str:
    before = answer(visit.client.get("/status"))["streams"]
    with visit.client.stream("GET", "/events", params={"every": 0.05}) as response:
        next(read_events(response))
        expect("open streams", before["open"] + 1, answer(visit.client.get("/status"))["streams"]["open"])
    start = time.perf_counter()
    while time.perf_counter() - start < NOTICE_LIMIT:
        if answer(visit.client.get("/status"))["streams"]["closed_early"] == before["closed_early"] + 1:
            return f"noticed within {took(start)}"
        time.sleep(0.005)
    raise Wrong(f"a client left in mid-stream, the app's generator was not closed within {NOTICE_LIMIT:.0f} s")


def took(start: float) -> str:
    """Tell the time since `start` in a width that does not jump."""
    seconds = time.perf_counter() - start
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1000:.0f} ms"
        if seconds >= 0.01
        else f"{seconds * 1000:.1f} ms"
    )


def speed(size: int, start: float) -> str:
    return f"{size / MB / (time.perf_counter() - start):.0f} MB/s"


def peak_memory(pid: int | None) -> float | None:
    """The most memory that a process has held so far, in MB; None where the system does not tell (it is not Linux)."""
    if pid is None:
        return None
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1]) * 1024 / MB for line in status if line.startswith("VmHWM:")), None)
    except OSError:
        return None


Step = Callable[[Visit], str]

# What the table's rows say. `{megabytes}` is filled in.
STEPS: dict[str, Step] = {
    "index page": index_page,
    "form": form_posted,
    "first event": first_event,
    "upload of {megabytes} MB": upload,
    "memory for it": memory_for_upload,
    "download of 21 MB": download,
    f"{AT_ONCE} slow requests at once": slow_at_once,
    "client leaves in mid-stream": client_leaves,
}


# --- Starting, driving and stopping -------------------------------------------------------------------------------


class App(NamedTuple):
    """What the demo serves: a column of its table. `last_words` have to be the beginning of the last line it prints."""

    title: str
    target: str
    last_words: str = ""


APPS = (
    App("Flask on uvicorn", "bridge.demo:flask_app"),
    App("FastAPI on wsgiref", "bridge.demo:fastapi_app", LIFESPAN_ENDED),
)

START_LIMIT = 60.0  # seconds; a cold start on a slow disk takes some
STOP_LIMIT = 10.0  # seconds; more than the 3 that requests in flight are given


class Server:
    """One app served by `python -m bridge` in a process of its own.

    That process has a session of its own, so that Ctrl-C reaches only this one, which then stops all. It ends by itself
    when its standard input closes, so when this process is killed as well.
    """

    def __init__(self, app: App, host: str, port: int) -> None:
        self.app = app
        bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        command = [sys.executable, "-m", "bridge", app.target, "--factory", "--bind", bind, "--until-stdin-closes"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # what it prints; an empty line is the end
        self._last_line = ""
        self.ended: threading.Event = threading.Event()  # its output has ended, so it has, or is about to
        self._reader = threading.Thread(target=self._read, name=f"bridge-demo {app.title}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last_line = line.strip()
            self._lines.put(line)
        self._lines.put("")
        self.ended.set()

    def wait_for_address(self) -> str:
        """Wait until it serves; its address."""
        limit = time.monotonic() + START_LIMIT
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                raise Wrong(f"{self.app.title} did not start within {START_LIMIT:.0f} s") from None
            if not line:
                raise Wrong(f"{self.app.title} did not start; it ended with status {self._process.wait(STOP_LIMIT)}")
            if line.startswith("Serving "):
                return line.split()[-1]

    def stop(self) -> str:
        """Stop it as a service manager does, by SIGTERM; how that went."""
        start = time.perf_counter()
        self._process.terminate()
        try:
            status = self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            raise Wrong(f"it did not stop within {STOP_LIMIT:.0f} s of SIGTERM") from None
        text = took(start)
        self._reader.join(STOP_LIMIT)
        expect("exit status", 0, status)
        if not self._last_line.startswith(self.app.last_words):
            raise Wrong(f"its last words: expected {self.app.last_words!r}, got {self._last_line!r}")
        return text

    def close(self) -> None:
        """Make sure that it is gone, however things went."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(STOP_LIMIT)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


LABEL_WIDTH = 30
COLUMN_WIDTH = 36


def run(
    host: str = "127.0.0.1",
    ports: Sequence[int] = (0, 0),
    *,
    megabytes: int = MEGABYTES,
    check: bool = False,
    apps: Sequence[App] = APPS,
) -> int:
    """Start the apps, drive them, print what was done; then serve on until Ctrl-C, or with `check` stop them.

    Returns:
        The exit status: 0, or 1 if anything was not as it should be.
    """
    failures: list[str] = []
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []
        for app, port in zip(apps, ports, strict=True):
            server = Server(app, host, port)
            stack.callback(server.close)
            servers.append(server)
        try:
            addresses = [server.wait_for_address() for server in servers]
        except Wrong as exc:
            print(f"The demo failed: {exc}", file=sys.stderr)
            return 1
        print_row("", [app.title for app in apps])
        visits: list[Visit] = []
        for server, address in zip(servers, addresses, strict=True):
            # From this machine to this machine: no proxy of the environment.
            client = stack.enter_context(httpx.Client(base_url=address, timeout=30, trust_env=False))
            visits.append(Visit(client, server.pid, megabytes))
        for label, step in STEPS.items():
            steps = [functools.partial(step, visit) for visit in visits]
            failures += take(label.format(megabytes=megabytes), apps, steps)
        if check:
            failures += take("clean stop", apps, [server.stop for server in servers])
        for failure in failures:
            print(f"FAILED: {failure}", file=sys.stderr)
        if check:
            print(f"\n{len(failures)} failed." if failures else "\nAll right.")
            return 1 if failures else 0
        return serve_on(servers, addresses, failures)


def take(label: str, apps: Sequence[App], steps: Sequence[Callable[[], str]]) -> list[str]:
    """Take a step on each app in turn, and print the row; what failed."""
    texts: list[str] = []
    failures: list[str] = []
    for app, step in zip(apps, steps, strict=True):
        try:
            texts.append(step())
        except Exception as exc:  # a server that broke shows as an error of the client, of whatever class
            texts.append("FAILED")
            failures.append(
                f"{app.title}, {label}: {exc if isinstance(exc, Wrong) else f'{type(exc).__name__}: {exc}'}"
            )
    print_row(label, texts)
    return failures


def print_row(label: str, texts: Sequence[str]) -> None:
    print(label.ljust(LABEL_WIDTH) + "".join(text.ljust(COLUMN_WIDTH) for text in texts).rstrip(), flush=True)


def serve_on(servers: Sequence[Server], addresses: Sequence[str], failures: Sequence[str]) -> int:
    try:
        print()
        for server, address in zip(servers, addresses, strict=True):
            print_row(server.app.title, [address])
        print_row("both, side by side", [f"{addresses[0]}/both?port={addresses[-1].rpartition(':')[2]}"])
        print("\nOpen them in a browser. Ctrl-C ends both.", flush=True)
        # A short wait each, in turn: a wait without a limit cannot be interrupted on Windows.
        while not any(server.ended.wait(0.5) for server in servers):
            pass
    except KeyboardInterrupt:
        print()
        return 1 if failures else 0
    ended = ", ".join(server.app.title for server in servers if server.ended.is_set())
    print(f"Ended by itself: {ended}", file=sys.stderr)
    return 1


# --- The page -----------------------------------------------------------------------------------------------------


def page(app: str, kind: str, server: str, wrapper: str) -> str:
    """Fill in the page that both apps show."""
    words = {
        "APP": app,
        "KIND": kind,
        "SERVER": server,
        "WRAPPER": wrapper,
        "SHA256": download_sha256(),
        "SIZE": f"{DOWNLOAD_BLOCKS * BLOCK / MB:.0f} MB",
        "SOCKET": ECHOES.format(server=server) if wrapper == "AsgiToWsgi" else NO_SOCKETS,
    }
    text = PAGE
    for word, value in words.items():
        text = text.replace(f"[[{word}]]", html.escape(value))
    return text


def both_pages(port: int) -> str:
    """Fill in the page that shows both apps: this one, and the one on another port of this host."""
    return BOTH.replace("[[PORT]]", str(port))


ECHOES = "What is said here is echoed by the app, through {server}."
NO_SOCKETS = "WSGI knows no WebSockets, so this app has none. The ASGI app beside it has one, on its WSGI server."

BOTH = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Both, across the bridge</title>
<style>
body { margin: 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); min-height: 100vh; }
iframe { width: 100%; height: 100%; min-height: 100vh; border: 0; }
iframe + iframe { border-left: 1px solid #8884; }
</style>
</head>
<body>
<iframe src="/" title="This app"></iframe>
<iframe id="other" title="The other app"></iframe>
<script>
document.getElementById("other").src = `${location.protocol}//${location.hostname}:[[PORT]]/`;
</script>
</body>
</html>
"""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>[[APP]] · bridge</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32' fill='none'
 stroke='%232f7d78' stroke-width='3' stroke-linecap='round'%3E
 %3Cpath d='M3 23h26M5 23a11 11 0 0 1 22 0M16 12v11'/%3E%3C/svg%3E">
<style>
:root {
  --paper: #f7f6f2; --card: #fff; --ink: #23302f; --quiet: #61706e; --line: #e2e0d8;
  --tint: #2a736e; --wash: #e4f0ee; --on-tint: #fff; --wrong: #a83e32;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141a1b; --card: #1b2324; --ink: #dfe7e5; --quiet: #93a3a0; --line: #2b3637;
    --tint: #7cc4bc; --wash: #21312f; --on-tint: #10201e; --wrong: #e58f83;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: clamp(2rem, 7vw, 5rem) 1.5rem 4rem; }
header { margin-bottom: 3rem; }
h1 {
  margin: 0 0 .5rem; font-size: clamp(2rem, 6vw, 3.2rem); font-weight: 300; letter-spacing: -.03em; line-height: 1.15;
}
p { text-wrap: pretty; }
header p { margin: 0; max-width: 44rem; min-height: 4.8em; color: var(--quiet); font-size: 1.1rem; }
h2 { margin: 0; font-size: 1rem; font-weight: 600; }
code, output, .big { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { color: var(--tint); font-size: .94em; }
.cards { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
section {
  display: flex; flex-direction: column; gap: .9rem; padding: 1.5rem; min-width: 0;
  background: var(--card); border: 1px solid var(--line); border-radius: 1rem;
}
[hidden] { display: none !important; }
section p { margin: 0; color: var(--quiet); font-size: .92rem; }
.wide { grid-column: 1 / -1; }
.numbers { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(5.2rem, 1fr)); margin: 0; }
.numbers dt { color: var(--quiet); font-size: .85rem; }
.numbers dd { margin: 0; }
.big { font-size: 2rem; font-weight: 300; line-height: 1.3; }
.title { display: flex; align-items: center; gap: .6rem; }
.dot { width: .6rem; height: .6rem; border-radius: 50%; background: var(--line); transition: background .9s ease-out; }
.dot.lit { background: var(--tint); transition: none; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
button, .button {
  padding: .5rem 1rem; border: 1px solid var(--tint); border-radius: .6rem; cursor: pointer;
  background: transparent; color: var(--tint); font: inherit; font-size: .92rem; text-decoration: none;
}
button.main { background: var(--tint); color: var(--on-tint); }
button:hover, .button:hover { background: var(--wash); color: var(--tint); }
button:disabled { opacity: .5; cursor: default; }
:focus-visible { outline: 2px solid var(--tint); outline-offset: 2px; }
label { display: block; color: var(--quiet); font-size: .85rem; }
input[type=text], input[type=file] {
  width: 100%; margin-top: .2rem; padding: .5rem .7rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--paper); color: var(--ink); font: inherit; font-size: .92rem;
}
::file-selector-button {
  margin-right: .7rem; padding: .1rem .7rem; border: 1px solid var(--tint); border-radius: .4rem; cursor: pointer;
  background: transparent; color: var(--tint); font: inherit;
}
::file-selector-button:hover { background: var(--wash); }
form { display: grid; gap: .8rem; justify-items: start; }
form label { width: 100%; }
progress {
  width: 100%; height: .4rem; border: 0; border-radius: 1rem; overflow: hidden;
  appearance: none; background: var(--wash);
}
progress::-webkit-progress-bar { background: var(--wash); }
progress::-webkit-progress-value { background: var(--tint); border-radius: 1rem; }
progress::-moz-progress-bar { background: var(--tint); border-radius: 1rem; }
output {
  display: block; min-height: 3.2em; font-size: .85rem; overflow-wrap: anywhere; white-space: pre-line;
}
output.wrong, #broken { color: var(--wrong); }
@media (prefers-reduced-motion: reduce) { .dot { transition: none; } }
</style>
</head>
<body>
<main>
<header>
<h1>[[APP]], across the bridge</h1>
<p>This page comes from [[APP]], [[KIND]]. It is served by [[SERVER]]; between the two stands
<code>bridge.[[WRAPPER]]</code> and nothing else.</p>
</header>
<div class="cards">

<section class="wide">
<div class="title"><span class="dot" id="dot"></span><h2>Live</h2></div>
<dl class="numbers">
<div><dt>events here</dt><dd class="big" id="number">&ndash;</dd></div>
<div><dt>seconds up</dt><dd class="big" id="uptime">&ndash;</dd></div>
<div><dt>streams</dt><dd class="big" id="open">&ndash;</dd></div>
<div><dt>opened</dt><dd class="big" id="started">&ndash;</dd></div>
<div><dt>closed early</dt><dd class="big" id="closed_early">&ndash;</dd></div>
</dl>
<p>Server-sent events, one each second, on their way before the app goes on to sleep.</p>
<p id="broken" hidden>The stream broke off; the browser tries again.</p>
</section>

<section>
<h2>Upload</h2>
<p>Streamed through the app, never held in memory. Its SHA-256 is computed here and there.</p>
<input type="file" id="file" aria-label="A file to upload">
<div class="row"><button id="made" class="main">Send 50 MB made here</button></div>
<progress id="upload_progress" max="1" value="0" aria-label="Upload"></progress>
<output id="upload_said"></output>
</section>

<section>
<h2>Download</h2>
<p>[[SIZE]], generated block by block, as fast as this side reads it and no faster.</p>
<div class="row">
<button id="fetch" class="main">Fetch and check</button><a class="button" href="/download">Save</a>
</div>
<progress id="download_progress" max="1" value="0" aria-label="Download"></progress>
<output id="download_said"></output>
</section>

<section>
<h2>Leave in mid-stream</h2>
<p>Opens a stream, reads one event and leaves. The app's generator is closed soon after, and counted above.</p>
<div class="row"><button id="leave" class="main">Open and leave</button></div>
<output id="leave_said"></output>
</section>

<section>
<h2>Slow ones at once</h2>
<p>Five requests that sleep for half a second each. None of them waits for another.</p>
<div class="row"><button id="slow" class="main">Ask five times</button></div>
<output id="slow_said"></output>
</section>

<section id="socket">
<h2>WebSocket</h2>
<p>[[SOCKET]]</p>
<p id="unheard" hidden>The server let none through. It does with
<code>pip install "wsgi-asgi-bridge[websocket]"</code></p>
<p id="hung_up" hidden>The connection has ended. Load the page again for a new one.</p>
<form id="echo" hidden>
<label>Text<input type="text" name="text" value="over the bridge" required autocomplete="off"></label>
<button class="main">Say it ten times</button>
<output id="echo_said"></output>
</form>
</section>

<section>
<h2>Form</h2>
<p>Posted as browsers do it, in UTF-8, and counted by the app.</p>
<form id="form" action="/form" method="post">
<label>Name<input type="text" name="name" value="Zoë" required autocomplete="off"></label>
<label>Message<input type="text" name="message" value="½ + ½ = 1" required autocomplete="off"></label>
<button class="main">Send</button>
</form>
<output id="form_said"></output>
</section>

</div>
</main>
<script>
const $ = id => document.getElementById(id);
const show = (id, text, wrong = false) => { $(id).textContent = text; $(id).classList.toggle("wrong", wrong); };
const seconds = start => `${((performance.now() - start) / 1000).toFixed(2)} s`;
const rate = (size, start) => `${(size / 1000 / (performance.now() - start)).toFixed(0)} MB/s`;
const hex = buffer => Array.from(new Uint8Array(buffer), b => b.toString(16).padStart(2, "0")).join("");
// Browsers hash on https and on this machine's own addresses only.
const sha256 = async data => globalThis.crypto?.subtle ? hex(await crypto.subtle.digest("SHA-256", data)) : null;
const json = async response => {
  if (!response.ok) throw new Error(`status ${response.status}`);
  return response.json();
};

// One click, one run: the button rests meanwhile, and an error is shown where the result would be.
function onclick(button, said, run) {
  $(button).addEventListener("click", async () => {
    $(button).disabled = true;
    try { await run(); } catch (error) { show(said, String(error), true); } finally { $(button).disabled = false; }
  });
}

const events = new EventSource("/events?every=1");
events.addEventListener("tick", message => {
  const { number, uptime, streams } = JSON.parse(message.data);
  show("number", number); show("uptime", uptime.toFixed(0));
  for (const name of ["open", "started", "closed_early"]) show(name, streams[name]);
  $("dot").classList.add("lit");
  setTimeout(() => $("dot").classList.remove("lit"), 100);
});
events.addEventListener("error", () => { $("broken").hidden = false; });
events.addEventListener("open", () => { $("broken").hidden = true; });

function send(blob) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();  // fetch tells nothing of an upload's progress
    request.open("POST", "/upload");
    request.responseType = "json";
    request.upload.onprogress = event => { $("upload_progress").value = event.loaded / event.total; };
    request.onload = () => {
      if (request.status === 200) resolve(request.response); else reject(new Error(`status ${request.status}`));
    };
    request.onerror = () => reject(new Error("the upload broke off"));
    request.send(blob);
  });
}

async function upload(blob) {
  $("upload_progress").value = 0;
  show("upload_said", "sending …");
  const start = performance.now();
  const { size, sha256: theirs } = await send(blob);
  const told = `${(size / 1e6).toFixed(1)} MB in ${seconds(start)}, ${rate(size, start)}`;
  show("upload_said", `${told}\n${theirs}`);
  const ours = await sha256(await blob.arrayBuffer());
  const wrong = size !== blob.size || (ours !== null && ours !== theirs);
  const verdict = wrong ? "not what was sent" : ours ? "the same as computed here" : "";
  show("upload_said", `${told}\n${theirs}\n${verdict}`, wrong);
}

onclick("made", "upload_said", () => {
  const block = crypto.getRandomValues(new Uint8Array(50000));
  return upload(new Blob(Array(1000).fill(block), { type: "application/octet-stream" }));
});
$("file").addEventListener("change", () => {
  const file = $("file").files[0];
  if (file) upload(file).catch(error => show("upload_said", String(error), true));
});

onclick("fetch", "download_said", async () => {
  const start = performance.now();
  const response = await fetch("/download");
  const size = Number(response.headers.get("Content-Length"));
  const data = new Uint8Array(size);
  let got = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    data.set(value, got);
    got += value.length;
    $("download_progress").value = got / size;
  }
  const told = `${(got / 1e6).toFixed(1)} MB in ${seconds(start)}, ${rate(got, start)}`;
  const hash = await sha256(data);
  const wrong = got !== size || (hash !== null && hash !== "[[SHA256]]");
  const verdict = wrong ? "not what it should be" : hash ? "the hash it should have" : "";
  show("download_said", `${told}\n${hash ?? ""}\n${verdict}`, wrong);
});

onclick("leave", "leave_said", async () => {
  const early = async () => (await json(await fetch("/status"))).streams.closed_early;
  const before = await early();
  const control = new AbortController();
  const response = await fetch("/events?every=0.1", { signal: control.signal });
  await response.body.getReader().read();
  control.abort();
  const start = performance.now();
  while (await early() === before) {
    if (performance.now() - start > 5000) throw new Error("not noticed within 5 s");
    await new Promise(resolve => setTimeout(resolve, 10));
  }
  show("leave_said", `noticed within ${(performance.now() - start).toFixed(0)} ms`);
});

onclick("slow", "slow_said", async () => {
  const start = performance.now();
  await Promise.all(Array.from({ length: 5 }, async (_, i) => json(await fetch(`/slow?seconds=0.5&${i}`))));
  show("slow_said", `all five in ${seconds(start)}`);
});

// A WSGI app has no WebSocket; and of an ASGI app's the server lets none through without the package for it.
const socket = "[[WRAPPER]]" === "AsgiToWsgi"
  ? new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}/echo`) : null;
socket?.addEventListener("open", () => { $("echo").hidden = false; });
socket?.addEventListener("close", () => {
  $($("echo").hidden ? "unheard" : "hung_up").hidden = false;
  $("echo").hidden = true;
});
const heard = text => new Promise(resolve => {
  socket.addEventListener("message", message => resolve(message.data === text), { once: true });
  socket.send(text);
});

$("echo").addEventListener("submit", async event => {
  event.preventDefault();
  const text = new FormData($("echo")).get("text");
  const start = performance.now();
  let right = 0;
  for (let i = 0; i < 10; i++) right += await heard(`${text} ${i}`);
  const told = `${right} of 10 came back, ${((performance.now() - start) / 10).toFixed(1)} ms each`;
  show("echo_said", told, right !== 10);
});

$("form").addEventListener("submit", async event => {
  event.preventDefault();
  try {
    const body = new URLSearchParams(new FormData($("form")));
    const got = await json(await fetch("/form", { method: "POST", body }));
    show("form_said", `${got.name} wrote ${got.characters} characters: ${got.message}`);
  } catch (error) { show("form_said", String(error), true); }
});
</script>
</body>
</html>
"""
