"""The demo: its steps see what is wrong, its check passes and fails as it should, and it stops cleanly."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from bridge import demo
from bridge.demo import App, Visit, Wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LIMIT = 50.0  # seconds in which a process has to do what is waited for

# For processes that find bridge where these tests did, from any directory. Without asyncio's debug mode, which says on
# stderr how slow a machine is.
ENVIRON = {**os.environ, "PYTHONPATH": str(Path(demo.__file__).parent.parent), "PYTHONASYNCIODEBUG": ""}


# The steps, on the Flask app as it is: no bridge, no server


def visit(app: WSGIApplication) -> Visit:
    return Visit(httpx.Client(transport=httpx.WSGITransport(app), base_url="http://demo"), megabytes=1)


@pytest.mark.parametrize("step", [step for step in demo.STEPS.values() if step is not demo.memory_for_upload])
def test_every_step_passes_on_an_app_that_works(step: demo.Step) -> None:
    assert step(visit(demo.flask_app()))


def test_the_download_is_the_same_for_ever() -> None:
    assert demo.download_sha256() == "5d3c923213852fb9808243a0eb07242ff0f79bfa39a54dae0bd7cc374562493c"


@pytest.mark.parametrize(("grown", "words"), [(None, "not known"), (0.5, "0.5 MB more")])
def test_memory_is_told(grown: float | None, words: str) -> None:
    assert words in demo.memory_for_upload(Visit(httpx.Client(), grown=grown))


def test_memory_that_grows_with_the_upload_is_wrong() -> None:
    with pytest.raises(Wrong, match=r"grew by 51\.0 MB in an upload of 50 MB, expected at most 25"):
        demo.memory_for_upload(Visit(httpx.Client(), megabytes=50, grown=51.0))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_is_read() -> None:
    peak = demo.peak_memory(os.getpid())
    assert peak is not None
    assert 1 < peak < 100_000


@pytest.mark.parametrize("pid", [None, 2**31 - 1])
def test_peak_memory_of_nobody_is_not_known(pid: int | None) -> None:
    assert demo.peak_memory(pid) is None


# Ways to be broken, as WSGI middleware


def failing(app: WSGIApplication) -> WSGIApplication:
    def broken(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
        return [b"broken"]

    return broken


def losing_the_end(app: WSGIApplication) -> WSGIApplication:
    def broken(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        return [b"".join(app(environ, start_response))[:-8]]

    return broken


def flipping_a_bit(app: WSGIApplication) -> WSGIApplication:
    def broken(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        for block in app(environ, start_response):
            yield bytes([block[0] ^ 1]) + block[1:] if len(block) == demo.BLOCK else block

    return broken


def short_of_a_byte_in(app: WSGIApplication) -> WSGIApplication:
    def broken(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body = environ["wsgi.input"].read()[:-1]
        return app({**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}, start_response)

    return broken


def holding_back(app: WSGIApplication) -> WSGIApplication:
    def broken(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        return list(app(environ, start_response))

    return broken


def one_at_a_time(app: WSGIApplication) -> WSGIApplication:
    lock = threading.Lock()

    def broken(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with lock:
            return app(environ, start_response)

    return broken


def never_closing(app: WSGIApplication) -> WSGIApplication:
    kept = []

    class Unclosed:
        def __init__(self, blocks: Iterable[bytes]) -> None:
            kept.append(blocks)
            self._blocks = blocks

        def __iter__(self) -> Iterator[bytes]:
            return iter(self._blocks)

    def broken(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return Unclosed(app(environ, start_response))

    return broken


@pytest.mark.parametrize(
    ("step", "broken", "words"),
    [
        (demo.index_page, failing, "status of the page: expected 200, got 500"),
        (demo.index_page, losing_the_end, "end of the page: expected '</html>'"),
        (demo.form_posted, failing, "status of /form: expected 200, got 500"),
        (demo.form_posted, short_of_a_byte_in, "form: expected "),
        (demo.first_event, failing, "type of the events"),
        (demo.first_event, holding_back, "s after the second was made: it was held back"),
        (demo.upload, failing, "status of /upload: expected 200, got 500"),
        (demo.upload, short_of_a_byte_in, "upload: expected "),
        (demo.download, failing, "status of the download: expected 200, got 500"),
        (demo.download, losing_the_end, "size of the download: expected 20971520, got 20971512"),
        (demo.download, flipping_a_bit, "SHA-256 of the download: expected "),
        (demo.slow_at_once, one_at_a_time, "at once took "),
        (demo.client_leaves, never_closing, "the app's generator was not closed within"),
    ],
)
def test_every_step_fails_on_an_app_that_is_broken(
    monkeypatch: pytest.MonkeyPatch,
    step: demo.Step,
    broken: Callable[[WSGIApplication], WSGIApplication],
    words: str,
) -> None:
    monkeypatch.setattr(demo, "SLEEP", 0.02)
    monkeypatch.setattr(demo, "NOTICE_LIMIT", 0.2)
    with pytest.raises(Wrong, match=re.escape(words)):
        step(visit(broken(demo.flask_app())))


def test_the_page_of_both_takes_a_port_and_nothing_else() -> None:
    client = visit(demo.flask_app()).client
    assert ":8001/`" in client.get("/both", params={"port": "8001"}).text
    assert ":0/`" in client.get("/both", params={"port": "`;alert(1)//"}).text


def test_the_page_has_all_its_words() -> None:
    page = demo.page("App & Co", "an app", "a server", "Wrapper")
    assert "[[" not in page
    assert "App &amp; Co" in page


# The whole of it


def test_an_app_that_does_not_start_fails_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.run(ports=[0], apps=[App("Nobody", "no_such_module:app")], check=True) == 1
    err = capfd.readouterr().err
    assert "there is no module 'no_such_module'" in err
    assert "The demo failed: Nobody did not start; it ended with status 2" in err


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=ENVIRON, capture_output=True, encoding="utf-8", timeout=LIMIT
    )


def test_the_check_passes() -> None:
    done = run("-m", "bridge", "--check", "--megabytes", "4")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.endswith("\nAll right.\n")
    assert "upload of 4 MB" in done.stdout


BROKEN = """
import sys
from bridge import demo

