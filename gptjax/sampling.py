"""How the next token is chosen from its logits."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int = 200  # new tokens of each prompt
    temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest token
    top_k: int | None = None  # choose among the k likeliest
    # Choose among the fewest likeliest that hold this probability (Holtzman et al. 2020,
    # section 3.1).
    top_p: float | None = None


def choose_token(logits_BV: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw an id for each row [B] from its logits, by the rules of `sampling`, with a key a row."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if sampling.top_p is not None:
        falling = -jnp.sort(-logits_BV, axis=-1)
        probabilities = jax.nn.softmax(falling)
        likelier = (
            jnp.cumsum(probabilities, axis=-1) - probabilities
        )  # held by the tokens before each: 0 for the first
        least = jnp.where(likelier <= sampling.top_p, falling, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)
