"""How well a model predicts held-out text."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data import Batch, Rows, batch_at, prefetch
from gptjax.model import Params, abstract_params, resolve, token_losses
from gptjax.sharding import in_use, local_rows, replicated, to_devices


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
            losses_BT = token_losses(params, batch, model)
        bytes_BT = jnp.asarray(bytes_per_token)[batch.targets_BT]
        return jnp.stack(
            [(batch.weights_BT * x).sum() for x in (losses_BT, jnp.ones_like(losses_BT), bytes_BT)]
        )

    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config.model, mesh))
    batch = Batch(*[in_use(mesh, "BT")] * len(Batch._fields))
    return jax.jit(step, in_shardings=(params, batch), out_shardings=replicated(mesh))


def evaluate(
    params: Params, rows: Rows, step: Callable, mesh: Mesh, *, num_batches: int, prefetched: int = 2
) -> dict[str, float]:
    """The loss over the first batches of a split, every target once.

    Args:
      params: of the model, on the mesh.
      rows: of the split, with `once`.
      step: as `jit_eval_step` returns it.
      mesh: where the batches go.
      num_batches: how many are read; `rows.num_batches` for the whole split.
      prefetched: batches made ahead.
    Returns:
      "eval/loss" in nats per token, and "eval/bits_per_byte": all nats, over ln 2, over the bytes
      of the text.
    """
    which = local_rows(mesh, rows.batch_size)
    make = functools.partial(batch_at, rows=rows, which=which)
    sums = [
        step(params, to_devices(mesh, batch, rows.batch_size))
        for batch in prefetch(make, 0, num_batches, prefetched)
    ]
    # Added in float64, for a split has many batches.
    nats, weight, num_bytes = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
    return {
        "eval/loss": nats / weight,
        "eval/bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
    }
