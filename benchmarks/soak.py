"""A soak: clients of all manners, for long, against real servers; then every answer was right, and nothing has grown.

    python -m benchmarks.soak --seconds 600            all sites, one after the other, as long each
    python -m benchmarks.soak --site flask --count 5000
    python -m benchmarks.soak --in-process 1000000     so many requests in each direction, without a server

The sites are Flask under uvicorn, FastAPI under gunicorn's gthread, and Django under hypercorn on trio. Each answer
carries a hash of its request. Clients send whole requests, in one piece, byte by byte, or several at once; and they
vanish in the headers, in the body and in the response, reset, and send garbage. In the first part of a soak nobody
touches the server, and what its processes hold before and after is compared. In the second part it is reloaded (HUP)
and its workers are killed, at least once each: then requests may be lost, but no answer may be wrong, and the server
must serve again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import hashlib
import json
import os
import random
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

__all__ = ["SITES", "Report", "run", "run_in_process"]

ROOT = Path(__file__).parent.parent
PATIENCE = 20.0  # seconds in which an answer must come
BLOCK = 16_384


@dataclass(frozen=True)
class Site:
    """A server and its app.

    Attributes:
        command: What is typed behind `python -m`.
        workers: How many processes serve.
        disturbances: What it is to survive: HUP reloads it, for a worker that gets a KILL it starts another one.
        robust: Whether it survives clients that send several requests at once, or a body that breaks off.
        chunks: Whether the app reads a body of which no length was told. Django's WSGI handler takes it for empty.
    """

    command: str
    workers: int = 2
    disturbances: tuple[str, ...] = ("KILL", "HUP")
    robust: bool = True
    chunks: bool = True


APP = "benchmarks.soak:application"
SITES = {
    "flask": Site(f"uvicorn --workers 2 --log-level warning --port {{port}} {APP}"),
    "fastapi": Site(f"gunicorn --workers 2 --threads 16 --log-level warning --bind 127.0.0.1:{{port}} {APP}"),
    # On trio, hypercorn 0.18 may end as a whole, by a BusyResourceError, when it wants to answer a request that breaks
    # off while it closes the connection: its send_eof() does not heed its own lock.
    "django": Site(
        f"hypercorn --worker-class trio --log-level warning --bind 127.0.0.1:{{port}} {APP}",
        workers=1,
        disturbances=("restart",),
        robust=False,
        chunks=False,
    ),
}


# The apps


def fingerprint(method: str, target: str, mark: str, body: bytes) -> str:
    """What an answer tells of its request."""
    return hashlib.sha256(b"\0".join([method.encode(), target.encode(), mark.encode(), body])).hexdigest()


def blocks(digest: str, size: int) -> Any:
    """A body of that size that only this request can have."""
    pattern = digest.encode() * (BLOCK // 64)
    for start in range(0, size, BLOCK):
        yield pattern[: min(BLOCK, size - start)]


def state_here(tasks: int) -> dict[str, int]:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "pid": os.getpid(),
        "tasks": tasks,
        "threads": int(status["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
        "kib": int(status["VmRSS"].split()[0]),
    }


def count_tasks(environ: dict[str, Any]) -> int:
    """The tasks of the loop that called a WSGI app."""
    import anyio.from_thread

    async def count() -> int:
        if (asyncio_loop := asyncio._get_running_loop()) is not None:
            return len(asyncio.all_tasks(asyncio_loop))
        import trio.lowlevel

        return trio.lowlevel.current_statistics().tasks_living

    return anyio.from_thread.run(count, token=environ["asgi.event_loop_token"])


def make_flask() -> Any:
    from flask import Flask, Response, request

    from bridge import WsgiToAsgi

    app = Flask(__name__)

    @app.route("/state")
    def state() -> Any:
        return state_here(count_tasks(request.environ))

    @app.route("/echo", methods=["GET", "POST"])
    def echo() -> Any:
        target = request.full_path.rstrip("?")
        digest = fingerprint(request.method, target, request.headers.get("X-Mark", ""), request.get_data())
        return Response(blocks(digest, int(request.args["size"])), headers={"X-Hash": digest})

    return WsgiToAsgi(app)


def make_fastapi() -> Any:
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from starlette.routing import Route

    from bridge import AsgiToWsgi

    async def live(_: Any) -> Any:
        yield {"lives": True}

    app = FastAPI(lifespan=contextlib.asynccontextmanager(live))

    @app.get("/state")
    async def state() -> Any:
        return state_here(len(asyncio.all_tasks()))

    async def echo(request: Any) -> Any:
        assert request.state.lives
        body = await request.body()
        target = f"/echo?{request.url.query}"
        digest = fingerprint(request.method, target, request.headers.get("x-mark", ""), body)

        async def stream() -> Any:
            for block in blocks(digest, int(request.query_params["size"])):
                yield block

        return StreamingResponse(stream(), headers={"X-Hash": digest})

    app.router.routes.append(Route("/echo", echo, methods=["GET", "POST"]))
    return AsgiToWsgi(app)


def make_django() -> Any:
    import django
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import JsonResponse, StreamingHttpResponse
    from django.urls import path

    from bridge import WsgiToAsgi

    def state(request: Any) -> Any:
        return JsonResponse(state_here(count_tasks(request.environ)))

    def echo(request: Any) -> Any:
        target = request.get_full_path()
        digest = fingerprint(request.method, target, request.headers.get("X-Mark", ""), request.body)
        return StreamingHttpResponse(blocks(digest, int(request.GET["size"])), headers={"X-Hash": digest})

    urls = type("urls", (), {"urlpatterns": [path("state", state), path("echo", echo)]})
    settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=urls, SECRET_KEY="soak", LOGGING_CONFIG=None)
    django.setup()
    return WsgiToAsgi(get_wsgi_application())


MAKERS = {"flask": make_flask, "fastapi": make_fastapi, "django": make_django}
application: Any = MAKERS[os.environ["SOAK_SITE"]]() if "SOAK_SITE" in os.environ else None


# The server's process


class Server:
    """A site's process."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.site = SITES[name]
        self.log = directory / f"{name}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", *shlex.split(self.site.command.format(port=self.port))]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"SOAK_SITE": self.name, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.census()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
                raise TimeoutError(f"{self.name} did not end; its log:\n{self.log.read_text()[-4000:]}") from None

    def workers(self) -> set[int]:
        """The processes that serve, or are about to: the living children but `multiprocessing`'s."""
        pid = self.process.pid
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} has ended; its log:\n{self.log.read_text()[-4000:]}")
        workers = set()
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):  # it has gone meanwhile
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if command and b"resource_tracker" not in command:
                    workers.add(int(child))
        return workers

    def disturb(self, how: str, rng: random.Random) -> None:
        """Do one of `Site.disturbances`, and wait until new workers serve in the place of those that it has cost.

        Another one meanwhile could undo it: uvicorn reloads no further where the new worker ends before it serves.
        """
        if how == "restart":
            self.stop()
            self.start()
            return
        workers = self.workers()
        if how == "HUP":
            self.process.send_signal(signal.SIGHUP)
        else:
            victim = rng.choice(sorted(workers))
            workers = {victim}
            os.kill(victim, signal.SIGKILL)
        self.census(doomed=workers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def ask_state(self) -> dict[str, int]:
        with self.connect() as connection:
            connection.sendall(b"GET /state HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n")
            with contextlib.closing(HTTPResponse(connection)) as response:
                response.begin()
                state: dict[str, int] = json.loads(response.read())
            return state

    def census(self, doomed: Collection[int] = ()) -> list[dict[str, int]]:
        """The state of each worker, asked until all have answered that there shall be.

        Args:
            doomed: Those that there shall not be any more.
        """
        states: dict[int, dict[str, int]] = {}
        deadline = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < deadline:
            workers = self.workers()
            if len(workers) == self.site.workers and workers <= states.keys() and workers.isdisjoint(doomed):
                return [states[worker] for worker in workers]
            try:
                state = self.ask_state()
                states[state["pid"]] = state
            except (OSError, HTTPException, ValueError):  # nobody serves yet
                time.sleep(0.02)
        raise TimeoutError(
            f"{self.name}: of the workers {sorted(workers)} {sorted(workers & states.keys())} have answered, and "
            f"{sorted(workers.intersection(doomed))} should have gone; its log:\n{self.log.read_text()[-4000:]}"
        )


# The clients


@dataclass
class Report:
    """What came of a soak."""

    site: str
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    right: int = 0
    lost: int = 0  # while the server was reloaded or a worker killed
    faults: list[str] = field(default_factory=list)
    disturbed: Counter[str] = field(default_factory=Counter)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        grown = " ".join(f"{key} {self.before[key]:,}->{self.after[key]:,}" for key in self.before)
        return (
            f"{self.site}: {sum(self.kinds.values()):,} exchanges in {self.seconds:.0f} s {dict(self.kinds)}, "
            f"{self.right:,} right answers, {self.lost:,} lost in {dict(self.disturbed)}, {len(self.faults)} faults; "
            f"{grown}" + "".join(f"\n  {fault}" for fault in self.faults[:20])
        )


class Fault(Exception):
    """A complete request that was not answered rightly."""


@dataclass
class Request:
    data: bytes
    digest: str
    size: int
    method: str


def make_request(rng: random.Random, chunks: bool, close: bool = False) -> Request:
    size = rng.choice([0, 1, 100, 5000, BLOCK, 3 * BLOCK + 7, 400_000])
    method = rng.choice(["GET", "POST"])
    target = f"/echo?size={size}&n={rng.randrange(10**9)}"
    mark = f"{rng.randrange(10**9)}"
    body = rng.randbytes(rng.choice([0, 1, 1000, 70_000, 300_000])) if method == "POST" else b""
    head = f"{method} {target} HTTP/1.1\r\nHost: soak\r\nX-Mark: {mark}\r\n"
    if close:
        head += "Connection: close\r\n"
    if method == "POST" and chunks and rng.random() < 0.5:
        step = rng.choice([1000, 33_333])
        pieces = [body[start : start + step] for start in range(0, len(body), step)]
        data = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
        head += "Transfer-Encoding: chunked\r\n\r\n"
    else:
        data = body
        head += f"Content-Length: {len(body)}\r\n\r\n" if method == "POST" else "\r\n"
    return Request(head.encode() + data, fingerprint(method, target, mark, body), size, method)


def check_answer(connection: socket.socket, request: Request) -> None:
    with contextlib.closing(HTTPResponse(connection, method=request.method)) as response:
        response.begin()
        body = response.read()
    if response.status != 200:
        raise Fault(f"status {response.status}: {body[:200]!r}")
    if response.headers["X-Hash"] != request.digest:
        raise Fault(f"the answer is that of another request: {response.headers['X-Hash']}")
    if body != b"".join(blocks(request.digest, request.size)):
        raise Fault(f"a wrong body of {len(body)} bytes, expected {request.size}")


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def vanish(rng: random.Random, connection: socket.socket) -> None:
    if rng.random() < 0.5:
        reset(connection)


class Client:
    """One client after the other, each of some manner."""

    def __init__(self, server: Server, report: Report, seed: int) -> None:
        self.server = server
        self.report = report
        self.rng = random.Random(seed)

    def serve_one(self) -> None:
        kinds = ["whole", "whole", "kept", "dribble", "in_headers", "in_body", "in_response", "garbage"]
        kind = self.rng.choice(kinds + ["pipeline"] * self.server.site.robust)
        self.report.kinds[kind] += 1
        with self.server.connect() as connection:
            getattr(self, kind)(connection)

    def whole(self, connection: socket.socket) -> None:
        request = make_request(self.rng, self.server.site.chunks, close=True)
        connection.sendall(request.data)
        check_answer(connection, request)
        self.report.right += 1

    def kept(self, connection: socket.socket) -> None:
        for _ in range(self.rng.randrange(1, 5)):
            request = make_request(self.rng, self.server.site.chunks)
            connection.sendall(request.data)
            check_answer(connection, request)
            self.report.right += 1

    def dribble(self, connection: socket.socket) -> None:
        request = make_request(self.rng, self.server.site.chunks, close=True)
        position = 0
        for _ in range(30):
            step = self.rng.choice([1, 2, 7, 60])
            connection.sendall(request.data[position : position + step])
            position += step
            time.sleep(0.002)
        connection.sendall(request.data[position:])
        check_answer(connection, request)
        self.report.right += 1

    def pipeline(self, connection: socket.socket) -> None:
        # The first must be answered; a server may leave the others, but what it answers must be right, and in order.
        requests = [make_request(self.rng, self.server.site.chunks) for _ in range(3)]
        data = b"".join(request.data for request in requests if request.method == "GET" or request is requests[0])
        asked = [request for request in requests if request.method == "GET" or request is requests[0]]
        sender = threading.Thread(target=self.send_quietly, args=(connection, data), daemon=True)
        sender.start()
        try:
            check_answer(connection, asked[0])
            self.report.right += 1
        finally:
            if sys.exc_info()[0] is not None or len(asked) == 1:
                connection.close()
            sender.join(PATIENCE)

    @staticmethod
    def send_quietly(connection: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(data)

    def in_headers(self, connection: socket.socket) -> None:
        head = make_request(self.rng, self.server.site.chunks).data.partition(b"\r\n\r\n")[0]
        connection.sendall(head[: self.rng.randrange(len(head))])
        vanish(self.rng, connection)

    def in_body(self, connection: socket.socket) -> None:
        data = make_request(self.rng, self.server.site.chunks).data
        start = data.index(b"\r\n\r\n") + 4
        connection.sendall(data[: self.rng.randrange(start, len(data) + 1)])
        if self.server.site.robust:
            vanish(self.rng, connection)
        else:
            reset(connection)

    def in_response(self, connection: socket.socket) -> None:
        connection.sendall(make_request(self.rng, self.server.site.chunks).data)
        connection.recv(self.rng.choice([1, 100, 20_000]))
        vanish(self.rng, connection)

    def garbage(self, connection: socket.socket) -> None:
        junk = self.rng.choice(
            [
                self.rng.randbytes(200),
                b"GET / HTTP/9.9\r\n\r\n",
                b"POST /echo?size=1 HTTP/1.1\r\nHost: soak\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\n12345",
                b"GET /echo?size=1 HTTP/1.1\r\nHost soak\r\n\r\n",
                b"\0" * 50,
                *[b"POST /echo?size=1 HTTP/1.1\r\nHost: soak\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"]
                * self.server.site.robust,
            ]
        )
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while connection.recv(65_536):
                pass


# The soak


def soak(server: Server, report: Report, seconds: float, count: int, clients: int, seed: int, forgiving: bool) -> None:
    """Let clients at a server until the time or the count is over.

    Args:
        forgiving: Connections may break: the server is disturbed meanwhile, in each of its ways at least.
    """
    deadline = time.monotonic() + seconds
    left = [count]
    due = list(server.site.disturbances) if forgiving else []

    def run_client(number: int) -> None:
        client = Client(server, report, seed * 1000 + number)
        while due or (time.monotonic() < deadline and left[0] > 0):
            left[0] -= 1
            kind = sum(report.kinds.values())
            try:
                client.serve_one()
            except Fault as fault:
                if not (forgiving and str(fault).startswith("status 50")):
                    report.faults.append(f"exchange {kind}: {fault}")
            except (OSError, HTTPException, ValueError) as error:
                last = sys.exc_info()[2]
                while (
                    last is not None and last.tb_next is not None and "soak" in last.tb_next.tb_frame.f_code.co_filename
                ):
                    last = last.tb_next
                place = last.tb_frame.f_code.co_name if last is not None else ""
                if forgiving:
                    report.lost += 1
                    time.sleep(0.01)  # perhaps nobody listens for a while
                elif place not in ("in_headers", "in_body", "in_response", "garbage", "send_quietly"):
                    report.faults.append(f"exchange {kind}, in {place}: {error!r}")

    threads = [threading.Thread(target=run_client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    rng = random.Random(seed)
    while due or any(thread.is_alive() for thread in threads):
        if forgiving and (due or time.monotonic() < deadline):
            how = due[0] if due else rng.choice(server.site.disturbances)
            server.disturb(how, rng)
            report.disturbed[how] += 1
            del due[:1]
        pause = min(3.0, seconds / 4) if forgiving else 0.2
        time.sleep(max(0.05, min(pause, deadline - time.monotonic())))
        if time.monotonic() > deadline + 3 * PATIENCE:
            report.faults.append("a client has not ended")
            return


def settle(server: Server, before: dict[str, int]) -> dict[str, int]:
    """What the workers hold together, after they had time to let go (idle threads stay for 10 s)."""
    deadline = time.monotonic() + 25
    while True:
        states = server.census()
        total = {key: sum(state[key] for state in states) for key in ("tasks", "threads", "files", "kib")}
        total["workers"] = len(states)
        if not before or time.monotonic() > deadline or not grown(before, total):
            return total
        time.sleep(0.5)


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What has grown, beyond what is kept for the next requests.

    gunicorn's pools of 16 threads a worker fill up slowly, and allocators keep a fifth and 8 MiB: far less than what a
    leak in one request of a hundred would leave of thousands.
    """
    slack = {
        "tasks": 4,
        "threads": 16 * before["workers"],
        "files": 8,
        "workers": 0,
        "kib": before["kib"] // 5 + 8192 * before["workers"],
    }
    return [f"{key}: {before[key]:,} -> {after[key]:,}" for key in before if after[key] > before[key] + slack[key]]


def run(name: str, seconds: float, count: int = sys.maxsize, clients: int = 8, seed: int = 1) -> Report:
    """Soak a site: two thirds of the time undisturbed, one third reloaded and killed."""
    report = Report(name)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        server = Server(name, Path(directory))
        try:
            warm = Report(name)
            soak(server, warm, min(5.0, seconds / 5), count, clients, seed, forgiving=False)
            report.faults += warm.faults
            report.before = settle(server, {})
            soak(server, report, seconds * 2 / 3, count * 2 // 3, clients, seed + 1, forgiving=False)
            report.after = settle(server, report.before)
            report.faults += [f"grown: {what}" for what in grown(report.before, report.after)]
            soak(server, report, seconds / 3, count // 3, clients, seed + 2, forgiving=True)
            soak(server, report, min(5.0, seconds / 5), count, clients, seed + 3, forgiving=False)
        except BaseException:
            sys.stderr.write(server.log.read_text()[-6000:])
            raise
        finally:
            server.stop()
        if report.faults:
            sys.stderr.write(server.log.read_text()[-6000:])
    report.seconds = time.monotonic() - began
    return report


# Without a server


def run_in_process(count: int) -> list[str]:
    """So many requests in each direction, in this process: what memory they leave.

    Returns:
        A line for each direction: requests, seconds, and KiB by tracemalloc and by the kernel after a tenth of them and
        at the end.
    """
    import anyio

    from bridge import AsgiToWsgi, WsgiToAsgi

    from . import apps, wsgi_to_asgi
    from .asgi_to_wsgi import request_environ

    def measure(name: str, serve: Any) -> str:
        import tracemalloc

        began = time.monotonic()
        serve(count // 10)
        gc.collect()
        early_rss = state_here(0)["kib"]
        serve(count - 2 * (count // 10))
        late_rss = state_here(0)["kib"]
        tracemalloc.start()
        serve(count // 20)
        gc.collect()
        early = tracemalloc.get_traced_memory()[0]
        serve(count // 20)
        gc.collect()
        late = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return (
            f"{name}: {count:,} requests in {time.monotonic() - began:.0f} s; RSS {early_rss:,} KiB after a tenth, "
            f"{late_rss:,} KiB after nine; the last two twentieths traced: {early:,} and {late:,} bytes"
        )

    def wsgi(number: int) -> None:
        wrapped: Any = WsgiToAsgi(apps.hello)
        exchange = wsgi_to_asgi.Exchange
        scope = wsgi_to_asgi.request_scope

        async def main() -> None:
            for _ in range(number):
                sent: list[Any] = []

                async def send(message: Any, sent: list[Any] = sent) -> None:
                    sent.append(message)

                await wrapped(scope(0), exchange((b"",)).receive, send)
                if sent[0]["status"] != 200 or sent[-1].get("more_body"):
                    raise Fault(f"got {sent}")

        anyio.run(main)
        wrapped.close()

    def asgi(number: int) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"hi"})

        with AsgiToWsgi(app, loop="shared", lifespan="off") as wrapped:
            for _ in range(number):
                environ = request_environ(b"")
                statuses: list[str] = []
                result = wrapped(environ, lambda status, headers, statuses=statuses: statuses.append(status))
                body = b"".join(result)
                result.close()  # type: ignore[attr-defined]
                if statuses != ["200 OK"] or body != b"hi":
                    raise Fault(f"got {statuses} and {body!r}")

    return [measure("WSGI app under ASGI", wsgi), measure("ASGI app under WSGI", asgi)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1200.0, help="for all sites together (default: %(default)s)")
    parser.add_argument("--count", type=int, default=sys.maxsize, help="exchanges at each site at most")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--site", choices=SITES, action="append")
    parser.add_argument("--in-process", type=int, metavar="REQUESTS")
    options = parser.parse_args()
    if options.in_process:
        print("\n".join(run_in_process(options.in_process)))
        return 0
    sites = options.site or list(SITES)
    faults = 0
    for name in sites:
        report = run(name, options.seconds / len(sites), options.count, options.clients, options.seed)
        faults += len(report.faults)
        print(report, flush=True)
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
