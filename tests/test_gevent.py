"""[A23] Under gevent: the loop lives in a real thread, greenlets wait for it, and others have asyncio for themselves.

All of it runs in processes of its own, since gevent's patches cannot be taken back.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from typing import TYPE_CHECKING

import pytest

from tests.servers import LIMIT, ROOT, SERVERS, Running, until
from tests.test_servers import EXPECTED, TRACEBACK, require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


APP = '''
import asyncio, contextlib, os, threading, time

import anyio.from_thread
from asgiref.sync import async_to_sync, sync_to_async
from bridge import AsgiToWsgi
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

arrived, flags = {}, set()

@contextlib.asynccontextmanager
async def lifespan(app):
    await asyncio.sleep(0)
    print("the app starts", flush=True)
    yield
    await asyncio.sleep(0.01)
    await asyncio.to_thread(time.sleep, 0.01)
    print("the app stops", flush=True)

app = FastAPI(lifespan=lifespan)

@app.post("/flag/{name}")
async def flag(name: str):
    flags.add(name)

@app.get("/flag/{name}")
async def seen(name: str):
    return name in flags

@app.get("/arrived/{name}")
async def count(name: str):
    return arrived.get(name, 0)

@app.get("/cpu")
async def cpu():
    return time.process_time()

@app.get("/together/{name}/{number}")
async def together(name: str, number: int):
    """Answered once so many have come."""
    arrived[name] = arrived.get(name, 0) + 1
    while arrived[name] < number:
        await asyncio.sleep(number / 1000)

@app.get("/sync-together/{name}/{number}")
def sync_together(name: str, number: int):
    arrived[name] = arrived.get(name, 0) + 1
    while arrived[name] < number:
        time.sleep(0.05)

@app.get("/until/{name}")
async def wait(name: str):
    """Answered once the flag is there."""
    arrived[name] = arrived.get(name, 0) + 1
    while name not in flags:
        await asyncio.sleep(1)

@app.get("/events/{name}")
async def events(name: str):
    async def make():
        yield "first"
        while name not in flags:
            await asyncio.sleep(0.01)
        yield "second"
    return StreamingResponse(make())

@app.get("/ticks/{name}")
async def ticks(name: str):
    async def make():
        try:
            while True:
                yield "tick" * 1000
                await asyncio.sleep(0.01)
        finally:
            flags.add(name)
    return StreamingResponse(make())

@app.post("/size")
async def size(request: Request):
    return sum([len(chunk) async for chunk in request.stream()])

def in_sync_code():
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop()

async def loop_of(*args):
    return id(asyncio.get_running_loop())

@app.get("/threads")
async def threads():
    """Every way from the loop to synchronous code, and back."""
    own = id(asyncio.get_running_loop())
    lock = threading.Lock()
    def count_up():
        with lock:
            time.sleep(0.001)
    await asyncio.gather(*(asyncio.to_thread(count_up) for _ in range(20)))
    return {
        "to_thread": await asyncio.to_thread(in_sync_code),
        "sync_to_async": await sync_to_async(in_sync_code)(),
        "thread_insensitive": await sync_to_async(in_sync_code, thread_sensitive=False)(),
        "async_to_sync": await sync_to_async(async_to_sync(loop_of))() == own,
        "from_thread": await anyio.to_thread.run_sync(anyio.from_thread.run, loop_of) == own,
        "run": await asyncio.to_thread(asyncio.run, loop_of()) != own,
        "getaddrinfo": bool(await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)),
    }

@app.get("/error")
async def error():
    raise LookupError("OnPurpose")
'''

SITE = (
    APP
    + '''
import uvloop

bridged = AsgiToWsgi(app, {options})

def application(environ, start_response):
    """Beside the app, what a Flask view may do in another greenlet."""
    path = environ["PATH_INFO"]
    if not path.startswith("/beside"):
        return bridged(environ, start_response)
    assert in_sync_code() is None
    run = asyncio.run if path.endswith("run") else lambda coroutine: async_to_sync(lambda: coroutine)()
    async def wait():
        await asyncio.sleep(0.01)
        return "beside"
    text = run(wait())
    assert in_sync_code() is None
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text.encode()]
'''
)

SITES = {
    "gunicorn": ("gunicorn-gevent", ""),
    "pywsgi-request-uvloop": ("gevent-pywsgi", "loop='request', loop_factory=uvloop.new_event_loop"),
    "pywsgi-unpatched-request-uvloop": (
        "gevent-pywsgi-unpatched",
        "loop='request', loop_factory=uvloop.new_event_loop",
    ),
}


@pytest.fixture(scope="module", params=list(SITES))
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests; at its end it has to have lived a whole life, and to have complained of nothing."""
    server, options = SITES[request.param]
    require(server)
    with Running(SERVERS[server], SITE.replace("{options}", options), tmp_path_factory.mktemp("gevent")) as running:
        yield running
        assert running.stop() == 0, running.log()
        log = running.log()
        print(log)
        assert log.count("the app starts") == 1, log
        assert log.count("the app stops") == 1, log
        assert [error for error in TRACEBACK.findall(log) if not EXPECTED.search(error)] == []
        assert "SIG" not in log


