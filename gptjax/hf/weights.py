"""Parameters from the tensors of an architecture, and back, one at a time."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gptjax.config import GPTConfig, MeshConfig
from gptjax.hf.architectures import BUFFERS, LM_HEAD, Architecture, Place
from gptjax.hf.tensors import FLOATS, Made, Tensor
from gptjax.model import Params, abstract_params, param_letters
from gptjax.rundir import CheckpointError
from gptjax.sharding import make_mesh

ALIGNMENT = 64  # bytes: JAX takes an array on a CPU as it is if it begins at a multiple of this


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as "blocks/ffn/up"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _shape(place: Place, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a tensor."""
    shape = [math.prod(sizes[letter] for letter in word) for word in place.letters.split()]
    if place.third is not None:
        shape[-1] *= 3
    return tuple(shape)


def _names(path: str, place: Place, architecture: Architecture, num_layers: int) -> list[str]:
    """The names of the tensors that hold a parameter: one for each layer, or one."""
    layers = range(num_layers) if path.startswith("blocks/") else [0]
    return [architecture.full_name(place.name.format(layer)) for layer in layers]


def _sizes(config: GPTConfig) -> dict[str, int]:
    """The sizes of dimensions in an architecture, whose vocabulary is not padded."""
    return config.sizes | {"V": config.vocab_size}


# --- in ------------------------------------------------------------------------------------------


def check_tensors(
    tensors: dict[str, Tensor], architecture: Architecture, config: GPTConfig
) -> dict[str, Tensor]:
    """The tensors of a model by their full names.

    Raises:
      CheckpointError: with the names of all that are missing, superfluous, or of a wrong shape or
        dtype.
    """
    if not any(name.startswith(architecture.prefix) for name in tensors):
        tensors = {architecture.full_name(name): one for name, one in tensors.items()}
    tensors = {name: one for name, one in tensors.items() if not name.endswith(BUFFERS)}
    sizes, wanted = _sizes(config), {}
    for path, place in architecture.expected(config).items():
        for name in _names(path, place, architecture, config.num_layers):
            wanted[name] = _shape(place, sizes)
    if config.tied_embedding and LM_HEAD in tensors:
        name = architecture.full_name(architecture.places["embedding/tokens"].name)
        _check_copy(tensors, name)
        del tensors[LM_HEAD]
    problems = [f"missing: {name} {list(wanted[name])}" for name in wanted if name not in tensors]
    problems += [
        f"not known: {name} {list(one.shape)}"
        for name, one in tensors.items()
        if name not in wanted
    ]
    for name, one in tensors.items():
        if name in wanted and (one.shape != wanted[name] or one.dtype not in FLOATS):
            problems.append(
                f"{name}: {one.dtype}{list(one.shape)}, wanted {list(wanted[name])} of "
                f"{', '.join(FLOATS)}"
            )
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(
            f"the tensors are not those of {architecture.name} as config.json has it, "
            f"differences: {len(problems)}\n{lines}"
        )
    return tensors


def _check_copy(tensors: dict[str, Tensor], name: str) -> None:
    """Refuse an unembedding that is not the embedding, though it should be."""
    head, embedding = tensors[LM_HEAD], tensors.get(name)
    if embedding is None or embedding.dtype not in FLOATS or head.dtype not in FLOATS:
        return  # refused for that
    if head.shape != embedding.shape or not np.array_equal(head.open(), embedding.open()):
        raise CheckpointError(
            f"{LM_HEAD} differs from {name}, but config.json has tie_word_embeddings true: "
            "set it to false to read both, or leave the first out"
        )


def read_params(
    tensors: dict[str, Tensor],
    architecture: Architecture,
    config: GPTConfig,
    mesh: jax.sharding.Mesh,
    dtype: str,
) -> Params:
    """The parameters, each part read straight to the device that keeps it.

    Raises:
      CheckpointError: if a tensor holds numbers that are not finite.
    """
    like = abstract_params(config, mesh)
    leaves, letters = by_path(like), by_path(param_letters(config))
    made = {}
    # The largest come first: what is read then lies beside least else.
    for path in sorted(leaves, key=lambda path: -leaves[path].size):
        shape, sharding = leaves[path].shape, leaves[path].sharding
        if path not in architecture.places:  # a bias that it does not have
            made[path] = jnp.zeros(shape, dtype, device=sharding)
            continue
        place = architecture.places[path]
        names = _names(path, place, architecture, config.num_layers)
        part = functools.partial(
            _part,
            shape=shape,
            letters=letters[path],
            place=place,
            found={name: tensors[name] for name in names},
            config=config,
            dtype=dtype,
        )
        made[path] = jax.make_array_from_callback(shape, sharding, part)
        jax.block_until_ready(made[path])
    return jax.tree.unflatten(jax.tree.structure(like), [made[path] for path in leaves])


