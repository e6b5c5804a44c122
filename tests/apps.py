"""The apps under test: one small site, written once with each framework, and bare without any.

Every site has the same paths, so that one test fits them all:

    /hello                   text; HEAD as well
    /echo/<anything>         the request as the app got it: path, raw path, query string, headers; sets two cookies
    /empty                   204
    /error                   an exception
    /broken                  an exception after the first 5 of 1000 promised bytes
    /form, /json             POST: what came, as JSON
    /multipart               POST: the file's name, size and SHA-256
    /upload/<key>            POST: size and SHA-256 of the body, read in pieces
    /refuse                  POST: 413, the body not read
    /download                DOWNLOAD_SIZE bytes
    /events/<key>            two server-sent events: the second one is made once "<key>-confirmed" is on the board
    /ticks/<key>             a stream without end
    /slow                    takes SLOW seconds
    /board/<name>            GET: what is on the board by that name, or 404; POST: puts it there

A bare app has only what a server without a framework can be asked for: see `bare_wsgi` and `bare_asgi`.

Frameworks are imported by those apps that use them. There is no `from __future__ import annotations` here, because
FastAPI reads the annotations of functions that are made within a function.
"""

import asyncio
import atexit
import hashlib
import io
import json
import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote_from_bytes

import anyio.to_thread

__all__ = [
    "BLOCK",
    "DOWNLOAD_SIZE",
    "SLOW",
    "Board",
    "OnPurpose",
    "bare_asgi",
    "bare_wsgi",
    "django_asgi",
    "django_wsgi",
    "fastapi_asgi",
    "flask_wsgi",
    "lifespan",
    "starlette_asgi",
]

BLOCK = bytes(range(256)) * 256
DOWNLOAD_SIZE = 320 * len(BLOCK)  # 20 MiB
SLOW = 0.5
LIMIT = 10.0  # seconds that an app waits for a client's word


class OnPurpose(Exception):
    """What the apps raise when they are asked to."""


