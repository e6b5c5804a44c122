"""The checks of conftest.py do catch what they are there for: a check that cannot fail is no check."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
SETTINGS = Path(__file__).parent.parent.joinpath("pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """An empty suite with this one's settings and conftest.py, which only has less patience."""
    pytester.makepyprojecttoml(SETTINGS)
    pytester.makeconftest(CONFTEST + "\nGRACE = 0.3\n")
    return pytester


def run(suite: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run it as a process of its own: what it leaves behind must not be left in this one."""
    return suite.runpytest_subprocess("-p", "no:cacheprovider", *options, ".")


def test_what_a_test_leaves_behind_fails_it(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import _thread, asyncio, os, socket, threading, time
        import pytest, uvloop

        kept = []

        def test_thread():
            threading.Thread(target=time.sleep, args=(60,), name="the-thread", daemon=True).start()

        def test_nameless_thread():
            _thread.start_new_thread(time.sleep, (60,))

        def test_socket():
            kept.append(socket.socket())

        def test_descriptor():
            kept.append(os.open(os.devnull, os.O_RDONLY))

        @pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
        def test_loop(factory):
            kept.append(factory())

        @pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
        @pytest.mark.leaves("loops", "files")
        def test_task(factory):
            kept.append(loop := factory())
            kept.append(loop.create_task(asyncio.sleep(60), name="the-task"))

        def test_task_of_a_closed_loop():
            loop = asyncio.new_event_loop()
            kept.append(loop.create_task(asyncio.sleep(60), name="the-orphan"))
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

        @pytest.fixture
        def leaky():
            threading.Thread(target=time.sleep, args=(60,), name="of-the-fixture", daemon=True).start()

        def test_fixture(leaky):
            pass

        @pytest.mark.leaves("files")
        def test_what_is_not_on_its_list():
            kept.append(asyncio.new_event_loop())
        """
    )
    result = run(suite)
    result.assert_outcomes(passed=11, errors=11)
    for words in (
        "thread the-thread",
        "native thread ",
        "file descriptor *: socket:",
        "file descriptor *: /dev/null",
        "loop <_UnixSelectorEventLoop",
        "loop <uvloop.Loop",
        "task the-task: ",
        "task the-orphan: ",
        "thread of-the-fixture",
    ):
        result.stdout.fnmatch_lines_random(f"*{words}*")
    result.stdout.fnmatch_lines(["left behind 0.3 s after the test:"])


def test_an_async_test_that_leaves_a_task_running_fails(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import asyncio, trio
        import pytest
        from anyio import sleep_forever
        from hypothesis import given, settings, strategies as st

        kept = []

        def start(anyio_backend_name):
            if anyio_backend_name == "trio":
                trio.lowlevel.spawn_system_task(sleep_forever, name="the-task")
            else:
                kept.append(asyncio.create_task(sleep_forever(), name="the-task"))

        async def test_plain(anyio_backend_name):
            start(anyio_backend_name)

        @given(number=st.integers())
        @settings(max_examples=1, database=None)
        async def test_hypothesis(number, anyio_backend_name):
            start(anyio_backend_name)

        @pytest.mark.leaves("tasks")
        async def test_allowed(anyio_backend_name):
            start(anyio_backend_name)
        """
    )
    result = run(suite)
    result.assert_outcomes(failed=6, passed=3)
    result.stdout.fnmatch_lines_random(["*still running 0.3 s after the test:", "*task the-task*"])


def test_what_is_cleaned_up_or_allowed_passes(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import asyncio, logging, socket, threading, time, weakref
        import pytest
        from anyio import create_task_group, sleep, to_thread

        def test_thread_that_is_about_to_end():
            threading.Thread(target=time.sleep, args=(0.1,)).start()

        def test_closed():
            socket.socket().close()
            asyncio.run(asyncio.sleep(0))

        class Owner:
            "Gives back its thread when it is dropped, and is part of a cycle."

            def __init__(self):
                self.itself = self
                leave = threading.Event()
                threading.Thread(target=leave.wait, name="owned", daemon=True).start()
                weakref.finalize(self, leave.set)

        @pytest.fixture
        def owner():
            return Owner()

        def test_dropped():
            Owner()

        def test_argument(owner):
            assert owner

        def test_owner_in_a_logged_traceback():
            def fail(owner):
                raise ValueError

            try:
                fail(Owner())
            except ValueError:
                logging.exception("with a traceback")

        @pytest.mark.leaves("threads", "files")
        def test_marked():
            global kept
            kept = socket.socket()
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()

        def test_watch_thread():
            threading.Thread(target=time.sleep, args=(60,), name="bridge-watch", daemon=True).start()

        @pytest.fixture(scope="session")
        def server():
            with socket.socket() as listener:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                yield listener

        def test_server_of_the_session(server):
            pass

        async def test_tasks():
            async with create_task_group() as group:
                group.start_soon(sleep, 0)
                await to_thread.run_sync(time.sleep, 0)

        async def test_task_that_is_about_to_end(anyio_backend_name):
            if anyio_backend_name == "asyncio":
                global task
                task = asyncio.create_task(sleep(0.1))
        """
    )
    result = run(suite)
    result.assert_outcomes(passed=14)


