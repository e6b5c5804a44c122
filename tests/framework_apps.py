"""ASGI apps as users of the frameworks write them, for tests/test_frameworks.py. Here is no test.

The frameworks are imported by the functions that use them: an app is made in the process that serves it. No annotation
is a text, since the frameworks read those of functions within functions.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import anyio
import anyio.to_thread

__all__ = [
    "Notes",
    "fastapi_app",
    "fastapi_app_with_a_database",
    "litestar_app",
    "mcp_app",
    "quart_app",
    "starlette_app",
]


class Notes:
    """What an app has come through; also by name, for a test in another process."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def add(self, note: str) -> None:
        self.all.append(note)

    def count(self, note: str) -> int:
        return self.all.count(note)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.asynccontextmanager
async def origin() -> AsyncIterator[str]:
    """A small HTTP server on the app's own loop, which answers with the path: its URL."""

    connections: set[asyncio.Task[Any]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split()[1]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        if connections:
            await asyncio.wait(connections)


def starlette_app(notes: Notes | None = None, file: str = __file__) -> Any:
    """Middleware, streams, events, background tasks, files, and the question whether the client has left."""
    from sse_starlette.sse import EventSourceResponse
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask, BackgroundTasks
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Mount, Route

    notes = notes or Notes()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        notes.add("startup")
        yield {"started_in": os.getpid(), "lock": asyncio.Lock()}
        await anyio.to_thread.run_sync(notes.add, "shutdown")

    class Around(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: Any) -> Response:
            response: Response = await call_next(request)
            response.headers["X-Around"] = request.method
            return response

    async def state(request: Request) -> Response:
        async with request.state.lock:
            return JSONResponse({"started_in": request.state.started_in, "pid": os.getpid()})

    def sync(request: Request) -> Response:
        return PlainTextResponse(threading.current_thread().name)

    async def stream(request: Request) -> Response:
        async def blocks() -> AsyncIterator[bytes]:
            for number in range(10):
                yield b"%d," % number
                await asyncio.sleep(0)

        return StreamingResponse(blocks(), media_type="text/plain")

    async def sync_stream(request: Request) -> Response:
        def blocks() -> Iterator[bytes]:
            for number in range(10):
                yield b"%d," % number

        return StreamingResponse(blocks(), media_type="text/plain")

    async def endless(request: Request) -> Response:
        async def blocks() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"tick"
                    await asyncio.sleep(0.005)
            finally:
                notes.add("endless ended")

        return StreamingResponse(blocks(), media_type="text/plain")

    async def events(request: Request) -> Response:
        async def tell() -> AsyncIterator[dict[str, Any]]:
            try:
                for number in range(int(request.query_params.get("count", 1_000_000))):
                    if await request.is_disconnected():
                        notes.add("disconnected")
                        break
                    yield {"event": "tick", "data": str(number)}
                    await asyncio.sleep(0.005)
            finally:
                notes.add("events ended")

        return EventSourceResponse(tell())

    async def background(request: Request) -> Response:
        async def work(name: str) -> None:
            await asyncio.sleep(0.01)
            notes.add(name)

        tasks = BackgroundTasks()
        tasks.add_task(work, "async")
        tasks.add_task(notes.add, "sync")
        return PlainTextResponse("accepted", 202, background=tasks)

    async def download(request: Request) -> Response:
        return FileResponse(file, background=BackgroundTask(notes.add, "downloaded"))

    async def echo(request: Request) -> Response:
        asked = await request.is_disconnected()
        data = await request.body()
        return JSONResponse({"disconnected": asked, "size": len(data), "sha256": sha256(data)})

    async def unread(request: Request) -> Response:
        return PlainTextResponse(str(await request.is_disconnected()))

    async def upload(request: Request) -> Response:
        digest = hashlib.sha256()
        async for chunk in request.stream():
            digest.update(chunk)
        return PlainTextResponse(digest.hexdigest())

    async def error(request: Request) -> Response:
        raise LookupError("on purpose")

    routes = [
        Route("/state", state),
        Route("/sync", sync),
        Route("/stream", stream),
        Route("/sync_stream", sync_stream),
        Route("/endless", endless),
        Route("/events", events),
        Route("/background", background),
        Route("/file", download),
        Route("/echo", echo, methods=["POST"]),
        Route("/unread", unread, methods=["POST"]),
        Route("/upload", upload, methods=["POST"]),
        Route("/error", error),
    ]
    around = [Middleware(Around)]
    compressed = [Middleware(GZipMiddleware, minimum_size=1)]
    return Starlette(
        lifespan=lifespan,
        routes=[
            *routes,
            Mount("/around", routes=routes, middleware=around),
            Mount("/gzip", routes=routes, middleware=compressed),
        ],
    )


def fastapi_app(notes: Notes | None = None) -> Any:
    """Dependencies, sync endpoints, uploads, and an HTTP client made at startup."""
    import httpx
    from fastapi import Depends, FastAPI, Request, UploadFile
    from fastapi.responses import PlainTextResponse, StreamingResponse

    notes = notes or Notes()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with origin() as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
            notes.add("startup")
            yield {"client": client, "started_in": os.getpid()}
        notes.add("shutdown")

    app = FastAPI(lifespan=lifespan)

    def noted() -> Iterator[str]:
        notes.add("opened")
        try:
            yield "a resource"
        finally:
            notes.add("closed")

    Resource = Annotated[str, Depends(noted)]

    @app.middleware("http")
    async def around(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["X-Around"] = request.method
        return response

    @app.get("/sync")
    def sync(resource: Resource) -> dict[str, str]:
        return {"resource": resource, "thread": threading.current_thread().name}

    @app.get("/failing")
    def failing(resource: Resource) -> None:
        raise LookupError("on purpose")

    @app.get("/stream")
    async def stream(resource: Resource) -> StreamingResponse:
        async def blocks() -> AsyncIterator[bytes]:
            for number in range(10):
                yield b"%d," % number
                await asyncio.sleep(0)

        return StreamingResponse(blocks(), media_type="text/plain")

    @app.get("/proxied/{path}")
    async def proxied(path: str, request: Request) -> PlainTextResponse:
        return PlainTextResponse((await request.state.client.get(f"/{path}")).text)

    @app.post("/upload")
    async def upload(file: UploadFile) -> dict[str, Any]:
        data = await file.read()
        return {"name": file.filename, "size": len(data), "sha256": sha256(data)}

    @app.post("/sync_upload")
    def sync_upload(file: UploadFile) -> dict[str, Any]:
        data = file.file.read()
        return {"name": file.filename, "size": len(data), "sha256": sha256(data)}

    return app


def fastapi_app_with_a_database(notes: Notes | None, database: str) -> Any:
    """SQLAlchemy's async engine, made at startup. It waits in the middle of greenlets.

    Args:
        database: A file that is not there yet.
    """
    from fastapi import BackgroundTasks, Depends, FastAPI, Request
    from pydantic import BaseModel
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

    notes = notes or Notes()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        engine = create_async_engine(f"sqlite+aiosqlite:///{database}", pool_size=4)
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE items (number INTEGER PRIMARY KEY, name TEXT)"))
        notes.add("startup")
        yield {"sessions": async_sessionmaker(engine)}
        await engine.dispose()
        notes.add("shutdown")

    app = FastAPI(lifespan=lifespan)

    async def session(request: Request) -> AsyncIterator[AsyncSession]:
        async with request.state.sessions() as session:
            yield session

    Session = Annotated[AsyncSession, Depends(session)]

    class Item(BaseModel):
        number: int
        name: str

    @app.post("/items", status_code=201)
    async def create(item: Item, session: Session, tasks: BackgroundTasks) -> Item:
        await session.execute(text("INSERT INTO items VALUES (:number, :name)"), item.model_dump())
        await session.commit()
        tasks.add_task(notes.add, "created")
        return item

    @app.get("/items/{number}")
    async def read(number: int, session: Session) -> Item:
        query = text("SELECT name FROM items WHERE number = :number")
        return Item(number=number, name=(await session.execute(query, {"number": number})).scalar_one())

    return app


def quart_app(notes: Notes | None = None) -> Any:
    import quart

    notes = notes or Notes()
    app = quart.Quart(__name__)

    @app.before_serving
    async def startup() -> None:
        notes.add("startup")

    @app.after_serving
    async def shutdown() -> None:
        notes.add("shutdown")

    @app.get("/hello/<name>")
    async def hello(name: str) -> Any:
        return {"hello": name, "query": quart.request.args.get("q")}

    @app.get("/sync")
    def sync() -> Any:
        return threading.current_thread().name

    @app.post("/echo")
    async def echo() -> Any:
        data = await quart.request.get_data()
        assert isinstance(data, bytes)
        return sha256(data)

    @app.post("/form")
    async def form() -> Any:
        return (await quart.request.form).to_dict()

    @app.post("/upload")
    async def upload() -> Any:
        digest = hashlib.sha256()
        async for chunk in quart.request.body:
            digest.update(chunk)
        return digest.hexdigest()

    @app.get("/stream")
    async def stream() -> Any:
        async def blocks() -> AsyncIterator[bytes]:
            for number in range(10):
                yield b"%d," % number
                await asyncio.sleep(0)

        return blocks(), 200, {"Content-Type": "text/plain"}

    @app.get("/endless")
    async def endless() -> Any:
        async def blocks() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"tick"
                    await asyncio.sleep(0.005)
            finally:
                notes.add("endless ended")

        response: Any = await quart.make_response(blocks())
        response.timeout = None
        return response

    @app.get("/background")
    async def background() -> Any:
        async def work() -> None:
            await asyncio.sleep(0.01)
            notes.add("background")

        app.add_background_task(work)
        return "accepted", 202

    @app.get("/file")
    async def file() -> Any:
        return await quart.send_file(__file__)

    @app.get("/error")
    async def error() -> Any:
        raise LookupError("on purpose")

    return app


def litestar_app(notes: Notes | None = None) -> Any:
    import litestar
    from litestar.background_tasks import BackgroundTask
    from litestar.datastructures import State, UploadFile
    from litestar.di import NamedDependency, Provide
    from litestar.enums import RequestEncodingType
    from litestar.params import Body, FromPath
    from litestar.response import File, ServerSentEvent, Stream

    notes = notes or Notes()

    async def startup(app: litestar.Litestar) -> None:
        app.state.lock = asyncio.Lock()
        notes.add("startup")

    async def shutdown(app: litestar.Litestar) -> None:
        notes.add("shutdown")

    async def provide_resource() -> AsyncIterator[str]:
        notes.add("opened")
        yield "a resource"
        notes.add("closed")

    @litestar.get("/hello/{name:str}", dependencies={"resource": Provide(provide_resource)})
    async def hello(name: FromPath[str], state: State, resource: NamedDependency[str]) -> dict[str, str]:
        async with state.lock:
            return {"hello": name, "resource": resource}

    @litestar.get("/sync", sync_to_thread=True)
    def sync() -> str:
        return threading.current_thread().name

    @litestar.post("/echo")
    async def echo(request: litestar.Request[Any, Any, Any]) -> str:
        return sha256(await request.body())

    @litestar.post("/upload")
    async def upload(data: Annotated[UploadFile, Body(media_type=RequestEncodingType.MULTI_PART)]) -> dict[str, Any]:
        content = await data.read()
        return {"name": data.filename, "size": len(content), "sha256": sha256(content)}

    @litestar.get("/stream")
    async def stream() -> Stream:
        async def blocks() -> AsyncIterator[bytes]:
            for number in range(10):
                yield b"%d," % number
                await asyncio.sleep(0)

        return Stream(blocks())

    @litestar.get("/events")
    async def events() -> ServerSentEvent:
        async def tell() -> AsyncIterator[str]:
            try:
                number = 0
                while True:
                    yield str(number)
                    number += 1
                    await asyncio.sleep(0.005)
            finally:
                notes.add("events ended")

        return ServerSentEvent(tell())

    @litestar.get("/background", status_code=202)
    async def background() -> litestar.Response[str]:
        async def work() -> None:
            await asyncio.sleep(0.01)
            notes.add("background")

        return litestar.Response("accepted", background=BackgroundTask(work))

    @litestar.get("/file")
    async def file() -> File:
        return File(path=__file__, filename="apps.py")

    @litestar.get("/error")
    async def error() -> None:
        raise LookupError("on purpose")

    return litestar.Litestar(
        route_handlers=[hello, sync, echo, upload, stream, events, background, file, error],
        on_startup=[startup],
        on_shutdown=[shutdown],
        openapi_config=None,
        logging_config=None,  # its listener's thread would live on
    )


def mcp_app() -> Any:
    """A server of tools over streamable HTTP: some answers are one JSON text, some a stream of events."""
    from mcp.server.mcpserver import Context, MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    server: MCPServer[Any] = MCPServer("tests")

    @server.tool()
    def add(a: int, b: int) -> int:
        return a + b

    @server.tool()
    async def count(to: int, ctx: Context) -> str:
        for number in range(to):
            await ctx.report_progress(number + 1, to, json.dumps(number))
            await asyncio.sleep(0.001)
        return f"counted to {to}"

    @server.tool()
    async def fail() -> None:
        raise ToolError("on purpose")

    return server.streamable_http_app()
