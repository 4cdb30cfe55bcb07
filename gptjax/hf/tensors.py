"""Files of tensors in the format safetensors: checked before they are read, and written.

A file is 8 bytes, the length of its header; the header, JSON that says of each tensor its dtype,
shape and place; and the tensors. Nothing in it is code.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gptjax.rundir import CheckpointError, sync

# Most bytes of a header: JSON takes some twenty times its size in memory, and a model of a thousand
# layers needs a quarter of this.
HEADER_BYTES = 4 << 20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES_OF_DTYPES = {dtype.name: name for name, dtype in FLOATS.items()}
# What begins a pickle, a zip file (as PyTorch's are), and others that are sometimes renamed.
FOREIGN = {b"PK": "a zip file, as of PyTorch", b"\x80": "a pickle", b"\x89HDF": "an HDF5 file"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


class Tensor(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # its first byte in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def open(self) -> np.ndarray:
        """The tensor, mapped: what is not looked at is not read. Its dtype is one of FLOATS."""
        dtype = FLOATS[self.dtype]
        if not self.shape or not self.num_bytes:
            return np.fromfile(self.path, dtype, math.prod(self.shape), offset=self.start)
        return np.memmap(self.path, dtype, "r", self.start, self.shape)

    def read_into(self, array: np.ndarray) -> None:
        """Read all of it to where it is wanted, in one piece and of the same dtype."""
        left = memoryview(array.reshape(-1).view(np.uint8))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left and (count := file.readinto(left)):
                left = left[count:]
        if left:
            raise CheckpointError(f"{self.path}: ends {len(left):,} bytes too soon; get it again")


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder by their names: of `model.safetensors`, or of the files that
    its index names.

    Raises:
      CheckpointError: if there are none, or a file is not what it says.
    """
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if not index.is_file():
        if not single.is_file():
            raise CheckpointError(_no_tensors(folder))
        return read_header(single)
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files; copy it again")
    tensors: dict[str, Tensor] = {}
    for name in sorted({*where.values()}):
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(
                f"{index}: names {name!r}, which is not a file of {folder}; copy that file, too"
            )
        found = read_header(folder / name)
        if twice := sorted({*tensors} & {*found}):
            raise CheckpointError(
                f"{folder / name}: {twice[0]!r} is in another file, too; copy the folder again"
            )
        tensors |= found
    if lost := [name for name, file in where.items() if _file_of(tensors, name) != file]:
        raise CheckpointError(
            f"{index}: {lost[0]!r} is not in {where[lost[0]]}; copy both files again"
        )
    return tensors


def _file_of(tensors: dict[str, Tensor], name: str) -> str | None:
    return tensors[name].path.name if name in tensors else None


def _no_tensors(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        return f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}; give a folder with one"
    return (
        f"{folder} has {pickles[0]} but no {SINGLE_NAME}: to read such a file is to run whatever "
        "code its author put there, so it is not read. Convert it where you trust it: "
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\""
    )


def read_object(path: Path) -> dict:
    """A file that holds a JSON object.

    Raises:
      CheckpointError: if it does not, or is too large to be one.
    """
    try:
        if path.stat().st_size > HEADER_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes are too many; check it")
        values = _loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give a folder that has it") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object; copy it again")
    return values


def _loads(content: bytes) -> Any:
    """JSON in UTF-8, in whose objects no name is there twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a name is there twice")
        return values

    return json.loads(content.decode(), object_pairs_hook=once)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names, without reading one.

    Raises:
      CheckpointError: unless the header is sound and the tensors fill the rest of the file, each
        byte belonging to one of them.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            problem = _length_problem(first, length, size)
            content = b"" if problem else file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; check the file") from None
    try:
        if problem:
            raise ValueError(problem)
        header = _loads(content)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, one, 8 + length) for name, one in header.items()}
        _check_places(tensors, 8 + length, size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a sound safetensors file: {error}; get it again") from (
            None
        )
    return tensors


def _length_problem(first: bytes, length: int, size: int) -> str:
    """What is wrong with the length of a header, if anything is."""
    for start, what in FOREIGN.items():
        if first.startswith(start) and length > HEADER_BYTES:
            return f"it is {what}, which may run code and is not read"
    if len(first) < 8:
        return f"it ends after {size} bytes"
    if length > HEADER_BYTES:
        return f"its header would have {length:,} bytes, and at most {HEADER_BYTES:,} are read"
    if length > size - 8:
        return f"its header would have {length:,} bytes, but only {size - 8:,} are there"
    return ""


def _tensor(path: Path, name: str, given: Any, begin: int) -> Tensor:
    """What a header says of one tensor."""
    try:
        dtype, shape, (start, stop) = (given[key] for key in ("dtype", "shape", "data_offsets"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name!r} has the dtype {dtype!r}, which is none")
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"{name!r} has the shape {shape!r} from byte {start!r} to {stop!r}")
    tensor = Tensor(path, dtype, tuple(shape), begin + start)
    if len(shape) > 16 or tensor.num_bytes != stop - start:
        raise ValueError(
            f"{name!r} is {dtype}{shape}, {tensor.num_bytes:,} bytes, but has {stop - start:,}"
        )
    return tensor


def _check_places(tensors: dict[str, Tensor], begin: int, size: int) -> None:
    """Refuse tensors that overlap, leave a hole, or end elsewhere than the file."""
    place = begin
    for name, one in sorted(tensors.items(), key=lambda pair: (pair[1].start, pair[1].num_bytes)):
        if one.start != place:
            what = "overlaps the tensor before it" if one.start < place else "comes after a hole"
            raise ValueError(f"{name!r} {what}, at byte {one.start:,} of the file")
        place += one.num_bytes
    if place != size:
        raise ValueError(f"its tensors end at byte {place:,}, but it has {size:,}")


# --- writing -------------------------------------------------------------------------------------

Made = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]  # name, shape, and how it is made


def write_tensors(folder: Path, tensors: Iterable[Made], dtype: str, shard_bytes: int) -> None:
    """Write tensors one after the other, each made when its turn comes.

    Args:
      folder: where `model.safetensors` is written, or several files and their index.
      tensors: all of them.
      dtype: "float32" or "bfloat16".
      shard_bytes: most bytes of a file, unless one tensor has more.
    """
    item = ITEM_BYTES[NAMES_OF_DTYPES[dtype]]
    shards, sizes = [[]], [0]
    for one in tensors:
        num_bytes = math.prod(one[1]) * item
        if shards[-1] and sizes[-1] + num_bytes > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(one)
        sizes[-1] += num_bytes
    if len(shards) == 1:
        write_file(folder / SINGLE_NAME, shards[0], dtype)
        return
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, dtype)
        where |= {one[0]: name for one in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: list[Made], dtype: str) -> None:
    """Write tensors to one file."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    name_of_dtype = NAMES_OF_DTYPES[dtype]
    for name, shape, _ in tensors:
        stop = place + math.prod(shape) * ITEM_BYTES[name_of_dtype]
        header[name] = {"dtype": name_of_dtype, "shape": shape, "data_offsets": [place, stop]}
        place = stop
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # so that tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for chunk in _chunks(tensors, dtype):
            file.write(chunk)
    sync(path)


def _chunks(tensors: list[Made], dtype: str) -> Iterator[memoryview]:
    for _, shape, make in tensors:
        array = np.ascontiguousarray(make(), FLOATS[NAMES_OF_DTYPES[dtype]])
        assert array.shape == shape, (array.shape, shape)
        yield array.reshape(-1).view(np.uint8).data
