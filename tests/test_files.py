"""Files in responses: read in blocks, or sent by their path."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bridge.files import BLOCK_SIZE, FileWrapper, PathFile, sendable_path

if TYPE_CHECKING:
    from collections.abc import Callable

CONTENT = b"0123456789"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    return path


# -- FileWrapper -----------------------------------------------------------------------------------------------------


class Recorder(io.BytesIO):
    """Notes the sizes that it is asked for."""

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(content)
        self.asked: list[int | None] = []

    def read(self, size: int | None = -1, /) -> bytes:
        self.asked.append(size)
        return super().read(size)


class Bare:
    """The least that PEP 3333 lets an app wrap: it has no close()."""

    def __init__(self, *blocks: bytes) -> None:
        self._blocks = list(blocks)

    def read(self, size: int) -> bytes:
        return self._blocks.pop(0) if self._blocks else b""


@pytest.mark.parametrize(
    ("wish", "size"),
    [((), BLOCK_SIZE), ((1,), BLOCK_SIZE), ((8192,), BLOCK_SIZE), ((4 * BLOCK_SIZE,), 4 * BLOCK_SIZE)],
)
def test_a_file_is_read_in_big_blocks(wish: tuple[int, ...], size: int) -> None:
    """[W18]"""
    content = os.urandom(1024) * (2 * size // 1024) + b"end"
    file = Recorder(content)
    blocks = list(FileWrapper(file, *wish))
    assert [len(block) for block in blocks] == [size, size, 3]
    assert b"".join(blocks) == content
    assert set(file.asked) == {size}


def test_a_file_is_read_on_from_where_it_stands() -> None:
    """[W18]"""
    file = io.BytesIO(CONTENT)
    file.seek(7)
    assert list(FileWrapper(file)) == [b"789"]


def test_an_iteration_can_be_left_and_taken_up() -> None:
    """[W18]"""
    wrapper = FileWrapper(Bare(b"a", b"b", b"c"))
    assert next(wrapper) == b"a"
    assert iter(wrapper) is wrapper
    assert list(wrapper) == [b"b", b"c"]
    assert list(wrapper) == []


def test_the_files_close_is_the_wrappers() -> None:
    """[W13], [W18]"""
    file = io.BytesIO(CONTENT)
    FileWrapper(file).close()
    assert file.closed


def test_a_file_without_close_has_none() -> None:
    """[W13]: PEP 3333 has servers look whether there is one."""
    assert not hasattr(FileWrapper(Bare()), "close")


def test_what_read_raises_is_raised() -> None:
    """[W15]"""
    file = io.BytesIO()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        next(FileWrapper(file))


# -- PathFile --------------------------------------------------------------------------------------------------------


def test_a_path_file_is_read_as_servers_do(path: Path) -> None:
    """[A12]"""
    with closing(PathFile(str(path), lambda: None)) as file:
        assert file.name == str(path)
        assert os.fstat(file.fileno()).st_size == 10
        assert file.tell() == 0
        assert file.read(4) == b"0123"
        assert file.seek(0, os.SEEK_END) == 10
        assert file.read(4) == file.read() == b""
        assert file.seek(2) == 2
        assert file.tell() == 2
        assert file.read() == b"23456789"
        file.seek(0)
        assert list(file) == [CONTENT]
        assert list(FileWrapper(file)) == []


def test_the_end_of_a_path_file_is_told_once(path: Path) -> None:
    """[A12], [A10]"""
    closed: list[bool] = []
    file = PathFile(str(path), lambda: closed.append(True))
    assert closed == []
    file.close()
    file.close()
    assert closed == [True]
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_a_path_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    """[A12]"""
    with pytest.raises(FileNotFoundError):
        PathFile(str(tmp_path / "missing"), lambda: None)


# -- sendable_path ---------------------------------------------------------------------------------------------------

OPENERS: list[Callable[[Path], Any]] = [
    lambda path: path.open("rb"),
    lambda path: io.FileIO(str(path)),
    lambda path: path.open("rb", buffering=0),
    lambda path: path.open("r+b"),
    lambda path: PathFile(str(path), lambda: None),
]


@pytest.mark.parametrize("opener", OPENERS, ids=["buffered", "FileIO", "unbuffered", "updated", "PathFile"])
@pytest.mark.parametrize("length", [None, 10])
def test_a_whole_real_file_may_go_by_its_path(path: Path, opener: Callable[[Path], Any], length: int | None) -> None:
    """[W18]"""
    with closing(opener(path)) as file:
        found = sendable_path(file, length)
    assert found == str(path)


@pytest.mark.parametrize("length", [0, 9, 11])
def test_a_part_of_a_file_may_not(path: Path, length: int) -> None:
    """[W18], [W14]: a range."""
    with path.open("rb") as file:
        assert sendable_path(file, length) is None


@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_file_that_was_read_from_may_not(path: Path, buffering: int) -> None:
    """[W18]"""
    with open(str(path), "rb", buffering=buffering) as file:
        file.read(1)
        assert sendable_path(file, None) is None
        file.seek(0)
        assert sendable_path(file, None) == str(path)


def test_a_file_by_a_relative_name_may_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[W18]: the server may work in another directory."""
    monkeypatch.chdir(path.parent)
    with open(path.name, "rb") as file:
        assert sendable_path(file, None) is None