def _part(
    index: tuple[slice, ...],
    *,
    shape: tuple[int, ...],
    letters: str,
    place: Place,
    found: dict[str, Tensor],
    config: GPTConfig,
    dtype: str,
) -> np.ndarray:
    """A part of a parameter, from the tensors of its layers, or from its one."""
    bounds = [range(*one.indices(size)) for one, size in zip(index, shape, strict=True)]
    array = _aligned([len(one) for one in bounds], dtype)
    stacked = letters.startswith("L")
    within = bounds[1:] if stacked else bounds
    names = [*found]
    for i, layer in enumerate(bounds[0] if stacked else [0]):
        into = array[i] if stacked else array
        _read(found[names[layer]], place, letters.removeprefix("L"), config, within, into)
        if not _finite(into):
            raise CheckpointError(
                f"{found[names[layer]].path}: {names[layer]} holds numbers that are not finite: "
                "get it again, or another model"
            )
    return array


def _read(
    tensor: Tensor,
    place: Place,
    letters: str,
    config: GPTConfig,
    bounds: list[range],
    into: np.ndarray,
) -> None:
    """Read a part of a tensor; rows past the end of a vocabulary are zeros."""
    sizes, theirs = _sizes(config), place.letters.replace(" ", "")
    whole = all(
        one.start == 0 and one.stop >= sizes[letter]
        for one, letter in zip(bounds, letters, strict=True)
    )
    if whole and theirs == letters and place.third is None and FLOATS[tensor.dtype] == into.dtype:
        rows = sizes[letters[0]]
        tensor.read_into(into[:rows])
        into[rows:] = 0
        return
    view = tensor.open()
    if place.third is not None:
        view = np.split(view, 3, axis=-1)[place.third]
    view = view.reshape([sizes[letter] for letter in theirs])
    view = view.transpose([theirs.index(letter) for letter in letters])
    there = view[tuple(slice(one.start, one.stop) for one in bounds)]
    into[len(there) :] = 0
    into[: len(there)] = there


def _aligned(shape: list[int], dtype: str) -> np.ndarray:
    """An empty array that JAX need not copy on a CPU."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _finite(array: np.ndarray) -> bool:
    # A sum takes half the time of looking at each, and only seldom overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum(dtype=np.float32)) or np.isfinite(array).all())


# --- out -----------------------------------------------------------------------------------------


def made_tensors(params: Params, architecture: Architecture, config: GPTConfig) -> Iterator[Made]:
    """The tensors of a model: name, shape, and a function that makes it.

    Of parameters that the model lacks, such as biases, there are zeros.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in by_path(params).items()}
    letters, sizes = by_path(param_letters(config)), _sizes(config)
    by_name = defaultdict(list)
    for path, place in architecture.expected(config).items():
        for layer, name in enumerate(_names(path, place, architecture, config.num_layers)):
            by_name[name].append((path, place, layer))
    scaled = architecture.model_type == "gpt_neo" and config.scale_attention

    def make(parts: list[tuple[str, Place, int]]) -> np.ndarray:
        arrays = []
        for path, place, layer in parts:
            shape = _shape(place._replace(third=None), sizes)
            if path not in leaves:
                arrays.append(np.zeros(shape, np.float32))
                continue
            word, array = letters[path], leaves[path]
            array = array[layer] if word.startswith("L") else array
            array = array[: config.vocab_size] if word.startswith("V") else array
            if scaled and path == "blocks/attention/query":  # GPT-Neo does not divide its scores
                array = array * np.float32(sizes["H"] ** -0.5)
            theirs, ours = place.letters.replace(" ", ""), word.removeprefix("L")
            arrays.append(array.transpose([ours.index(one) for one in theirs]).reshape(shape))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)

    for name in sorted(by_name, key=_in_order):
        parts = by_name[name]
        yield name, _shape(parts[0][1], sizes), lambda parts=parts: make(parts)


def without_label_bias(params: Params, architecture: Architecture) -> Params:
    """The same model without a bias of its labels, where an architecture has none: what the bias of
    the last norm adds to the logits grows by as much.

    Raises:
      CheckpointError: if that cannot add what is wanted, as of more labels than `model.width`.
    """
    bias_C = params["head"].get("label_bias")
    if bias_C is None or "head/label_bias" in architecture.places:
        return params
    head = dict(params["head"])
    label_DC, bias_C = (np.asarray(head[name], np.float64) for name in ("label", "label_bias"))
    added_D = np.linalg.lstsq(label_DC.T, bias_C)[0]
    if not np.allclose(added_D @ label_DC, bias_C, rtol=0, atol=1e-6 * max(abs(bias_C).max(), 1)):
        raise CheckpointError(
            f"{architecture.name} has no bias of its labels, and that of {len(bias_C):,} labels "
            f"cannot be held by the last norm's, as model.width = {len(label_DC):,}: train the "
            "head of a model with model.bias = False"
        )
    norm = head["norm"] | {"bias": head["norm"]["bias"] + jnp.float32(added_D)}
    head["label_bias"] = jnp.zeros_like(head["label_bias"])
    return params | {"head": head | {"norm": norm}}


def _in_order(name: str) -> list:
    """By which names come in the order of layers: 2 before 10."""
    return [(one.isdigit(), int(one) if one.isdigit() else one) for one in name.split(".")]


def mesh_of(params: Params) -> jax.sharding.Mesh:
    """The mesh that parameters lie on; of a single device if they lie on none."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        return sharding.mesh
    return make_mesh(MeshConfig(), list(sharding.device_set))
