"""The site with each ASGI framework, and without any."""

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread

from tests.apps import (
    COOKIES,
    DOCUMENT,
    ETAG,
    HINT,
    LIMIT,
    TRAILER,
    Like,
    OnPurpose,
    Upload,
    board,
    broken_async,
    document,
    download_async,
    events_async,
    file_seen,
    lifespan,
    scope_seen,
    slow,
    slow_async,
    ticks_async,
)
from tests.apps.django import channels_asgi, django_asgi

__all__ = [
    "bare_asgi",
    "channels_asgi",
    "django_asgi",
    "falcon_asgi",
    "fastapi_asgi",
    "litestar_asgi",
    "quart_asgi",
    "starlette_asgi",
]


Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def starlette_asgi() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
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

    async def unchanged(request: Request) -> Response:
        return Response(status_code=304, headers={"ETag": ETAG})

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

    def slow_(request: Request) -> Response:
        return Response(slow(request.path_params["key"]))

    async def document_(request: Request) -> Response:
        return FileResponse(document())

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
            Route("/unchanged", unchanged),
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
            Route("/slow/{key}", slow_),
            Route("/document", document_),
            Route("/board/{name}", board_, methods=["GET", "POST"]),
        ],
    )


def fastapi_asgi() -> Any:
    from fastapi import Body, FastAPI, Form, Request, Response, UploadFile
    from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse

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

    @app.get("/unchanged", status_code=304)
    async def unchanged(response: Response) -> None:
        response.headers["ETag"] = ETAG

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

    @app.get("/slow/{key}")
    async def slow_(key: str) -> Response:
        return PlainTextResponse(await slow_async(key))

    @app.get("/document")
    async def document_() -> Response:
        return FileResponse(document())

    @app.get("/board/{name}")
    async def look(name: str) -> Response:
        text = board.get(name)
        return Response(status_code=404) if text is None else PlainTextResponse(text)

    @app.post("/board/{name}", status_code=204)
    async def put(name: str) -> None:
        board.put(name)

    return app


def quart_asgi() -> Any:
    import quart

    app = quart.Quart("tests")
    app.config["MAX_CONTENT_LENGTH"] = None
    state: dict[str, Any] = {}

    @app.while_serving
    async def live() -> AsyncGenerator[None, None]:
        async with lifespan() as started:
            state.update(started)
            yield

    @app.get("/hello")
    async def hello() -> Any:
        return quart.Response("hello", mimetype="text/plain")

    @app.get("/echo/<path:_>")
    async def echo(_: str) -> Any:
        response = quart.jsonify(scope_seen({**quart.request.scope, "state": state}))
        response.headers["X-Reply"] = quart.request.headers.get("X-Ask", "")
        for cookie in COOKIES:
            response.headers.add("Set-Cookie", cookie)
        return response

    @app.get("/empty")
    async def empty() -> Any:
        return "", 204

    @app.get("/unchanged")
    async def unchanged() -> Any:
        return "", 304, {"ETag": ETAG}

    @app.get("/error")
    async def error() -> Any:
        raise OnPurpose("before the response")

    @app.get("/broken")
    async def broken_() -> Any:
        return broken_async(), 200, {"Content-Length": "1000"}

    @app.post("/form")
    async def form() -> Any:
        return (await quart.request.form).to_dict()

    @app.post("/json")
    async def json_() -> Any:
        return await quart.request.get_json()

    @app.post("/multipart")
    async def multipart() -> Any:
        file = (await quart.request.files)["file"]
        return file_seen(file.filename, file.read())

    @app.post("/upload/<key>")
    async def upload(key: str) -> Any:
        return await Upload(key).read_async(quart.request.body)

    @app.post("/refuse")
    async def refuse() -> Any:
        return "too large", 413

    @app.get("/download")
    async def download_() -> Any:
        return download_async(), 200, {"Content-Type": "application/octet-stream"}

    @app.get("/events/<key>")
    async def events_(key: str) -> Any:
        return events_async(key), 200, {"Content-Type": "text/event-stream"}

    @app.get("/ticks/<key>")
    async def ticks_(key: str) -> Any:
        return ticks_async(key), 200, {"Content-Type": "text/event-stream"}

    @app.get("/slow/<key>")
    async def slow_(key: str) -> Any:
        return await slow_async(key)

    @app.get("/document")
    async def document_() -> Any:
        return await quart.send_file(document())

    @app.get("/board/<name>")
    async def look(name: str) -> Any:
        text = board.get(name)
        return ("", 404) if text is None else quart.Response(text)

    @app.post("/board/<name>")
    async def put(name: str) -> Any:
        board.put(name)
        return "", 204

    return app


