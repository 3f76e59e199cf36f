"""Byte ranges of files: local ones, and those behind any URL that fsspec knows (`https://`, `s3://`, …)."""

from __future__ import annotations

import glob
import io
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Value = TypeVar("Value")

BLOCK_BYTES = 8 * 1024 * 1024  # of a request, where a file is read from end to end
BLOCKS_KEPT = 3  # a scan looks back by one sample
STATUS_WORTH_A_RETRY = (408, 425, 429)  # time-out, too early, too many requests; and everything from 500
FINAL_ERRORS = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError, AssertionError),
)


class Unreachable(OSError):
    """A file that may be there and was not read: the server failed, refused, or did not answer in time."""


@dataclass(frozen=True)
class RemoteOptions:
    """How shards that lie behind a URL are read.

    Args:
        timeout: Seconds that one request may take. File systems that are not asynchronous in fsspec (SFTP, HDFS, …)
            have time-outs of their own, set through `storage_options`.
        attempts: Requests for the same bytes before they are given up.
        backoff: Seconds before the second attempt; they double with every further one.
        cache_directory: Where whole shards are kept on a local disk, to be shared by all processes of a machine. null
            reads every sample by a range request.
        cache_gigabytes: Bound on what is kept there (10⁹ bytes); the shard that was not used for longest goes first.
        storage_options: What the fsspec file system takes, such as `{anon: true}` for S3.
    """

    timeout: float = 60.0
    attempts: int = 5
    backoff: float = 0.5
    cache_directory: str | None = None
    cache_gigabytes: float = 50.0
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.attempts < 1 or self.backoff < 0:
            raise ValueError(
                f"remote.timeout is {self.timeout}, remote.attempts {self.attempts} and remote.backoff {self.backoff}: "
                "a request needs some time, at least one attempt, and a pause of at least 0 seconds."
            )
        if self.cache_gigabytes <= 0:
            raise ValueError(
                f"remote.cache_gigabytes is {self.cache_gigabytes}: use more than 0, or no remote.cache_directory."
            )


def is_url(address: str) -> bool:
    """Whether fsspec has to read it; everything else is a local path."""
    return "://" in address or "::" in address


class Files:
    """Reads files by address. Holds nothing open, so it may be forked or sent to another process."""

    def __init__(self, remote: RemoteOptions | None = None) -> None:
        self.remote = remote or RemoteOptions()

    def read(self, address: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer where the file ends.

        Raises:
            FileNotFoundError: There is no such file.
            Unreachable: Every attempt failed.
            ValueError: The server does not know range requests.
        """
        if not is_url(address):
            return read_local(address, start, length)

        def request(system: AbstractFileSystem, path: str) -> bytes:
            try:
                content: bytes = self._call(system, "cat_file", path, start=start, end=start + length)
            except Exception as error:
                if getattr(error, "status", None) == 416:  # the range begins behind the end of the file
                    return b""
                raise
            if len(content) > length:
                raise ValueError(
                    f"the server of {address} sends the whole file when it is asked for a part (HTTP range requests): "
                    "serve the shards from one that knows them, or copy them to a local disk"
                )
            return content

        return self._request(address, request)

    def read_all(self, address: str) -> bytes:
        """A whole, small file. Errors are `read`'s."""
        if not is_url(address):
            return Path(address).read_bytes()
        content: bytes = self._request(address, lambda system, path: self._call(system, "cat_file", path))
        return content

    def size(self, address: str) -> int:
        """Bytes of a file. Errors are `read`'s."""
        if not is_url(address):
            return os.stat(address).st_size

        def request(system: AbstractFileSystem, path: str) -> int:
            try:
                size = self._call(system, "info", path)["size"]
            except FileNotFoundError as error:  # fsspec's name for whatever an HTTP server answers
                status = getattr(error.__cause__, "status", 404)
                if error.__cause__ is None or status in (404, 410):
                    raise
                raise error.__cause__ from None
            if size is None:
                raise ValueError(f"the server of {address} does not say how long it is (Content-Length)")
            return int(size)

        return self._request(address, request)

    def open(self, address: str) -> BinaryIO:
        """The file, to be read from end to end and sought. Errors are `read`'s, when it is opened or read."""
        if not is_url(address):
            return open(address, "rb")
        return io.BufferedReader(_RangeFile(self, address, self.size(address)))

    def glob(self, pattern: str) -> list[str]:
        """Addresses that match, in alphabetical order. Errors are `read`'s."""
        if not is_url(pattern):
            return sorted(glob.glob(pattern))

        def request(system: AbstractFileSystem, path: str) -> list[str]:
            try:
                found = self._call(system, "glob", path)
            except FileNotFoundError:
                return []
            return sorted(str(system.unstrip_protocol(name)) for name in found)

        return self._request(pattern, request)

    def _call(self, system: AbstractFileSystem, method: str, *arguments: Any, **options: Any) -> Any:
        if not system.async_impl:
            return getattr(system, method)(*arguments, **options)
        from fsspec.asyn import sync

        call = getattr(system, f"_{method}")
        return sync(system.loop, call, *arguments, timeout=self.remote.timeout, **options)

    def _file_system(self, address: str) -> tuple[AbstractFileSystem, str]:
        from fsspec.core import url_to_fs  # kept for each process: a connection must not be shared with a fork

        try:
            system, path = url_to_fs(address, **self.remote.storage_options)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"fsspec cannot read {address} ({error}). It reads https://, with another package also s3:// (pip "
                "install s3fs), gs:// (gcsfs) and more; or copy the ladder to a local disk."
            ) from error
        return system, path

    def _request(self, address: str, request: Callable[[AbstractFileSystem, str], Value]) -> Value:
        for attempt in range(1, self.remote.attempts + 1):
            try:
                return request(*self._file_system(address))
            except FINAL_ERRORS:
                raise
            except Exception as error:  # every file system of fsspec has errors of its own
                status = getattr(error, "status", None)
                refused = isinstance(status, int) and status < 500 and status not in STATUS_WORTH_A_RETRY
                if refused or attempt == self.remote.attempts:
                    reason = (
                        f"no answer in {self.remote.timeout:g} s" if isinstance(error, TimeoutError) else _named(error)
                    )
                    times = "" if refused else f" {attempt} times, the last time"
                    raise Unreachable(f"{address} could not be read{times}: {reason}") from error
            time.sleep(self.remote.backoff * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else repr(error)


def read_local(path: str | Path, start: int, length: int) -> bytes:
    """`length` bytes of a local file from `start`; fewer where it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.pread(descriptor, length, start)
        while len(content) < length and (more := os.pread(descriptor, length - len(content), start + len(content))):
            content += more  # Linux reads at most 2 GB at once
        return content
    finally:
        os.close(descriptor)


class _RangeFile(io.RawIOBase):
    """A remote file, read in large blocks of which the last ones are kept."""

    def __init__(self, files: Files, address: str, size: int) -> None:
        self._files = files
        self._address = address
        self._size = size
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        number, within = divmod(self._position, BLOCK_BYTES)
        if number not in self._blocks:
            self._blocks[number] = self._files.read(self._address, number * BLOCK_BYTES, BLOCK_BYTES)
            if len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        piece = memoryview(self._blocks[number])[within : within + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)
