"""Which kind of app an object is, told without calling it."""

from __future__ import annotations

import enum
import functools
import inspect
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeGuard, cast

from bridge.errors import shown

__all__ = ["USUAL_NAMES", "Kind", "check_app", "describe", "kind_of", "possible_kinds", "what_is_wrong"]

USUAL_NAMES = ("app", "application", "create_app", "make_app")
"""What apps, and functions that make them, are mostly called in their modules."""


class Kind(enum.Enum):
    """The two kinds of app."""

    WSGI = "WSGI"
    ASGI = "ASGI"


_ARGUMENTS = {Kind.WSGI: 2, Kind.ASGI: 3}
_BOTH = frozenset(Kind)
_NEITHER: frozenset[Kind] = frozenset()

# What a constructor refuses must be wrong for sure: a server calls WSGI apps with two arguments and ASGI apps with
# three, iterates what the one returns and awaits what the other does. Only Python's own functions, methods and classes
# tell truly what they take. Proxies, mocks, builtins and compiled code say what they please, or nothing: so they may be
# both. And nothing is asked of an object that it could answer itself: a lazy one would wake up.


class _Call(NamedTuple):
    """What runs when an object is called."""

    function: FunctionType
    arguments: int
    """How many are there before the caller's: self, and those of a functools.partial."""
    keywords: dict[str, Any]

    def takes(self, count: int) -> bool:
        """Whether it can be called with so many positional arguments."""
        try:
            # Not what __wrapped__ says: a decorator may well change the kind.
            signature = inspect.signature(self.function, follow_wrapped=False)
            signature.bind(*range(self.arguments + count), **self.keywords)
        except TypeError:
            return False
        return True


def possible_kinds(app: object) -> frozenset[Kind]:
    """The kinds that `app` may be: both where nothing tells, none where it is no app for sure."""
    if issubclass(type(app), type):
        return _kinds_of_class(cast("type", app))
    if not callable(app):
        return _NEITHER
    call = _call_of(app)
    if call is None:
        return _BOTH
    if inspect.isasyncgenfunction(call.function):
        return _NEITHER
    kinds = frozenset(kind for kind, count in _ARGUMENTS.items() if call.takes(count))
    return kinds - {Kind.WSGI} if inspect.iscoroutinefunction(call.function) else kinds


def _kinds_of_class(app: type) -> frozenset[Kind]:
    """A class may itself be the app, made anew for each request, as PEP 3333's `AppClass` and Starlette's endpoints."""
    if (inspect.getattr_static(type(app), "__call__"), inspect.getattr_static(app, "__new__")) != _PLAIN_WAYS:
        return _BOTH  # calling it gives whatever it likes
    init = inspect.getattr_static(app, "__init__")
    call = _Call(init, 1, {}) if _is_plain(init) else None
    return frozenset(
        kind
        for kind, results in _RESULTS.items()
        if any(hasattr(app, name) for name in results) and (call is None or call.takes(_ARGUMENTS[kind]))
    )


_PLAIN_WAYS = inspect.getattr_static(type, "__call__"), inspect.getattr_static(object, "__new__")
_RESULTS = {Kind.WSGI: ("__iter__", "__getitem__"), Kind.ASGI: ("__await__",)}


def _call_of(app: Any) -> _Call | None:
    """What runs when `app` is called; None where that is no plain function of Python's."""
    arguments = 0
    keywords: dict[str, Any] = {}
    while type(app) is functools.partial:
        arguments += len(app.args)
        keywords = {**app.keywords, **keywords}
        app = app.func
    if type(app) is MethodType:
        app, arguments = app.__func__, arguments + 1
    elif type(app) is not FunctionType:
        app, arguments = _method_called(app), arguments + 1
    return _Call(app, arguments, keywords) if _is_plain(app) else None


def _method_called(app: object) -> object:
    return inspect.getattr_static(type(app), "__call__", None)


def _is_plain(function: object) -> TypeGuard[FunctionType]:
    # With a __signature__ of its own it says something else than what runs.
    return type(function) is FunctionType and "__signature__" not in function.__dict__


def kind_of(app: object) -> Kind | None:
    """The kind that `app` most likely is; None if it may be both, or is neither.

    Where an app could be called as both, its first parameter's name may tell. Of decorated apps each layer is asked,
    the outermost first.
    """
    layer: Any = app
    seen: set[int] = set()
    while layer is not None and id(layer) not in seen:
        seen.add(id(layer))
        kinds = possible_kinds(layer)
        if len(kinds) < 2:
            return next(iter(kinds), None)
        kind = _NAMES.get(_first_parameter(layer))
        if kind is not None:
            return kind
        layer = getattr(layer, "__wrapped__", None)
    return None


_NAMES = {"environ": Kind.WSGI, "env": Kind.WSGI, "scope": Kind.ASGI}


def _first_parameter(app: Any) -> str:
    try:
        return next(iter(inspect.signature(app, follow_wrapped=False).parameters), "")
    except Exception:  # it has none, as builtins, or does not tell
        return ""


