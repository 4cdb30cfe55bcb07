"""The architectures of Transformers that hold our models: their options, and where parameters lie.

One table for each says of every parameter of ours in which tensor it is and how that is laid out;
it is read in both directions.
"""

import reprlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from gptjax.config import Config, GPTConfig, violations
from gptjax.rundir import CheckpointError


class Place(NamedTuple):
    """Where a parameter lies."""

    name: str  # of the tensor, less the architecture's prefix; {} is the number of the layer
    letters: str  # the tensor's dimensions, each the product of ours: "NH D" is [N x H, D]
    third: int | None = None  # of a last dimension in which queries, keys and values lie in turn


class Architecture(NamedTuple):
    """A class of Transformers."""

    name: str
    model_type: str  # in config.json
    prefix: str  # of the names of all tensors but the unembedding's
    places: dict[str, Place]  # by the path of the parameter
    always_biased: bool  # a model of ours without biases is held with biases of zero
    defaults: dict[str, Any]  # of config.json, where it leaves an option out
    only: dict[str, tuple]  # options that no model of ours has, with the values that mean so
    read: Callable[[dict[str, Any]], GPTConfig]  # options of config.json to a model
    write: Callable[[GPTConfig], dict[str, Any]]  # and back
    obstacles: Callable[[GPTConfig], Iterator[str]]  # what of a model it cannot hold
    # what its head is for: a class of the text, or of each token, or the ends of a passage; None:
    # the token that follows
    task: Literal["classify", "entities", "questions"] | None = None

    def expected(self, config: GPTConfig) -> dict[str, Place]:
        """The places that its tensors have for a model, by the paths of the parameters."""
        biased = self.always_biased or config.bias
        untied = not config.tied_embedding
        return {
            path: place
            for path, place in self.places.items()
            if (biased or not path.endswith("bias")) and (untied or path != UNEMBEDDING)
        }

    def full_name(self, name: str) -> str:
        return name if name in HEADS else self.prefix + name


UNEMBEDDING, LM_HEAD = "head/unembedding", "lm_head.weight"
# Tensors without the prefix.
HEADS = (LM_HEAD, "score.weight", "classifier.weight", "classifier.bias")
HEADS += ("qa_outputs.weight", "qa_outputs.bias")
# Tensors that some versions wrote and that are no parameters: masks, position ids, frequencies.
BUFFERS = (".attn.bias", "attn.masked_bias", ".attention.bias", "attention.masked_bias")
BUFFERS += ("position_ids", "rotary_emb.inv_freq")

# Their names of activations, and ours. The tanh approximation has several names.
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _theirs(activation: str) -> str:
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


def _ours(activation: str, names: dict[str, str] = ACTIVATIONS) -> str:
    if activation not in names:
        raise CheckpointError(
            f"config.json: the activation {activation!r}: give one of {', '.join(names)}"
        )
    return names[activation]


# --- GPT-2 ---------------------------------------------------------------------------------------

_GPT2_PLACES = {
    "embedding/tokens": Place("wte.weight", "V D"),
    "embedding/positions": Place("wpe.weight", "P D"),
    "blocks/attention_norm/scale": Place("h.{}.ln_1.weight", "D"),
    "blocks/attention_norm/bias": Place("h.{}.ln_1.bias", "D"),
    "blocks/attention/query": Place("h.{}.attn.c_attn.weight", "D NH", 0),
    "blocks/attention/key": Place("h.{}.attn.c_attn.weight", "D KH", 1),
    "blocks/attention/value": Place("h.{}.attn.c_attn.weight", "D KH", 2),
    "blocks/attention/query_bias": Place("h.{}.attn.c_attn.bias", "NH", 0),
    "blocks/attention/key_bias": Place("h.{}.attn.c_attn.bias", "KH", 1),
    "blocks/attention/value_bias": Place("h.{}.attn.c_attn.bias", "KH", 2),
    "blocks/attention/out": Place("h.{}.attn.c_proj.weight", "NH D"),
    "blocks/attention/out_bias": Place("h.{}.attn.c_proj.bias", "D"),
    "blocks/ffn_norm/scale": Place("h.{}.ln_2.weight", "D"),
    "blocks/ffn_norm/bias": Place("h.{}.ln_2.bias", "D"),
    "blocks/ffn/up": Place("h.{}.mlp.c_fc.weight", "D F"),
    "blocks/ffn/up_bias": Place("h.{}.mlp.c_fc.bias", "F"),
    "blocks/ffn/down": Place("h.{}.mlp.c_proj.weight", "F D"),
    "blocks/ffn/down_bias": Place("h.{}.mlp.c_proj.bias", "D"),
    "head/norm/scale": Place("ln_f.weight", "D"),
    "head/norm/bias": Place("ln_f.bias", "D"),
    UNEMBEDDING: Place(LM_HEAD, "V D"),
}


