"""Models and batches small enough for a test of every combination."""

import functools
from dataclasses import replace

import jax
import numpy as np

from gptjax.config import Config, GPTConfig, OptimizerConfig, TuneConfig
from gptjax.data import Batch
from gptjax.model import Params, forward, init_params
from gptjax.sharding import make_mesh, to_devices
from gptjax.step import TrainState, abstract_state, init_state, jit_train_step

PLAIN = GPTConfig(
    vocab_size=61,
    vocab_multiple=8,
    context_size=32,
    num_layers=2,
    width=32,
    num_heads=4,
    initial_scale=0.2,  # large, so that every parameter matters to the loss
    compute_dtype="float32",
    attention="xla",
)
MODERN = GPTConfig(
    vocab_size=61,
    vocab_multiple=8,
    context_size=32,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    positions="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tied_embedding=False,
    window=7,
    window_every=2,
    initial_scale=0.2,
    compute_dtype="float32",
    attention="blockwise",
)
# What GPT-1 and GPT-Neo have, together.
OLD = replace(
    PLAIN,
    norm_place="after",
    activation="gelu_exact",
    query_bias=False,
    scale_attention=False,
    initial_scale=0.1,
)
MODELS = {"plain": PLAIN, "modern": MODERN}


# Operation by operation these take seconds.
fresh = jax.jit(init_params, static_argnums=0)


@functools.partial(jax.jit, static_argnames="config")
def logits_of(params: Params, tokens_BT: np.ndarray, config: GPTConfig, **given) -> jax.Array:
    return forward(params, tokens_BT, config, **given)[0]


def random_batch(config: Config, seed: int = 0) -> Batch:
    """Rows of two documents each, of unequal weights, with padding in the last row."""
    rng = np.random.default_rng(seed)
    B, T = config.batch_size, config.model.context_size
    tokens = rng.integers(0, config.model.vocab_size, (B, T + 1), np.int32)
    cuts = rng.integers(1, T, (B, 1))
    place = np.arange(T, dtype=np.int32)
    segments = (1 + (place >= cuts)).astype(np.int32)
    positions = np.where(place >= cuts, place - cuts, place).astype(np.int32)
    weights = rng.choice(np.float32([0, 0.5, 1, 2]), (B, T))
    weights[-1, T // 2 :] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


@functools.cache
def first_state(model: GPTConfig, optimizer: OptimizerConfig, tune: TuneConfig) -> TrainState:
    config = Config(model=model, optimizer=optimizer, tune=tune)
    return jax.device_get(jax.jit(lambda: init_state(config, jax.random.key(config.seed)))())


def run_steps(
    config: Config, num_steps: int, num_devices: int = 1
) -> tuple[list[dict], TrainState]:
    """Metrics of the first steps on a mesh of that many devices, and the state after them."""
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    state = jax.device_put(first_state(config.model, config.optimizer, config.tune), shardings)
    step = jit_train_step(config, mesh)
    metrics = []
    for seed in range(num_steps):
        state, values = step(state, to_devices(mesh, random_batch(config, seed), config.batch_size))
        metrics.append({name: value.item() for name, value in jax.device_get(values).items()})
    return metrics, state