def what_is_wrong(app: object) -> tuple[str, str]:
    """Why `app`, of no possible kind, is none, and what was meant instead: empty where nobody can know."""
    if isinstance(app, str):
        module, _, name = app.partition(":")
        return "is a string", f"the app itself, as in: from {module or 'module'} import {name or 'app'}"
    if isinstance(app, ModuleType):
        name = _find_app(app)
        module = app.__name__.rpartition(".")[2]
        return "is a module", f"the app in it, {module}.{name}" if name else "the app in it"
    if inspect.iscoroutine(app):
        app.close()  # or Python warns that it was never awaited
        # A function with fewer parameters than an app is one that makes an app.
        is_app = app.cr_code.co_argcount > 1
        meant = f"the function itself, {app.__name__}" if is_app else "what it gives when it is awaited"
        return "is a coroutine, as async functions return them", meant
    if isinstance(app, type):
        return _what_is_wrong_with_class(app)
    call = _call_of(app) if callable(app) else None
    if call is None:
        return "cannot be called", ""
    name = _ask(app, "__name__", "app")
    if inspect.isasyncgenfunction(call.function):
        return "is async and yields, as no app does", ""
    if call.takes(0) and inspect.iscoroutinefunction(call.function):
        return "is async and takes no arguments", f"what it gives when it is awaited: asyncio.run({name}())"
    if call.takes(0):
        return "takes no arguments", f"what it makes, {name}()"
    if call.takes(1):
        return "takes one argument, as ASGI 2 apps do", f"asgiref.compatibility.double_to_single_callable({name})"
    if call.takes(2):
        return "is async and takes two arguments: an ASGI app takes three, scope, receive and send", ""
    signature = inspect.signature(call.function, follow_wrapped=False)
    return f"takes {signature}: a WSGI app takes (environ, start_response), an ASGI app (scope, receive, send)", ""


def _what_is_wrong_with_class(app: type) -> tuple[str, str]:
    if _call_of_instances(app) is None:
        return "is a class, and what it makes cannot be called", ""
    if _is_asgi2(app):
        return "is an ASGI 2 app", f"asgiref.compatibility.double_to_single_callable({app.__name__})"
    return "is a class", f"an instance of it, {app.__name__}(...)"


def _is_asgi2(app: type) -> bool:
    """Whether a class is an ASGI 2 app: made of a scope, and called with receive and send."""
    init, call = inspect.getattr_static(app, "__init__"), _call_of_instances(app)
    return (
        _is_plain(init)
        and _is_plain(call)
        and inspect.iscoroutinefunction(call)
        and _Call(init, 1, {}).takes(1)
        and _Call(call, 1, {}).takes(2)
    )


def _call_of_instances(app: type) -> object:
    """What runs when an instance is called; not what runs when the class is, which is its own class's."""
    return next((vars(base)["__call__"] for base in app.__mro__ if "__call__" in vars(base)), None)


def _kinds_of_instances(app: type) -> frozenset[Kind]:
    """The kinds that what a class makes may be; both where nothing tells."""
    call = _call_of_instances(app)
    if not _is_plain(call):
        return _BOTH
    kinds = frozenset(kind for kind, count in _ARGUMENTS.items() if _Call(call, 1, {}).takes(count))
    return kinds - {Kind.WSGI} if inspect.iscoroutinefunction(call) else kinds


def _find_app(module: ModuleType) -> str:
    """What an app in a module is called, as far as that can be told; empty where nothing looks like one."""
    things = vars(module)
    usual = [name for name in USUAL_NAMES if callable(things.get(name))]
    others = [
        name
        for name, thing in things.items()
        if not (name.startswith("_") or isinstance(thing, type))
        and len(possible_kinds(thing)) == 1
        and _first_parameter(thing) in _NAMES  # many a function takes two or three arguments
    ]
    return [*usual, *others, ""][0]


def check_app(app: object, kind: Kind) -> None:
    """Refuse what is no app of this kind, for sure.

    Raises:
        TypeError: It is none; the message says what to write instead.
    """
    kinds = possible_kinds(app)
    if kind in kinds:
        return
    wrapper, expected, server = _WORDS[kind]
    if kinds:
        other, got, other_server = _WORDS[next(iter(kinds))]
        raise TypeError(
            f"{wrapper} expected {expected}, got {got}, {describe(app)}: "
            f"write {other}(app) for {other_server}; {server} runs it as it is"
        )
    if isinstance(app, type) and len(made := _kinds_of_instances(app)) == 1 and kind not in made:
        other, got, other_server = _WORDS[next(iter(made))]
        made_so = f"{app.__name__}(...)"
        raise TypeError(
            f"{wrapper} expected {expected}, got {describe(app)}, which is a class that makes {got}: "
            f"write {other}({made_so}) for {other_server}; {server} runs {made_so} as it is"
        )
    wrong, meant = what_is_wrong(app)
    text = f"{wrapper} expected {expected}, got {describe(app)}, which {wrong}"
    raise TypeError(f"{text}; give it {meant}" if meant else text)


# The wrapper of a kind, and where it has its apps served.
_WORDS = {
    Kind.WSGI: ("WsgiToAsgi", "a WSGI app", "an ASGI server"),
    Kind.ASGI: ("AsgiToWsgi", "an ASGI app", "a WSGI server"),
}


def describe(app: object) -> str:
    """Name an object in a message: its qualified name, or what it shows of itself; never a whole long repr."""
    while isinstance(app, functools.partial):
        app = app.func
    name = _ask(app, "__qualname__", None)
    if not isinstance(name, str):
        return shown(app)
    module = _ask(app, "__module__", None)
    return f"{module}.{name}" if module else name


def _ask(app: object, name: str, otherwise: Any) -> Any:
    """An attribute of an object, which may raise whatever it likes when it is asked."""
    try:
        return getattr(app, name, otherwise)
    except Exception:
        return otherwise