def litestar_asgi() -> Any:
    from litestar import Litestar, MediaType, Request, Response, get, head, post
    from litestar.datastructures import Cookie, UploadFile
    from litestar.enums import RequestEncodingType
    from litestar.logging import LoggingConfig
    from litestar.params import Body
    from litestar.response import File, Stream

    @asynccontextmanager
    async def live(app: Litestar) -> AsyncIterator[None]:
        async with lifespan(app) as started:
            app.state.started_in = started["started_in"]
            yield

    @get("/hello", media_type=MediaType.TEXT)
    async def hello() -> str:
        return "hello"

    @head("/hello", media_type=MediaType.TEXT)
    async def hello_head() -> None:
        pass

    @get("/echo/{_:path}")
    async def echo(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
        cookies = [Cookie(key=cookie[0], value=cookie[2], path="/") for cookie in COOKIES]
        headers = {"X-Reply": request.headers.get("X-Ask", "")}
        seen = scope_seen({**request.scope, "state": {"started_in": request.app.state.started_in}})
        return Response(seen, headers=headers, cookies=cookies)

    @get("/empty", status_code=204)
    async def empty() -> None:
        pass

    @get("/unchanged", status_code=304)
    async def unchanged() -> Response[None]:
        return Response(None, headers={"ETag": ETAG})

    @get("/error")
    async def error() -> None:
        raise OnPurpose("before the response")

    @get("/broken")
    async def broken_() -> Stream:
        return Stream(broken_async(), headers={"Content-Length": "1000"})

    @post("/form", status_code=200)
    async def form(data: Annotated[dict[str, str], Body(media_type=RequestEncodingType.URL_ENCODED)]) -> dict[str, str]:
        return data

    @post("/json", status_code=200)
    async def json_(data: dict[str, Any]) -> dict[str, Any]:
        return data

    @post("/multipart", status_code=200)
    async def multipart(
        data: Annotated[dict[str, Any], Body(media_type=RequestEncodingType.MULTI_PART)],
    ) -> dict[str, Any]:
        file: UploadFile = data["file"]
        return file_seen(file.filename, await file.read())

    @post("/upload/{key:str}", status_code=200)
    async def upload(key: str, request: Request[Any, Any, Any]) -> dict[str, Any]:
        return await Upload(key).read_async(request.stream())

    @post("/refuse", status_code=413, media_type=MediaType.TEXT)
    async def refuse() -> str:
        return "too large"

    @get("/download")
    async def download_() -> Stream:
        return Stream(download_async(), media_type="application/octet-stream")

    @get("/events/{key:str}")
    async def events_(key: str) -> Stream:
        return Stream(events_async(key), media_type="text/event-stream")

    @get("/ticks/{key:str}")
    async def ticks_(key: str) -> Stream:
        return Stream(ticks_async(key), media_type="text/event-stream")

    @get("/slow/{key:str}", media_type=MediaType.TEXT)
    async def slow_(key: str) -> bytes:  # in threads of Litestar's there is no room for 20
        return await slow_async(key)

    @get("/document")
    async def document_() -> File:
        return File(document())

    @get("/board/{name:str}", media_type=MediaType.TEXT)
    async def look(name: str) -> Response[str]:
        text = board.get(name)
        return Response("", status_code=404) if text is None else Response(text)

    @post("/board/{name:str}", status_code=204)
    async def put(name: str) -> None:
        board.put(name)

    return Litestar(
        [
            hello,
            hello_head,
            echo,
            empty,
            unchanged,
            error,
            broken_,
            form,
            json_,
            multipart,
            upload,
            refuse,
            download_,
            events_,
            ticks_,
            slow_,
            document_,
            look,
            put,
        ],
        lifespan=[live],
        request_max_body_size=None,
        logging_config=LoggingConfig(log_exceptions="always", disable_stack_trace={404}),
    )


def falcon_asgi() -> Any:
    from falcon.asgi import App

    class Life:
        """Falcon's hooks into the lifespan."""

        def __init__(self) -> None:
            self.state: dict[str, Any] = {}
            self._stack = AsyncExitStack()

        async def process_startup(self, scope: Any, event: Any) -> None:
            self.state = await self._stack.enter_async_context(lifespan())

        async def process_shutdown(self, scope: Any, event: Any) -> None:
            await self._stack.aclose()

    class Get:
        """A resource that answers GET, and HEAD as well."""

        def __init__(self, answer: Any) -> None:
            self._answer = answer

        async def on_get(self, request: Any, response: Any, **parameters: str) -> None:
            await self._answer(request, response, **parameters)

        on_head = on_get

    class Post(Get):
        async def on_post(self, request: Any, response: Any, **parameters: str) -> None:
            await self._answer(request, response, **parameters)

    life = Life()

    async def hello(request: Any, response: Any) -> None:
        response.content_type = "text/plain"
        response.text = "hello"

    async def echo(request: Any, response: Any, _: str) -> None:
        response.media = scope_seen({**request.scope, "state": life.state})
        response.set_header("X-Reply", request.get_header("X-Ask") or "")
        for cookie in COOKIES:
            name, _, value = cookie.partition(";")[0].partition("=")
            response.set_cookie(name, value)

    async def empty(request: Any, response: Any) -> None:
        response.status = 204

    async def unchanged(request: Any, response: Any) -> None:
        response.status = 304
        response.set_header("ETag", ETAG)

    async def error(request: Any, response: Any) -> None:
        raise OnPurpose("before the response")

    async def broken_(request: Any, response: Any) -> None:
        response.stream, response.content_length = broken_async(), 1000

    async def media(request: Any, response: Any) -> None:
        response.media = await request.get_media()

    async def multipart(request: Any, response: Any) -> None:
        async for part in await request.get_media():
            if part.name == "file":
                response.media = file_seen(part.filename, await part.stream.read())

    async def upload(request: Any, response: Any, key: str) -> None:
        response.media = await Upload(key).read_async(request.stream)

    async def refuse(request: Any, response: Any) -> None:
        response.status, response.text = 413, "too large"

    async def download_(request: Any, response: Any) -> None:
        response.content_type, response.stream = "application/octet-stream", download_async()

    async def events_(request: Any, response: Any, key: str) -> None:
        response.content_type, response.stream = "text/event-stream", events_async(key)

    async def ticks_(request: Any, response: Any, key: str) -> None:
        response.content_type, response.stream = "text/event-stream", ticks_async(key)

    async def slow_(request: Any, response: Any, key: str) -> None:
        response.data = await slow_async(key)

    async def document_(request: Any, response: Any) -> None:
        # Falcon wants an asynchronous file, which the standard library has not.
        response.stream, response.content_length = blocks_of(document()), document().stat().st_size

    async def board_(request: Any, response: Any, name: str) -> None:
        text = board.get(name)
        if request.method == "POST":
            board.put(name)
            response.status = 204
        elif text is None:
            response.status = 404
        else:
            response.text = text

    app = App(middleware=[life])
    gets = {
        "/hello": hello,
        "/echo/{_:path}": echo,
        "/empty": empty,
        "/unchanged": unchanged,
        "/error": error,
        "/broken": broken_,
        "/download": download_,
        "/events/{key}": events_,
        "/ticks/{key}": ticks_,
        "/slow/{key}": slow_,
        "/document": document_,
    }
    posts = {
        "/form": media,
        "/json": media,
        "/multipart": multipart,
        "/upload/{key}": upload,
        "/refuse": refuse,
        "/board/{name}": board_,
    }
    for resource, paths in (Get, gets), (Post, posts):
        for path, answer in paths.items():
            app.add_route(path, resource(answer))
    return app


async def blocks_of(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while block := await anyio.to_thread.run_sync(file.read, 65536):
            yield block


def bare_asgi() -> Any:
    """What a server does by itself. The board tells whether there is a lifespan."""

    async def live(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        for step in ("startup", "shutdown"):
            await receive()
            if "state" in scope:
                scope["state"]["started_in"] = os.getpid()
            board.put(f"native-{step}")
            await send({"type": f"lifespan.{step}.complete"})

    async def body_of(receive: Receive) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("ClientDisconnected")
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def answer_like(like: Like, send: Send, method: str) -> None:
        if like.raises == "before":
            raise OnPurpose("before the response")
        headers = [(b"content-length", b"%d" % len(like.body))] if like.is_sized else []
        await send({"type": "http.response.start", "status": like.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else like.body})
        if like.raises == "behind":
            raise OnPurpose("behind the response")

    async def respond(send: Send, blocks: AsyncIterator[bytes], *headers: tuple[bytes, bytes]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for block in blocks:
            await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body"})

    async def respond_until_gone(receive: Receive, send: Send, key: str) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(respond, send, ticks_async(key), (b"content-type", b"text/event-stream"))
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await live(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        kind, _, key = path.lstrip("/").partition("/")
        extensions = scope.get("extensions") or {}
        status, headers, body = 200, [(b"content-type", b"text/plain")], b"hello"
        if kind == "events":
            return await respond(send, events_async(key), (b"content-type", b"text/event-stream"))
        if kind == "ticks":
            return await respond_until_gone(receive, send, key)
        if kind == "broken":
            return await respond(send, broken_async(), (b"content-length", b"1000"))
        if kind == "like":
            return await answer_like(Like.told_by(key), send, scope["method"])
        if kind == "document":
            by_path = "http.response.pathsend" in extensions
            headers += [(b"content-length", b"%d" % len(DOCUMENT)), (b"x-wrapped", str(by_path).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            if by_path:
                return await send({"type": "http.response.pathsend", "path": str(document())})
            return await send({"type": "http.response.body", "body": document().read_bytes()})
        if kind == "trailers" and "http.response.trailers" in extensions:
            await send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": True})
            await send({"type": "http.response.body", "body": b"hello"})
            trailer = tuple(text.encode() for text in TRAILER)
            return await send({"type": "http.response.trailers", "headers": [trailer]})
        if kind == "echo":
            body = json.dumps(scope_seen(scope)).encode()
        elif kind == "upload":
            body = json.dumps(await Upload(key).read_async(body_of(receive))).encode()
        elif kind == "refuse":
            status, body = 413, b"too large"
        elif kind == "board":
            board.put(key)
        elif kind == "slow":
            body = await slow_async(key)
        elif kind == "gone":
            board.put(f"{key}-begun")
            with anyio.fail_after(LIMIT):
                while (await receive())["type"] != "http.disconnect":
                    pass
            board.put(f"{key}-gone")
        elif kind == "hints" and "http.response.early_hint" in extensions:
            await send({"type": "http.response.early_hint", "links": [HINT.encode()]})
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