def ask(site: Running, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes]:
    with contextlib.closing(HTTPConnection("127.0.0.1", site.port, timeout=LIMIT)) as connection:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()


@contextlib.contextmanager
def asking(site: Running, path: str, number: int) -> Iterator[list[int]]:
    """So many requests at once, of which the statuses are there at the end."""
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(ask(site, path)[0])) for _ in range(number)]
    for thread in threads:
        thread.start()
    yield statuses
    for thread in threads:
        thread.join(LIMIT)


def test_200_slow_requests_are_served_at_once(site: Running) -> None:
    """[A23]"""
    with asking(site, "/together/many/200", 200) as statuses:
        pass
    assert statuses == [200] * 200


def test_sync_endpoints_are_served_at_once(site: Running) -> None:
    """[A23]"""
    with asking(site, "/sync-together/sync/20", 20) as statuses:
        pass
    assert statuses == [200] * 20


def test_nobody_spins_while_100_requests_sleep(site: Running) -> None:
    """[A23]"""
    with asking(site, "/until/spin", 100) as statuses:
        assert any(ask(site, "/arrived/spin")[1] == b"100" for _ in until(LIMIT))
        before = float(ask(site, "/cpu")[1])
        time.sleep(0.5)
        assert float(ask(site, "/cpu")[1]) - before < 0.25
        ask(site, "/flag/spin", "POST")
    assert statuses == [200] * 100


@pytest.mark.parametrize("way", ["run", "async_to_sync"])
def test_asyncio_belongs_to_other_greenlets_meanwhile(site: Running, way: str) -> None:
    """[A23]"""
    with asking(site, f"/until/{way}", 3) as statuses:
        assert any(ask(site, f"/arrived/{way}")[1] == b"3" for _ in until(LIMIT))
        for _ in range(3):
            assert ask(site, f"/beside/{way}") == (200, b"beside")
        ask(site, f"/flag/{way}", "POST")
    assert statuses == [200] * 3


def test_synchronous_code_of_the_app_runs_out_of_the_loop_and_back(site: Running) -> None:
    """[A17] [A23]"""
    status, body = ask(site, "/threads")
    assert (status, body) == (
        200,
        b'{"to_thread":null,"sync_to_async":null,"thread_insensitive":null,"async_to_sync":true,'
        b'"from_thread":true,"run":true,"getaddrinfo":true}',
    )


def test_first_event_arrives_before_the_second_is_made(site: Running) -> None:
    """[A7] [A23]"""
    with contextlib.closing(HTTPConnection("127.0.0.1", site.port, timeout=LIMIT)) as connection:
        connection.request("GET", "/events/confirmed")
        response = connection.getresponse()
        assert response.read(5) == b"first"
        ask(site, "/flag/confirmed", "POST")
        assert response.read() == b"second"


