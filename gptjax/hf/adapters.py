"""Adapters alone, in the format of Hugging Face's PEFT: adapter_config.json, and what it describes
in adapter_model.safetensors.

An adapter adds `lora_alpha / r x B A` to the weight of a module, A [r, inputs] and B [outputs, r].
Where queries, keys and values are one module, as GPT-2's c_attn, an adapter of each becomes one of
as many times the rank: A has the rows of each in turn, and B is zero where the outputs are not its
own. So any of them may be written, and any adapter of such a module be read, as up to three.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import LORA_TARGETS, GPTConfig, TuneConfig
from gptjax.hf.architectures import (
    ARCHITECTURES,
    PROBLEM_TYPES,
    UNEMBEDDING,
    Architecture,
    closest,
    delimit_said,
    label_names,
    says_delimit,
)
from gptjax.hf.tensors import FLOATS, Made, Tensor, read_header, read_object, write_file
from gptjax.hf.weights import by_path, made_tensors
from gptjax.model import Params, param_letters
from gptjax.rundir import CheckpointError, sync

CONFIG_NAME, FILE_NAME = "adapter_config.json", "adapter_model.safetensors"
LABELS_NAME = "labels.json"  # what config.json says of a head, which PEFT has no place for
PREFIX = "base_model.model."  # of the names of all tensors
TASK_TYPES = {
    "CAUSAL_LM": None,
    "FEATURE_EXTRACTION": None,
    "SEQ_CLS": "classify",
    "TOKEN_CLS": "entities",
    "QUESTION_ANS": "questions",
}
# Options of LoRA that mean more than B A where they are set.
MORE = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Ways to begin that leave the model's own weights as they are.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


class Adapters(NamedTuple):
    """What a folder of PEFT holds."""

    model: GPTConfig  # that they belong to, with the head that they bring
    tune: TuneConfig  # by which they go on being trained
    lora: Params  # as `tuning.init_all` makes them, NumPy
    head: dict[str, np.ndarray]  # parameters of the head that they bring, by path
    task: str | None  # what that head is for
    labels: tuple[str, ...]
    delimit: bool  # `task.delimit` of what it has learnt


def is_peft(folder: Path) -> bool:
    """Whether a folder holds adapters in the format of PEFT."""
    return (folder / CONFIG_NAME).is_file()


def base_of(folder: Path) -> Path:
    """The run or folder whose weights the adapters of a folder change.

    Raises:
      CheckpointError: if it is not there.
    """
    name = read_object(folder / CONFIG_NAME).get("base_model_name_or_path")
    for path in (Path(str(name)), folder / str(name)):
        if name and path.is_dir():
            return path
    raise CheckpointError(
        f"{folder / CONFIG_NAME}: base_model_name_or_path = {name!r}: there is no such folder: set "
        "it to the run, or the folder of Transformers, whose weights the adapters change"
    )


class _Member(NamedTuple):
    """A parameter of ours that is a module of theirs, or a third of one."""

    name: str  # of LORA_TARGETS
    third: int | None
    scale: float  # what of ours is theirs


def _modules(architecture: Architecture, config: GPTConfig) -> dict[str, list[_Member]]:
    """By the name of each module, {} being the number of the layer, what of ours is in it."""
    modules = defaultdict(list)
    divided = architecture.model_type == "gpt_neo" and config.scale_attention
    for name, (part, _, _) in LORA_TARGETS.items():
        if place := architecture.places.get(f"blocks/{part}/{name}"):
            # GPT-Neo does not divide its scores, so its queries are smaller.
            scale = config.sizes["H"] ** -0.5 if divided and name == "query" else 1.0
            modules[place.name.removesuffix(".weight")].append(_Member(name, place.third, scale))
    return dict(modules)


def _suffix(module: str) -> str:
    """Less the number of the layer and what is before it."""
    return module.partition("{}.")[2]


# --- out -----------------------------------------------------------------------------------------


def write_adapters(
    folder: Path,
    architecture: Architecture,
    config: GPTConfig,
    tune: TuneConfig,
    params: Params,
    dtype: str,
    *,
    base: Path,
    labels: Sequence[str],
    delimit: bool,
) -> dict[str, int]:
    """Write adapters and, of a task, the head; the rank of each kind of module.

    Args:
      params: of a run with adapters. A bias of labels is that of the last norm, where the
        architecture has none, as `without_label_bias` makes it.
      base: the run, or folder, whose weights they change.
    """
    modules = {
        module: [one for one in members if one.name in tune.lora_targets]
        for module, members in _modules(architecture, config).items()
    }
    counts = {module: len(members) for module, members in modules.items() if members}
    saved = _saved(architecture)
    head = made_tensors({"head": params["head"]}, architecture, config)
    tensors = [(PREFIX + name, *made) for name, *made in head if name in saved]
    for module, count in counts.items():
        for layer in range(config.num_layers):
            given = (params["lora"], modules[module], layer, tune.lora_rank)
            name = PREFIX + architecture.full_name(module.format(layer))
            tensors += _tensors_of(name, *given, _sizes(config, modules[module][0].name))
        counts[module] = count * tune.lora_rank
    options = {
        "peft_type": "LORA",
        "task_type": next(name for name, task in TASK_TYPES.items() if task == architecture.task),
        "base_model_name_or_path": str(base),
        "r": tune.lora_rank,
        "lora_alpha": _plain(tune.lora_alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [_suffix(module) for module in counts],
        "rank_pattern": _pattern(counts, tune.lora_rank, tune.lora_rank),
        "alpha_pattern": _pattern(counts, tune.lora_rank, _plain(tune.lora_alpha)),
        # Of modules whose weight is [inputs, outputs].
        "fan_in_fan_out": architecture.places["blocks/ffn/up"].letters == "D F",
        "modules_to_save": sorted({_module(name) for name in saved}) or None,
        "inference_mode": True,
    }
    write_file(folder / FILE_NAME, tensors, dtype)
    _write_json(folder / CONFIG_NAME, options)
    if architecture.task is not None:
        said = delimit_said(delimit)
        if labels:
            said |= {"problem_type": PROBLEM_TYPES[config.head]}
            said |= {"id2label": dict(enumerate(labels))}
        _write_json(folder / LABELS_NAME, said)
    return {_suffix(module): rank for module, rank in counts.items()}


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
    sync(path)


def _pattern(ranks: dict[str, int], rank: int, value: float) -> dict[str, float]:
    """Of modules that have more than the rank, as many times the value."""
    return {
        _suffix(module): found // rank * value for module, found in ranks.items() if found > rank
    }


def _plain(value: float) -> float:
    """A whole number as one."""
    return int(value) if value == int(value) else value


def _sizes(config: GPTConfig, name: str) -> tuple[int, int]:
    """How many numbers a target reads, and writes."""
    _, inner, outer = LORA_TARGETS[name]
    return math.prod(_shape(config, inner)), math.prod(_shape(config, outer))


def _shape(config: GPTConfig, letters: str) -> tuple[int, ...]:
    return tuple(config.sizes[letter] for letter in letters)


def _tensors_of(
    name: str,
    lora: Params,
    members: Sequence[_Member],
    layer: int,
    rank: int,
    sizes: tuple[int, int],
) -> list[Made]:
    """A and B of a module of one layer."""
    inner, outer = sizes
    whole = outer if members[0].third is None else 3 * outer

    def make_a() -> np.ndarray:
        downs = [np.asarray(lora[one.name]["down"][layer]) for one in members]
        return np.concatenate([down.reshape(inner, rank).T for down in downs])

    def make_b() -> np.ndarray:
        b = np.zeros((whole, len(members) * rank), np.float32)
        for number, one in enumerate(members):
            up = np.asarray(lora[one.name]["up"][layer]).reshape(rank, outer)
            first = (one.third or 0) * outer
            b[first : first + outer, number * rank : (number + 1) * rank] = one.scale * up.T
        return b

    total = len(members) * rank
    return [
        (f"{name}.lora_A.weight", (total, inner), make_a),
        (f"{name}.lora_B.weight", (whole, total), make_b),
    ]


def _saved(architecture: Architecture) -> list[str]:
    """The names of tensors that are written besides: the head of a task, and the last norm, whose
    bias holds that of the labels where the head has none.
    """
    if architecture.task is None:
        return []
    places = architecture.places.items()
    return [
        architecture.full_name(place.name) for path, place in places if path.startswith("head/")
    ]


def _module(name: str) -> str:
    """The last part of a module's name, by the name of a tensor of it."""
    return name.split(".")[-2]


