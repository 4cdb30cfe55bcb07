"""Models and tokenizers in the format of Hugging Face's Transformers, in and out."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import GPTConfig, MeshConfig, TuneConfig
from gptjax.hf.adapters import Adapters, base_of, is_peft, read_adapters, write_adapters
from gptjax.hf.architectures import (
    Architecture,
    closest,
    delimit_said,
    label_names,
    read_model,
    says_delimit,
)
from gptjax.hf.tensors import find_tensors, read_object, write_tensors
from gptjax.hf.tokenizers import write_tokenizer
from gptjax.hf.weights import (
    check_tensors,
    made_tensors,
    mesh_of,
    read_params,
    without_label_bias,
)
from gptjax.model import Params, forward
from gptjax.rundir import CheckpointError, sync
from gptjax.sharding import make_mesh
from gptjax.tokenizer import Tokenizer

__all__ = [
    "Adapters",
    "base_of",
    "is_hf",
    "is_peft",
    "load_hf",
    "read_adapters",
    "read_hf_config",
    "read_hf_delimit",
    "read_hf_labels",
    "save_adapters",
    "save_hf",
]

SHARD_BYTES = 5_000_000_000  # most bytes of a file of tensors, as in Transformers
TOLERANCE = 1e-4  # of logits, as a part of the largest: what a scale that is folded in may round


def is_hf(folder: Path) -> bool:
    """Whether a folder has the config.json of a model of Transformers."""
    path = folder / "config.json"
    return path.is_file() and "model_type" in read_object(path)


def read_hf_config(folder: Path) -> GPTConfig:
    """The model that a folder's config.json describes.

    Raises:
      CheckpointError: if there is none, or it cannot be read.
    """
    return _read_config(folder)[1]


def read_hf_delimit(folder: Path) -> bool:
    """Whether a folder's head has learnt examples between delimiters, as `task.delimit` has it:
    only one of ours, which says so.
    """
    return says_delimit(read_object(folder / "config.json"))


def read_hf_labels(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """What the head of a folder's model is for, as `task.kind` has it, and the names of its labels;
    None and () if it says tokens.

    Raises:
      CheckpointError: if there is no such model, or it cannot be read.
    """
    task = _read_config(folder)[0].task
    values = read_object(folder / "config.json")
    return task, label_names(values) if task in ("classify", "entities") else ()


def load_hf(
    folder: Path | str,
    mesh: Mesh | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    vocab_multiple: int = 64,
) -> tuple[GPTConfig, Params]:
    """A model of GPT-2, GPT-1, GPT-Neo, Llama or Mistral, from config.json and safetensors; of
    GPT-2 also with a head for classes of a text, for tags, or for passages.

    Each tensor is read straight to where it is to lie, so there is never a second copy of all.

    Args:
      folder: as `save_pretrained` writes it: one file of tensors or several with an index, names
        with or without their prefix, of 16, 32 or 64 bits.
      mesh: of the parameters; None: the first device.
      dtype: of the parameters.
      vocab_multiple: of the model: rows of the embedding are padded with zeros to a multiple.
    Raises:
      CheckpointError: for a folder that cannot be read as such a model; the message names every
        tensor that is missing, superfluous or mis-shaped. Files that may run code are not read.
    """
    folder = Path(folder)
    architecture, config = _read_config(folder)
    config = replace(config, vocab_multiple=vocab_multiple)
    tensors = find_tensors(folder)
    try:
        tensors = check_tensors(tensors, architecture, config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    return config, read_params(tensors, architecture, config, mesh, dtype)


def _read_config(folder: Path) -> tuple[Architecture, GPTConfig]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    try:
        return read_model(read_object(folder / "config.json"))
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(
            message if message.startswith(str(folder)) else f"{folder}: {message}"
        ) from None


def save_hf(
    folder: Path | str,
    config: GPTConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard_bytes: int = SHARD_BYTES,
    *,
    task: str | None = None,
    labels: Sequence[str] = (),
    delimit: bool = True,
) -> str:
    """Write a folder that Transformers opens as it is; its class there.

    The folder appears when all of it is written, read again, and predicts what the model does.

    Args:
      folder: not there yet, or empty.
      config: the model. The rows that pad its vocabulary are left out.
      params: of the model; all of them on devices of this process.
      tokenizer: its files are written, too; None: no files.
      dtype: of the tensors.
      shard_bytes: most bytes of a file of tensors.
      task: `task.kind` of a head of labels: "entities" if it tags each token.
      labels: their names, in the order of the head's outputs; (): they are numbered.
      delimit: `task.delimit` of what the head has learnt, which is written for `load_hf` alone.
    Raises:
      CheckpointError: if no architecture holds the model, with the options in the way; if the
        folder is not empty; or if what was written is not the model. Then nothing is left.
    """
    architecture = closest(config, task)
    params = without_label_bias(params, architecture) if params else params
    with _whole(Path(folder).absolute()) as new:
        given = (new, architecture, config, params, tokenizer, dtype, shard_bytes)
        _write(*given, labels, delimit)
        _check(new, config, params, dtype)
    return architecture.name


def save_adapters(
    folder: Path | str,
    config: GPTConfig,
    tune: TuneConfig,
    params: Params,
    base: Path | str,
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    task: str | None = None,
    labels: Sequence[str] = (),
    delimit: bool = True,
) -> tuple[str, dict[str, int]]:
    """Write adapters alone, with the head of a task, as PEFT opens them on their base.

    Args:
      folder: not there yet, or empty.
      config: the model.
      tune: how the adapters were trained.
      params: of a run with adapters.
      base: the run, or the folder of Transformers, whose weights they change.
      dtype: of the tensors.
      task: as of `save_hf`.
      labels, delimit: likewise.
    Returns:
      the class of the model in Transformers, and the rank of each kind of module that has an
      adapter.
    Raises:
      CheckpointError: as `save_hf` does.
    """
    architecture, base = closest(config, task), Path(base).absolute()
    if config.head == "lm" and is_hf(base):
        architecture = _read_config(base)[0]
    params = without_label_bias(params, architecture)
    with _whole(Path(folder).absolute()) as new:
        given = (new, architecture, config, tune, params, dtype)
        ranks = write_adapters(*given, base=base, labels=labels, delimit=delimit)
    return architecture.name, ranks


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes this one if nothing is raised."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already; give another folder, or delete it")
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        sync(new)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    sync(folder.parent)


def _write(
    folder, architecture, config, params, tokenizer, dtype, shard_bytes, labels, delimit
) -> None:
    write_tensors(folder, made_tensors(params, architecture, config), dtype, shard_bytes)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer:
        ids = (tokenizer.begin, tokenizer.end, tokenizer.pad)
        special = {
            name: token if token < config.vocab_size else None
            for name, token in zip(special, ids, strict=True)
        }
        write_tokenizer(folder, tokenizer, config)
    options = {"architectures": [architecture.name], "model_type": architecture.model_type}
    options |= architecture.write(config) | special | {"dtype": dtype, "torch_dtype": dtype}
    if config.head != "lm":
        options |= delimit_said(delimit)
    if config.num_labels:
        names = labels or label_names({"num_labels": config.num_labels})
        options["id2label"] = dict(enumerate(names))
        options["label2id"] = {name: number for number, name in enumerate(names)}
    _write_json(folder / "config.json", options)
    if architecture.task is None:
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **special})


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
    sync(path)


def _check(folder: Path, config: GPTConfig, params: Params, dtype: str) -> None:
    """Refuse a folder that does not predict what a model does with parameters of that dtype.

    Raises:
      CheckpointError: with the difference.
    """
    back, loaded = load_hf(folder, mesh_of(params))
    # How it is computed is no part of the folder.
    how = {"attention": config.attention, "remat": config.remat, "compute_dtype": "float32"}
    back, config = (replace(one, **how) for one in (back, config))
    T = min(config.context_size, 64)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, T), np.int32)
    rounded = params
    if dtype != "float32":
        rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)
    run = jax.jit(forward, static_argnames="config")
    expected, found = (
        np.asarray(run(tree, tokens_BT, model)[0])
        for tree, model in ((rounded, config), (loaded, back))
    )
    difference, most = abs(expected - found).max(), abs(expected).max()
    if not difference <= TOLERANCE * max(most, 1):
        raise CheckpointError(
            f"{folder}: read again, it gives logits that differ by up to {difference:.3g} (of "
            f"{most:.3g}): it is not kept. This is a mistake of gptjax: report the config"
        )