def test_an_upload_arrives(site: Running) -> None:
    """[A3] [A23]"""
    assert ask(site, "/size", "POST", b"x" * 1_000_000) == (200, b"1000000")


def test_an_error_is_a_500_and_the_next_request_is_served(site: Running) -> None:
    """[A9] [A23]"""
    assert ask(site, "/error")[0] == 500
    assert ask(site, "/flag/none") == (200, b"false")


def test_the_app_hears_that_its_client_has_left(site: Running) -> None:
    """[A10] [A23]"""
    with site.connect() as connection:
        connection.sendall(b"GET /ticks/left HTTP/1.1\r\nHost: tests\r\n\r\n")
        assert connection.recv(4)
    assert any(ask(site, "/flag/left")[1] == b"true" for _ in until(LIMIT, pause=0.05))


# -- In a script -------------------------------------------------------------------------------------------------------

DRIVER = """
import gc, io, os, sys, threading
import gevent
from gevent import Greenlet

def get(path, application=None):
    environ = {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "tests",
        "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.version": (1, 0), "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr, "wsgi.multithread": True, "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    statuses = []
    result = (application or bridged)(environ, lambda status, headers, exc_info=None: statuses.append(status))
    try:
        body = b"".join(result)
    finally:
        result.close()
    return statuses[0][:3] + " " + body.decode()

def get_together(path, number):
    greenlets = [gevent.spawn(get, path) for _ in range(number)]
    gevent.joinall(greenlets, timeout=15)
    assert {greenlet.value for greenlet in greenlets} == {"200 null"}, [greenlet.value for greenlet in greenlets]

bridged = AsgiToWsgi(app)
"""

PATCH = "import gevent.monkey; gevent.monkey.patch_all()\n"

ORDERS = {
    "patched-before": PATCH + APP + DRIVER,
    "patched-after": "import bridge, anyio.to_thread, asgiref.sync\n" + PATCH + APP + DRIVER,
    "unpatched": "import gevent\n" + APP + DRIVER,
}


def run(script: str) -> str:
    """What a script prints."""
    require("gevent-pywsgi")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=2 * LIMIT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


@pytest.fixture(params=list(ORDERS))
def script(request: pytest.FixtureRequest) -> str:
    return ORDERS[request.param]


def test_the_order_of_imports_is_free_and_the_exit_shuts_the_app_down(script: str) -> None:
    """[A20] [A23]"""
    printed = run(
        script
        + """
get_together("/together/a/20", 20)  # which race for the start
get_together("/sync-together/b/5", 5)
print(get("/threads"))
"""
    )
    assert '"async_to_sync":true,"from_thread":true' in printed
    assert printed.count("the app starts") == printed.count("the app stops") == 1


def test_close_leaves_no_thread_greenlet_or_descriptor(script: str) -> None:
    """[A21] [S2] [A23]"""
    run(
        script
        + """
def left():
    gc.collect()
    greenlets = sum(isinstance(each, Greenlet) and not each.dead for each in gc.get_objects())
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), greenlets

def live():
    get_together(f"/together/{len(seen)}/10", 10)
    get("/threads")
    bridged.close()
    gevent.sleep(0.2)  # for what is on its way out
    seen.append(left())

seen = []
for _ in range(3):
    live()
for _ in range(200):
    if all(now <= then for now, then in zip(left(), seen[0])):
        break
    gevent.sleep(0.05)
else:
    raise AssertionError(f"{seen}, then {left()}")
"""
    )


def test_a_greenlet_may_be_stopped_while_it_waits(script: str) -> None:
    """[A10] [A23] As servers do, by a time limit."""
    run(
        script
        + """
bridged.startup()  # which may take longer than that
for _ in range(3):
    with gevent.Timeout(0.2, False):
        get("/until/never")
        raise AssertionError("it was answered")
assert get("/hello") == '404 {"detail":"Not Found"}'
assert get("/arrived/never") == "200 3"
flags.add("never")
"""
    )


