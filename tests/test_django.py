"""Django's WSGI application under ASGI. Its settings are the process's: so it runs in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

SITE = """
    import asyncio, json, sys, threading
    import anyio, django, httpx
    from django.conf import settings
    from django.core.signals import request_finished
    from django.core.wsgi import get_wsgi_application
    from django.db import connection
    from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
    from django.urls import path
    from bridge import WsgiToAsgi

    database = sys.argv[1]
    settings.configure(
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="of the tests",
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": database, "CONN_MAX_AGE": None}},
    )
    django.setup()

    def query(request):
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        return JsonResponse({"connection": id(connection.connection), "thread": threading.get_ident()})

    def stream(request):
        def rows():
            for number in range(3):
                with connection.cursor() as cursor:
                    cursor.execute("SELECT %s", [number])
                    yield str(cursor.fetchone()[0])
        return StreamingHttpResponse(rows())

    lock = None
    inside = []

    async def shared(request):
        async with lock:
            inside.append(asyncio.get_running_loop())
            await asyncio.sleep(0)
            return HttpResponse(request.body)

    urlpatterns = [path("query", query), path("stream", stream), path("shared", shared)]
    finished = []
    request_finished.connect(lambda **arguments: finished.append(threading.get_ident()), weak=False)
    application = WsgiToAsgi(get_wsgi_application(), threads=4)

    def client():
        return httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://testserver")

    async def gather(count, call):
        answers = []
        async def one():
            answers.append(await call())
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(one)
        return answers
"""


def run(main: str, backend: str, tmp_path: Path) -> Any:
    """What an async ``main`` returns, in a process with the site."""
    site = textwrap.dedent(SITE) + textwrap.dedent(main)
    site += f"\nprint(json.dumps(anyio.run(main, backend={backend!r})))\n"
    script = tmp_path / "site.py"
    script.write_text(site)
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(script), str(tmp_path / "db.sqlite3")],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONASYNCIODEBUG": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_persistent_connections_persist(backend: str, tmp_path: Path) -> None:
    """[W19] Threads are reused, so CONN_MAX_AGE works: a connection for each thread, and no more."""
    main = """
        async def main():
            answers = []
            async with client() as c:
                for _ in range(20):
                    answers += [(await c.get("/query")).json() for _ in range(2)]
                    answers += [answer.json() for answer in await gather(4, lambda: c.get("/query"))]
            return {
                "answers": len(answers),
                "connections": len({answer["connection"] for answer in answers}),
                "threads": len({answer["thread"] for answer in answers}),
                "finished": len(finished),
                "finished in the thread": set(finished) == {answer["thread"] for answer in answers},
            }
    """
    seen = run(main, backend, tmp_path)
    assert seen["answers"] == seen["finished"] == 120
    assert seen["connections"] == seen["threads"] <= 4
    assert seen["finished in the thread"]


def test_a_streamed_response_uses_the_connection_of_its_thread(tmp_path: Path) -> None:
    """[W13]"""
    main = """
        async def main():
            async with client() as c:
                return [(await c.get("/stream")).text for _ in range(3)]
    """
    assert run(main, "asyncio", tmp_path) == ["012"] * 3


def test_async_views_share_the_servers_loop_and_its_locks(tmp_path: Path) -> None:
    """[W20]"""
    main = """
        async def main():
            global lock
            lock = asyncio.Lock()
            async with client() as c, lock:
                async with asyncio.TaskGroup() as group:
                    posts = [group.create_task(c.post("/shared", content=b"x" * 1000)) for _ in range(8)]
                    await asyncio.sleep(0)
                    lock.release()
                answers = [post.result() for post in posts]
                await lock.acquire()
            return {
                "bodies": [len(answer.content) for answer in answers],
                "loops": len(set(inside)),
                "ours": set(inside) == {asyncio.get_running_loop()},
            }
    """
    assert run(main, "asyncio", tmp_path) == {"bodies": [1000] * 8, "loops": 1, "ours": True}


def test_async_views_share_a_client_that_the_lifespan_has_made(tmp_path: Path) -> None:
    """[W20] [W22] Each request finds the one connection open that the first has made."""
    main = """
        import contextlib
        from tests.drivers import AsgiServer, make_scope

        connections = []

        async def serve_connection(reader, writer):
            connections.append(writer)
            while await reader.readline():
                while await reader.readline() != b"\\r\\n":
                    pass
                writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\n\\r\\nbehind")
            writer.close()

        @contextlib.asynccontextmanager
        async def lifespan(_):
            server = await asyncio.start_server(serve_connection, "127.0.0.1", 0)
            host, port = server.sockets[0].getsockname()
            async with server, httpx.AsyncClient(trust_env=False) as client:
                yield {"lock": asyncio.Lock(), "client": client, "url": f"http://{host}:{port}/"}

        async def view(request):
            state = request.META["asgi.scope"]["state"]
            async with state["lock"]:
                return HttpResponse((await state["client"].get(state["url"])).content)

        urlpatterns += [path("behind", view)]

        async def main():
            bridge = WsgiToAsgi(get_wsgi_application(), lifespan=lifespan)
            async with AsgiServer().lifespan(bridge) as server:
                def one():
                    return AsgiServer().run(bridge, make_scope(path="/behind", state=dict(server.state)))
                exchanges = await gather(8, one)
            return [[exchange.body.decode() for exchange in exchanges], len(connections)]
    """
    assert run(main, "asyncio", tmp_path) == [["behind"] * 8, 1]


def test_locals_of_middleware_outside_are_seen_inside_and_the_other_way_round(tmp_path: Path) -> None:
    """[W13] What Django keeps in asgiref's Locals: here its translation and its timezone."""
    main = """
        from django.utils import timezone, translation

        def seen():
            return [translation.get_language(), str(timezone.get_current_timezone())]

        def localized(request):
            inside = seen()
            translation.activate("fr")
            return JsonResponse({"inside": inside, "changed": seen()})

        async def localized_async(request):
            inside = seen()
            translation.activate("fr")
            return JsonResponse({"inside": inside, "changed": seen()})

        def plain(request):
            return JsonResponse({"inside": seen(), "changed": seen()})

        urlpatterns += [path("sync", localized), path("async", localized_async), path("plain", plain)]
        after = []

        async def middleware(scope, receive, send):
            if scope["path"] != "/plain":
                translation.activate("de")
                timezone.activate("Asia/Tokyo")
            await application(scope, receive, send)
            after.append(seen())

        async def main():
            answers = []
            async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://t") as c:
                for page in ("sync", "async", "plain"):
                    answers += [await asyncio.create_task(c.get("/" + page))]
            return [[answer.json()["inside"], answer.json()["changed"]] for answer in answers] + after
    """
    german, french, plain = ["de", "Asia/Tokyo"], ["fr", "Asia/Tokyo"], ["en-us", "America/Chicago"]
    assert run(main, "asyncio", tmp_path) == [[german, french]] * 2 + [[plain, plain]] + [french] * 2 + [plain]
