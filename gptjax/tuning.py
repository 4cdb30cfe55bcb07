"""Which parameters a run trains, and how fast: all, the last blocks, or adapters of low rank."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.config import LORA_TARGETS, Config
from gptjax.model import Params, abstract_params, init_params, param_letters
from gptjax.sharding import constrain_stored, stored


def init_all(config: Config, key: jax.Array) -> Params:
    """Fresh parameters of a run: those of its model, and adapters that change nothing yet."""
    params = init_params(config.model, key)
    if config.tune.lora_rank is None:
        return params
    sizes, lora = config.model.sizes | {"R": config.tune.lora_rank}, {}
    for number, (name, letters) in enumerate(_adapter_letters(config).items()):
        down, up = (tuple(sizes[letter] for letter in letters[one]) for one in ("down", "up"))
        normal = jax.random.normal(jax.random.fold_in(key, number), down)
        # Its outputs are as large as its inputs; those of `up` are 0 (Hu et al. 2021, section 4.1).
        scale = math.prod(down[1:-1]) ** -0.5
        lora[name] = {"down": normal * scale, "up": jnp.zeros(up)}
    return params | {"lora": lora}


def all_letters(config: Config) -> Any:
    """The letters of all parameters of a run, as `param_letters` gives them of a model."""
    letters = param_letters(config.model)
    return (
        letters if config.tune.lora_rank is None else letters | {"lora": _adapter_letters(config)}
    )


def abstract_all(config: Config, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of all parameters of a run; nothing is allocated."""
    params = abstract_params(config.model, mesh)
    if config.tune.lora_rank is None:
        return params
    shapes = jax.eval_shape(functools.partial(init_all, config), jax.random.key(0))["lora"]
    lora = jax.tree.map(
        lambda shape, letters: jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=stored(mesh, letters)
        ),
        shapes,
        _adapter_letters(config),
    )
    return params | {"lora": lora}


def _adapter_letters(config: Config) -> dict[str, dict[str, str]]:
    return {
        name: {"down": f"L{inner}R", "up": f"LR{outer}"}
        for name, (_, inner, outer) in LORA_TARGETS.items()
        if name in config.tune.lora_targets
    }


def merged(params: Params, config: Config) -> Params:
    """The parameters of the model alone: adapters are added to the weights that they belong to,
    W + alpha / rank x down x up (Hu et al. 2021, equation 3).
    """
    if config.tune.lora_rank is None:
        return params
    blocks = {name: dict(part) for name, part in params["blocks"].items()}
    for name, letters in _adapter_letters(config).items():
        part, inner, outer = LORA_TARGETS[name]
        change = jnp.einsum(
            f"{letters['down']},{letters['up']}->L{inner}{outer}",
            params["lora"][name]["down"],
            params["lora"][name]["up"],
        )
        weight = blocks[part][name] + config.tune.lora_alpha / config.tune.lora_rank * change
        blocks[part][name] = constrain_stored(weight, f"L{inner}{outer}")
    return {name: part for name, part in params.items() if name != "lora"} | {"blocks": blocks}


def with_room(lora: Params, fresh: Params) -> Params:
    """Adapters of which those that are nothing, as of a block that had none, can be learnt: where
    both of its parts are 0, no gradient ever reaches an adapter.
    """
    found = {}
    for name, one in lora.items():
        down, up = one["down"], one["up"]
        bare_LR = ~up.any(axis=tuple(range(2, up.ndim))) & ~down.any(
            axis=tuple(range(1, down.ndim - 1))
        )
        shape = (len(down), *[1] * (down.ndim - 2), down.shape[-1])
        found[name] = one | {"down": jnp.where(bare_LR.reshape(shape), fresh[name]["down"], down)}
    return found


def trained(tree: Any, config: Config, cut: Callable | None = None) -> Any:
    """What of a tree of parameters, or of their letters, is trained.

    Args:
      cut: of a leaf of blocks what belongs to the last ones; None: of arrays.
    """
    tune = config.tune
    if tune.lora_rank is not None:
        labels = {name: leaf for name, leaf in tree["head"].items() if name.startswith("label")}
        return {"lora": tree["lora"], "head": labels}
    if tune.layers is None:
        return tree
    first = max(config.model.num_layers - tune.layers, 0)
    last = jax.tree.map(cut or (lambda leaf: leaf[first:]), tree["blocks"])
    return {"head": tree["head"]} | ({"blocks": last} if tune.layers else {})


def abstract_trained(params: Any, config: Config) -> Any:
    """As `trained`, of what `abstract_all` gives."""
    count = min(config.tune.layers or 0, config.model.num_layers)

    def cut(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(shape=(count, *leaf.shape[1:]))

    return trained(params, config, cut)


def trained_letters(config: Config) -> Any:
    return trained(all_letters(config), config, lambda letters: letters)


def joined(params: Params, part: Params, config: Config) -> Params:
    """The parameters with others in place of those that are trained."""
    if config.tune.lora_rank is not None:
        return params | {"lora": part["lora"], "head": params["head"] | part["head"]}
    if config.tune.layers is None:
        return part
    found = params | {"head": part["head"]}
    if "blocks" in part:
        first = max(config.model.num_layers - config.tune.layers, 0)
        found["blocks"] = jax.tree.map(
            lambda leaf, last: jnp.concatenate([leaf[:first], last]),
            params["blocks"],
            part["blocks"],
        )
    return found


def rates(part: Params, config: Config) -> Any:
    """What the learning rate of each trained parameter is multiplied by: 1 in the head, and from
    block to block down to the embedding `layer_decay` times as much (Howard and Ruder 2018,
    section 3.2).
    """
    decay, count = config.tune.layer_decay, config.model.num_layers

    def rate_of(path: tuple, leaf: jax.Array) -> Any:
        place = path[0].key
        if decay == 1 or place == "head":
            return 1.0
        if place == "embedding":
            return decay ** (count + 1)
        distance = jnp.arange(leaf.shape[0], 0, -1, dtype=jnp.float32)
        return (decay**distance).reshape(-1, *[1] * (leaf.ndim - 1))

    return jax.tree.map_with_path(rate_of, part)