class Board:
    """Where an app and its test leave word for each other, whichever process or thread they are in: small files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, name: str, text: str = "") -> None:
        unfinished = self._directory / f"{name}.{os.getpid()}.unfinished"
        unfinished.write_text(text)
        unfinished.rename(self._directory / name)

    def get(self, name: str) -> str | None:
        try:
            return (self._directory / name).read_text()
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> list[str]:
        return sorted(path.name for path in self._directory.glob(f"{prefix}*"))

    def wait(self, name: str) -> None:
        for _ in self._patience(name):
            time.sleep(0.005)

    async def wait_async(self, name: str) -> None:
        for _ in self._patience(name):
            await asyncio.sleep(0.005)

    def _patience(self, name: str) -> Iterator[None]:
        deadline = time.monotonic() + LIMIT
        while self.get(name) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} was not put on the board within {LIMIT:g} s")
            yield


board = Board(Path(os.environ.get("BOARD", "")))


# What all sites do alike


def environ_seen(environ: dict[str, Any]) -> dict[str, Any]:
    path_info = environ["SCRIPT_NAME"] + environ.get("tests.path_info", environ["PATH_INFO"])
    path = path_info.encode("latin-1")
    target = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""  # not every WSGI server tells
    state = environ.get("asgi.scope", {}).get("state") or {}
    return {
        "path": path.decode("utf-8", "replace"),
        "path_info": path_info,
        "raw_path": target.partition("?")[0] or quote_from_bytes(path, "/:@!$&'()*+,;=~"),
        "query": environ["QUERY_STRING"],
        "headers": [[key[5:].replace("_", "-").lower(), environ[key]] for key in environ if key.startswith("HTTP_")],
        "pid": os.getpid(),
        "started_in": state.get("started_in"),
    }


def scope_seen(scope: dict[str, Any]) -> dict[str, Any]:
    return {
        "path": scope["path"],
        "raw_path": scope["raw_path"].decode("latin-1"),
        "query": scope["query_string"].decode("latin-1"),
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
        "pid": os.getpid(),
        "started_in": (scope.get("state") or {}).get("started_in"),
    }


COOKIES = ["a=1; Path=/", "b=2; Path=/"]
EVENTS = [b"data: first\n\n", b"data: second\n\n"]


def download() -> Iterator[bytes]:
    for _ in range(DOWNLOAD_SIZE // len(BLOCK)):
        yield BLOCK


def broken() -> Iterator[bytes]:
    yield b"begun"
    raise OnPurpose("in the middle of a response")


def events(key: str) -> Iterator[bytes]:
    yield EVENTS[0]
    board.wait(f"{key}-confirmed")
    yield EVENTS[1]


def ticks(key: str) -> Iterator[bytes]:
    try:
        while True:
            yield b"data: tick\n\n"
            time.sleep(0.02)
    finally:
        board.put(f"{key}-closed")


async def download_async() -> AsyncIterator[bytes]:
    for block in download():
        yield block


async def broken_async() -> AsyncIterator[bytes]:
    for block in broken():
        yield block


async def events_async(key: str) -> AsyncIterator[bytes]:
    yield EVENTS[0]
    await board.wait_async(f"{key}-confirmed")
    yield EVENTS[1]


async def ticks_async(key: str) -> AsyncIterator[bytes]:
    try:
        while True:
            yield b"data: tick\n\n"
            await asyncio.sleep(0.02)
    finally:
        board.put(f"{key}-closed")


class Upload:
    """A body as it comes in; the board tells when it begins, and how it fails."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._size = 0
        self._hash = hashlib.sha256()

    def read(self, read: Callable[[int], bytes]) -> dict[str, Any]:
        try:
            while chunk := read(65536):
                self._take(chunk)
        except BaseException as error:
            self._fail(error)
            raise
        return self._result()

    async def read_async(self, chunks: AsyncIterable[bytes]) -> dict[str, Any]:
        try:
            async for chunk in chunks:
                self._take(chunk)
        except BaseException as error:
            self._fail(error)
            raise
        return self._result()

    def _take(self, chunk: bytes) -> None:
        if chunk and not self._size:
            board.put(f"{self._key}-begun")
        self._size += len(chunk)
        self._hash.update(chunk)

    def _fail(self, error: BaseException) -> None:
        board.put(f"{self._key}-failed", type(error).__name__)

    def _result(self) -> dict[str, Any]:
        board.put(f"{self._key}-whole")
        return {"size": self._size, "sha256": self._hash.hexdigest()}