def test_a_child_serves_anew_what_its_parent_has_used(script: str) -> None:
    """[A20] [A23]"""
    printed = run(
        script
        + """
get_together("/together/a/3", 3)
child = os.fork()
if not child:
    get_together("/together/b/3", 3)
    bridged.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
get_together("/together/c/3", 3)
"""
    )
    assert printed.count("the app starts") == printed.count("the app stops") == 2


def test_a_blocking_lock_is_shared_by_the_loop_and_greenlets() -> None:
    """[A23] gevent's locks belong to the hub that has them first, here to that of the loop's thread.

    Threads are switched five times as often as by default, and no more: gevent 26.9 then loses count in the middle of a
    semaphore ("assert self.counter >= 0"), or crashes.
    """
    run(
        PATCH
        + """
import asyncio, logging, sys, threading
sys.setswitchinterval(1e-3)
from bridge import AsgiToWsgi

lock = None

async def app(scope, receive, send):
    global lock
    if lock is None:
        lock = threading.RLock()
    for _ in range(300):
        with lock:
            sum(range(100))
    await asyncio.gather(*(asyncio.to_thread(hold) for _ in range(3)))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"null"})

def hold():
    for _ in range(100):
        with lock:
            sum(range(100))
"""
        + DRIVER.replace("AsgiToWsgi(app)", "AsgiToWsgi(app, lifespan='off')")
        + """
for _ in range(20):
    get_together("/", 20)
"""
    )


def test_what_the_garbage_collector_calls_may_wait(script: str) -> None:
    """[A23] In the middle of anything: who then comes for the same lock lets the hub go on, which ends that wait."""
    run(
        script
        + """
import gevent.monkey

get_ident = gevent.monkey.get_original("_thread", "get_ident")
here = get_ident()
waits = 0

def wait(phase, info):
    global waits
    if phase == "stop" and get_ident() == here and isinstance(gevent.getcurrent(), Greenlet):
        waits += 1
        gevent.sleep(0.001)

get_together("/together/before/20", 20)
gc.set_threshold(23)
gc.callbacks.append(wait)
for number in range(10):
    get_together(f"/together/{number}/20", 20)
gc.callbacks.remove(wait)
assert waits > 100, waits
bridged.close()
"""
    )


PARTLY = {
    "no-threads": "patch_all(thread=False)",
    "selectors-alone": "patch_select()",
    "sockets-alone": "patch_socket()",
    "no-selectors": "patch_all(select=False)",
    "no-queues": "patch_all(queue=False)",
}


@pytest.mark.parametrize("patch", PARTLY.values(), ids=PARTLY)
def test_a_process_may_be_patched_partly(patch: str) -> None:
    """[A23] A loop has a selector and sockets of its own, and its threads have queues that they can wait in."""
    printed = run(
        f"import gevent.monkey; gevent.monkey.{patch}\n"
        + APP
        + DRIVER
        + """
async def serve():
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    assert await reader.read() == b""
    writer.close()
    server.close()

app.get("/serve")(serve)
get_together("/together/a/20", 20)
get_together("/serve", 3)
assert '"async_to_sync":true,"from_thread":true' in get("/threads")
for _ in range(2):
    get_together("/sync-together/b/1", 3)
    gevent.sleep(0.01)
"""
    )
    assert printed.count("the app starts") == printed.count("the app stops") == 1


BY_NAME = """
import gevent.queue
from queue import Empty, LifoQueue, SimpleQueue
"""

FROM_GEVENT = """
from gevent.queue import LifoQueue
from queue import Empty
"""

