"""The state of a run, and its step: what training runs and what a plan compiles."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data import Batch
from gptjax.guard import Recent, judge, no_recent
from gptjax.model import Params, resolve, weighted_loss
from gptjax.optim import learning_rate, make_optimizer
from gptjax.pipeline import stack_of
from gptjax.sharding import constrain_stored, in_use, replicated
from gptjax.tuning import (
    abstract_all,
    abstract_trained,
    init_all,
    joined,
    merged,
    rates,
    trained,
    trained_letters,
)


class TrainState(NamedTuple):
    """All that a step needs besides the batch."""

    step: jax.Array  # batches seen, int32
    params: Params
    opt_state: Any
    skipped: jax.Array  # updates skipped in a row up to now, int32
    recent: Recent  # losses and gradient norms of the updates before


def init_state(config: Config, key: jax.Array) -> TrainState:
    """The state before the first step."""
    return _state_of(init_all(config, key), config)


def _state_of(params: Params, config: Config) -> TrainState:
    """The state of a run that begins with these parameters."""
    optimizer = make_optimizer(config.optimizer, trained_letters(config))
    opt_state = optimizer.init(trained(params, config))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, opt_state, skipped=zero, recent=no_recent())


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on a mesh; nothing is allocated.

    Moments, which only parameters that are trained have, lie as these do; everything else is on
    every device.
    """
    params = abstract_all(config, mesh)
    shapes = jax.eval_shape(functools.partial(_state_of, config=config), params)
    everywhere = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(mesh))
    placed = {jax.tree.structure(tree): tree for tree in (params, abstract_trained(params, config))}

    def place(node: Any) -> Any:
        known = placed.get(jax.tree.structure(node))
        return everywhere(node.shape, node.dtype) if known is None else known

    return jax.tree.map(place, shapes, is_leaf=lambda node: jax.tree.structure(node) in placed)


def jit_init_state(config: Config, mesh: Mesh) -> Callable[[jax.Array], TrainState]:
    """A compiled function of a key: the state before the first step, made where it is to lie."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    # It runs once, so a CPU need not optimise it: that takes four times as long as the rest.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(
        functools.partial(init_state, config),
        out_shardings=shardings,
        compiler_options={"xla_backend_optimization_level": 0} if on_cpu else None,
    )


def with_params(state: TrainState, read: Callable[[], Params]) -> TrainState:
    """The state with other parameters, which are read once its own have made room."""
    jax.tree.map(lambda leaf: leaf.delete(), state.params)
    return state._replace(params=read())


def train_step(
    state: TrainState, batch: Batch, config: Config
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from one global batch.

    The loss is the sum of weights x losses over the whole batch divided once by the sum of its
    weights, so devices, processes and accumulated parts make no difference. An update whose loss or
    gradient is not finite, or a spike, is skipped: the parameters and the optimizer's state stay as
    they are, bit for bit, on every device.

    Returns:
      the next state, and scalars under the names of metrics.jsonl.
    """
    letters = trained_letters(config)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    loss, grads = loss_and_grads(state.params, batch, config, key)
    grads = jax.tree.map(constrain_stored, grads, letters)
    grad_norm = optax.tree.norm(grads)
    rate = learning_rate(config, state.step)
    taken, recent = judge(state.recent, loss, grad_norm, state.step, config)
    part = trained(state.params, config)
    direction, opt_state = make_optimizer(config.optimizer, letters).update(
        grads, state.opt_state, part, taken=taken
    )
    part = jax.tree.map(
        lambda value, change, scale: jnp.where(taken, value - rate * scale * change, value),
        part,
        direction,
        rates(part, config),
    )
    params = joined(state.params, part, config)
    skipped = jnp.where(taken, 0, state.skipped + 1)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/learning_rate": rate,
        "train/skipped": skipped,
        "train/spikes": recent.spikes,
        "data/batch_hash": batch_hash(batch),
    }
    return TrainState(state.step + 1, params, opt_state, skipped, recent), metrics


