"""The learning rate of a step, which parameters decay, and AdamW."""

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
    """Whether a parameter decays: those that map the width to or from something do, biases and
    norm scales do not.
    """
    return "D" in letters and letters.strip("L") != "D"


def make_optimizer(config: OptimizerConfig, letters: Any) -> optax.GradientTransformation:
    """Gradients -> AdamW's direction (Loshchilov and Hutter 2019, algorithm 2), to be multiplied by
    minus the learning rate.

    Args:
      config: its constants.
      letters: the tree of parameters with each leaf's letters, as `model.param_letters` gives it.
    """
    return optax.chain(
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(decays, letters)),
    )
