"""AsgiToWsgi's life under gunicorn: apps loaded, and used, before the workers are forked; ends of all kinds."""

from __future__ import annotations

import os
import re
import signal
import textwrap
import time
from pathlib import Path

import httpx
import pytest

from tests.drivers import run_in_threads
from tests.servers import LIMIT, Running, Server, until

APPLICATION = """
    import asyncio, os
    import anyio.to_thread
    import uvloop
    from bridge import AsgiToWsgi

    def tell(what):
        os.write(1, f"<{what} {os.getpid()}>".encode())

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            tell("startup")
            scope["state"]["pid"] = os.getpid()
            scope["state"]["lock"] = asyncio.Lock()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await anyio.to_thread.run_sync(tell, "shutdown")
            await send({"type": "lifespan.shutdown.complete"})
            return
        async with scope["state"]["lock"]:
            await anyio.to_thread.run_sync(os.getpid)
        body = b"%d %d" % (scope["state"]["pid"], os.getpid())
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        if scope["path"] == "/background":
            await asyncio.sleep(0.5)
            tell("background")

    application = AsgiToWsgi(app, loop_factory=FACTORY)
"""


def told(running: Running, what: str) -> list[str]:
    """The processes that have told it."""
    return sorted(re.findall(rf"<{what} (\d+)>", running.log()))


def ask(running: Running, count: int) -> set[str]:
    """The workers that have answered, each of which must have started the app itself."""

    def visit(number: int) -> str:
        response = httpx.get(running.url, trust_env=False, timeout=LIMIT, headers={"Connection": "close"})
        started_in, pid = response.text.split()
        assert started_in == pid
        return pid

    return set(run_in_threads(visit, count, threads=8))


@pytest.mark.parametrize("factory", ["asyncio.new_event_loop", "uvloop.new_event_loop"])
@pytest.mark.parametrize("used", [False, True], ids=["wrapped", "used"])
def test_an_app_is_preloaded_and_served_by_each_worker(tmp_path: Path, used: bool, factory: str) -> None:
    """[A20] The master's own life ends with the master, each worker's with the worker."""
    source = textwrap.dedent(APPLICATION).replace("FACTORY", factory) + ("application.startup()\n" if used else "")
    server = Server(
        "gunicorn --preload --workers 2 --threads 4 --bind 127.0.0.1:{port} application:application", "gunicorn"
    )
    with Running(server, source, tmp_path) as running:
        workers: set[str] = set()
        for _ in until(LIMIT):
            workers |= ask(running, 16)
            if len(workers) == 2:
                break
        assert len(workers) == 2
        assert running.stop() == 0
        lives = sorted([*workers, str(running.pid)] if used else workers)
        assert told(running, "startup") == lives
        assert told(running, "shutdown") == lives
        assert "Traceback" not in running.log(), running.log()


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_background_work_is_waited_for_when_a_worker_ends(tmp_path: Path, kind: str) -> None:
    """[A10] [A20] At SIGTERM, before the app is shut down."""
    source = textwrap.dedent(APPLICATION).replace("FACTORY", "asyncio.new_event_loop")
    command = f"gunicorn --worker-class {kind} --bind 127.0.0.1:{{port}} application:application"
    with Running(Server(command, "gunicorn"), source, tmp_path) as running:
        response = httpx.get(f"{running.url}/background", trust_env=False, timeout=LIMIT)
        assert response.status_code == 200
        assert not told(running, "background")
        assert running.stop() == 0
        log = running.log()
        assert 0 <= log.index("<background") < log.index("<shutdown"), log
        assert "Traceback" not in log, log


@pytest.mark.parametrize("options", ["--processes 2 --lazy-apps", "--enable-threads --threads 4"])
def test_a_second_signal_does_not_cut_off_the_shutdown_under_uwsgi(tmp_path: Path, options: str) -> None:
    """[A20] A terminal, and systemd, send theirs to master and workers; the master sends one to the workers, too."""
    source = textwrap.dedent(APPLICATION).replace("FACTORY", "asyncio.new_event_loop")
    source = source.replace('"shutdown")', '"begins")\n        await asyncio.sleep(0.5)\n        tell("shutdown")')
    command = f"uwsgi --master --die-on-term --need-app {options} --http-socket 127.0.0.1:{{port}}"
    server = Server(f"{command} --module application:application", "uwsgi")
    if server.missing and os.environ.get("BRIDGE_REQUIRE_SERVERS") != "1":
        pytest.skip("uwsgi is missing")
    with Running(server, source, tmp_path) as running:
        (worker,) = ask(running, 1)
        time.sleep(0.5)  # uWSGI runs no atexit handlers of a worker that is not yet through with its last request
        running.terminate()
        assert any(told(running, "begins") for _ in until(LIMIT)), running.log()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(int(worker), number)
        assert running.stop() == 0
        assert told(running, "shutdown") == [worker]


@pytest.mark.parametrize("loop", ["shared", "request"])
@pytest.mark.parametrize("name", ["gunicorn", "waitress"])
def test_a_stream_without_end_keeps_no_thread_that_only_sends_its_headers(tmp_path: Path, name: str, loop: str) -> None:
    """[A10] To HEAD; the one thread that there is then serves the next request."""
    source = f"""
        import asyncio
        from bridge import AsgiToWsgi

        async def app(scope, receive, send):
            await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]}})
            while scope["path"] == "/ticks":
                await send({{"type": "http.response.body", "body": b"tick", "more_body": True}})
                await asyncio.sleep(0.05)
            await send({{"type": "http.response.body", "body": b"x" * 1000}})

        application = AsgiToWsgi(app, loop={loop!r}, lifespan="off")
    """
    commands = {
        "gunicorn": "gunicorn --bind 127.0.0.1:{port} application:application",
        "waitress": "waitress --listen 127.0.0.1:{port} --threads 1 application:application",
    }
    with Running(Server(commands[name], name), textwrap.dedent(source), tmp_path) as running:
        response = httpx.head(f"{running.url}/ticks", trust_env=False, timeout=LIMIT)
        assert (response.status_code, response.headers["content-length"]) == (200, "1000")
        assert len(httpx.get(running.url, trust_env=False, timeout=LIMIT).content) == 1000
        assert "Traceback" not in running.log(), running.log()