def file_seen(name: str | None, content: bytes) -> dict[str, Any]:
    return {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[dict[str, Any]]:
    """Tells on the board in which process it ran, and how often; its end needs the loop and a thread."""
    count = len(board.names(f"startup-{os.getpid()}-"))
    board.put(f"startup-{os.getpid()}-{count}")
    yield {"started_in": os.getpid()}
    await anyio.to_thread.run_sync(time.sleep, 0)
    board.put(f"shutdown-{os.getpid()}-{count}")


# WSGI


def flask_wsgi() -> Any:
    import flask

    app = flask.Flask("tests")

    @app.get("/hello")
    def hello() -> Any:
        return flask.Response("hello", mimetype="text/plain")

    @app.get("/echo/<path:_>")
    def echo(_: str) -> Any:
        response = flask.jsonify(environ_seen(flask.request.environ))
        response.headers["X-Reply"] = flask.request.headers.get("X-Ask", "")
        for cookie in COOKIES:
            response.headers.add("Set-Cookie", cookie)
        return response

    @app.get("/empty")
    def empty() -> Any:
        return "", 204

    @app.get("/error")
    def error() -> Any:
        raise OnPurpose("before the response")

    @app.get("/broken")
    def broken_() -> Any:
        return flask.Response(broken(), headers={"Content-Length": "1000"})

    @app.post("/form")
    def form() -> Any:
        return flask.jsonify(flask.request.form.to_dict())

    @app.post("/json")
    def json_() -> Any:
        return flask.jsonify(flask.request.get_json())

    @app.post("/multipart")
    def multipart() -> Any:
        file = flask.request.files["file"]
        return file_seen(file.filename, file.read())

    @app.post("/upload/<key>")
    def upload(key: str) -> Any:
        return Upload(key).read(flask.request.stream.read)

    @app.post("/refuse")
    def refuse() -> Any:
        return "too large", 413

    @app.get("/download")
    def download_() -> Any:
        return flask.Response(download(), mimetype="application/octet-stream")

    @app.get("/events/<key>")
    def events_(key: str) -> Any:
        return flask.Response(events(key), mimetype="text/event-stream")

    @app.get("/ticks/<key>")
    def ticks_(key: str) -> Any:
        return flask.Response(ticks(key), mimetype="text/event-stream")

    @app.get("/slow")
    def slow() -> Any:
        time.sleep(SLOW)
        return "slow"

    @app.get("/board/<name>")
    def look(name: str) -> Any:
        text = board.get(name)
        return ("", 404) if text is None else text

    @app.post("/board/<name>")
    def put(name: str) -> Any:
        board.put(name)
        return "", 204

    return app


# Django, as a WSGI and as an ASGI app


def django_wsgi() -> Any:
    configure_django(DjangoStreams(download, broken, events, ticks))
    from django.core.wsgi import get_wsgi_application

    application = get_wsgi_application()

    def noting(environ: dict[str, Any], start_response: Any) -> Any:
        # Django puts a text of its own there.
        return application({**environ, "tests.path_info": environ["PATH_INFO"]}, start_response)

    return noting


def django_asgi() -> Any:
    configure_django(DjangoStreams(download_async, broken_async, events_async, ticks_async))
    from django.core.asgi import get_asgi_application

    return get_asgi_application()


class DjangoStreams:
    """The streams of the site: under ASGI, Django would collect those that are not async."""

    def __init__(
        self,
        download: Callable[[], object],
        broken: Callable[[], object],
        events: Callable[[str], object],
        ticks: Callable[[str], object],
    ) -> None:
        self.download, self.broken, self.events, self.ticks = download, broken, events, ticks


def configure_django(streams: DjangoStreams) -> None:
    from django.conf import settings
    from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
    from django.urls import path

    def hello(request: Any) -> Any:
        return HttpResponse("hello", content_type="text/plain")

    def echo(request: Any, _: str) -> Any:
        seen = scope_seen(request.scope) if hasattr(request, "scope") else environ_seen(request.META)
        response = JsonResponse(seen)
        response["X-Reply"] = request.headers.get("X-Ask", "")
        for cookie in COOKIES:
            name, _, value = cookie.partition(";")[0].partition("=")
            response.set_cookie(name, value)
        return response

    def empty(request: Any) -> Any:
        return HttpResponse(status=204)

    def error(request: Any) -> Any:
        raise OnPurpose("before the response")

    def broken_(request: Any) -> Any:
        return StreamingHttpResponse(streams.broken(), headers={"Content-Length": "1000"})

    def form(request: Any) -> Any:
        return JsonResponse(request.POST.dict())

    def json_(request: Any) -> Any:
        return JsonResponse(json.loads(request.body))

    def multipart(request: Any) -> Any:
        file = request.FILES["file"]
        return JsonResponse(file_seen(file.name, file.read()))

    def upload(request: Any, key: str) -> Any:
        return JsonResponse(Upload(key).read(request.read))

    def refuse(request: Any) -> Any:
        return HttpResponse("too large", status=413)

    def download_(request: Any) -> Any:
        return StreamingHttpResponse(streams.download(), content_type="application/octet-stream")

    def events_(request: Any, key: str) -> Any:
        return StreamingHttpResponse(streams.events(key), content_type="text/event-stream")

    def ticks_(request: Any, key: str) -> Any:
        return StreamingHttpResponse(streams.ticks(key), content_type="text/event-stream")

    def slow(request: Any) -> Any:
        time.sleep(SLOW)
        return HttpResponse("slow")

    def board_(request: Any, name: str) -> Any:
        if request.method == "POST":
            board.put(name)
            return HttpResponse(status=204)
        text = board.get(name)
        return HttpResponse(status=404) if text is None else HttpResponse(text)

    class Urls:
        urlpatterns = [  # noqa: RUF012  # as in every Django project
            path("hello", hello),
            path("echo/<path:_>", echo),
            path("empty", empty),
            path("error", error),
            path("broken", broken_),
            path("form", form),
            path("json", json_),
            path("multipart", multipart),
            path("upload/<key>", upload),
            path("refuse", refuse),
            path("download", download_),
            path("events/<key>", events_),
            path("ticks/<key>", ticks_),
            path("slow", slow),
            path("board/<name>", board_),
        ]

    settings.configure(
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=Urls,
        SECRET_KEY="of the tests",
        LOGGING={  # else Django would keep its errors to itself
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"console": {"class": "logging.StreamHandler"}},
            "loggers": {"django": {"handlers": ["console"], "level": "ERROR"}},
        },
    )


