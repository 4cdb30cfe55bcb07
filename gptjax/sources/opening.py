"""The bytes of a file or URL, unpacked, and what tells whether they have changed."""

import bz2
import gzip
import hashlib
import importlib
import io
import lzma
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from gptjax.config import ConfigError, did_you_mean
from gptjax.sources.records import DataError

READ_BYTES = 1 << 20  # of a file, at once
PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
# What stores call the checksum of a file, or else the time when it was written.
TAGS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Last-Modified")


class Fingerprint(NamedTuple):
    """What a manifest keeps of a source."""

    name: str
    size: int  # bytes of its files
    sha256: str  # of its files; of those at a URL, the tag that their store gives them
    modified: int  # nanoseconds since 1970; when it differs, the checksum decides; 0 at a URL


def sha256_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stat_of(where: str) -> Fingerprint:
    """Of one file: its path or URL, its size, and its tag or the time when it was modified."""
    if not is_url(where):
        stat = os.stat(where)
        return Fingerprint(where, stat.st_size, "", stat.st_mtime_ns)
    system, path = file_system(where)
    with reaching(where):
        info = system.info(path)
        tag = next((f"{key}:{info[key]}" for key in TAGS if info.get(key)), None)
        return Fingerprint(where, info["size"] or 0, tag or f"ukey:{system.ukey(path)}", 0)


# --- URLs --------------------------------------------------------------------------------------


def is_url(where: str) -> bool:
    return "://" in where


def file_system(where: str) -> tuple[Any, str]:
    """What reaches a URL, and the URL as that knows it."""
    import fsspec

    protocol = where.partition("://")[0]
    try:
        return fsspec.url_to_fs(where)
    except ImportError as error:
        raise ConfigError(
            f"{where}: {protocol}:// needs a package that is not installed ({error})"
        ) from error
    except Exception as error:
        known = fsspec.available_protocols()
        if protocol in known:
            raise DataError(f"{where}: cannot be read ({said(error)})") from error
        raise ConfigError(
            f"{where}: nothing is known of {protocol}://; give gs://, s3://, https:// or another "
            f"that fsspec reads.{did_you_mean(protocol, known)}"
        ) from error


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Each library has its own errors for what is not there, not allowed or cut off."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: cannot be read ({said(error)})") from error


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# --- opening -----------------------------------------------------------------------------------


def packing_of(where: str) -> str:
    """The ending of a packed file, or nothing."""
    suffix = Path(where.partition("?")[0] if is_url(where) else where).suffix
    return suffix if suffix.lower() in PACKED else ""


class _Guarded(io.RawIOBase):
    """A file whose failures are DataErrors that say where."""

    def __init__(self, file: Any, where: str, packing: str):
        self._file, self._where, self._packing, self._position = file, where, packing, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # in a packed file by unpacking all that lies before

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._guard():
            self._position = self._file.seek(offset, whence)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        with self._guard():
            # `read` would lose what it had gathered when it met the end of a file cut short.
            read = self._file.read1 if self._packing else self._file.read
            piece = read(len(buffer))
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except DataError:  # of the file that is unpacked
            raise
        except Exception as error:
            at = f"{self._where} (byte {self._position:,}{' unpacked' if self._packing else ''})"
            if not self._packing or getattr(error, "errno", None):
                raise DataError(f"{at}: cannot be read ({said(error)})") from error
            kind = PACKED[self._packing.lower()]
            raise DataError(f"{at}: not a whole {kind} file ({error}); copy it again") from error


@contextmanager
def open_bytes(where: str) -> Iterator[BinaryIO]:
    """The bytes of a file or URL, those inside of a packed one."""
    packing = packing_of(where)
    with ExitStack() as stack:
        if is_url(where):
            system, path = file_system(where)
            with reaching(where):
                file = stack.enter_context(system.open(path, "rb"))
            file = io.BufferedReader(_Guarded(file, where, ""), READ_BYTES)
        else:
            file = stack.enter_context(open(where, "rb", READ_BYTES))
        if packing:
            unpack = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
            unpack |= {".zst": partial(_open_zstd, where)}
            unpacked = stack.enter_context(unpack[packing.lower()](file))
            file = io.BufferedReader(_Guarded(unpacked, where, packing), READ_BYTES)
        yield file


def _open_zstd(where: str, file: BinaryIO) -> Any:
    try:
        from compression import zstd
    except ImportError:  # before Python 3.14
        zstd = needed("backports.zstd", "zstd", where)
    return zstd.open(file)


def needed(module: str, extra: str, where: str) -> ModuleType:
    """A module of an optional package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{where}: needs the package {error.name}: pip install 'gptjax[{extra}]'"
        ) from error
