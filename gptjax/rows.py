"""The rows that a config names: for training, and for validation."""

import functools
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.config import Config, ConfigError, GPTConfig
from gptjax.corpus import load_corpus
from gptjax.data import Member, Rows, check_rows
from gptjax.exclusions import Exclusion, read_exclusions
from gptjax.faults import at
from gptjax.sources import DataError
from gptjax.store import Store
from gptjax.tokenizer import Tokenizer


def with_vocabulary(model: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    """The model with a vocabulary that holds the tokenizer's."""
    size = model.vocab_size or tokenizer.vocab_size
    # Padding is never predicted: models of others often have no id for it.
    least = tokenizer.vocab_size - (tokenizer.pad == tokenizer.vocab_size - 1)
    if size < least:
        raise ConfigError(
            f"model.vocab_size = {size:,}, but the tokenizer has {tokenizer.vocab_size:,} ids: "
            "give as many or more, or None to take the tokenizer's"
        )
    return replace(model, vocab_size=size)


def load_rows(config: Config, tokenizer: Tokenizer) -> tuple[Rows, dict[str, Rows]]:
    """The rows for training, and for validation those of each store that holds some out, by its
    name in a mixture or by "".

    Process 0 builds the stores that are not there yet; the others wait.

    Raises:
      DataError: for text or stores that cannot be used.
    """
    if config.task.kind is not None:
        raise DataError(
            f"task.kind = {config.task.kind!r}: such a run has no token store, it reads the "
            "examples of task.train; look at these, or at RUN/said"
        )
    if jax.process_index() == 0:
        at("prepare")
        stores = _load_stores(config, tokenizer, progress=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("stores are built")
    if jax.process_index() > 0:
        stores = _load_stores(config, tokenizer, progress=False)

    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    order = {
        "context_size": config.model.context_size,
        "batch_size": config.batch_size,
        "seed": config.seed,
        # Nothing sees padding: where the model has no id for it, another serves.
        "pad": tokenizer.pad if tokenizer.pad < vocab_size else tokenizer.end,
        "end": tokenizer.end,
    }
    data = config.data
    if data.mixture:
        members = [
            Member(
                store=stores[one.name][0],
                name=one.name,
                weight=one.weight,
                weights=one.weights,
                max_epochs=min(filter(None, (one.max_epochs, data.max_epochs)), default=None),
            )
            for one in data.mixture
        ]
    else:
        ((train, _),) = stores.values()
        members = [Member(store=train, max_epochs=data.max_epochs)]
    valid = {
        name: Rows(members=(Member(store=held_out, name=name),), shuffle=False, once=True, **order)
        for name, (_, held_out) in stores.items()
        if held_out
    }
    return Rows(members=tuple(members), shuffle=data.shuffle, skip=data.skip, **order), valid


def _load_stores(
    config: Config, tokenizer: Tokenizer, *, progress: bool
) -> dict[str, tuple[Store, Store | None]]:
    """The stores for training and validation: of each store of a mixture by its name, or of the one
    that there is by "".
    """
    data = config.data
    # A batch is not of one store alone in a mixture, so that need not fill it.
    batch_size = 1 if data.mixture else config.batch_size

    def accept(split: str, num_tokens: int) -> None:
        check_rows(num_tokens, config.model.context_size, batch_size, split)

    load = functools.partial(load_corpus, tokenizer=tokenizer, accept=accept, progress=progress)
    if not data.mixture:
        return {"": load(data)}
    stores = {}
    for one in data.mixture:
        own = {name: getattr(one, name) for name in ("path", "exclude", "valid_path", "holdout")}
        try:
            stores[one.name] = load(replace(data, mixture=(), **own))
        except DataError as error:
            raise DataError(f"data.mixture, {one.name}: {error}") from error
    return stores


def take_up(run_dir: Path, start: int) -> tuple[Exclusion, ...]:
    """What the run leaves out, which goes on from a step: what was recorded since it was last
    started has not been in effect before.

    Raises:
      DataError: if the record cannot be read, or the processes read different ones.
    """
    exclusions = tuple(
        one if one.taken_up else replace(one, taken_up=True, from_step=start)
        for one in read_exclusions(run_dir)
    )
    if jax.process_count() > 1:
        digest = np.uint32(zlib.crc32(repr(exclusions).encode()))
        if len(set(multihost_utils.process_allgather(digest).tolist())) > 1:
            raise DataError(f"{run_dir}: skipped.json changed just as the run started; start again")
    return exclusions
