"""What Windows and macOS lack, taken away here: bridge is imported and serves both ways all the same.

That shows that nothing is asked for which is not there. It does not show that it works there.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.drivers import complaints

LACKS = {
    # Of which the documentation of these modules says "Availability: Unix", and what else their builds there have not.
    "windows": """
        os: fork forkpty register_at_fork getuid geteuid getgid getpgid setsid killpg sendfile splice pread pwrite pipe2
            wait waitid uname posix_fadvise memfd_create eventfd openpty sysconf fchmod fchown mkfifo;
        signal: SIGHUP SIGQUIT SIGCHLD SIGUSR1 SIGUSR2 SIGALRM SIGPIPE SIGKILL alarm setitimer pthread_kill
            pthread_sigmask siginterrupt sigwait pause;
        socket: AF_UNIX AF_NETLINK AF_PACKET SO_REUSEPORT MSG_DONTWAIT MSG_NOSIGNAL CMSG_LEN CMSG_SPACE;
        select: poll epoll POLLIN POLLOUT POLLERR POLLHUP POLLRDHUP EPOLLIN EPOLLRDHUP;
        time: pthread_getcpuclockid tzset clock_gettime
    """,
    "macos": """
        os: splice pipe2 posix_fadvise memfd_create eventfd;
        signal: sigtimedwait sigwaitinfo;
        socket: AF_NETLINK AF_PACKET MSG_NOSIGNAL;
        select: epoll POLLRDHUP EPOLLIN EPOLLRDHUP
    """,
}

SERVE = """
    import asyncio, io, socket, threading
    import bridge
    from bridge import AsgiToWsgi, WsgiToAsgi
    from bridge.asgi_to_wsgi import _has_left

    class Loop(asyncio.BaseEventLoop):
        '''As Windows' proactor: there is no map of what it watches, and it watches no sockets for others.'''

        def __init__(self):
            super().__init__()
            self._selector = self
            self._called = threading.Event()

        def select(self, timeout):
            self._called.wait(timeout)
            self._called.clear()
            return []

        def _write_to_self(self):
            self._called.set()

        def _process_events(self, events):
            pass

    async def asgi_app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"], "more_body": True})
        await asyncio.sleep(0.05)  # the watch has the keeper run the loop
        await send({"type": "http.response.body", "body": await asyncio.to_thread(bytes, b"!")})

    def wsgi_app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield environ["wsgi.input"].read()
        yield b"!"

    def make_environ():
        return {
            "REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": "/", "QUERY_STRING": "", "CONTENT_LENGTH": "5",
            "SERVER_NAME": "localhost", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(b"hello"), "werkzeug.socket": here,
        }

    def socketpair():
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            return client, server.accept()[0]

    socket.socketpair = socketpair  # of AF_UNIX here
    selectors.DefaultSelector = selectors.SelectSelector
    here, there = socketpair()
    for loop in ("shared", "request"):
        with AsgiToWsgi(asgi_app, loop=loop, loop_factory=Loop) as application:
            for _ in range(3):
                result = application(make_environ(), lambda *args: None)
                assert b"".join(result) == b"hello!"
                result.close()

    async def main():
        application = WsgiToAsgi(wsgi_app)
        parts = []

        async def receive():
            return {"type": "http.request", "body": b"hello", "more_body": False}

        async def send(message):
            parts.append(message.get("body", b""))

        for _ in range(3):
            scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"5")]}
            await application(scope, receive, send)
        application.close()
        assert b"".join(parts) == b"hello!" * 3, parts

    asyncio.run(main())
    assert not _has_left(here)
    there.send(b"more")
    assert not _has_left(here)
    here.recv(4)
    there.close()
    assert _has_left(here)
    here.close()
    print("served")
"""


@pytest.mark.parametrize("system", LACKS)
def test_serves_without_what_a_system_lacks(system: str) -> None:
    """[S2] Imported and used in a process where it was taken away before."""
    # The standard library, as it is here, needs some of it.
    script = "import asyncio, concurrent.futures.thread, logging, os, select, selectors, signal, socket, ssl, time\n"
    for module, names in (line.split(":") for line in " ".join(LACKS[system].split()).split("; ")):
        script += f"for name in {names.split()}: vars({module}).pop(name, None)\n"
    script += textwrap.dedent(SERVE)
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert complaints(done.stderr) == ""
    assert done.stdout == "served\n"
