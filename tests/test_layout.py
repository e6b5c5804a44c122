"""The house of `bridge` keeps its shape: imports go down the floors only, low floors know no thread or loop."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bridge"

# A module imports from lower floors, never from its own: what two rooms of one floor share belongs below both.
FLOORS: dict[str, float] = {
    "errors": -1,
    "headers": 0,
    "kinds": 0,
    "nesting": 0,
    "environ": 1,
    "scope": 1,
    "response": 1,
    "body": 1,
    "files": 1,
    "threads": 1.5,  # below all others that know threads
    "hubs": 1.75,
    "channel": 2,
    "workers": 2,
    "loops": 2,
    "lifespan": 2,
    "websocket": 2,
    "life": 2.5,  # joins a lifespan and its loops
    "wsgi_to_asgi": 3,
    "asgi_to_wsgi": 3,
    # The door, and above it those who come in by it like any other user.
    "__init__": 4,
    "check": 5,
    "demo": 5,
    "__main__": 6,
}

# Floors 0 and 1 are pure functions and state machines: whoever needs one of these lives further up.
PURE_FLOORS = (-1, 0, 1)
CONCURRENCY = {"_thread", "anyio", "asyncio", "concurrent", "multiprocessing", "queue", "threading", "trio"}

# What the top of the repository holds, besides dot files.
TOP_LEVEL = {"bridge", "tests", "benchmarks", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"}


def imports(tree: ast.Module) -> set[str]:
    """The absolute names of all that a module of the package imports, in functions and under TYPE_CHECKING as well."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["bridge" if node.level else None, node.module]))
            if origin == "bridge":  # `from . import errors` names a module, `from . import WsgiToAsgi` the door
                names |= {f"bridge.{alias.name}" if alias.name in FLOORS else "bridge" for alias in node.names}
            else:
                names.add(origin)
    return names


def rooms(names: set[str]) -> set[str]:
    """Those of the imported names that are modules of the package, as FLOORS calls them."""
    parts = [name.split(".") for name in names]
    return {part[1] if len(part) > 1 else "__init__" for part in parts if part[0] == "bridge"}


def complaints(module: str, source: str) -> list[str]:
    """What is wrong with a module of the package, each in one sentence."""
    if module not in FLOORS:
        return [f"{module} stands on no floor: a new module needs a new concept, and a line in FLOORS"]
    tree = ast.parse(source)
    names = imports(tree)
    found = [
        f"{module} (floor {FLOORS[module]}) imports {room} (floor {FLOORS.get(room, 'unknown')})"
        for room in sorted(rooms(names))
        if FLOORS.get(room, len(FLOORS)) >= FLOORS[module]
    ]
    if FLOORS[module] in PURE_FLOORS:
        found += [f"{module} imports {name}" for name in sorted(names) if name.split(".")[0] in CONCURRENCY]
        found += [
            f"{module}:{node.lineno} has a {type(node).__name__}"
            for node in ast.walk(tree)
            if isinstance(node, ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith | ast.Await)
        ]
    if module == "__init__":
        found += [f"__init__:{node.lineno} is code" for node in tree.body if not belongs_in_the_door(node)]
    return found


def belongs_in_the_door(node: ast.stmt) -> bool:
    """Whether it is the docstring, an import, or a name such as __all__ that is given a plain value."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign):
        return not any(isinstance(part, ast.Call | ast.Lambda) for part in ast.walk(node.value))
    return isinstance(node, ast.ImportFrom)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_keeps_to_its_floor(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    assert complaints(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("helpers", ""),
        ("sub.errors", ""),
        ("errors", "from .response import WsgiResponse"),
        ("response", "from . import channel"),
        ("response", "import bridge.workers"),
        ("response", "from bridge.loops import SharedLoop"),
        ("response", "from .body import InputStream"),
        ("response", "from bridge import WsgiToAsgi"),
        ("response", "import bridge"),
        ("response", "from .nowhere import anything"),
        ("response", "if TYPE_CHECKING:\n    from .channel import Channel"),
        ("response", "def start():\n    from .channel import Channel"),
        ("channel", "from .workers import Workers"),
        ("wsgi_to_asgi", "from .asgi_to_wsgi import AsgiToWsgi"),
        ("__init__", "from .demo import main"),
        ("headers", "import threading"),
        ("headers", "from concurrent.futures import Future"),
        ("headers", "import asyncio.events"),
        ("body", "async def receive(): ..."),
        ("body", "class Reader:\n    async def receive(self): ..."),
        ("__init__", "def wrap(app): ..."),
        ("__init__", "__version__ = version('bridge')"),
        ("__init__", "if True:\n    from .errors import BridgeError"),
    ],
)
def test_what_does_not_fit_the_house_is_found(module: str, source: str) -> None:
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "from __future__ import annotations\nimport enum"),
        ("response", "from . import headers\nfrom .errors import ProtocolError"),
        ("channel", "import threading\nimport anyio\nasync def get(): await wait()"),
        ("wsgi_to_asgi", "from .channel import Channel\nfrom .environ import build_environ"),
        ("demo", "from bridge import AsgiToWsgi, WsgiToAsgi"),
        ("__main__", "def main():\n    from . import demo"),
        ("__init__", '"""Doc."""\nfrom .errors import BridgeError\n__all__ = ["BridgeError"]\n__version__ = "1"'),
    ],
)
def test_what_fits_the_house_is_let_be(module: str, source: str) -> None:
    assert complaints(module, source) == []


def test_the_top_of_the_repository_holds_nothing_more_than_it_needs() -> None:
    try:
        # Untracked files count, ignored ones do not. A clone may belong to another user than whoever runs the tests.
        listing = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a clone: git knows nothing of these files")
    names = {path.split("/")[0] for path in listing.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