def loss_and_grads(
    params: Params, batch: Batch, config: Config, key: jax.Array
) -> tuple[jax.Array, Params]:
    """The mean loss of a batch over its weights, and its gradient by what is trained, computed in
    `config.accumulate` parts; of a task with an `lm_weight`, so much of the mean loss of the token
    that follows more.
    """
    task, total = config.task, batch.weights_BT.sum()
    weights_BT = batch.weights_BT / jnp.where(total == 0, 1, total)  # a batch of padding alone: 0
    batch = batch._replace(weights_BT=weights_BT)
    lm_weights_BT = following_weights(batch) * task.lm_weight if task.lm_weight else None
    part_loss = jax.value_and_grad(
        lambda tuned, part, key: weighted_loss(
            merged(joined(params, tuned, config), config),
            part[0],
            config.model,
            key=key,
            run=stack_of(config.mesh),
            smoothing=task.label_smoothing,
            lm_weights_BT=part[1],
        )
    )
    whole, tuned = (batch, lm_weights_BT), trained(params, config)
    if config.accumulate == 1:
        return part_loss(tuned, whole, key=key)

    def add(total: tuple, part: tuple[Any, jax.Array]) -> tuple[tuple, None]:
        return jax.tree.map(
            jnp.add, total, part_loss(tuned, part[0], key=jax.random.fold_in(key, part[1]))
        ), None

    # A part takes its rows from every device: rows a, a + A, a + 2A, ... so that none moves.
    parts = jax.tree.map(
        lambda x: x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1), whole
    )
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, tuned))
    return jax.lax.scan(add, zeros, (parts, jnp.arange(config.accumulate)))[0]


def following_weights(batch: Batch) -> jax.Array:
    """Weights that are alike wherever the next token is of the same segment, and 1 together."""
    segments_BT = batch.segments_BT
    same_BT = (segments_BT == jnp.roll(segments_BT, -1, axis=1)) & (segments_BT > 0)
    same_BT = same_BT.at[:, -1].set(False)
    return same_BT / jnp.maximum(same_BT.sum(), 1)


def batch_hash(batch: Batch) -> jax.Array:
    """A number that tells two global batches apart, the same on every mesh: uint32 sums do not
    depend on their order.
    """
    B, T = batch.tokens_BT.shape
    places = jnp.arange(B * T, dtype=jnp.uint32).reshape(B, T)
    mixed = [
        (x.astype(jnp.uint32) + jnp.uint32(i)) * ((places * 2 + 1) * jnp.uint32(2654435761 + 2 * i))
        for i, x in enumerate((batch.tokens_BT, batch.targets_BT, batch.segments_BT))
    ]
    return functools.reduce(jnp.add, [x.sum(dtype=jnp.uint32) for x in mixed])


def jit_train_step(
    config: Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """The compiled step: what `fit` runs and what a plan lowers. It takes the state's memory for
    the next state.
    """
    platform = mesh.devices.flat[0].platform
    config = replace(config, model=resolve(config.model, platform)[0])
    state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    batch = Batch(*[in_use(mesh, "BT")] * len(Batch._fields))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(state, batch, config)

    return jax.jit(
        step, in_shardings=(state, batch), out_shardings=(state, replicated(mesh)), donate_argnums=0
    )


def trace_train_step(config: Config, mesh: Mesh) -> jax.stages.Traced:
    """The step that `jit_train_step` returns, traced before there is a state or a batch."""
    sharding = in_use(mesh, "BT")
    shape = (config.batch_size, config.model.context_size)
    batch = Batch(
        *[
            jax.ShapeDtypeStruct(
                shape, np.float32 if name == "weights_BT" else np.int32, sharding=sharding
            )
            for name in Batch._fields
        ]
    )
    return jit_train_step(config, mesh).trace(abstract_state(config, mesh), batch)