def test_a_thread_that_the_kernels_list_lacked_is_no_newcomer(suite: pytest.Pytester) -> None:
    """faulthandler's is the last one before a test, just behind the one of the test before, which is ending."""
    suite.makepyfile(
        """
        import os

        import pytest

        @pytest.fixture(scope="module", autouse=True)
        def list_that_ends_early():
            cut = []

            def list_directory(path, original=os.listdir):
                names = original(path)
                if str(path) == "/proc/self/task" and not cut:
                    cut.extend(names[1:])
                    return names[:1]
                return names

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "listdir", list_directory)
                yield
            assert cut

        def test_it():
            pass
        """
    )
    run(suite).assert_outcomes(passed=1)


def test_a_failed_test_is_not_blamed_twice(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import threading, time

        def test_it():
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            assert False
        """
    )
    run(suite).assert_outcomes(failed=1)


def test_what_is_dropped_unclosed_fails_by_its_warning(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import socket

        def test_socket():
            socket.socket()

        def test_socket_in_a_cycle():
            holder = [socket.socket()]
            holder.append(holder)
        """
    )
    result = run(suite)
    assert result.ret != 0
    result.stdout.fnmatch_lines_random(["*test_socket*", "*test_socket_in_a_cycle*"])
    assert result.parseoutcomes().get("failed", 0) + result.parseoutcomes().get("errors", 0) == 2


def test_a_misspelt_mark_is_an_error(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import pytest

        @pytest.mark.leaves("thread")
        def test_it():
            pass
        """
    )
    result = run(suite)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*leaves() takes any of*got*'thread'*"])


def test_async_tests_run_on_every_backend_in_debug_mode_unasked(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import asyncio, sys

        async def test_it(request):
            loop = "trio" if "trio" in request.node.name else asyncio.get_running_loop()
            print("running", request.node.name, loop)
            assert loop == "trio" or loop.get_debug()

        def test_debug_mode_of_any_other_loop():
            loop = asyncio.new_event_loop()
            loop.close()
            assert loop.get_debug()
        """
    )
    result = run(suite, "-s")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines_random(
        [
            "*running test_it?asyncio? <_UnixSelectorEventLoop*",
            "*running test_it?uvloop? <uvloop.Loop*",
            "*running test_it?trio? trio*",
        ]
    )


def test_a_warning_fails_a_test(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import warnings

        def test_it():
            warnings.warn("anything", DeprecationWarning)
        """
    )
    run(suite).assert_outcomes(failed=1)


def test_a_test_that_hangs_fails_with_its_traceback_and_the_rest_runs(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import threading
        import pytest

        @pytest.mark.timeout(3)
        def test_hangs():
            threading.Event().wait()

        @pytest.mark.timeout(3)
        async def test_hangs_in_a_loop():
            import anyio
            await anyio.sleep_forever()

        def test_next():
            pass
        """
    )
    result = run(suite)
    result.assert_outcomes(failed=4, passed=1)
    result.stdout.fnmatch_lines_random(["*threading.Event().wait()", "*await anyio.sleep_forever()"])