HANDED = """
def hand(kind):
    async def run():
        event = threading.Event()
        threading.Timer(0.01, event.set).start()
        assert event.wait()
        things = kind()
        got = asyncio.create_task(asyncio.to_thread(things.get, timeout=10))  # a greenlet waits
        await asyncio.sleep(0.01)
        things.put(1)
        assert await got == 1
        thread = threading.Thread(target=lambda: (time.sleep(0.01), things.put(2)))
        thread.start()
        assert things.get(timeout=10) == 2  # the loop's thread waits
        thread.join()
    return run

@app.get("/executor")
async def run_in_executor():
    return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(executor, in_sync_code), 10)

assert get("/executor") == "200 null"

for kind in ("Queue", "LifoQueue", "PriorityQueue", "SimpleQueue"):
    app.get(f"/hand/{kind}")(hand(lambda kind=kind: getattr(queue, kind)()))
app.get("/hand/simple")(hand(lambda: by_name.SimpleQueue()))
app.get("/hand/lifo")(hand(lambda: by_name.LifoQueue()))
for kind in ("Queue", "LifoQueue", "PriorityQueue", "SimpleQueue", "simple", "lifo"):
    assert get(f"/hand/{kind}") == "200 null", kind
assert from_gevent.LifoQueue is gevent.queue.LifoQueue is not by_name.LifoQueue
"""


@pytest.mark.parametrize("patch", ["patch_all()", "patch_all(queue=False)"])
def test_queues_hand_things_over_between_the_loop_and_greenlets(patch: str, tmp_path: Path) -> None:
    """[A17] [A23] Also by the names that a module has imported before, as aiosqlite's."""
    (tmp_path / "by_name.py").write_text(BY_NAME)
    (tmp_path / "from_gevent.py").write_text(FROM_GEVENT)
    run(
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        f"import gevent.monkey; gevent.monkey.{patch}\n"
        "import concurrent.futures, queue, by_name, from_gevent\n"
        "executor = concurrent.futures.ThreadPoolExecutor(1)\n" + APP + DRIVER + HANDED
    )


def test_the_app_may_start_processes_anywhere() -> None:
    """[A17] [A23] gevent hears of a child's end in the main thread's hub alone, and may hear it at once."""
    run(
        PATCH
        + APP
        + DRIVER
        + """
import concurrent.futures, multiprocessing, subprocess

def echo():
    return subprocess.run(["echo", "hi"], capture_output=True, timeout=10).stdout

async def echo_by_asyncio():
    process = await asyncio.create_subprocess_exec("echo", "hi", stdout=subprocess.PIPE)
    return (await process.communicate())[0]

async def echo_in_a_thread():
    return await asyncio.to_thread(echo)

def leave():
    os._exit(3)

@app.get("/processes")
async def processes():
    texts = await asyncio.gather(*(way() for _ in range(10) for way in (echo_by_asyncio, echo_in_a_thread)))
    texts += [echo() for _ in range(10)]
    assert texts == [b"hi\\n"] * 30, texts
    assert [os.waitstatus_to_exitcode(os.system("exit 3")) for _ in range(30)] == [3] * 30
    for _ in range(10):
        process = multiprocessing.get_context("fork").Process(target=leave)
        process.start()
        process.join(10)
        assert process.exitcode == 3
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 4"], {})
        assert os.waitpid(pid, 0) == (pid, 4 << 8)

app.get("/echo")(lambda: subprocess.call(["true"]) or None)
greenlets = [gevent.spawn(get, path) for path in ["/processes"] + ["/echo"] * 10]
gevent.joinall(greenlets, timeout=20)
assert {greenlet.value for greenlet in greenlets} == {"200 null"}, [greenlet.value for greenlet in greenlets]
"""
    )


def test_wrappers_are_nested_in_a_server_whose_loop_a_greenlet_runs() -> None:
    """[C1] [C2] [A23] asyncio's mark is the whole thread's; the server's threads are greenlets of it."""
    run(
        PATCH
        + """
import asyncio
from bridge import AsgiToWsgi, WsgiToAsgi

async def inner(scope, receive, send):
    assert asyncio.get_running_loop() is outer
    body = (await receive())["body"]
    await asyncio.sleep(0.01)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})

def innermost(environ, start_response):
    start_response("200 OK", [])
    return [environ["wsgi.input"].read()]

async def middleware(scope, receive, send):
    await WsgiToAsgi(innermost)(scope, receive, send)

async def post(app):
    parts, answers = [b"abc", b"def", b""], []
    async def receive():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
    async def send(message):
        answers.append(message)
    await asyncio.wait_for(app({
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/", "raw_path": b"/", "query_string": b"", "root_path": "", "headers": [], "client": ("test", 1),
        "server": ("test", 80),
    }, receive, send), 10)
    return b"".join(answer.get("body", b"") for answer in answers)

async def main():
    global outer
    outer = asyncio.get_running_loop()
    assert (await post(WsgiToAsgi(AsgiToWsgi(inner)))).startswith(b"abc")
    assert await post(WsgiToAsgi(AsgiToWsgi(middleware))) == b"abcdef"

asyncio.run(main())
"""
    )