# ASGI


def starlette_asgi() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def hello(request: Request) -> Response:
        return Response("hello", media_type="text/plain")

    async def echo(request: Request) -> Response:
        response = JSONResponse(scope_seen(dict(request.scope)), headers={"X-Reply": request.headers.get("X-Ask", "")})
        for cookie in COOKIES:
            response.headers.append("Set-Cookie", cookie)
        return response

    async def empty(request: Request) -> Response:
        return Response(status_code=204)

    async def error(request: Request) -> Response:
        raise OnPurpose("before the response")

    async def broken_(request: Request) -> Response:
        return StreamingResponse(broken_async(), headers={"Content-Length": "1000"})

    async def form(request: Request) -> Response:
        return JSONResponse(dict(await request.form()))

    async def json_(request: Request) -> Response:
        return JSONResponse(await request.json())

    async def multipart(request: Request) -> Response:
        async with request.form() as fields:
            file: Any = fields["file"]
            return JSONResponse(file_seen(file.filename, await file.read()))

    async def upload(request: Request) -> Response:
        return JSONResponse(await Upload(request.path_params["key"]).read_async(request.stream()))

    async def refuse(request: Request) -> Response:
        return Response("too large", status_code=413)

    async def download_(request: Request) -> Response:
        return StreamingResponse(download_async(), media_type="application/octet-stream")

    async def events_(request: Request) -> Response:
        return StreamingResponse(events_async(request.path_params["key"]), media_type="text/event-stream")

    async def ticks_(request: Request) -> Response:
        return StreamingResponse(ticks_async(request.path_params["key"]), media_type="text/event-stream")

    def slow(request: Request) -> Response:
        time.sleep(SLOW)
        return Response("slow")

    async def board_(request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "POST":
            board.put(name)
            return Response(status_code=204)
        text = board.get(name)
        return Response(status_code=404) if text is None else Response(text)

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/hello", hello),
            Route("/echo/{_:path}", echo),
            Route("/empty", empty),
            Route("/error", error),
            Route("/broken", broken_),
            Route("/form", form, methods=["POST"]),
            Route("/json", json_, methods=["POST"]),
            Route("/multipart", multipart, methods=["POST"]),
            Route("/upload/{key}", upload, methods=["POST"]),
            Route("/refuse", refuse, methods=["POST"]),
            Route("/download", download_),
            Route("/events/{key}", events_),
            Route("/ticks/{key}", ticks_),
            Route("/slow", slow),
            Route("/board/{name}", board_, methods=["GET", "POST"]),
        ],
    )