# --- in ------------------------------------------------------------------------------------------


def read_adapters(folder: Path, base: GPTConfig, base_labels: Sequence[str] = ()) -> Adapters:
    """The adapters of a folder.

    Args:
      base: the model whose weights they change.
      base_labels: the names of the labels of its head, which are theirs if they name none.
    Raises:
      CheckpointError: if the folder cannot be read, means more than LoRA, or is of another model;
        the message names every tensor that does not fit.
    """
    options, path = read_object(folder / CONFIG_NAME), folder / FILE_NAME
    if problems := [*_option_problems(options)]:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {'; '.join(problems)}")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {FILE_NAME}, as save_pretrained of PEFT writes it; an "
            "adapter_model.bin may run code and is not read"
        )
    labels = read_object(folder / LABELS_NAME) if (folder / LABELS_NAME).is_file() else {}
    tensors = {name.removeprefix(PREFIX): one for name, one in read_header(path).items()}
    model = _with_head(base, TASK_TYPES[options.get("task_type")], tensors, labels, path)
    architecture, tensors = _fitting(model, TASK_TYPES[options.get("task_type")], tensors)
    if problems := [*_tensor_problems(tensors, architecture, model)]:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(
            f"{path}: its tensors are not adapters of this {architecture.name}, differences: "
            f"{len(problems)}\n{lines}"
        )
    arrays = {name: _finite(one, name) for name, one in tensors.items()}
    lora = _read_lora(arrays, architecture, model, options)
    rank = max(one["down"].shape[-1] for one in lora.values())
    alpha = options["lora_alpha"]
    if rank != options["r"] or options.get("use_rslora"):
        alpha = rank * _scaling(options, options["r"], alpha)
    return Adapters(
        model=model,
        tune=TuneConfig(lora_rank=rank, lora_alpha=float(alpha), lora_targets=tuple(lora)),
        lora={name: _shaped(one, model, name, rank) for name, one in lora.items()},
        head=_read_head(arrays, architecture, model, path),
        task=architecture.task,
        labels=_names(model, labels, base_labels),
        delimit=architecture.task is None or says_delimit(labels),
    )


