"""The properties of the translations, driven by the code that they reach: python -m tests.fuzz -max_total_time=1200

The tests hold them for hypothesis's random examples; here libFuzzer makes the examples, by atheris: it keeps each that
has reached new code of bridge's, and goes on from there. The properties are the tests' own, the examples are not:
hypothesis can make its own out of libFuzzer's bytes, but does so far more slowly, and then finds less.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import atheris

with atheris.instrument_imports(include=["bridge"]):
    from tests import test_body, test_environ, test_headers, test_scope, test_security

__all__ = ["main"]

LIMITS = {
    "max_total_time": 60,  # seconds
    "max_len": 512,  # bytes that an example is made of
    "len_control": 0,  # long ones from the beginning on
    "timeout": 20,  # seconds for one, which takes less than a millisecond
    "rss_limit_mb": 1024,
}
"""libFuzzer's options for who gives no others: every run has an end."""

Draw = Callable[[Any], Any]  # a part of an example out of atheris's FuzzedDataProvider


def octets(data: Any) -> bytes:
    drawn: bytes = data.ConsumeBytes(data.ConsumeIntInRange(0, 24))
    return drawn


def latin_1(data: Any) -> str:
    return octets(data).decode("latin-1")


def utf_8(data: Any) -> str:
    return octets(data).decode("utf-8", "replace")


def any_text(data: Any) -> str:
    drawn: str = data.ConsumeUnicode(data.ConsumeIntInRange(0, 8))  # with surrogates
    return drawn


def number(least: int, most: int) -> Draw:
    return lambda data: data.ConsumeIntInRange(least, most)


def one_of(*choices: Any) -> Draw:
    return lambda data: data.PickValueInList(list(choices))


def either(first: Draw, second: Draw) -> Draw:
    return lambda data: (first if data.ConsumeBool() else second)(data)


def all_of(*draws: Draw) -> Draw:
    return lambda data: tuple(draw(data) for draw in draws)


def some(draw: Draw) -> Draw:
    return lambda data: [draw(data) for _ in range(data.ConsumeIntInRange(0, 6))]


def then(draw: Draw, change: Callable[[Any], Any]) -> Draw:
    return lambda data: change(draw(data))


def word(alphabet: str) -> Draw:
    """At least one character, and all of them of the alphabet."""
    return then(latin_1, lambda drawn: "".join(letter for letter in drawn if letter in alphabet) or alphabet[0])


def environ_of(drawn: Any) -> dict[str, Any]:
    """As a well-behaved server makes it: SCRIPT_NAME is empty, or begins with one slash and does not end in one."""
    script_name, path, query, port, keys = drawn
    root = f"/{script_name.strip('/')}".rstrip("/")
    environ: dict[str, Any] = test_scope.REQUIRED | {
        "SCRIPT_NAME": root,
        "PATH_INFO": f"/{path}",
        "QUERY_STRING": query,
    }
    for key in ("HTTP_PROXY", "HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"):
        keys.pop(key, None)
    environ |= keys | {"SERVER_PORT": str(port)}
    return environ


def sent_by_a_client(drawn: Any) -> dict[str, Any]:
    return dict(zip(("path", "root_path", "raw_path", "query_string", "headers"), drawn, strict=True))


TOKEN = test_headers.TOKEN
NAME = either(one_of(*"cookie Cookie content-type content-length proxy Proxy host te x-a X-A x_a".split()), word(TOKEN))
NAME_BYTES = then(NAME, str.encode)
KEY = then(word(TOKEN.upper().replace("-", "")), "HTTP_{}".format)
ENVIRON = then(all_of(latin_1, latin_1, latin_1, number(1, 65535), then(some(all_of(KEY, latin_1)), dict)), environ_of)
SEGMENTS = then(utf_8, lambda drawn: drawn.split("/"))
SEGMENTS_BYTES = then(octets, lambda drawn: drawn.split(b"/"))
STEP = either(
    all_of(one_of("read", "readline", "readlines"), one_of(None, -1, 0, 1, 2, 7, 100, 9000)),
    either(all_of(one_of("read1", "readinto"), number(0, 20)), all_of(one_of("iterate", "readlines"))),
)

PROPERTIES: list[tuple[Callable[..., object], list[Draw]]] = [
    (test_environ.test_no_byte_of_a_path_is_lost_nor_a_segment_cut, [SEGMENTS, SEGMENTS, one_of(True, False)]),
    (test_environ.test_raw_path_gives_the_exact_bytes, [SEGMENTS_BYTES, SEGMENTS_BYTES]),
    (test_environ.test_any_bytes_may_be_a_query, [octets]),
    (
        test_environ.test_what_a_client_sends_is_translated_or_a_bad_request,
        [
            then(
                all_of(any_text, any_text, octets, octets, some(all_of(either(NAME_BYTES, octets), octets))),
                sent_by_a_client,
            )
        ],
    ),
    (
        test_scope.test_no_text_in_an_environ_is_refused,
        [then(some(all_of(either(one_of(*test_scope.TEXT_KEYS), then(any_text, "HTTP_{}".format)), any_text)), dict)],
    ),
    (test_scope.test_an_environ_comes_back_from_its_scope, [ENVIRON]),
    (test_scope.test_a_scope_comes_back_from_its_environ, [ENVIRON]),
    (test_headers.test_headers_come_back_joined_and_in_order, [some(all_of(NAME_BYTES, octets))]),
    (test_headers.test_an_environs_headers_come_back_as_they_were, [then(some(all_of(KEY, latin_1)), dict)]),
    (test_headers.test_nothing_can_be_injected_by_a_response_header, [some(all_of(either(NAME, any_text), any_text))]),
    (test_headers.test_nothing_can_be_injected_by_a_response_header, [some(all_of(either(NAME, latin_1), latin_1))]),
    (
        test_body.test_any_sequence_of_reads_is_as_from_a_file,
        [then(some(octets), lambda drawn: [chunk for chunk in drawn if chunk]), one_of(1, 3, 8192), some(STEP)],
    ),
    (
        test_body.test_a_body_as_messages,
        [octets, either(one_of(None, ""), then(number(0, 20), str)), one_of(None, False, True), number(1, 21)],
    ),
    (
        test_security.test_no_header_changes_the_environ_beside_the_headers,
        [some(all_of(either(NAME_BYTES, octets), octets))],
    ),
    (
        test_security.test_no_header_changes_the_scope_beside_the_headers,
        [then(some(all_of(then(latin_1, "HTTP_{}".format), latin_1)), dict)],
    ),
]


def run_one(data: bytes) -> None:
    """Hold one property for one example; what breaks it is printed and raised."""
    provider = atheris.FuzzedDataProvider(data)
    test, draws = PROPERTIES[provider.ConsumeIntInRange(0, len(PROPERTIES) - 1)]
    example = [draw(provider) for draw in draws]
    shown = repr(example)  # before the test may change it
    try:
        test.hypothesis.inner_test(*example)
    except BaseException:
        print(f"{test.__name__}, for {shown}", file=sys.stderr)
        raise


def main(arguments: list[str]) -> None:
    """Run until an example breaks a property, or a limit is reached; it ends the process, as libFuzzer does.

    Args:
        arguments: As libFuzzer takes them: ``-runs=100000``, ``-seed=1``, a directory to keep the examples in.
    """
    limits = [f"-{name}={value}" for name, value in LIMITS.items()]
    atheris.Setup([sys.argv[0], *limits, *arguments], run_one)  # of two equal options the last one holds
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