STARTS = {
    "in gevent's pool": "pool.apply(bridged.startup)",
    "by a request in gevent's pool": "assert pool.apply(get, ('/flag/a',)) == '200 false'",
    "by a thread that ends": "start_new_thread(bridged.startup, ()); gevent.sleep(0.5)",
    "of a second app": "get('/flag/a'); pool.apply(other.startup)",
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_an_app_may_be_started_by_a_thread_that_is_not_the_servers(start: str) -> None:
    """[A23] Its threads are at home in the main hub, whatever thread makes the first loop or the last."""
    run(
        PATCH
        + APP
        + DRIVER
        + f"""
start_new_thread = gevent.monkey.get_original("_thread", "start_new_thread")
pool = gevent.get_hub().threadpool
other = AsgiToWsgi(app)
{start}
get_together("/sync-together/b/5", 5)
get_together("/together/a/5", 5)
"""
    )


def test_a_hub_that_nobody_runs_is_no_home() -> None:
    """[A23] Where the server has another thread than the main one, which blocks."""
    run(
        PATCH
        + APP
        + DRIVER
        + """
from bridge import hubs, threads
gevent.sleep(0)  # the main thread has a hub, too
hubs.ANSWER_SECONDS = 0.2
over, answers = threads.Lock(), []
over.acquire()

def serve():
    answers.append(get("/sync-together/a/1"))
    over.release()

start_new_thread = gevent.monkey.get_original("_thread", "start_new_thread")
start_new_thread(serve, ())
assert over.acquire(timeout=15)
assert answers == ["200 null"]
os._exit(0)
"""
    )


def test_who_waits_for_a_hub_that_is_run_no_more_hears_of_it() -> None:
    """[A23]"""
    run(
        PATCH
        + APP
        + DRIVER
        + """
from bridge import hubs, threads
get("/flag/a")
hubs.HOME_SECONDS = 0.2
over, errors, called = threads.Lock(), [], []
over.acquire()

def ask():
    try:
        hubs.at_home(lambda: called.append(1))
    except RuntimeError as error:
        errors.append(str(error))

threads.start(ask, "asks", over)
assert over.acquire(timeout=15)  # the main thread blocks, and its hub does not come
assert len(errors) == 1 and "no thread runs gevent's hub" in errors[0]
gevent.sleep(0.01)
assert not called  # late
"""
    )


def test_a_socket_may_change_hands_between_the_loop_and_greenlets() -> None:
    """[A17] [A23] As connections of a pool do; also where it was made by an app that has ended."""
    run(
        PATCH
        + APP
        + DRIVER
        + """
import errno, socket

pairs = {}

def talk(name):
    "Each end waits for the other one, which another greenlet has."
    a, b = pairs[name]
    def echo():
        for _ in range(3):
            b.sendall(b.recv(10))
    echoes = threading.Thread(target=echo)
    echoes.start()
    for _ in range(3):
        time.sleep(0.01)
        a.sendall(b"hello")
        assert a.recv(10) == b"hello"
    echoes.join()
    a.settimeout(0.01)
    try:
        a.recv(1)
    except TimeoutError:
        a.settimeout(None)
    else:
        raise AssertionError

@app.get("/make/{name}")
async def make(name: str):
    pairs[name] = socket.socketpair()

@app.get("/talk/{name}")
async def talk_in_loop(name: str):
    talk(name)

app.get("/sync-talk/{name}")(talk)

@app.get("/close/{name}")
async def close(name: str):
    descriptors = [each.fileno() for each in pairs[name]]
    for each in pairs[name]:
        each.close()
    for descriptor in descriptors:
        for _ in range(100):
            try:
                os.fstat(descriptor)
            except OSError as error:
                assert error.errno == errno.EBADF
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("it is open")

pairs["here"] = socket.socketpair()
get("/make/there")
for _ in range(2):
    for name in ("here", "there"):
        for way in ("talk", "sync-talk"):
            assert get(f"/{way}/{name}") == "200 null"
        talk(name)
assert get("/close/here") == "200 null"
a, b = pairs["there"]
a.close()
assert b.recv(1) == b""  # once the loop's hub has closed it
get("/make/left")
bridged.close()
talk("left")
descriptors = [each.fileno() for each in pairs["left"]]
for each in pairs["left"]:
    each.close()
for descriptor in descriptors:
    try:
        os.fstat(descriptor)
    except OSError:
        continue
    raise AssertionError("it is open")
gc.collect()
"""
    )


@pytest.mark.parametrize("patch", ["", PATCH], ids=["unpatched", "patched"])
def test_a_wsgi_app_inside_keeps_its_loop_for_asgiref_from_other_greenlets(patch: str) -> None:
    """[C1] [A23] Also where they share its thread: each request returns to its own, and the others to none."""
    run(
        patch
        + """
import asyncio
import gevent
from asgiref.sync import SyncToAsync, async_to_sync
from bridge import AsgiToWsgi, WsgiToAsgi

def shown():
    return getattr(SyncToAsync.threadlocal, "main_event_loop", None)

async def native():
    return asyncio.get_running_loop()

began, others = [], []

def inner(environ, start_response):
    own = shown()
    assert own is not None
    running = async_to_sync(native)()
    began.append(own)
    while len(began) < 3:
        gevent.sleep(0.01)
    assert shown() is own
    others.append(own)
    gevent.sleep(0.03 if len(others) == 1 else 0.01)
    assert shown() is own and async_to_sync(native)() is running
    start_response("200 OK", [])
    return [b"null"]

async def app(scope, receive, send):
    await WsgiToAsgi(inner)(scope, receive, send)
"""
        + DRIVER.replace("AsgiToWsgi(app)", "AsgiToWsgi(app, lifespan='off')")
        + """
beside = gevent.spawn(lambda: [(gevent.sleep(0.005), shown())[1] for _ in range(20)])
get_together("/", 3)
assert set(beside.get()) == {None}
assert shown() is None
"""
    )


@pytest.mark.parametrize("patch", ["", PATCH], ids=["unpatched", "patched"])
def test_a_greenlet_that_is_stopped_before_it_comes_to_the_wsgi_app_inside_leaves_no_error(patch: str) -> None:
    """[A10] [C1] [A23] Starlette's middleware complains then that there was no response."""
    run(
        patch
        + """
import asyncio, logging
import gevent
from bridge import AsgiToWsgi, WsgiToAsgi, threads
from starlette.middleware.base import BaseHTTPMiddleware

logging.basicConfig()
entered, flags = [], set()

def inner(environ, start_response):
    start_response("200 OK", [])
    return [b"null"]

class Middleware(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        entered.append(request.url.path)
        while request.url.path == "/slow" and not flags:
            await asyncio.sleep(0.01)
        return await call_next(request)

app = Middleware(WsgiToAsgi(inner))
"""
        + DRIVER
        + """
get_together("/", 3)
greenlet = gevent.spawn(get, "/slow")
while entered[-1] != "/slow":
    gevent.sleep(0.01)
flags.add("go on")
threads.sleep(0.2)  # a real one: the app inside asks for its thread meanwhile, which cannot come
greenlet.kill(timeout=10)
assert greenlet.dead
get_together("/", 1)
bridged.close()
"""
    )
