"""A model with its tokenizer, from a run or from a folder of Hugging Face's Transformers."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, ConfigError, DataConfig, GPTConfig, MeshConfig
from gptjax.hf import is_hf, load_hf, read_hf_config
from gptjax.model import Params
from gptjax.rundir import CheckpointError, read_run
from gptjax.sharding import make_mesh
from gptjax.tokenizer import Tokenizer, make_tokenizer
from gptjax.tuning import abstract_all, merged

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
      where: a run, or a folder as `save_pretrained` of Transformers writes it.
      step: of a run's checkpoints; None: the newest.
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


def load_params(where: Path, config: GPTConfig, mesh: Mesh, step: int | None = None) -> Params:
    """The parameters of a run or folder on a mesh, for a model that `check_origin` allows; with the
    head that is there, if it is another. Adapters are merged.
    """
    if is_hf(where):
        return load_hf(where, mesh, vocab_multiple=config.vocab_multiple)[1]
    run, _ = read_run(where)
    there = replace(config, head=run.model.head, num_labels=run.model.num_labels)
    run = replace(run, model=there)
    return merged(Checkpoints(where).restore_params(abstract_all(run, mesh), step), run)


def with_head(params: Params, fresh: Params, *, same: bool) -> Params:
    """The parameters with a fresh head, but for its norm, and fresh adapters; a head of the `same`
    kind they keep.
    """
    labels = () if same else ("label", "label_bias")
    kept = {
        name: leaf if name in labels else params["head"].get(name, leaf)
        for name, leaf in fresh["head"].items()
    }
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
        if origin.positions == "rope" and model.context_size != plain.context_size:
            own["context_size"] = model.context_size
        model = replace(origin, **own)
    data = config.data
    if data.tokenizer == "bytes" and tokenizer and tokenizer.kind != "bytes":
        folder = where if is_hf(where) else where / "tokenizer"
        data = replace(data, tokenizer=str(folder))
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
    if not is_hf(where):
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
