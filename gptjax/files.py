"""Files in a folder that is on a disk or in a bucket, and turns at building one."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tensorstore as ts

from gptjax.config import ConfigError
from gptjax.sources import DataError

Folder = Path | str  # str: a path, or a URL that TensorStore knows, such as gs://BUCKET/PATH


def is_url(folder: Folder) -> bool:
    return "://" in str(folder)


def join(folder: Folder, *names: str) -> Folder:
    return "/".join([str(folder).rstrip("/"), *names]) if is_url(folder) else Path(folder, *names)


def spec_of(folder: Folder) -> str | dict[str, str]:
    """The folder as TensorStore takes it."""
    if is_url(folder):
        return f"{str(folder).rstrip('/')}/"
    return {"driver": "file", "path": f"{Path(folder).absolute()}/"}


def read_file(folder: Folder, name: str) -> bytes | None:
    """The content of a file; None if there is none."""
    result = ts.KvStore.open(spec_of(folder)).result().read(name).result()
    return result.value if result.state == "value" else None


def read_json(folder: Folder, name: str) -> Any:
    """What `write_json` wrote; None if there is none, or it is no JSON."""
    content = read_file(folder, name)
    with suppress(ValueError):
        return content and json.loads(content)


def write_json(folder: Folder, name: str, value: Any) -> None:
    """Write a file that is whole and outlives a loss of power, or is not there."""
    content = (json.dumps(value, indent=1) + "\n").encode()
    with writing(folder):
        ts.KvStore.open(spec_of(folder)).result().write(name, content).result()


@contextmanager
def writing(folder: Folder) -> Iterator[None]:
    """Failures of the file system as what they are, where TensorStore says ValueError."""
    try:
        yield
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
        raise


def remove(folder: Folder) -> None:
    """Delete a folder and all that lies in it."""
    if is_url(folder):
        ts.KvStore.open(spec_of(folder)).result().delete_range(ts.KvStore.KeyRange()).result()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def remove_file(folder: Folder, name: str) -> None:
    """Delete a file, if it is there."""
    with writing(folder):
        ts.KvStore.open(spec_of(folder)).result().write(name, None).result()


def list_folders(folder: Folder, below: str) -> list[str]:
    """The folders with files that lie in a folder's folder."""
    files = ts.KvStore.open(spec_of(folder)).result()
    places = ts.KvStore.KeyRange(f"{below}/", f"{below}0")  # 0 follows the slash
    names = (key.decode().split("/") for key in files.list(places).result())
    return list(dict.fromkeys(name[1] for name in names if len(name) > 2))


def remove_files(folder: Folder, first: str, past: str) -> None:
    """Delete the files of a folder whose names lie between two in the order of their letters."""
    places = ts.KvStore.KeyRange(first, past)
    ts.KvStore.open(spec_of(folder)).result().delete_range(places).result()


@contextmanager
def building(folder: Folder) -> Iterator[Folder | None]:
    """A place to build what becomes `folder` if all goes well; None if `folder` is there already.

    Processes that want the same folder at once take turns. A kill, or whatever else is no fault of
    the data, leaves the shards that are finished in a hidden folder, where the next one finds them.
    What lies at a URL is built in its place, and processes do not see each other.
    """
    if is_url(folder):
        yield folder
        return
    folder = Path(folder)
    new_parent = not folder.parent.exists()
    try:
        with _alone_in(folder.with_name(f".{folder.name}.building")) as workshop:
            if folder.exists():
                yield None
                return
            place = workshop / "store"
            place.mkdir(exist_ok=True)
            yield place
            for inside, _, _ in os.walk(place):
                _sync(inside)
            place.rename(folder)
            _sync(folder.parent)
    finally:
        if new_parent:
            with suppress(OSError):  # it holds a store
                folder.parent.rmdir()


@contextmanager
def _alone_in(workshop: Path) -> Iterator[Path]:
    """A folder that one process at a time is in, and that goes with it if nothing is to be kept."""
    while True:
        try:
            workshop.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(workshop / "lock", os.O_CREAT | os.O_WRONLY)
        except (FileExistsError, FileNotFoundError):  # the one before is just removing the folder
            continue
        with open(descriptor, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink == 0:  # removed while this process waited for it
                continue
            keep = False
            try:
                yield workshop
            except BaseException as error:
                at_fault = isinstance(error, DataError | ConfigError)
                keep = not at_fault or any(workshop.glob("**/shard.json"))
                raise
            finally:
                if not keep:
                    shutil.rmtree(workshop, ignore_errors=True)
            return


def _sync(folder: str | Path) -> None:
    """Make the names in a folder outlive a loss of power; TensorStore does so for its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