def test_a_file_by_a_descriptor_or_a_name_of_bytes_may_not(path: Path) -> None:
    """[W18]"""
    for name in (os.open(path, os.O_RDONLY), os.fsencode(path)):
        with open(name, "rb") as file:
            assert sendable_path(file, None) is None


def test_a_file_that_was_removed_or_replaced_may_not(path: Path) -> None:
    """[W18]"""
    with open(str(path), "rb") as file:
        path.rename(path.with_suffix(".old"))
        assert sendable_path(file, None) is None
        path.write_bytes(CONTENT)
        assert sendable_path(file, None) is None


def test_a_closed_or_detached_file_may_not(path: Path) -> None:
    """[W18]"""
    closed = open(str(path), "rb")  # noqa: SIM115
    closed.close()
    assert sendable_path(closed, None) is None
    detached = open(str(path), "rb")  # noqa: SIM115
    detached.detach().close()
    assert sendable_path(detached, None) is None


def test_a_file_that_is_no_regular_one_may_not(tmp_path: Path) -> None:
    """[W18]"""
    with open(os.devnull, "rb", buffering=0) as device:
        assert sendable_path(device, None) is None


def test_what_is_no_file_may_not() -> None:
    """[W18]"""
    named = io.BytesIO(CONTENT)
    named.name = "/etc/hostname"
    for thing in (io.BytesIO(CONTENT), named, Bare(), object(), None, "/etc/hostname", iter([b"a"])):
        assert sendable_path(thing, None) is None


def test_a_file_that_gives_other_than_its_bytes_may_not(path: Path) -> None:
    """[W18]: what lies at the path is not what read() gives."""
    for module in (gzip, bz2):
        packed = str(path.with_suffix(".packed"))
        with module.open(packed, "wb") as file:
            file.write(CONTENT)
        with module.open(packed, "rb") as file:
            assert sendable_path(file, None) is None
            assert sendable_path(io.BufferedReader(file), None) is None
    with open(str(path)) as text:
        assert sendable_path(text, None) is None
    archive = str(path.with_suffix(".tar"))
    with tarfile.open(archive, "w") as tar:
        tar.add(path, str(path))
    with tarfile.open(archive) as tar:
        assert sendable_path(tar.extractfile(tar.getmembers()[0]), None) is None


def test_a_file_that_goes_when_it_is_closed_may_not(path: Path) -> None:
    """[W18]: close() may come before the server opens the path."""
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        assert sendable_path(file, None) is None