def _read_gpt2(given: dict[str, Any]) -> GPTConfig:
    return GPTConfig(
        vocab_size=given["vocab_size"],
        context_size=given["n_positions"],
        num_layers=given["n_layer"],
        width=given["n_embd"],
        num_heads=given["n_head"],
        ffn_size=given["n_inner"],
        activation=_ours(given["activation_function"]),
        norm_epsilon=given["layer_norm_epsilon"],
        scale_attention=given["scale_attn_weights"],
        tied_embedding=given["tie_word_embeddings"],
        dropout=given["resid_pdrop"],
        initial_scale=given["initializer_range"],
    )


def _write_gpt2(config: GPTConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_size,
        "n_layer": config.num_layers,
        "n_embd": config.width,
        "n_head": config.num_heads,
        "n_inner": config.sizes["F"],
        "activation_function": _theirs(config.activation),
        "layer_norm_epsilon": config.norm_epsilon,
        "scale_attn_weights": config.scale_attention,
        "tie_word_embeddings": config.tied_embedding,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": config.initial_scale,
    }


def _differs(config: GPTConfig, **allowed: tuple) -> Iterator[str]:
    """The options of a model that are not of those allowed."""
    for name, values in allowed.items():
        if (value := getattr(config, name)) not in values:
            yield f"model.{name} = {value!r}"


def _original_obstacles(config: GPTConfig) -> Iterator[str]:
    """What none of the architectures with learned positions holds."""
    yield from _differs(
        config,
        positions=("learned",),
        norm=("layernorm",),
        activation=("gelu", "gelu_exact", "relu", "silu"),
        num_kv_heads=(None, config.num_heads),
        head_size=(None, config.width / config.num_heads),
    )


def _gpt2_obstacles(config: GPTConfig) -> Iterator[str]:
    yield from _original_obstacles(config)
    yield from _differs(config, norm_place=("before",), window=(None,))


GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    places=_GPT2_PLACES,
    always_biased=True,
    defaults={
        "n_positions": 1024,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
    },
    only={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    read=_read_gpt2,
    write=_write_gpt2,
    obstacles=_gpt2_obstacles,
)

# Of heads of classes.
PROBLEM_TYPES = {"label": "single_label_classification", "labels": "multi_label_classification"}
_GPT2_TRUNK = {path: place for path, place in _GPT2_PLACES.items() if path != UNEMBEDDING}


def _read_labels(given: dict[str, Any]) -> GPTConfig:
    if given["problem_type"] is None and len(label_names(given)) == 1:
        raise CheckpointError(
            "config.json: it has one label and no problem_type, which is regression: give a head "
            "of classes, whose id2label names two or more"
        )
    head = "labels" if given["problem_type"] == PROBLEM_TYPES["labels"] else "label"
    return replace(_read_gpt2(given), head=head, num_labels=len(label_names(given)))


def _write_labels(config: GPTConfig) -> dict[str, Any]:
    return _write_gpt2(config) | {"problem_type": PROBLEM_TYPES[config.head]}


def _label_obstacles(config: GPTConfig) -> Iterator[str]:
    yield from _gpt2_obstacles(config)
    yield from _differs(config, bidirectional=(False,), pool=("last",))


