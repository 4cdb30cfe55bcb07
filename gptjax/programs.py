"""A model as two programs of StableHLO, which run without gptjax: prefill and decode."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from gptjax.config import GPTConfig
from gptjax.hf.tensors import FLOATS, find_tensors, write_tensors
from gptjax.hf.weights import by_path
from gptjax.model import KVCache, Params, forward, init_cache
from gptjax.rundir import CheckpointError

PLATFORMS = ("cpu", "cuda", "tpu")
Cache = tuple  # the fields of a KVCache, for a program knows no names
ARGUMENTS = {
    "prefill": "params, tokens [B, T] int32, positions [B, T] int32 (-1: padding), length int32 -> "
    "logits [B, V] float32 after token length - 1 of each row, cache",
    "decode": "params, cache, token [B] int32 -> logits [B, V] float32 after it, cache",
}


def prefill(
    params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, length: jax.Array, *, config
) -> tuple[jax.Array, Cache]:
    """Read rows that end together at `length`; the logits of each row's next token, and a cache of
    `context_size` slots.
    """
    cache = init_cache(config, len(tokens_BT), config.context_size)
    logits_BTV, cache = forward(
        params, tokens_BT, config, positions_BT=positions_BT, cache=cache, only=length - 1
    )
    return logits_BTV[:, 0], tuple(cache._replace(length=length))


def decode(
    params: Params, cache: Cache, token_B: jax.Array, *, config: GPTConfig
) -> tuple[jax.Array, Cache]:
    """Add a token to each row; the logits of the next."""
    logits_BTV, cache = forward(params, token_B[:, None], config, cache=KVCache(*cache))
    return logits_BTV[:, 0], tuple(cache)


def save_programs(
    folder: Path,
    config: GPTConfig,
    params: Params,
    *,
    batch_size: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write the programs, for CPUs, NVIDIA GPUs and TPUs, and the parameters, their first argument.

    The folder is kept only if what was written is loaded again and gives the same logits.

    Args:
      folder: not there yet, or empty.
      config: the model.
      params: of the model.
      batch_size: rows of the programs.
      dtype: of the parameters, and of what is computed with.
    Raises:
      CheckpointError: if the folder is not empty, or what was written is not the model.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is there already; give another folder, or delete it")
    config = replace(config, compute_dtype=dtype, attention="xla", remat="none")
    params = jax.device_get(jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    shape = (batch_size, config.context_size)
    tokens_BT = jax.ShapeDtypeStruct(shape, np.int32)
    length, token_B = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct(shape[:1], np.int32)
    functions = {
        name: jax.jit(functools.partial(function, config=config))
        for name, function in (("prefill", prefill), ("decode", decode))
    }
    first = (params, tokens_BT, tokens_BT, length)
    _, cache = jax.eval_shape(functions["prefill"], *first)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, arguments in (("prefill", first), ("decode", (params, cache, token_B))):
            program = export.export(functions[name], platforms=PLATFORMS)(*arguments)
            (folder / f"{name}.bin").write_bytes(program.serialize())
        made = [
            (path, leaf.shape, lambda leaf=leaf: leaf) for path, leaf in by_path(params).items()
        ]
        write_tensors(folder, made, dtype, shard_bytes=5_000_000_000)
        sizes = {"batch_size": batch_size, "context_size": shape[1]}
        sizes["vocab_size"] = config.vocab_size
        (folder / "programs.json").write_text(json.dumps(sizes | ARGUMENTS, indent=2) + "\n")
        _check(folder, functions, params, batch_size, config)
    except BaseException:
        shutil.rmtree(folder)
        raise


def load_programs(folder: Path) -> tuple[Callable, Callable, Params]:
    """The programs `prefill` and `decode` that a folder holds, and their parameters."""
    programs = [
        jax.jit(export.deserialize(bytearray((folder / f"{name}.bin").read_bytes())).call)
        for name in ("prefill", "decode")
    ]
    params: Params = {}
    for name, tensor in find_tensors(folder).items():
        *parts, last = name.split("/")
        inner = functools.reduce(lambda node, part: node.setdefault(part, {}), parts, params)
        inner[last] = jnp.asarray(tensor.open(), FLOATS[tensor.dtype])
    return *programs, params


def _check(folder: Path, functions: dict, params: Params, batch_size: int, config) -> None:
    """Refuse programs that give other logits than their functions.

    Raises:
      CheckpointError: with the difference.
    """
    prefill, decode, loaded = load_programs(folder)
    rng, size = np.random.default_rng(0), config.context_size
    length = max(size // 2, 1)
    tokens_BT = rng.integers(0, config.vocab_size, (batch_size, size), np.int32)
    place = np.arange(size, dtype=np.int32)
    positions_BT = np.broadcast_to(np.where(place < length, place, -1), tokens_BT.shape)
    found = []
    for first, then, tree in ((prefill, decode, loaded), (*functions.values(), params)):
        logits, cache = first(tree, tokens_BT, np.array(positions_BT), np.int32(length))
        found.append([logits])
        if length < size:
            found[-1].append(then(tree, cache, tokens_BT[:, 0])[0])
    difference = max(float(abs(a - b).max()) for a, b in zip(*found, strict=True))
    if not difference <= 1e-4:
        raise CheckpointError(
            f"{folder}: loaded again, the programs give logits that differ by up to "
            f"{difference:.3g}; they are not kept. This is a mistake of gptjax: report the config"
        )
