"""Whether what a checkpoint gives back is what was saved: its files, and its values.

The manifest of a step lists size and SHA-256 of every file, and guards itself: no byte of a step
can change, go or come without notice. The fingerprint of a leaf is computed from its values on the
devices, before they are copied and after they are restored, so it also covers what happens between
the devices and the files. It does not depend on the mesh.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.rundir import CheckpointError, sync

FORMAT = "gptjax-2"
MANIFEST = "gptjax_manifest.json"
THREADS = 8  # that hash and sync files: both wait for the disk, or run outside of Python's lock


class NotFiniteError(RuntimeError):
    """A state that is not to be saved, for some of it is infinite or not a number."""


class Leaf(NamedTuple):
    """An array of a saved state."""

    dtype: str
    shape: tuple[int, ...]
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Manifest(NamedTuple):
    """What a step says of itself."""

    step: int
    mesh: dict[str, int]  # the axes of the mesh that wrote it
    leaves: dict[str, Leaf]  # by path, such as "params/blocks/ffn/up"
    files: dict[str, tuple[int, str]]  # size and SHA-256 by name, such as "params/_METADATA"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as "params/blocks/ffn/up", the same for tuples, lists and dicts."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


# --- files ---------------------------------------------------------------------------------------


def seal(folder: Path, step: int, mesh: dict[str, int], leaves: dict[str, Leaf]) -> Manifest:
    """Write the manifest of a step that is complete, and wait until all of it is on the disk.

    Raises:
      OSError: if a file cannot be read or the manifest not be written.
    """
    names = sorted(_names(folder))
    with ThreadPoolExecutor(THREADS) as threads:
        sums = threads.map(_sha256, [folder / name for name in names])
        sizes = [(folder / name).stat().st_size for name in names]
        files = dict(zip(names, zip(sizes, sums, strict=True), strict=True))
        manifest = Manifest(step, mesh, leaves, files)
        (folder / MANIFEST).write_bytes(_render(manifest))
        list(threads.map(sync, [*folder.rglob("*"), folder]))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step.

    Raises:
      CheckpointError: if it is not there, not as it was written, or of another format.
    """
    try:
        written = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{MANIFEST}: {error.strerror}; the folder is a part of a copy, or of an older version"
        ) from error
    try:
        body = json.loads(written)
        found = body["format"]
        leaves = {name: Leaf(one[0], tuple(one[1]), one[2]) for name, one in body["leaves"].items()}
        files = {name: (size, digest) for name, (size, digest) in body["files"].items()}
        manifest = Manifest(body["step"], body["mesh"], leaves, files)
        intact = _render(manifest, found) == written
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{MANIFEST}: damaged")
    if found != FORMAT:
        raise CheckpointError(
            f"{MANIFEST}: it has the format {found!r}, but this version of gptjax reads "
            f"{FORMAT!r}: use the version that wrote it"
        )
    return manifest


def _render(manifest: Manifest, format: str = FORMAT) -> bytes:
    """The one text of a manifest: with the sum of all else, so that no byte of it may differ."""
    body = {"format": format} | manifest._asdict()
    body["sha256"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body, indent=1).encode()