def broken_app():
    app = demo.flask_app()
    app.view_functions["upload"] = lambda: {"size": 0, "sha256": ""}
    return app

def crashing_app():
    app = demo.flask_app()
    app.view_functions["slow"] = lambda: __import__("os")._exit(9)
    return app

if __name__ == "__main__":
    whole = demo.App("Whole", "bridge.demo:fastapi_app", demo.LIFESPAN_ENDED)
    sys.exit(demo.run(megabytes=1, check=True, apps=[whole, demo.App("Broken", f"broken:{sys.argv[1]}")]))
"""


@pytest.mark.parametrize(
    ("app", "failed"),
    [
        ("broken_app", ["upload of 1 MB: upload: expected {"]),
        (
            "crashing_app",
            [
                "20 slow requests at once: ",
                "client leaves in mid-stream: ",
                "clean stop: exit status: expected 0, got 9",
            ],
        ),
    ],
)
def test_the_check_fails_on_a_broken_app(tmp_path: Path, app: str, failed: list[str]) -> None:
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    done = run(
        "-c",
        "import sys, runpy; sys.path.insert(0, ''); runpy.run_path('broken.py', run_name='__main__')",
        app,
        cwd=tmp_path,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("FAILED: ")]
    assert done.returncode == 1, done.stdout
    assert done.stdout.endswith(f"\n{len(failed)} failed.\n")
    assert len(said) == len(failed)
    for line, words in zip(said, failed, strict=True):
        assert line.startswith(f"FAILED: Broken, {words}")


@contextlib.contextmanager
def demo_at_work() -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The demo as `make demo` starts it, from the moment on at which it has told its two addresses.

    The third line, of the page that shows both, is looked at here.
    """
    command = [sys.executable, "-m", "bridge", "--megabytes", "1"]
    process = subprocess.Popen(command, env=ENVIRON, stdout=subprocess.PIPE, encoding="utf-8")
    watchdog = threading.Timer(LIMIT, process.kill)
    watchdog.start()
    assert process.stdout is not None
    try:
        addresses: list[str] = []
        for line in process.stdout:
            addresses += re.findall(r"http://\S+", line)
            if "Ctrl-C" in line:
                break
        *addresses, both = addresses
        assert both == f"{addresses[0]}/both?port={addresses[1].rpartition(':')[2]}"
        assert f":{both.rpartition('=')[2]}" in addresses[1]
        yield process, addresses
    finally:
        watchdog.cancel()
        watchdog.join()
        if process.poll() is None:
            process.terminate()
        process.wait()
        process.stdout.close()


def wait_until_gone(address: str) -> None:
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        try:
            httpx.get(f"{address}/status", trust_env=False)
        except httpx.TransportError:
            return
        time.sleep(0.05)
    pytest.fail(f"{address} still answers")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_on_until_a_signal_stops_all(signal_number: int) -> None:
    with demo_at_work() as (process, addresses):
        titles = [httpx.get(address, trust_env=False).text for address in addresses]
        process.send_signal(signal_number)
        status = process.wait()
    assert [re.search("<h1>(.*), across", text)[1] for text in titles] == ["Flask", "FastAPI"]  # type: ignore[index]
    assert status == 0
    for address in addresses:
        wait_until_gone(address)


def test_its_servers_end_with_it_even_when_it_is_killed() -> None:
    with demo_at_work() as (process, addresses):
        assert len(addresses) == 2
        process.kill()
        process.wait()
        for address in addresses:
            wait_until_gone(address)


def test_a_server_that_ends_by_itself_ends_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "STEPS", {"end": crash})
    assert demo.run(ports=[0], apps=[App("Flask", "bridge.demo:flask_app")]) == 1
    assert "Ended by itself: Flask" in capsys.readouterr().err


def crash(visit: Visit) -> str:
    assert visit.pid is not None
    os.kill(visit.pid, signal.SIGKILL)
    return "killed"
