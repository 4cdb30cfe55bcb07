"""A model with its tokenizer, from a run, from a folder of Hugging Face's Transformers, or from one
of PEFT.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.best import best_step
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, ConfigError, DataConfig, GPTConfig, MeshConfig, TuneConfig
from gptjax.hf import (
    Adapters,
    base_of,
    is_hf,
    is_peft,
    load_hf,
    read_adapters,
    read_hf_config,
    read_hf_delimit,
    read_hf_labels,
)
from gptjax.hf.weights import by_path
from gptjax.model import Params
from gptjax.rundir import CheckpointError, read_run
from gptjax.sharding import make_mesh
from gptjax.tokenizer import Tokenizer, make_tokenizer
from gptjax.tuning import abstract_all, merged, with_room

# Fields of a model that say how it is computed or trained, not what it predicts.
CHOICES = {
    "vocab_multiple",
    "dropout",
    "initial_scale",
    "compute_dtype",
    "attention",
    "context_attention",
    "split_residual",
    "remat",
    "loss_piece",
    "head",
    "num_labels",
    "pool",
    "bidirectional",
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "encoder.json", "*.model")


def load(
    where: str | Path, *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[GPTConfig, Params, Tokenizer | None]:
    """A model to call: its config, its parameters, and its tokenizer.

        config, params, tokenizer = gptjax.load("runs/tiny")
        tokens = tokenizer.encode("To be")[None]
        logits, _ = gptjax.forward(params, tokens, config)

    Args:
      where: a run, or a folder as `save_pretrained` of Transformers or of PEFT writes it; adapters
        are merged.
      step: of a run's checkpoints; None: the best of a task's run, or the newest.
      mesh: where the parameters go; None: the first device.
    Returns:
      the config, the parameters in float32, and the tokenizer; None if a folder has no files of
      one.
    Raises:
      CheckpointError: if there is no such folder, or it cannot be read.
    """
    where = Path(where)
    config, tokenizer = read_model(where)
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    return config, load_params(where, config, mesh, step), tokenizer


def read_model(where: Path) -> tuple[GPTConfig, Tokenizer | None]:
    """The model of a run or folder, and its tokenizer.

    Raises:
      CheckpointError: if there is none, or it cannot be read.
    """
    if is_peft(where):
        model, tokenizer = read_model(base_of(where))
        return read_adapters(where, model).model, tokenizer
    if not (where.is_dir() and is_hf(where)):
        run, tokenizer = read_run(where)
        return run.model, tokenizer
    config = read_hf_config(where)
    if not any(path for pattern in TOKENIZER_FILES for path in where.glob(pattern)):
        return config, None
    try:
        return config, make_tokenizer(DataConfig(tokenizer=str(where)))
    except ConfigError as error:
        raise CheckpointError(f"{where}: its tokenizer cannot be read: {error}") from error


class Learnt(NamedTuple):
    """What a run or folder has learnt of a task."""

    kind: str | None  # None: nothing
    labels: tuple[str, ...]  # in the order of its head's outputs
    delimit: bool  # `task.delimit`


def task_of(where: Path) -> Learnt:
    """The task that a run or folder has learnt."""
    if is_peft(where):
        found = adapters_of(where)
        return Learnt(found.task, found.labels, found.delimit)
    if is_hf(where):
        kind, labels = read_hf_labels(where)
        return Learnt(kind, labels, kind is None or read_hf_delimit(where))
    task = read_run(where)[0].task
    return Learnt(task.kind, task.labels, task.delimit)


def _root(where: Path) -> Path:
    """The run, or the folder of a whole model, that a folder stands on."""
    while is_peft(where):
        where = base_of(where)
    return where


def adapters_of(where: Path) -> Adapters:
    """What a folder of PEFT holds."""
    base = base_of(where)
    return read_adapters(where, read_model(base)[0], task_of(base).labels)


def load_params(where: Path, config: GPTConfig, mesh: Mesh, step: int | None = None) -> Params:
    """The parameters of a run or folder on a mesh, for a model that `check_origin` allows; with the
    head that is there, if it is another. Adapters are merged. Without a step it is the best of a
    task's run, or the newest.
    """
    params, tune = load_apart(where, config, mesh, step)
    return merged(params, Config(model=config, tune=tune))


def load_apart(
    where: Path, config: GPTConfig, mesh: Mesh, step: int | None = None
) -> tuple[Params, TuneConfig]:
    """As `load_params`, with adapters apart, and how they were trained."""
    if is_peft(where):
        return _load_peft(where, config, mesh)
    if is_hf(where):
        return load_hf(where, mesh, vocab_multiple=config.vocab_multiple)[1], TuneConfig()
    run, _ = read_run(where)
    there = replace(config, head=run.model.head, num_labels=run.model.num_labels)
    run = replace(run, model=there)
    checkpoints = Checkpoints(where)
    if step is None and (best := best_step(where, run)) in checkpoints.steps():
        step = best
    return checkpoints.restore_params(abstract_all(run, mesh), step), run.tune


def _load_peft(where: Path, config: GPTConfig, mesh: Mesh) -> tuple[Params, TuneConfig]:
    """The parameters of their base with adapters and the head that they bring."""
    found = adapters_of(where)
    params = load_params(base_of(where), config, mesh)
    model = replace(config, head=found.model.head, num_labels=found.model.num_labels)
    like = abstract_all(Config(model=model, tune=found.tune), mesh)
    own = by_path({"lora": found.lora, "head": params["head"]}) | found.head

    def part(path: tuple, one: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = own.get(name, np.zeros(one.shape, one.dtype))  # a bias that there is none of
        return jax.device_put(leaf, one.sharding)

    brought = {name: like[name] for name in ("lora", "head")}
    return params | jax.tree.map_with_path(part, brought), found.tune


def same_base(where: Path, config: GPTConfig, params: Params, mesh: Mesh) -> bool:
    """Whether the parameters of a run with adapters are those of a run or folder, but for these and
    the head of a task. Rows that pad the vocabulary do not count.
    """
    check = by_path(load_params(where, config, mesh))
    apart = ("lora/",) if config.head == "lm" else ("lora/", "head/")
    for path, leaf in by_path(params).items():
        if path.startswith(apart):
            continue
        known = slice(
            config.vocab_size if path in ("embedding/tokens", "head/unembedding") else None
        )
        if path not in check or not np.array_equal(leaf[known], check[path][known]):
            return False
    return True


# --- what a run begins with ----------------------------------------------------------------------


def begin_with(where: Path, config: Config, mesh: Mesh, own: Params) -> Callable[[], Params]:
    """What reads the parameters that a new run begins with. Of its own it keeps adapters, and a
    head of labels, unless there are the same.

    Args:
      where: the run or folder that has them.
      config: the new run's.
      own: its fresh parameters, which may be gone when the others are read.
    """
    model = config.model
    own = {name: own[name] for name in ("head", "lora") if name in own}
    if model.head == "lm" and "lora" not in own:
        return lambda: load_params(where, model, mesh)
    order, fresh = _order_of_labels(where, config), jax.tree.map(jnp.copy, own)
    if not _goes_on(where, config.tune):
        return lambda: _with_head(load_params(where, model, mesh), fresh, order)

    def read() -> Params:
        params, _ = load_apart(where, model, mesh)
        lora = with_room(params["lora"], fresh["lora"])
        return _with_head(params, fresh | {"lora": lora}, order)

    return read


def _order_of_labels(where: Path, config: Config) -> list[int] | None:
    """Which outputs of the head of a run or folder those of a new run are; None if its head is of
    another kind, or of other labels.
    """
    there, here = read_model(where)[0], config.model
    if (there.head, there.num_labels) != (here.head, here.num_labels) or here.head == "lm":
        return None
    if here.head == "span":
        return [0, 1]
    theirs, ours = task_of(where).labels, config.task.labels
    if {*theirs} != {*ours}:
        return None
    return [theirs.index(label) for label in ours]


def about_origin(where: Path, config: Config) -> str:
    """What becomes of the head and the adapters that a run begins with, as it says it."""
    head = ""
    if config.model.head != "lm":
        known = _order_of_labels(where, config) is not None
        head = ", its head among them" if known else ", under a new head"
    return head + _about_adapters(where, config.tune)


def _about_adapters(where: Path, tune: TuneConfig) -> str:
    if not is_peft(where):
        return ""
    if _goes_on(where, tune):
        return ", whose adapters go on"
    there = adapters_of(where).tune
    return (
        f", whose adapters are merged; --tune.lora-rank {there.lora_rank} --tune.lora-alpha "
        f"{there.lora_alpha:g} --tune.lora-targets {' '.join(there.lora_targets)} lets them go on"
    )


def _goes_on(where: Path, tune: TuneConfig) -> bool:
    """Whether adapters of a folder of PEFT are those that a run trains."""
    if tune.lora_rank is None or not is_peft(where):
        return False
    there = adapters_of(where).tune
    same = (there.lora_rank, there.lora_alpha) == (tune.lora_rank, tune.lora_alpha)
    return same and {*there.lora_targets} == {*tune.lora_targets}


def _with_head(params: Params, fresh: Params, order: list[int] | None) -> Params:
    """The parameters with a fresh head, but for its norm, and fresh adapters; if there is an
    `order` of the labels of the head that they have, with that.
    """
    kept = {name: params["head"].get(name, leaf) for name, leaf in fresh["head"].items()}
    for name in ("label", "label_bias"):
        if name in kept and order is None:
            kept[name] = fresh["head"][name]
        elif name in kept and order != sorted(order):
            sharding, places = fresh["head"][name].sharding, np.array(order)
            pick = jax.jit(lambda leaf, at=places: leaf[..., at], out_shardings=sharding)
            kept[name] = pick(kept[name])
    return params | fresh | {"head": kept}


def take_over(config: Config, where: Path) -> Config:
    """The config with the model and the tokenizer of a run or folder, where it says nothing of
    them but how to compute and what to predict.

    Raises:
      CheckpointError: if there is none, or it cannot be read.
    """
    origin, tokenizer = read_model(where)
    names = {field.name for field in dataclasses.fields(GPTConfig)} - CHOICES
    names -= {"vocab_size", "context_size"}
    model, plain = config.model, GPTConfig()
    if all(getattr(model, name) == getattr(plain, name) for name in names):
        own = {name: getattr(model, name) for name in CHOICES - {"vocab_multiple"}}
        for name in ("vocab_multiple", "context_size"):  # `check_origin` says if it can be another
            if getattr(model, name) != getattr(plain, name):
                own[name] = getattr(model, name)
        model = replace(origin, **own)
    data = config.data
    if data.tokenizer == "bytes" and tokenizer and tokenizer.kind != "bytes":
        root = _root(where)
        data = replace(data, tokenizer=str(root if is_hf(root) else root / "tokenizer"))
    return replace(config, model=model, data=data)


def check_origin(where: Path, config: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    """Refuse a run or folder whose parameters are not for this model, or this tokenizer.

    Returns:
      the model; with the vocabulary that is there, if it has none yet.
    Raises:
      CheckpointError: with all differences.
    """
    origin, its_tokenizer = read_model(where)
    if config.vocab_size is None:
        config = replace(config, vocab_size=origin.vocab_size)
    names = {field.name for field in dataclasses.fields(GPTConfig)} - CHOICES
    if not is_hf(_root(where)):
        names.add("vocab_multiple")
    if config.positions == "rope":
        names.remove("context_size")  # no parameter depends on it
    pairs = [(name, getattr(origin, name), getattr(config, name)) for name in sorted(names)]
    differences = [
        f"model.{name} is {theirs!r} there and {ours!r} here"
        for name, theirs, ours in pairs
        if _effective(origin, name) != _effective(config, name)
    ]
    if origin.head != "lm" and config.head == "lm" and not config.tied_embedding:
        differences.append(f"model.head is {origin.head!r} there, so it has no unembedding")
    if its_tokenizer and its_tokenizer.fingerprint != tokenizer.fingerprint:
        differences.append(
            f"the tokenizer is of kind {its_tokenizer.kind!r} with fingerprint "
            f"{its_tokenizer.fingerprint} there, and of kind {tokenizer.kind!r} with "
            f"{tokenizer.fingerprint} here"
        )
    if differences:
        raise CheckpointError(
            f"init_from = {str(where)!r}: its parameters do not fit: {'; '.join(differences)}. "
            "Give the model and the tokenizer that it has, or another init_from"
        )
    return config


def _effective(config: GPTConfig, name: str) -> object:
    """What a field means: of sizes that may be left out, their number."""
    letters = {"num_kv_heads": "K", "head_size": "H", "ffn_size": "F"}
    return config.sizes[letters[name]] if name in letters else getattr(config, name)


def with_end(config: GPTConfig, params: Params, tokenizer: Tokenizer) -> tuple[GPTConfig, Params]:
    """The model with a row for the end of texts, if its tokenizer's is past its vocabulary, as for
    GPT-1, which has none.

    The row is the mean of all, so that the end is about as likely as a token is on average.
    """
    if tokenizer.end < config.vocab_size:
        return config, params
    grown = replace(config, vocab_size=tokenizer.end + 1)

    def grow(rows_VD: jax.Array) -> jax.Array:
        known = rows_VD[: config.vocab_size]
        bare = jnp.zeros((grown.sizes["V"], config.width), rows_VD.dtype)
        new = bare.at[config.vocab_size : grown.vocab_size].set(known.mean(axis=0))
        return new.at[: config.vocab_size].set(known)

    params = params | {"embedding": dict(params["embedding"]), "head": dict(params["head"])}
    for part, name in (("embedding", "tokens"), ("head", "unembedding")):
        if name in params[part]:
            params[part][name] = grow(params[part][name])
    return grown, params