def _names(model: GPTConfig, said: dict[str, Any], base_labels: Sequence[str]) -> tuple[str, ...]:
    """The names of the labels of the head that adapters bring."""
    if not model.num_labels:
        return ()
    if "id2label" not in said and len(base_labels) == model.num_labels:
        return tuple(base_labels)
    return label_names({"num_labels": model.num_labels} | said)


def _option_problems(options: dict[str, Any]) -> Iterator[str]:
    if (kind := options.get("peft_type")) != "LORA":
        yield f"peft_type = {kind!r}: only LORA can be read"
        return
    if (kind := options.get("task_type")) not in TASK_TYPES:
        known = ", ".join(filter(None, TASK_TYPES))
        yield f"task_type = {kind!r}: only {known} can be read"
    for name in ("r", "lora_alpha"):
        if not isinstance(value := options.get(name), int | float) or not value > 0:
            yield f"{name} = {value!r}: it must be a number above 0"
    if (bias := options.get("bias", "none")) != "none":
        yield f"bias = {bias!r}: only adapters without biases of their own can be read"
    if (begin := options.get("init_lora_weights")) not in BEGINNINGS:
        yield f"init_lora_weights = {begin!r}: it changes the model, too: merge them with PEFT"
    for name in MORE:
        if options.get(name):
            yield f"{name} = {options[name]!r}: it adds more than LoRA does: merge them with PEFT"


def _with_head(
    base: GPTConfig,
    task: str | None,
    tensors: dict[str, Tensor],
    labels: dict[str, Any],
    path: Path,
) -> GPTConfig:
    """The model with the head that adapters bring."""
    if task is None:
        return base
    architecture = next(one for one in ARCHITECTURES if one.task == task)
    name = architecture.places["head/label"].name
    if name not in tensors:
        raise CheckpointError(
            f"{path}: the head {name} is missing: save it with them, by modules_to_save"
        )
    if task == "questions":
        return replace(base, head="span", num_labels=None)
    said = labels.get("problem_type")
    several = said == PROBLEM_TYPES["labels"] or (said is None and base.head == "labels")
    return replace(base, head="labels" if several else "label", num_labels=tensors[name].shape[0])


def _fitting(
    model: GPTConfig, task: str | None, tensors: dict[str, Tensor]
) -> tuple[Architecture, dict[str, Tensor]]:
    """The architecture that holds a model and has most of the names, and the tensors without its
    prefix.
    """
    closest(model, task)  # refuses a model that none holds
    fitting = []
    for one in ARCHITECTURES:
        if one.task == task and not [*one.obstacles(model)]:
            bare = {name.removeprefix(one.prefix): tensor for name, tensor in tensors.items()}
            wanted = _wanted(one, model)
            fitting.append((sum(name in wanted for name in bare), one, bare))
    _, architecture, bare = max(fitting, key=lambda one: one[0])
    return architecture, bare


def _wanted(architecture: Architecture, model: GPTConfig) -> dict[str, list[int | None]]:
    """The shapes of all tensors that there may be, None for a rank."""
    wanted: dict[str, list[int | None]] = {}
    for module, members in _modules(architecture, model).items():
        inner, outer = _sizes(model, members[0].name)
        for layer in range(model.num_layers):
            name = module.format(layer)
            wanted[f"{name}.lora_A.weight"] = [None, inner]
            wanted[f"{name}.lora_B.weight"] = [outer * len(members), None]
    for path, place in architecture.places.items():
        if path.startswith("head/") and path != UNEMBEDDING:
            wanted[place.name] = [model.sizes[letter] for letter in place.letters.split()]
    return wanted


