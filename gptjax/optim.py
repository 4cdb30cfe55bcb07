"""The learning rate of a step, which parameters decay, and AdamW."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.config import Config, OptimizerConfig


def learning_rate(config: Config, step: jax.Array | int) -> jax.Array:
    """The rate of the update that follows `step` updates, float32.

    It grows linearly over the warm-up to `learning_rate`, falls to `final_learning_rate` over the
    `decay_steps` that end `final_steps` before the last, along a cosine (Loshchilov and Hutter
    2017, equation 5) or a line, and stays there.
    """
    optimizer = config.optimizer
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    final = peak / 10 if optimizer.final_learning_rate is None else optimizer.final_learning_rate
    decay, end = optimizer.decay_steps, config.steps - optimizer.final_steps
    if decay is None:
        decay = (end - warmup) // (5 if optimizer.schedule == "constant" else 1)
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum((step + 1) / (warmup + 1), 1)
    decayed = jnp.clip((step - (end - decay)) / max(decay, 1), 0, 1)
    if optimizer.schedule == "cosine":
        decayed = (1 - jnp.cos(jnp.pi * decayed)) / 2
    return jnp.where(step < warmup, peak * warm, peak + (final - peak) * decayed)


def decays(letters: str) -> bool:
    """Whether a parameter decays: those that map the width to or from something do, and both
    matrices of an adapter; biases and norm scales do not.
    """
    return "R" in letters or ("D" in letters and letters.strip("L") != "D")


def make_optimizer(config: OptimizerConfig, letters: Any) -> optax.GradientTransformationExtraArgs:
    """Gradients -> AdamW's direction (Loshchilov and Hutter 2019, algorithm 2), to be multiplied by
    minus the learning rate.

    Its `update` takes one argument more, `taken`: where that is False the state stays as it is,
    bit for bit.

    Args:
      config: its constants.
      letters: the tree of parameters with each leaf's letters, as `model.param_letters` gives it.
    """
    return optax.chain(
        optax.identity() if config.clip_norm is None else clip_by_global_norm(config.clip_norm),
        scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(decays, letters)),
    )


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Gradients, scaled down to a global norm of `most` where it is larger (Pascanu et al. 2013,
    algorithm 1).

    `optax.clip_by_global_norm` divides each gradient by the norm, which XLA does not do twice, for
    the mean and for the squares: it keeps another copy of all gradients. Multiplying it repeats.
    """

    def update(grads: Any, state: optax.EmptyState, params: Any = None):
        scale = jnp.minimum(1, most / optax.tree.norm(grads))
        return jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(
    beta1: float, beta2: float, epsilon: float
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction (Kingma and Ba 2015, algorithm 1), with the state and the numbers of
    `optax.scale_by_adam`.

    The difference is in memory. There XLA computes the new moments once for the state and once more
    for the direction; both read the old ones, so these are copied before the new ones take their
    place. Here the direction reads the new ones.
    """

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None, *, taken=True):
        count = state.count + taken
        mu, nu = jax.lax.optimization_barrier(
            jax.tree.map(
                functools.partial(jnp.where, taken),
                (
                    optax.tree.update_moment(grads, state.mu, beta1, 1),
                    optax.tree.update_moment(grads, state.nu, beta2, 2),
                ),
                (state.mu, state.nu),
            )
        )
        direction = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + epsilon),
            optax.tree.bias_correction(mu, beta1, count),
            optax.tree.bias_correction(nu, beta2, count),
        )
        return direction, optax.ScaleByAdamState(count, mu, nu)

    init = optax.scale_by_adam(beta1, beta2, epsilon).init
    return optax.GradientTransformationExtraArgs(init, update)