# It reads the class at the last token that is no padding; its head has no bias, so ours is held by
# that of the last norm.
GPT2_CLASSES = GPT2._replace(
    name="GPT2ForSequenceClassification",
    places=_GPT2_TRUNK | {"head/label": Place("score.weight", "C D")},
    defaults=GPT2.defaults | {"problem_type": None},
    only=GPT2.only | {"problem_type": (None, *PROBLEM_TYPES.values())},
    read=_read_labels,
    write=_write_labels,
    obstacles=_label_obstacles,
    task="classify",
)
GPT2_TAGS = GPT2_CLASSES._replace(
    name="GPT2ForTokenClassification",
    places=_GPT2_TRUNK
    | {
        "head/label": Place("classifier.weight", "C D"),
        "head/label_bias": Place("classifier.bias", "C"),
    },
    write=_write_gpt2,
    task="entities",
)
GPT2_PASSAGES = GPT2._replace(
    name="GPT2ForQuestionAnswering",
    places=_GPT2_TRUNK
    | {
        "head/label": Place("qa_outputs.weight", "C D"),
        "head/label_bias": Place("qa_outputs.bias", "C"),
    },
    read=lambda given: replace(_read_gpt2(given), head="span"),
    obstacles=_label_obstacles,
    task="questions",
)


# --- GPT-1: norms after each addition, and other names of the embeddings -------------------------

# Its "gelu" is the tanh approximation.
_GPT1_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu", "relu": "relu", "silu": "silu"}
_GPT1_ACTIVATIONS["swish"] = "silu"


def _read_gpt1(given: dict[str, Any]) -> GPTConfig:
    as_gpt2 = given | {"activation_function": "relu", "n_inner": None, "scale_attn_weights": True}
    return replace(
        _read_gpt2(as_gpt2),
        activation=_ours(given["afn"], _GPT1_ACTIVATIONS),
        norm_place="after",
    )


def _write_gpt1(config: GPTConfig) -> dict[str, Any]:
    options = _write_gpt2(config) | {"afn": config.activation}
    for name in ("activation_function", "n_inner", "scale_attn_weights"):
        del options[name]
    return options


def _gpt1_obstacles(config: GPTConfig) -> Iterator[str]:
    yield from _original_obstacles(config)
    yield from _differs(
        config,
        norm_place=("after",),
        window=(None,),
        scale_attention=(True,),
        ffn_size=(None, 4 * config.width),
        activation=("gelu", "relu", "silu"),
    )


GPT1 = Architecture(
    name="OpenAIGPTLMHeadModel",
    model_type="openai-gpt",
    prefix="transformer.",
    places={
        path: place for path, place in _GPT2_PLACES.items() if not path.startswith("head/norm/")
    }
    | {
        "embedding/tokens": Place("tokens_embed.weight", "V D"),
        "embedding/positions": Place("positions_embed.weight", "P D"),
    },
    always_biased=True,
    defaults={
        "n_positions": 512,
        "afn": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
    },
    only={},
    read=_read_gpt1,
    write=_write_gpt1,
    obstacles=_gpt1_obstacles,
)


# --- GPT-Neo: banded layers, scores that are not divided, no biases of queries, keys, values -----

_NEO_PLACES = {
    "embedding/tokens": Place("wte.weight", "V D"),
    "embedding/positions": Place("wpe.weight", "P D"),
    "blocks/attention_norm/scale": Place("h.{}.ln_1.weight", "D"),
    "blocks/attention_norm/bias": Place("h.{}.ln_1.bias", "D"),
    "blocks/attention/query": Place("h.{}.attn.attention.q_proj.weight", "NH D"),
    "blocks/attention/key": Place("h.{}.attn.attention.k_proj.weight", "KH D"),
    "blocks/attention/value": Place("h.{}.attn.attention.v_proj.weight", "KH D"),
    "blocks/attention/out": Place("h.{}.attn.attention.out_proj.weight", "D NH"),
    "blocks/attention/out_bias": Place("h.{}.attn.attention.out_proj.bias", "D"),
    "blocks/ffn_norm/scale": Place("h.{}.ln_2.weight", "D"),
    "blocks/ffn_norm/bias": Place("h.{}.ln_2.bias", "D"),
    "blocks/ffn/up": Place("h.{}.mlp.c_fc.weight", "F D"),
    "blocks/ffn/up_bias": Place("h.{}.mlp.c_fc.bias", "F"),
    "blocks/ffn/down": Place("h.{}.mlp.c_proj.weight", "D F"),
    "blocks/ffn/down_bias": Place("h.{}.mlp.c_proj.bias", "D"),
    "head/norm/scale": Place("ln_f.weight", "D"),
    "head/norm/bias": Place("ln_f.bias", "D"),
    UNEMBEDDING: Place(LM_HEAD, "V D"),
}