def _tensor_problems(
    tensors: dict[str, Tensor], architecture: Architecture, model: GPTConfig
) -> Iterator[str]:
    wanted = _wanted(architecture, model)
    for name, one in tensors.items():
        shape = wanted.get(name)
        if shape is None:
            yield f"not known: {name} {list(one.shape)}"
        elif one.dtype not in FLOATS or len(one.shape) != len(shape):
            yield f"{name}: {one.dtype}{list(one.shape)}"
        elif any(size not in (None, given) for size, given in zip(shape, one.shape, strict=True)):
            words = ", ".join("any" if size is None else str(size) for size in shape)
            yield f"{name}: {one.dtype}{list(one.shape)}, wanted [{words}]"
    firsts = [name for name in tensors if name.endswith(".lora_A.weight")]
    if not firsts:
        yield "missing: every lora_A"
    for name in firsts:
        other = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if other is None or other.shape[-1:] != tensors[name].shape[:1]:
            yield f"{name}: there is no lora_B of its rank"


def _finite(tensor: Tensor, name: str) -> np.ndarray:
    array = np.asarray(tensor.open(), np.float32)
    if not np.isfinite(array).all():
        raise CheckpointError(f"{tensor.path}: {name} holds numbers that are not finite")
    return array


def _scaling(options: dict[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _read_lora(
    arrays: dict[str, np.ndarray],
    architecture: Architecture,
    model: GPTConfig,
    options: dict[str, Any],
) -> dict[str, dict[str, np.ndarray]]:
    """Adapters by target, [L, inner, R] and [L, R, outer], for the scaling of all: where a module
    has another one, `up` is as much larger. What no layer has is left out.
    """
    lora = {}
    usual = _scaling(options, options["r"], options["lora_alpha"])
    for module, members in _modules(architecture, model).items():
        names = {layer: module.format(layer) for layer in range(model.num_layers)}
        names = {layer: name for layer, name in names.items() if f"{name}.lora_A.weight" in arrays}
        if not names:
            continue
        inner, outer = _sizes(model, members[0].name)
        rank = max(len(arrays[f"{name}.lora_A.weight"]) for name in names.values())
        down = np.zeros((model.num_layers, inner, rank), np.float32)
        up = np.zeros((model.num_layers, rank, outer * len(members)), np.float32)
        for layer, name in names.items():
            a, b = (arrays[f"{name}.lora_{letter}.weight"] for letter in "AB")
            full = architecture.full_name(name)
            alpha = _of_pattern(options.get("alpha_pattern"), full, options["lora_alpha"])
            down[layer, :, : len(a)] = a.T
            up[layer, : len(a)] = b.T * np.float32(_scaling(options, len(a), alpha) / usual)
        for one in members:
            first = (one.third or 0) * outer
            mine = up[:, :, first : first + outer] / np.float32(one.scale)
            used = mine.any(axis=(0, 2)) if up.any() and one.third is not None else slice(None)
            if mine[:, used].shape[1]:
                lora[one.name] = {"down": down[:, :, used], "up": mine[:, used]}
    return lora


def _of_pattern(pattern: dict[str, float] | None, module: str, otherwise: float) -> float:
    """What a pattern says of a module, as PEFT reads one: the first name that it ends with, which
    is a regular expression.
    """
    for name, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({name})$", module):
            return value
    return otherwise


def _shaped(one: dict[str, np.ndarray], model: GPTConfig, name: str, rank: int) -> Params:
    """An adapter with dimensions as its letters say, and zeros up to the rank."""
    _, inner, outer = LORA_TARGETS[name]
    more = rank - one["down"].shape[-1]
    down = np.pad(one["down"], [(0, 0), (0, 0), (0, more)])
    up = np.pad(one["up"], [(0, 0), (0, more), (0, 0)])
    return {
        "down": down.reshape(model.num_layers, *_shape(model, inner), rank),
        "up": up.reshape(model.num_layers, rank, *_shape(model, outer)),
    }


def _read_head(
    arrays: dict[str, np.ndarray], architecture: Architecture, model: GPTConfig, path: Path
) -> dict[str, np.ndarray]:
    """The parameters of the head, by path."""
    letters, head = by_path(param_letters(model)), {}
    for ours, place in architecture.places.items():
        if place.name not in arrays or not ours.startswith("head/"):
            continue
        array, theirs = arrays[place.name], place.letters.replace(" ", "")
        if ours in letters:
            head[ours] = array.transpose([theirs.index(letter) for letter in letters[ours]])
        elif array.any():
            raise CheckpointError(f"{path}: {place.name}, but the model has model.bias = False")
    return head
