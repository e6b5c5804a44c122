"""README's tables are those of the script, bridge keeps each promise in them, and the checks can fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import conformance
from benchmarks.conformance import CHECKS, CONTESTANTS, MARKERS, YES, Broken, Check

if TYPE_CHECKING:
    from collections.abc import Iterator

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def rows() -> Iterator[tuple[str, list[str]]]:
    """The promises in README, each with its cells."""
    table = README.partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    for line in table.splitlines():
        words, *cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and words not in CONTESTANTS:
            yield words, cells


def test_the_readme_has_the_tables_of_the_script() -> None:
    assert [words for words, _ in rows()] == [check.words for check in CHECKS.values()]


def test_bridge_keeps_each_promise_that_is_shown() -> None:
    cells = [cells[0] for _, cells in rows()]
    assert cells == [YES] * len(CHECKS)


IN_PROCESS = [check for check in CHECKS.values() if check.name != "back_fork"]  # tests fork in processes of their own


@pytest.mark.parametrize("check", IN_PROCESS, ids=lambda check: check.name)
def test_bridge_keeps_the_promise(check: Check) -> None:
    made: list[Any] = []

    def wrap(app: Any) -> Any:
        made.append(CONTESTANTS[check.direction]["bridge"](app))
        return made[-1]

    asyncio.run(check.function(wrap))
    for application in made:
        application.close()


def broken_wsgi(app: Any) -> Any:
    """A wrapper of the simplest kind: all at once, on the loop."""

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        import io

        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        started: list[Any] = []
        environ = {"wsgi.input": io.BytesIO(body), "PATH_INFO": scope["path"].removeprefix(scope["root_path"])}
        for name, value in scope["headers"]:
            key = "HTTP_" + name.decode().upper().replace("-", "_")
            environ[key] = f"{environ[key]},{value.decode()}" if key in environ else value.decode()
        try:
            blocks = list(app(environ, lambda *args: started.append(args)))
        except LookupError:
            raise RuntimeError("the app failed") from None
        status, headers = started[0]
        encoded = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": int(status[:3]), "headers": encoded})
        await send({"type": "http.response.body", "body": b"".join(blocks)})

    return asgi


@pytest.mark.parametrize(
    "name",
    """
    request_streams parallel response_length request_length errors_propagate prefix exact_path
    underscores injection
    """.split(),
)
def test_a_check_can_fail(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(conformance, "PATIENCE", 0.2)
    with pytest.raises((Broken, TimeoutError)):
        asyncio.run(CHECKS[name].function(broken_wsgi))