def fastapi_asgi() -> Any:
    from fastapi import Body, FastAPI, Form, Request, Response, UploadFile
    from fastapi.responses import PlainTextResponse, StreamingResponse

    app = FastAPI(lifespan=lifespan)

    @app.api_route("/hello", methods=["GET", "HEAD"])
    async def hello() -> Response:
        return PlainTextResponse("hello")

    @app.get("/echo/{_:path}")
    async def echo(request: Request, response: Response) -> dict[str, Any]:
        response.headers["X-Reply"] = request.headers.get("X-Ask", "")
        for cookie in COOKIES:
            response.headers.append("Set-Cookie", cookie)
        return scope_seen(dict(request.scope))

    @app.get("/empty", status_code=204)
    async def empty() -> None:
        pass

    @app.get("/error")
    async def error() -> None:
        raise OnPurpose("before the response")

    @app.get("/broken")
    async def broken_() -> Response:
        return StreamingResponse(broken_async(), headers={"Content-Length": "1000"})

    @app.post("/form")
    async def form(name: Annotated[str, Form()], text: Annotated[str, Form()]) -> dict[str, str]:
        return {"name": name, "text": text}

    @app.post("/json")
    async def json_(value: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        return value

    @app.post("/multipart")
    async def multipart(file: UploadFile) -> dict[str, Any]:
        return file_seen(file.filename, await file.read())

    @app.post("/upload/{key}")
    async def upload(key: str, request: Request) -> dict[str, Any]:
        return await Upload(key).read_async(request.stream())

    @app.post("/refuse")
    async def refuse() -> Response:
        return PlainTextResponse("too large", status_code=413)

    @app.get("/download")
    async def download_() -> Response:
        return StreamingResponse(download_async(), media_type="application/octet-stream")

    @app.get("/events/{key}")
    async def events_(key: str) -> Response:
        return StreamingResponse(events_async(key), media_type="text/event-stream")

    @app.get("/ticks/{key}")
    async def ticks_(key: str) -> Response:
        return StreamingResponse(ticks_async(key), media_type="text/event-stream")

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(SLOW)
        return "slow"

    @app.get("/board/{name}")
    async def look(name: str) -> Response:
        text = board.get(name)
        return Response(status_code=404) if text is None else PlainTextResponse(text)

    @app.post("/board/{name}", status_code=204)
    async def put(name: str) -> None:
        board.put(name)

    return app


# Without a framework: what a server does by itself


def bare_wsgi() -> Any:
    """/echo, /upload, /refuse and /broken; anything else is /hello. The board tells whether one can hear of the end."""
    board.put("native-startup")
    atexit.register(board.put, "native-shutdown")

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        status, body = "200 OK", b"hello"
        if environ["PATH_INFO"] == "/broken":
            start_response(status, [("Content-Type", "text/plain"), ("Content-Length", "1000")])
            return broken()
        if environ["PATH_INFO"].startswith("/echo/"):
            body = json.dumps(environ_seen(environ)).encode()
        elif environ["PATH_INFO"].startswith("/upload/"):
            stream = environ["wsgi.input"]
            if not environ.get("wsgi.input_terminated"):
                stream = io.BytesIO(stream.read(int(environ.get("CONTENT_LENGTH") or 0)))
            body = json.dumps(Upload("bare").read(stream.read)).encode()
        elif environ["PATH_INFO"] == "/refuse":
            status, body = "413 Content Too Large", b"too large"
        start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]

    return app


def bare_asgi() -> Any:
    """The same; the board tells whether there is a lifespan."""

    async def live(receive: Any, send: Any) -> None:
        for step in ("startup", "shutdown"):
            await receive()
            board.put(f"native-{step}")
            await send({"type": f"lifespan.{step}.complete"})

    async def body_of(receive: Callable[[], Awaitable[dict[str, Any]]]) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await live(receive, send)
        status, body = 200, b"hello"
        if scope["path"].startswith("/echo/"):
            body = json.dumps(scope_seen(scope)).encode()
        elif scope["path"].startswith("/upload/"):
            body = json.dumps(await Upload("bare").read_async(body_of(receive))).encode()
        elif scope["path"] == "/refuse":
            status, body = 413, b"too large"
        is_broken = scope["path"] == "/broken"
        length = 1000 if is_broken else len(body)
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % length)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": is_broken})
        if is_broken:
            raise OnPurpose("in the middle of a response")

    return app
