"""How well a model predicts held-out text."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, GPTConfig
from gptjax.data import Batch, Passage, Rows, prefetch
from gptjax.model import Params, resolve, token_losses
from gptjax.pipeline import stack_of
from gptjax.sharding import in_use, local_rows, replicated, to_devices
from gptjax.tuning import abstract_all, merged


def jit_eval_step(
    config: Config, mesh: Mesh, bytes_per_token: np.ndarray
) -> Callable[[Params, Batch], jax.Array]:
    """A compiled function of params and a batch: the sums of weights x losses, of weights, and of
    the targets' bytes.

    Args:
      config: the run.
      mesh: where the parameters and the batch lie.
      bytes_per_token: [vocab_size], UTF-8 bytes that each id stands for.
    """
    model = resolve(config.model, mesh.devices.flat[0].platform)[0]

    def step(params: Params, batch: Batch) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            losses_BT = token_losses(
                merged(params, config), batch, model, run=stack_of(config.mesh)
            )
        bytes_BT = jnp.asarray(bytes_per_token)[batch.targets_BT]
        return jnp.stack(
            [(batch.weights_BT * x).sum() for x in (losses_BT, jnp.ones_like(losses_BT), bytes_BT)]
        )

    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_all(config, mesh))
    batch = Batch(*[in_use(mesh, "BT")] * len(Batch._fields))
    return jax.jit(step, in_shardings=(params, batch), out_shardings=replicated(mesh))


def evaluate(
    params: Params,
    splits: Mapping[str, Rows],
    step: Callable,
    mesh: Mesh,
    *,
    max_batches: int | None = None,
    prefetched: int = 2,
    begin: Callable[[], bool] = lambda: True,
    request: Future[None] | None = None,
) -> dict[str, float] | None:
    """The loss over the first batches of each split, every target once.

    Args:
      params: of the model, on the mesh.
      splits: rows of each by its name, with `once`; one alone may have the name "".
      step: as `jit_eval_step` returns it.
      mesh: where the batches go.
      max_batches: how many of each split are read; None: all.
      prefetched: batches made ahead.
      begin: asked before each batch; False ends the evaluation.
      request: when it is done, no more batches are waited for.
    Returns:
      "eval/loss" in nats per token, and "eval/bits_per_byte": all nats, over ln 2, over the bytes
      of the text; of all splits together, and as "eval/NAME/loss" and so on of each with a name.
      None if the evaluation was ended.
    """
    totals = {}
    for name, rows in splits.items():
        num_batches = min(max_batches or rows.num_batches, rows.num_batches)
        make = functools.partial(rows.batch_at, which=local_rows(mesh, rows.batch_size))
        sums = []
        with closing(prefetch(make, 0, num_batches, prefetched, request)) as batches:
            for batch in batches:
                if not begin():
                    return None
                sums.append(step(params, to_devices(mesh, batch, rows.batch_size)))
        if len(sums) < num_batches:
            return None
        # Added in float64, for a split has many batches.
        totals[name] = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
    figures = _figures("eval", sum(totals.values()))
    for name, total in totals.items():
        figures |= _figures(f"eval/{name}", total) if name else {}
    return figures


def _figures(prefix: str, total: np.ndarray) -> dict[str, float]:
    nats, weight, num_bytes = total
    return {
        f"{prefix}/loss": nats / weight,
        f"{prefix}/bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
    }


_losses = jax.jit(token_losses, static_argnames="config")  # compiled once for all calls


def document_losses(
    params: Params,
    batch: Batch,
    passages: Sequence[Passage],
    model: GPTConfig,
    rows_at_once: int = 8,
) -> list[tuple[float, int]]:
    """How well a model predicts each document of a batch.

    Args:
      params: of the model, on one device.
      batch: rows of one step.
      passages: of the same rows, in their order.
      model: with all that is to be resolved.
      rows_at_once: the model is given so many, whatever the size of the batch.
    Returns:
      for each passage the sum of its tokens' losses in nats, and how many count.
    """
    B = len(batch.tokens_BT)
    size, parts = min(rows_at_once, B), []
    for first in range(0, B, size):
        start = min(first, B - size)  # the last part begins earlier: one size is compiled
        part = Batch(*(x[start : start + size] for x in batch))
        parts.append(np.asarray(_losses(params, part, config=model))[first - start :])
    losses_BT = np.concatenate(parts)
    sums, before, column = [], None, 0
    for passage in passages:
        column = column if passage.row == before else 0
        before, stop = passage.row, column + passage.stop - passage.start
        row = passage.row - passages[0].row
        weights = batch.weights_BT[row, column:stop]
        nats = (weights * losses_BT[row, column:stop]).sum(dtype=np.float64)
        sums.append((float(nats), int(weights.sum())))
        column = stop
    return sums