def damage(
    folder: Path, *, hashes: bool, among: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """What is wrong with a step, a line for each file; nothing if it is whole.

    Args:
      hashes: whether to read the files, or to be content with which there are and their sizes.
      among: which of the files count, by name.
    """
    try:
        manifest = read_manifest(folder)
        found = _names(folder)
    except (CheckpointError, OSError) as error:
        return [str(error)]
    lines = []
    if str(manifest.step) != folder.name:
        lines.append(f"{MANIFEST}: it is that of step {manifest.step}")
    lines += [f"{name}: missing" for name in manifest.files if among(name) and name not in found]
    lines += [f"{name}: not of this step" for name in found if name not in manifest.files]
    there = [name for name in manifest.files if among(name) and name in found]

    def check(name: str) -> str | None:
        size, digest = manifest.files[name]
        try:
            actual = (folder / name).stat().st_size
            if actual != size:
                return f"{name}: {actual:,} bytes, not {size:,}"
            if hashes and _sha256(folder / name) != digest:
                return f"{name}: its bytes are not those that were written"
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None

    if not hashes:
        return sorted(lines + list(filter(None, map(check, there))))
    with ThreadPoolExecutor(THREADS) as threads:
        return sorted(lines + list(filter(None, threads.map(check, there))))


def _names(folder: Path) -> set[str]:
    """All files of a step but the manifest."""
    names = set()
    for parent, _, files in os.walk(folder):
        place = Path(parent).relative_to(folder)
        names |= {str(place / name) for name in files}
    return names - {MANIFEST}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- values --------------------------------------------------------------------------------------


def jit_fingerprint(like: Any) -> Callable[[Any], jax.Array]:
    """A compiled function of trees that lie as this one does: two sums of each leaf's bits, and how
    many of its numbers are not finite, as uint32 [leaf, 3] that every process can read.

    Each word is multiplied by an odd number made of its index, so the sums modulo 2^32 change with
    any single element, and with elements that change places. Sums of integers do not depend on
    their order, and so not on the mesh. On the devices it is one pass over the state, which takes
    no memory, and one message.
    """
    leaves, structure = jax.tree.flatten(like)
    shardings = [leaf.sharding for leaf in leaves]
    if not all(isinstance(sharding, NamedSharding) for sharding in shardings):
        return _jit(None, (), structure)
    return _jit(shardings[0].mesh, tuple(sharding.spec for sharding in shardings), structure)


@functools.cache  # of compiled functions, which JAX keeps by the function it is given
def _jit(mesh: Mesh | None, specs: tuple[PartitionSpec, ...], structure: Any) -> Callable:
    def of_one_device(tree: Any) -> jax.Array:
        leaves = _unwrapped(tree)
        return jnp.stack([_sums(leaf, [0] * leaf.ndim, leaf.shape) for leaf in leaves])

    def of_a_mesh(tree: Any) -> jax.Array:
        leaves = tuple(_unwrapped(tree))
        each = functools.partial(of_a_device, shapes=[leaf.shape for leaf in leaves])
        return jax.shard_map(
            each, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False
        )(leaves)

    def of_a_device(blocks: tuple[jax.Array, ...], shapes: list[tuple[int, ...]]) -> jax.Array:
        rows = []
        for block, shape, spec in zip(blocks, shapes, specs, strict=True):
            axes = [_axes(entry) for entry in spec] + [()] * (block.ndim - len(spec))
            begin = [_place(names) * size for names, size in zip(axes, block.shape, strict=True)]
            copied = [name for name in mesh.axis_names if not any(name in names for names in axes)]
            first = _place(copied) == 0  # of the devices that have the same block
            rows.append(jnp.where(first, _sums(block, begin, shape), 0))
        return lax.psum(jnp.stack(rows), mesh.axis_names)

    return jax.jit(of_a_mesh if mesh else of_one_device)


def _axes(entry: Any) -> tuple[str, ...]:
    """The axes that an entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _place(axes: Collection[str]) -> jax.Array | int:
    """Which of the blocks along some axes a device has."""
    return lax.axis_index(tuple(axes)) if axes else 0


def _unwrapped(tree: Any) -> list[jax.Array]:
    """The leaves, keys of random numbers as the words that they are."""
    return [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(tree)
    ]


@functools.partial(jax.jit, static_argnames="shape")  # once for all leaves of one shape
def _sums(block: jax.Array, begin: Sequence[jax.Array | int], shape: tuple[int, ...]) -> jax.Array:
    """What a block of a leaf adds to its row of `jit_fingerprint`.

    Args:
      begin: where the block begins, in each dimension.
      shape: of the leaf.
    """
    words = _words(block)
    if words.ndim > block.ndim:  # two words an element
        begin, shape = [*begin, 0], (*shape, words.shape[-1])
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dimension in reversed(range(words.ndim)):
        place = lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
        place = place + jnp.asarray(begin[dimension], jnp.uint32)
        index, stride = index + place * np.uint32(stride % 2**32), stride * shape[dimension]
    lanes = [words * (_mix(index ^ np.uint32(lane)) | 1) for lane in (0, 0x9E3779B9)]
    finite = jnp.isfinite(block) if jnp.issubdtype(block.dtype, jnp.inexact) else block == block
    bad = (~finite).astype(jnp.uint32).reshape(block.shape + (1,) * (words.ndim - block.ndim))
    # One reduction of three operands, for three would each be a pass over the block.
    return jnp.stack(
        lax.reduce(
            (*lanes, jnp.broadcast_to(bad, words.shape)),
            (np.uint32(0),) * 3,
            lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True)),
            tuple(range(words.ndim)),
        )
    )


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of each element as uint32; an element of eight bytes is two of them, in a dimension
    of its own.
    """
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    """A hash of 32 bits: Wellons, "Prospecting for Hash Functions" (2018), lowbias32."""
    word = (word ^ (word >> 16)) * np.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * np.uint32(0x846CA68B)
    return word ^ (word >> 16)


def describe(tree: Any, sums: np.ndarray) -> dict[str, Leaf]:
    """The leaves of a tree by path, with what `jit_fingerprint` found."""
    return {
        path: Leaf(str(leaf.dtype), tuple(leaf.shape), f"{one:08x}{other:08x}")
        for (path, leaf), (one, other, _) in zip(by_path(tree).items(), sums.tolist(), strict=True)
    }


def refuse_not_finite(tree: Any, sums: np.ndarray, step: int) -> None:
    """Refuse a state by what `jit_fingerprint` found.

    Raises:
      NotFiniteError: naming the leaves.
    """
    bad = [
        f"{path} ({count:,} of {leaf.size:,})"
        for (path, leaf), count in zip(by_path(tree).items(), sums[:, 2].tolist(), strict=True)
        if count
    ]
    if bad:
        raise NotFiniteError(
            f"step {step:,} is not saved, its state is not finite in {_listed(bad)}: go on from "
            "the checkpoint before, with a lower optimizer.learning_rate or a longer warm-up"
        )


def changed(manifest: Manifest, tree: Any, sums: np.ndarray, items: Collection[str]) -> list[str]:
    """The leaves of some items that are not those that were saved, a line for each."""
    found, saved = describe(tree, sums), _leaves_of(manifest, items)
    return [
        f"{path}: its values are not those that were saved"
        for path in sorted(found | saved)
        if found.get(path) != saved.get(path)
    ]


def differences(manifest: Manifest, like: Any, items: Collection[str]) -> list[str]:
    """How a step differs from what is wanted, in names, shapes and dtypes: a line for each leaf.

    Args:
      like: a dict of trees by item.
      items: those of the step that are compared.
    """
    stored = _leaves_of(manifest, items)
    wanted = {
        path: Leaf(str(leaf.dtype), tuple(leaf.shape), "") for path, leaf in by_path(like).items()
    }
    both = [
        path
        for path in sorted(stored | wanted)
        if str(stored.get(path, "nothing")) != str(wanted.get(path, "nothing"))
    ]
    lines = [
        f"  - {path}: stored {stored.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
        for path in both
    ]
    hint = _hint([(stored.get(path), wanted.get(path)) for path in both])
    return lines + ([hint] if hint else [])


def _leaves_of(manifest: Manifest, items: Collection[str]) -> dict[str, Leaf]:
    return {path: leaf for path, leaf in manifest.leaves.items() if path.partition("/")[0] in items}


def _hint(pairs: list[tuple[Leaf | None, Leaf | None]]) -> str | None:
    """What all differences have in common, where that says what is wrong."""
    if not pairs or any(None in pair for pair in pairs):
        return None
    if all(old.shape == new.shape for old, new in pairs):
        return "Only dtypes differ."
    sizes = {
        sizes
        for old, new in pairs
        if len(old.shape) == len(new.shape)
        for sizes in zip(old.shape, new.shape, strict=True)
        if sizes[0] != sizes[1]
    }
    if len(sizes) != 1:
        return None
    ((old_size, new_size),) = sizes
    return (
        f"Where {old_size:,} is stored {new_size:,} is wanted: one size of the model has changed, "
        "such as that of its vocabulary."
    )


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