def _read_neo(given: dict[str, Any]) -> GPTConfig:
    try:
        kinds = [kind for turn, times in given["attention_types"] for kind in turn * times]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != given["num_layers"] or {*kinds} - {"global", "local"}:
        raise CheckpointError(
            f"config.json: attention_types = {given['attention_types']!r} is not a list of kinds "
            f"for num_layers = {given['num_layers']!r}: give 'global' or 'local' for each"
        )
    period = kinds.index("local") + 1 if "local" in kinds else 1
    expected = (["global"] * (period - 1) + ["local"]) * (len(kinds) // period)
    if "local" in kinds and kinds != expected:
        raise CheckpointError(
            f"config.json: attention_types = {given['attention_types']!r}: only models can be read "
            "whose layers are all global, or of which every n-th is local"
        )
    return GPTConfig(
        vocab_size=given["vocab_size"],
        context_size=given["max_position_embeddings"],
        num_layers=given["num_layers"],
        width=given["hidden_size"],
        num_heads=given["num_heads"],
        ffn_size=given["intermediate_size"],
        activation=_ours(given["activation_function"]),
        norm_epsilon=given["layer_norm_epsilon"],
        query_bias=False,
        scale_attention=False,
        window=given["window_size"] if "local" in kinds else None,
        window_every=period,
        tied_embedding=given["tie_word_embeddings"],
        dropout=given["resid_dropout"],
        initial_scale=given["initializer_range"],
    )


def _write_neo(config: GPTConfig) -> dict[str, Any]:
    turn = ["global" if window is None else "local" for window in config.windows]
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_size,
        "num_layers": config.num_layers,
        "hidden_size": config.width,
        "num_heads": config.num_heads,
        "intermediate_size": config.sizes["F"],
        "activation_function": _theirs(config.activation),
        "layer_norm_epsilon": config.norm_epsilon,
        "attention_types": [[turn, config.num_layers // len(turn)]],
        "attention_layers": turn * (config.num_layers // len(turn)),
        "window_size": config.window or 256,
        "tie_word_embeddings": config.tied_embedding,
        "resid_dropout": config.dropout,
        "embed_dropout": config.dropout,
        "attention_dropout": 0.0,
        "initializer_range": config.initial_scale,
    }


def _neo_obstacles(config: GPTConfig) -> Iterator[str]:
    yield from _original_obstacles(config)
    yield from _differs(config, norm_place=("before",))
    if config.bias:
        yield from _differs(config, query_bias=(False,))


NEO = Architecture(
    name="GPTNeoForCausalLM",
    model_type="gpt_neo",
    prefix="transformer.",
    places=_NEO_PLACES,
    always_biased=True,
    defaults={
        "max_position_embeddings": 2048,
        "intermediate_size": None,
        "window_size": 256,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_dropout": 0.0,
        "initializer_range": 0.02,
    },
    only={},
    read=_read_neo,
    write=_write_neo,
    obstacles=_neo_obstacles,
)


# --- Llama, and Mistral, which adds a band to every layer ----------------------------------------

_LLAMA_PLACES = {
    "embedding/tokens": Place("embed_tokens.weight", "V D"),
    "blocks/attention_norm/scale": Place("layers.{}.input_layernorm.weight", "D"),
    "blocks/attention/query": Place("layers.{}.self_attn.q_proj.weight", "NH D"),
    "blocks/attention/query_bias": Place("layers.{}.self_attn.q_proj.bias", "NH"),
    "blocks/attention/key": Place("layers.{}.self_attn.k_proj.weight", "KH D"),
    "blocks/attention/key_bias": Place("layers.{}.self_attn.k_proj.bias", "KH"),
    "blocks/attention/value": Place("layers.{}.self_attn.v_proj.weight", "KH D"),
    "blocks/attention/value_bias": Place("layers.{}.self_attn.v_proj.bias", "KH"),
    "blocks/attention/out": Place("layers.{}.self_attn.o_proj.weight", "D NH"),
    "blocks/attention/out_bias": Place("layers.{}.self_attn.o_proj.bias", "D"),
    "blocks/ffn_norm/scale": Place("layers.{}.post_attention_layernorm.weight", "D"),
    "blocks/ffn/gate": Place("layers.{}.mlp.gate_proj.weight", "F D"),
    "blocks/ffn/gate_bias": Place("layers.{}.mlp.gate_proj.bias", "F"),
    "blocks/ffn/up": Place("layers.{}.mlp.up_proj.weight", "F D"),
    "blocks/ffn/up_bias": Place("layers.{}.mlp.up_proj.bias", "F"),
    "blocks/ffn/down": Place("layers.{}.mlp.down_proj.weight", "D F"),
    "blocks/ffn/down_bias": Place("layers.{}.mlp.down_proj.bias", "D"),
    "head/norm/scale": Place("norm.weight", "D"),
    UNEMBEDDING: Place(LM_HEAD, "V D"),
}


def _read_llama(given: dict[str, Any]) -> GPTConfig:
    if given["attention_bias"] != given["mlp_bias"]:
        raise CheckpointError(
            f"config.json: attention_bias = {given['attention_bias']} and mlp_bias = "
            f"{given['mlp_bias']}: only models can be read that have both kinds of bias, or none"
        )
    # Since its version 5, Transformers keeps all of RoPE's options under one name.
    rope = {"rope_theta": given["rope_theta"]} | (given["rope_scaling"] or {})
    rope |= given["rope_parameters"] or {}
    return GPTConfig(
        vocab_size=given["vocab_size"],
        context_size=given["max_position_embeddings"],
        num_layers=given["num_hidden_layers"],
        width=given["hidden_size"],
        num_heads=given["num_attention_heads"],
        num_kv_heads=given["num_key_value_heads"],
        head_size=given["head_dim"],
        ffn_size=given["intermediate_size"],
        positions="rope",
        rope_base=rope["rope_theta"],
        rope_scaling=_read_scaling(rope),
        norm="rmsnorm",
        norm_epsilon=given["rms_norm_eps"],
        activation="swiglu",
        bias=given["attention_bias"],
        tied_embedding=given["tie_word_embeddings"],
        initial_scale=given["initializer_range"],
    )


_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _read_scaling(rope: dict[str, Any]) -> tuple | None:
    kind = next((rope[name] for name in ("rope_type", "type") if rope.get(name)), "default")
    if kind == "llama3":
        if lost := [name for name in _SCALING if name not in rope]:
            raise CheckpointError(f"config.json: rope_scaling lacks {', '.join(lost)}")
        return tuple(rope[name] for name in _SCALING)
    if kind != "default":
        raise CheckpointError(
            f"config.json: rope_scaling of type {kind!r} is not supported: default and llama3 are"
        )
    return None


def _write_llama(config: GPTConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling:
        rope |= dict(zip(_SCALING, config.rope_scaling, strict=True)) | {"rope_type": "llama3"}
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.sizes["K"],
        "head_dim": config.sizes["H"],
        "intermediate_size": config.sizes["F"],
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        # Both are read: the second by Transformers before version 5.
        "rope_parameters": rope,
        "rope_theta": config.rope_base,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embedding,
        "initializer_range": config.initial_scale,
    }


def _rotary_obstacles(config: GPTConfig) -> Iterator[str]:
    yield from _differs(
        config,
        positions=("rope",),
        norm=("rmsnorm",),
        norm_place=("before",),
        activation=("swiglu",),
        scale_attention=(True,),
    )
    if config.width % config.num_heads:
        yield f"model.width = {config.width} that model.num_heads = {config.num_heads} leave a rest"


def _llama_obstacles(config: GPTConfig) -> Iterator[str]:
    yield from _rotary_obstacles(config)
    yield from _differs(config, window=(None,))


LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    prefix="model.",
    places=_LLAMA_PLACES,
    always_biased=False,
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "head_dim": None,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    only={"hidden_act": ("silu", "swish")},
    read=_read_llama,
    write=_write_llama,
    obstacles=_llama_obstacles,
)


def _read_mistral(given: dict[str, Any]) -> GPTConfig:
    return replace(
        _read_llama(given | {"attention_bias": False, "mlp_bias": False}),
        window=given["sliding_window"],
    )


def _write_mistral(config: GPTConfig) -> dict[str, Any]:
    options = _write_llama(config) | {"sliding_window": config.window}
    del options["attention_bias"], options["mlp_bias"]
    return options


def _mistral_obstacles(config: GPTConfig) -> Iterator[str]:
    yield from _rotary_obstacles(config)
    yield from _differs(config, bias=(False,), window_every=(1,))


MISTRAL = LLAMA._replace(
    name="MistralForCausalLM",
    model_type="mistral",
    places={path: place for path, place in _LLAMA_PLACES.items() if not path.endswith("_bias")},
    defaults=LLAMA.defaults
    | {"sliding_window": 4096, "max_position_embeddings": 4096 * 32, "num_key_value_heads": 8},
    read=_read_mistral,
    write=_write_mistral,
    obstacles=_mistral_obstacles,
)

# Of one model_type the first is read unless config.json names another.
ARCHITECTURES = (GPT2, GPT2_CLASSES, GPT2_TAGS, GPT2_PASSAGES, GPT1, NEO, LLAMA, MISTRAL)


# --- from config.json to a model and back --------------------------------------------------------


def read_model(values: dict[str, Any]) -> tuple[Architecture, GPTConfig]:
    """The architecture and the model that a config.json describes.

    Raises:
      CheckpointError: if it is none of ours, or has options that no model of ours has.
    """
    kind, names = values.get("model_type"), values.get("architectures") or ()
    of_kind = [one for one in ARCHITECTURES if one.model_type == kind]
    architecture = next((one for one in of_kind if one.name in names), next(iter(of_kind), None))
    if architecture is None:
        known = ", ".join(dict.fromkeys(one.model_type for one in ARCHITECTURES))
        raise CheckpointError(f"config.json: model_type = {kind!r}: give a model of {known}")
    problems = [
        f"{name} = {values[name]!r}, and only {' or '.join(map(repr, allowed))} can be read"
        for name, allowed in architecture.only.items()
        if name in values and values[name] not in allowed
    ]
    if problems:
        raise CheckpointError("config.json: " + "; ".join(problems))
    try:
        config = architecture.read(architecture.defaults | values)
    except KeyError as error:
        raise CheckpointError(f"config.json: lacks {error}; copy it again") from None
    problems = [one for one in violations(Config(model=config)) if one.startswith("model.")]
    if problems:
        raise CheckpointError("config.json: " + "; ".join(problems))
    return architecture, config


def delimit_said(delimit: bool) -> dict[str, Any]:
    """How a config.json says `task.delimit`, which Transformers passes over."""
    return {"task_specific_params": {"gptjax": {"delimit": delimit}}}


def says_delimit(values: dict[str, Any]) -> bool:
    """What it says of that; nothing is False."""
    ours = (values.get("task_specific_params") or {}).get("gptjax") or {}
    return bool(ours.get("delimit", False))


def label_names(values: dict[str, Any]) -> tuple[str, ...]:
    """The labels that a config.json names, in the order of the head's outputs; without names they
    are called as Transformers calls them.

    Raises:
      CheckpointError: if they are no numbered list.
    """
    given = values.get("id2label")
    if given is None:
        return tuple(f"LABEL_{number}" for number in range(values.get("num_labels", 2)))
    try:
        by_number = {int(number): name for number, name in given.items()}
        names = tuple(by_number[number] for number in range(len(given)))
        if names and {type(name) for name in names} == {str}:
            return names
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(
        f"config.json: id2label = {reprlib.repr(given)} does not name every label from 0 on"
    )


def closest(config: GPTConfig, task: str | None = None) -> Architecture:
    """The architecture that holds a model.

    Args:
      task: what a head of labels is for, as `Architecture.task`; None: as far as the head says.
    Raises:
      CheckpointError: if none does, with what is in the way of each.
    """
    if config.head != "label" or task is None:
        task = {"lm": None, "span": "questions"}.get(config.head, "classify")
    known = [one for one in ARCHITECTURES if one.task == task]
    in_the_way = [[*one.obstacles(config)] for one in known]
    if [] in in_the_way:
        return known[in_the_way.index([])]
    lines = [
        f"  - {one.name}: {', '.join(obstacles)}"
        for one, obstacles in zip(known, in_the_way, strict=True)
    ]
    raise CheckpointError(
        "no architecture of Transformers holds this model. In the way of\n" + "\n".join(lines)
    )
