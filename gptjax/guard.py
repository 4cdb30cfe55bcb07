"""Which updates are taken: none whose loss or gradient is not finite, or far above the last ones.

All of it is a function of values that every device has, so all decide alike; and what it remembers
is a part of the state, so a run that goes on decides as if it had never stopped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import MOST_SPIKE_WINDOW, Config

# How far a value may vary without being unusual, as a share of the median: the least that counts as
# the values' own deviation, for those of a large batch, or of a text learned by heart, hardly vary.
LEAST_DEVIATION = 0.1
# The median of the distances from the median, times this, is a normal distribution's standard
# deviation (Rousseeuw and Croux 1993, "Alternatives to the median absolute deviation", section 1).
NORMAL = 1.4826


class Recent(NamedTuple):
    """What the updates that were taken last looked like."""

    losses: jax.Array  # float32 [MOST_SPIKE_WINDOW], the newest at the end
    grad_norms: jax.Array  # likewise
    count: jax.Array  # how many of them there are, int32
    spikes: jax.Array  # spikes since the last of them, int32


def no_recent() -> Recent:
    """Nothing, before the first step. All fields have one size in every run, so that a window may
    be set, or changed, for the rest of it.
    """
    values = jnp.zeros(MOST_SPIKE_WINDOW, jnp.float32)
    return Recent(values, values, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    recent: Recent, loss: jax.Array, grad_norm: jax.Array, step: jax.Array, config: Config
) -> tuple[jax.Array, Recent]:
    """Whether an update is to be taken, and what is recent after it.

    A spike is a finite loss or gradient norm that is far above the last `guard.spike_window`, once
    there are as many and the warm-up is over. After `guard.max_spikes` in a row the next is the new
    normal, unless the run goes back instead: then what was recent is forgotten.
    """
    guard = config.guard
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    high = new_normal = jnp.zeros_like(finite)
    if guard.spike_window:
        watched = (recent.count >= guard.spike_window) & (step >= config.optimizer.warmup_steps)
        high = (
            finite
            & watched
            & (
                _above(loss, recent.losses, guard.spike_window, guard.spike_loss)
                | _above(grad_norm, recent.grad_norms, guard.spike_window, guard.spike_grad_norm)
            )
        )
        if not guard.rollback_after:
            new_normal = high & (recent.spikes >= guard.max_spikes)
    spike = high & ~new_normal
    taken = finite & ~spike

    def push(values: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(taken, jnp.append(values[1:], value), values)

    count = jnp.minimum(jnp.where(new_normal, 0, recent.count) + taken, MOST_SPIKE_WINDOW)
    spikes = jnp.where(taken, 0, recent.spikes + spike)
    return taken, Recent(
        push(recent.losses, loss), push(recent.grad_norms, grad_norm), count, spikes
    )


def _above(
    value: jax.Array, values: jax.Array, window: int, threshold: float | None
) -> jax.Array | bool:
    """Whether a value is so many deviations over the median of the last values."""
    if threshold is None:
        return False
    last = values[-window:]
    middle = jnp.median(last)
    deviation = NORMAL * jnp.median(jnp.abs(last - middle))
    deviation = jnp.maximum(deviation, LEAST_DEVIATION * jnp.abs(middle))
    return value > middle + threshold * deviation
