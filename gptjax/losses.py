"""What a model's output is worth: the logits of tokens and their losses, and the losses of labels.

The logits of all positions never exist at once: T goes in pieces, one after the other.
"""

import functools

import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.data import WORD_BITS, Batch
from gptjax.sharding import constrain, constrain_stored, constrain_terms, parts

# Bytes of float32 logits that may exist at once on a device, when the config does not say how many
# positions.
LOGITS_BYTES = 128 * 2**20


# --- tokens --------------------------------------------------------------------------------------


def logits_of(x_BTD: jax.Array, unembedding_VD: jax.Array, config: GPTConfig) -> jax.Array:
    """Float32 logits with the vocabulary's padding at minus infinity, as far as a float goes."""
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", x_BTD, unembedding_VD, preferred_element_type=jnp.float32
    )
    logits_BTV = constrain(logits_BTV, "BTV")
    if config.vocab_size == config.sizes["V"]:
        return logits_BTV
    return jnp.where(
        jnp.arange(config.sizes["V"]) < config.vocab_size, logits_BTV, jnp.finfo(jnp.float32).min
    )


def _softmax(
    logits_BTV: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Negative log-likelihoods of the targets [B, T], the softmax before its division [B, T, V],
    and its divisor [B, T].
    """
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    most_BT = logits_BTV.max(axis=-1)
    # Without the barrier XLA computes the exponentials twice, for the sum and for the gradient:
    # half of the time that this function takes.
    exp_BTV = jax.lax.optimization_barrier(jnp.exp(logits_BTV - most_BT[..., None]))
    sums_BT = exp_BTV.sum(axis=-1)
    return most_BT + jnp.log(sums_BT) - picked_BT, exp_BTV, sums_BT


def unembed_losses(
    x_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array, config: GPTConfig
) -> jax.Array:
    """The negative log-likelihood of each target, in nats: [B, T], float32.

    Args:
      x_BTD: the normalised stream.
      unembedding_VD: by which logits are made of it.
      targets_BT: ids below `config.vocab_size`.
      config: with nothing left to choose, as `model.resolve` makes it.
    """
    pieces = _pieces(x_BTD, targets_BT, config=config)

    @jax.checkpoint
    def piece_losses(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _softmax(logits_of(piece[0], unembedding_VD, config), piece[1])[0]

    return _join(jax.lax.map(piece_losses, pieces), config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def unembed_loss(x_BTD, unembedding_VD, targets_BT, weights_BT, config: GPTConfig) -> jax.Array:
    """The sum of weights x negative log-likelihoods, in nats.

    The same as of `unembed_losses`, but its gradient costs three products with the unembedding
    instead of four: they are made in the forward pass, while the logits of a piece of T exist.
    """

    def piece_loss(piece: tuple[jax.Array, ...]) -> jax.Array:
        x, targets, weights = piece
        return (_softmax(logits_of(x, unembedding_VD, config), targets)[0] * weights).sum()

    return jax.lax.map(piece_loss, _pieces(x_BTD, targets_BT, weights_BT, config=config)).sum()


def _forward(x_BTD, unembedding_VD, targets_BT, weights_BT, config: GPTConfig):
    """The loss, and its gradients, made while the logits of a piece exist.

    The softmax is never divided by its sums: that scales rows, so it is left to the products with
    D, which is much smaller than V. The gradient of the unembedding has a term for each device's
    rows R and positions S, which are added up once, after the last piece: each piece would else
    wait for a sum over the network that is larger than itself.
    """
    B, T, _ = x_BTD.shape
    R, S = parts("B", B), parts("T", T)

    def piece_gradients(dunembedding_RSDV: jax.Array, piece: tuple[jax.Array, ...]):
        x, targets, weights = piece
        logits_BTV = logits_of(x, unembedding_VD, config)
        losses, exp_BTV, sums = _softmax(logits_BTV, targets)
        hit_BTV = targets[..., None] == jnp.arange(config.sizes["V"])
        dlogits_BTV = jnp.where(hit_BTV, exp_BTV - sums[..., None], exp_BTV)
        dlogits_BTV = constrain(dlogits_BTV.astype(x.dtype), "BTV")
        scale = (weights / sums)[..., None]
        dx = jnp.einsum(
            "BTV,VD->BTD", dlogits_BTV, unembedding_VD, preferred_element_type=jnp.float32
        )
        # As DV, not VD: that would transpose the larger factor of the product.
        x_RbStD, dlogits_RbStV = (
            y.reshape(R, B // R, S, -1, y.shape[-1])
            for y in ((x * scale).astype(x.dtype), dlogits_BTV)
        )
        dunembedding_RSDV += jnp.einsum(
            "RbStD,RbStV->RSDV", x_RbStD, dlogits_RbStV, preferred_element_type=jnp.float32
        )
        dunembedding_RSDV = constrain(dunembedding_RSDV, "BTDV")
        return dunembedding_RSDV, ((dx * scale).astype(x.dtype), (losses * weights).sum())

    pieces = _pieces(x_BTD, targets_BT, weights_BT, config=config)
    zeros_RSDV = constrain(jnp.zeros((R, S, *unembedding_VD.shape[::-1]), jnp.float32), "BTDV")
    dunembedding_RSDV, (dx, losses) = jax.lax.scan(piece_gradients, zeros_RSDV, pieces)
    dunembedding_RSDV = constrain_terms(dunembedding_RSDV, "BTDV")
    dunembedding_VD = constrain_stored(dunembedding_RSDV.sum((0, 1)).T, "VD")
    return losses.sum(), (_join(dx, config), dunembedding_VD.astype(unembedding_VD.dtype))


def _backward(config: GPTConfig, gradients: tuple[jax.Array, jax.Array], dloss: jax.Array):
    dx_BTD, dunembedding_VD = (gradient * dloss.astype(gradient.dtype) for gradient in gradients)
    return dx_BTD, dunembedding_VD, None, None


unembed_loss.defvjp(_forward, _backward)


def _pieces(x_BTD: jax.Array, *others_BT: jax.Array, config: GPTConfig) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] cut along T: [pieces, B, T / pieces, ...].

    Of positions that are split over devices, a piece has its share from each, so that none moves.
    """
    B, T, _ = x_BTD.shape
    mesh = jax.sharding.get_abstract_mesh()
    bytes_at_once = B * config.sizes["V"] * 4 // max(mesh.size, 1)
    size = min(config.loss_piece or max(LOGITS_BYTES // max(bytes_at_once, 1), 1), T)
    apart = parts("T", T, between=config.split_residual)
    size = max(size, apart)  # a piece has something of each part
    pieces = next(n for n in range(-(-T // size), T + 1) if T % (n * apart) == 0)
    return tuple(_cut(x, apart, pieces) for x in (x_BTD, *others_BT))


def _cut(x_BT: jax.Array, apart: int, pieces: int) -> jax.Array:
    B, T, *rest = x_BT.shape
    x = x_BT.reshape(B, apart, pieces, T // apart // pieces, *rest)
    return jnp.moveaxis(x, 2, 0).reshape(pieces, B, T // pieces, *rest)


def _join(pieces: jax.Array, config: GPTConfig) -> jax.Array:
    """The inverse of `_pieces`, for one array."""
    n, B, size, *rest = pieces.shape
    apart = parts("T", n * size, between=config.split_residual)
    x = jnp.moveaxis(pieces.reshape(n, B, apart, size // apart, *rest), 0, 2)
    return x.reshape(B, n * size, *rest)


# --- labels --------------------------------------------------------------------------------------


def label_losses(
    logits_BTC: jax.Array, batch: Batch, config: GPTConfig, smoothing: float = 0.0
) -> jax.Array:
    """The losses of a head of labels at each position, in nats, [B, T]."""
    match config.head:
        case "label":
            return _class_losses(logits_BTC, batch.targets_BT, smoothing)
        case "labels":
            return _label_set_losses(logits_BTC, batch.targets_BT, smoothing)
        case "span":
            return _span_losses(logits_BTC, batch.targets_BT, batch.segments_BT)
    raise AssertionError(config.head)


def _class_losses(logits_BTC: jax.Array, targets_BT: jax.Array, smoothing: float) -> jax.Array:
    logprobs_BTC = jax.nn.log_softmax(logits_BTC)
    hit_BTC = targets_BT[..., None] == jnp.arange(logits_BTC.shape[-1])
    losses_BT = -jnp.where(hit_BTC, logprobs_BTC, 0).sum(-1)
    return (1 - smoothing) * losses_BT - smoothing * logprobs_BTC.mean(-1)


def _label_set_losses(logits_BTC: jax.Array, targets_BT: jax.Array, smoothing: float) -> jax.Array:
    """The sum over the labels, of which each is there or not. Those past the first word of bits
    have theirs at the positions before.
    """
    C = logits_BTC.shape[-1]
    words_BTW = jnp.stack(
        [jnp.roll(targets_BT, number, axis=1) for number in range(-(-C // WORD_BITS))], axis=-1
    )
    label = jnp.arange(C)
    there_BTC = words_BTW[..., label // WORD_BITS] >> (label % WORD_BITS) & 1
    share_BTC = there_BTC * (1 - smoothing) + smoothing / 2
    return (jax.nn.softplus(logits_BTC) - share_BTC * logits_BTC).sum(-1)


def _span_losses(logits_BTC: jax.Array, targets_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Of bit 1, that the passage begins here and nowhere else in the segment; of bit 2, that it
    ends here; of both, their mean.
    """

    def sums(logits_TC: jax.Array, segments_T: jax.Array) -> jax.Array:
        """For each token the log of the sum of exponentials over its segment, linear in T."""
        most = logits_TC.shape[0] + 1  # segments, with that of padding
        highest_SC = jax.ops.segment_max(jax.lax.stop_gradient(logits_TC), segments_T, most)
        highest_TC = highest_SC[segments_T]
        sum_SC = jax.ops.segment_sum(jnp.exp(logits_TC - highest_TC), segments_T, most)
        return highest_TC + jnp.log(sum_SC[segments_T])

    losses_BTC = jax.vmap(sums)(logits_BTC, segments_BT) - logits_BTC
    bits_BTC = targets_BT[..., None] >> jnp.arange(2) & 1
    return (bits_BTC * losses_BTC).sum(-1) / jnp.maximum(bits_BTC.sum(-1), 1)
