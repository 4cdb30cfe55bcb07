"""What a config must be to run: the rules between its fields."""

import dataclasses
import itertools
import math
import re
import reprlib
import types
from collections.abc import Collection, Iterator
from typing import Any

from gptjax.config.fields import (
    BLOCK_ROWS,
    LORA_TARGETS,
    MOST_SPIKE_WINDOW,
    Config,
    TaskConfig,
    TuneConfig,
    default_ffn_size,
    weight_at,
)
from gptjax.config.kinds import did_you_mean, field_problems, refuse


def check(config: Config, num_devices: int | None = None) -> None:
    """Refuse a config that cannot run, before anything is allocated.

    Args:
      config: the run.
      num_devices: devices of the whole run; None leaves out the rules that need it.
    Raises:
      ConfigError: with all violations.
    """
    refuse(violations(config, num_devices))


def violations(
    config: Config, num_devices: int | None = None, *, settled: bool = True
) -> list[str]:
    """What is wrong with a config: for each violation what was given, what is allowed, what to do.

    A rule between fields is left out when one of them has no usable value: that is a violation too.

    Args:
      settled: False: the model may still become that of `init_from`, so rules of it are left out.
    """
    wrong = field_problems(config, Config)
    unusable = {re.sub(r"(\[\d+\])+$", "", path) for path in wrong}  # a wrong item: the whole tuple
    problems, readable = list(wrong.values()), _readable("", config, unusable)
    for rule in (*RULES, *(MODEL_RULES if settled else ())):
        try:
            for problem in rule(readable, num_devices):
                problems.append(problem)  # those before a field that is not there count
        except AttributeError:
            if not wrong:
                raise
    return problems


def _readable(path: str, value: Any, wrong: Collection[str]) -> Any:
    """The same fields without those at a wrong path."""
    if isinstance(value, tuple):
        return tuple(_readable(f"{path}[{i}]", item, wrong) for i, item in enumerate(value))
    if not dataclasses.is_dataclass(value):
        return value
    paths = {f.name: f"{path}.{f.name}".lstrip(".") for f in dataclasses.fields(value)}
    return types.SimpleNamespace(
        **{
            name: _readable(below, getattr(value, name), wrong)
            for name, below in paths.items()
            if below not in wrong
        }
    )


HEADS = ("classify", "entities", "questions")  # tasks with a head of their own
# Fields of a task that only some kinds read.
KINDS_OF = {
    "second_column": ("classify",),
    "label_column": ("classify", "entities", "choices"),
    "label_columns": ("classify",),
    "first_label": ("classify", "entities"),
    "several": ("classify",),
    "label_separator": ("classify",),
    "class_weights": ("classify", "entities"),
    "label_smoothing": ("classify", "entities"),
    "scheme": ("entities",),
    "joiner": ("entities",),
    "repeat": ("entities",),
    "max_answer": ("questions",),
    "answers": ("questions",),
    "source_column": ("pairs",),
    "target_column": ("pairs",),
    "bleu_tokens": ("pairs", "dialogue"),
    "messages_column": ("dialogue",),
    "role_key": ("dialogue",),
    "content_key": ("dialogue",),
    "assistant": ("dialogue",),
    "system": ("dialogue",),
    "turn": ("dialogue",),
    "choice_columns": ("choices",),
    "first_choice": ("choices",),
    "words": ("classify",),
    "lm_weight": HEADS,
}


# --- rules between fields: each yields its violations ------------------------------------------


def _multiple(name: str, value: int, of: str, divisor: int, otherwise: str = "") -> Iterator[str]:
    if rest := value % divisor:
        near = " or ".join(str(n) for n in (value - rest, value - rest + divisor) if n)
        yield (
            f"{name} = {value} is not a multiple of {of} = {divisor} (remainder {rest}): "
            f"give {name} {near}{otherwise}"
        )


def _name_is_a_folder(config: Config, _: int | None) -> Iterator[str]:
    if config.name in ("", ".", "..") or set(config.name) & set("/\\\0"):
        yield f"name = {config.name!r}: it names a folder: give letters, digits, '-' and '_'"


def _heads(config: Config, _: int | None) -> Iterator[str]:
    model = config.model
    if model.num_kv_heads:
        heads, kv_heads = model.num_heads, model.num_kv_heads
        yield from _multiple("model.num_heads", heads, "model.num_kv_heads", kv_heads)
    if model.head_size is None:
        otherwise = ", or model.head_size"
        yield from _multiple(
            "model.width", model.width, "model.num_heads", model.num_heads, otherwise
        )
    head_size = model.head_size or model.width // model.num_heads
    if model.positions == "rope" and head_size % 2:
        near = " or ".join(str(size) for size in (head_size - 1, head_size + 1) if size)
        yield (
            f"model.head_size = {head_size}: RoPE turns pairs of numbers, so it must be even: "
            f"give model.head_size {near}"
        )


def _rope_scaling(config: Config, _: int | None) -> Iterator[str]:
    model = config.model
    if model.rope_scaling is None:
        return
    if model.positions != "rope":
        yield (
            f"model.rope_scaling is given, but model.positions = {model.positions!r}: give "
            "model.positions rope, or model.rope_scaling None"
        )
    _, low, high, _ = model.rope_scaling
    if low >= high:
        yield (
            f"model.rope_scaling = {model.rope_scaling}: the factor of low frequencies, {low:g}, "
            f"must be below that of high ones, {high:g}, as in 8 1 4 8192"
        )


def _head(config: Config, _: int | None) -> Iterator[str]:
    model, task = config.model, config.task
    labelled = model.head in ("label", "labels")
    if labelled and model.num_labels is None and task.kind is None:
        yield f"model.head = {model.head!r}, but model.num_labels is None: give model.num_labels"
    if not labelled and model.num_labels is not None:
        yield (
            f"model.num_labels = {model.num_labels}, but model.head = {model.head!r}: give "
            "model.head label or labels, or model.num_labels None"
        )
    classes = task.kind == "classify" if task.kind else labelled
    if model.pool == "mean" and not classes:
        yield (
            f"model.pool = 'mean', but task.kind = {task.kind!r} with model.head = "
            f"{model.head!r} has no class of a whole text: give model.pool last, or "
            "task.kind classify"
        )
    says_tokens = task.kind in ("pairs", "dialogue", "choices") or (
        model.head == "lm" and task.kind is None
    )
    if model.bidirectional and says_tokens:
        yield (
            "model.bidirectional = True, but the token that follows is to be predicted: give "
            "model.bidirectional False, or a task of kind classify, entities or questions"
        )


def _tune(config: Config, _: int | None) -> Iterator[str]:
    tune = config.tune
    if tune.layers is not None and tune.layers > config.model.num_layers:
        yield (
            f"tune.layers = {tune.layers}, but model.num_layers = {config.model.num_layers}: give "
            "at most as many"
        )
    says_labels = config.task.kind in HEADS or config.model.head != "lm"
    bare = config.model.norm_place == "after" and config.model.tied_embedding
    if tune.layers == 0 and bare and not says_labels:
        yield "tune.layers = 0, but the head of this model has nothing to train: give more layers"
    if tune.lora_rank is None:
        for name in ("lora_alpha", "lora_targets"):
            if (given := getattr(tune, name)) != getattr(TuneConfig, name):
                yield (
                    f"tune.{name} = {given!r}, but tune.lora_rank is None: give --tune.lora-rank, "
                    f"or leave tune.{name} out"
                )
        return
    if tune.layers is not None:
        yield (
            f"tune.layers = {tune.layers} and tune.lora_rank = {tune.lora_rank} exclude each "
            "other: give one of them"
        )
    swiglu = config.model.activation == "swiglu"
    allowed = [name for name in LORA_TARGETS if swiglu or name != "gate"]
    for name in tune.lora_targets:
        if name not in allowed:
            near = did_you_mean(name, allowed)
            yield f"tune.lora_targets: {name!r}: give some of {', '.join(allowed)}.{near}"
    if not tune.lora_targets:
        yield f"tune.lora_targets is empty: give some of {', '.join(allowed)}"


def _windows(config: Config, _: int | None) -> Iterator[str]:
    model = config.model
    if model.window is not None:
        every = model.window_every
        yield from _multiple("model.num_layers", model.num_layers, "model.window_every", every)
    elif model.window_every != 1:
        yield (
            f"model.window_every = {model.window_every}, but model.window is None: give "
            "model.window, or model.window_every 1"
        )


def _learning_rates(config: Config, _: int | None) -> Iterator[str]:
    highest, final = config.optimizer.learning_rate, config.optimizer.final_learning_rate
    if final is not None and final > highest:
        yield (
            f"optimizer.final_learning_rate = {final:g} is above optimizer.learning_rate = "
            f"{highest:g}: give at most that"
        )


def _schedule(config: Config, _: int | None) -> Iterator[str]:
    if config.task.kind is None or config.task.epochs is None:  # else its steps are not known yet
        yield from schedule_problems(config)


def schedule_problems(config: Config) -> Iterator[str]:
    """Whether the parts of the learning rate's schedule fit into the steps."""
    names = ("warmup_steps", "decay_steps", "final_steps")
    parts = {name: getattr(config.optimizer, name) or 0 for name in names}
    if (total := sum(parts.values())) > config.steps:
        terms = " + ".join(f"{name} {size}" for name, size in parts.items())
        of, more = "", f"steps {total}"
        if config.task.kind and config.task.epochs is not None:
            of, more = f", as task.epochs = {config.task.epochs:g} are", "more epochs"
        yield (
            f"optimizer: {terms} = {total}, but steps = {config.steps}{of}: "
            f"give fewer of them, or {more}"
        )


def _guard(config: Config, _: int | None) -> Iterator[str]:
    guard = config.guard
    if 0 < guard.spike_window < 16:
        yield (
            f"guard.spike_window = {guard.spike_window}: too few to tell what is usual: "
            f"give 16 to {MOST_SPIKE_WINDOW}, or 0 to take every finite update"
        )
    if guard.rollback_after and guard.rollback_after > guard.max_nonfinite:
        yield (
            f"guard.rollback_after = {guard.rollback_after} is more than guard.max_nonfinite = "
            f"{guard.max_nonfinite}, after which the run stops: give at most as many"
        )


def _data(config: Config, _: int | None) -> Iterator[str]:
    data = config.data
    if config.task.kind is not None:
        return
    if not data.path and not data.mixture:
        yield "data.path is empty: give files, folders or globs, as in --data.path text.txt"
    stores = data.mixture or [data]
    if config.eval_every is not None and not any(one.holdout or one.valid_path for one in stores):
        each = "in every store of data.mixture " if data.mixture else ""
        section = "" if data.mixture else "data."
        yield (
            f"{each}{section}holdout = 0 and {section}valid_path is empty, so there is nothing to "
            "evaluate on: give one of them, or eval_every None"
        )


def _task(config: Config, _: int | None) -> Iterator[str]:
    task = config.task
    if task.kind is None:
        for name in ("train", "valid", "test", "epochs", "patience", *KINDS_OF):
            if (given := getattr(task, name)) != getattr(TaskConfig, name):
                yield (
                    f"task.{name} = {reprlib.repr(given)}, but task.kind is None: give "
                    "task.kind, such as --task.kind classify"
                )
        return
    yield from _of_other_kinds(task, TaskConfig())
    if not task.train:
        yield "task.train is empty: give files of labelled examples, as in --task.train train.tsv"
    if config.eval_every is not None and not task.valid:
        yield (
            "task.valid is empty, so there is nothing to evaluate on: give --task.valid FILE, or "
            "eval_every None"
        )


def _of_other_kinds(task: TaskConfig, plain: TaskConfig) -> Iterator[str]:
    """Fields that make no difference to a task, where they are not as in another one."""
    for name, kinds in KINDS_OF.items():
        if (given := getattr(task, name)) != getattr(plain, name) and task.kind not in kinds:
            yield (
                f"task.{name} = {reprlib.repr(given)}, but task.kind = {task.kind!r}: leave it "
                f"out, or give task.kind {' or '.join(kinds)}"
            )


def check_task(task: TaskConfig, own: TaskConfig) -> None:
    """Refuse a task that a run cannot be asked.

    Args:
      own: the run's task, whose fields are no mistakes.
    Raises:
      ConfigError: with all violations.
    """
    refuse([*_of_other_kinds(task, own), *_task_texts(Config(task=task), None)])


def _task_evaluation(config: Config, _: int | None) -> Iterator[str]:
    task = config.task
    if task.kind is None:
        return
    if config.eval_batches is not None and task.kind in HEADS:
        yield (
            f"eval_batches = {config.eval_batches}, but the figures of a task are those of all "
            "examples: give eval_batches None, and fewer examples in task.valid"
        )
    if task.patience is not None and config.eval_every is None:
        yield (
            f"task.patience = {task.patience}, but eval_every is None: give eval_every, or "
            "task.patience None"
        )


def _task_losses(config: Config, _: int | None) -> Iterator[str]:
    task, model = config.task, config.model
    if task.lm_weight and (model.bidirectional or not model.tied_embedding):
        yield (
            f"task.lm_weight = {task.lm_weight:g} needs model.bidirectional False and "
            "model.tied_embedding True: give these, or 0"
        )


def _task_texts(config: Config, _: int | None) -> Iterator[str]:
    task = config.task
    if len({*task.labels}) < len(task.labels):
        yield f"task.labels = {reprlib.repr(task.labels)}: a label is given twice: give each once"
    if task.text_column and task.text_column == task.label_column:
        yield (
            f"task.text_column and task.label_column are both {task.text_column!r}: give the "
            "column of each"
        )
    if task.delimiter is not None and (len(task.delimiter) != 1 or task.delimiter in '"\r\n'):
        yield f"task.delimiter = {task.delimiter!r}: give one character, as in --task.delimiter ';'"
    if task.words and len(task.words) != len(task.labels):
        yield (
            f"task.words has {len(task.words)} words, but task.labels {len(task.labels)} labels: "
            "give task.labels, and a word for each of them in the same order"
        )
    role, content = task.turn.find("{role}"), task.turn.find("{content}")
    if content < 0 or role > content or task.turn.count("{content}") > 1:
        yield (
            f"task.turn = {task.turn!r}: give a text with {{role}} before {{content}}, each once"
        )
    for name, kind in (("parallel", "pairs"), ("folders", "classify")):
        if task.file_format == name and task.kind not in (None, kind):
            yield (
                f"task.file_format = {name!r}, but task.kind = {task.kind!r}: give task.kind {kind}"
            )
    if task.label_columns and not task.several:
        yield (
            f"task.label_columns = {reprlib.repr(task.label_columns)}, of which any number may "
            "say 1, but task.several is False: give task.several True"
        )
    # A run's own config has the labels too, which are those columns.
    for name, own in (("label_column", None), ("labels", task.label_columns)):
        if task.label_columns and (given := getattr(task, name)) and given != own:
            yield (
                f"task.label_columns and task.{name} = {reprlib.repr(given)} exclude each other: "
                "labels are called as their columns; give one of the two"
            )


def _mixture_alone(config: Config, _: int | None) -> Iterator[str]:
    data = config.data
    for name in ("path", "exclude", "valid_path") if data.mixture else ():
        if given := getattr(data, name):
            yield (
                f"data.{name} = {reprlib.repr(given)} and data.mixture exclude each other: give "
                f"the {name} of each store of the mixture, or no mixture"
            )


def _mixture_stores(config: Config, _: int | None) -> Iterator[str]:
    before: dict[str, int] = {}
    for i, store in enumerate(config.data.mixture):
        here = f"data.mixture[{i}]"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", store.name):
            yield (
                f"{here}.name = {store.name!r}: it is a part of the names of metrics: give "
                "letters from A to Z, digits, '-' and '_'"
            )
        elif store.name in before:
            yield (
                f"{here}.name = {store.name!r} is that of data.mixture[{before[store.name]}] too: "
                "give each store another"
            )
        before.setdefault(store.name, i)
        if not store.path:
            yield f"{here}.path is empty: give files, folders or globs, as in ('text.txt',)"


def _mixture_weights(config: Config, _: int | None) -> Iterator[str]:
    stores = config.data.mixture
    for i, store in enumerate(stores):
        for (step, _), (following, _) in itertools.pairwise(store.weights):
            if following <= step:
                yield (
                    f"data.mixture[{i}].weights: step {following} comes after step {step}: give "
                    "the pairs with ascending steps"
                )
                return
    steps = sorted({1}.union(*({step for step, _ in store.weights} for store in stores)))
    weights = {step: [weight_at(store, step) for store in stores] for step in steps}
    for step in steps:
        if stores and not any(weights[step]):
            yield (
                f"data.mixture: at step {step} the weight of every store is 0: give at least one "
                "of them more"
            )
    for i in range(len(stores)):
        for step in steps:
            weight, total = weights[step][i], sum(weights[step])
            if weight and weight / total * BLOCK_ROWS < 1:
                least = (total - weight) / (BLOCK_ROWS - 1) * 1.000001  # as it is rounded below
                yield (
                    f"data.mixture[{i}]: at step {step} its weight {weight:g} of {total:g} is less "
                    f"than one row of {BLOCK_ROWS:,}: give at least {least:.7g}, or 0"
                )
                break


def _skip(config: Config, _: int | None) -> Iterator[str]:
    before = None
    for i, (first, last) in enumerate(config.data.skip):
        if first > last:
            yield (
                f"data.skip[{i}] = ({first}, {last}): its first batch comes after its last: "
                f"give {last} {first}"
            )
        if before and first <= before[1]:
            yield (
                f"data.skip[{i}] = ({first}, {last}) begins before data.skip[{i - 1}] = {before} "
                "ends: give ascending pairs that have no batch in common"
            )
        before = (first, last)


def _stages(config: Config, _: int | None) -> Iterator[str]:
    model, mesh, tune = config.model, config.mesh, config.tune
    if mesh.pipe == 1:
        for name, otherwise in (("rounds", 1), ("microbatches", None)):
            if (given := getattr(mesh, name)) != otherwise:
                yield (
                    f"mesh.{name} = {given}, but mesh.pipe = 1: give mesh.pipe, or mesh.{name} "
                    f"{otherwise}"
                )
        return
    groups = {"mesh.pipe": mesh.pipe, "mesh.rounds": mesh.rounds}
    if model.window is not None:
        groups["model.window_every"] = model.window_every  # a group has whole periods
    groups = {name: size for name, size in groups.items() if size > 1}
    each, of = math.prod(groups.values()), "mesh.pipe"
    if len(groups) > 1:
        of = " x ".join(f"{name} {size}" for name, size in groups.items())
    otherwise = ""
    for name in [name for name in groups if name.startswith("mesh.")]:
        rest = each // groups[name]
        if model.num_layers > rest and model.num_layers % rest == 0:
            nearest = _nearest_divisors(model.num_layers, rest, groups[name])
            otherwise += f", or {name} {nearest}"
    yield from _multiple("model.num_layers", model.num_layers, of, each, otherwise)
    if tune.layers and tune.lora_rank is None:
        yield from _multiple(
            "tune.layers", tune.layers, "mesh.pipe", mesh.pipe, ", or another mesh.pipe"
        )


def _positions(config: Config, _: int | None) -> Iterator[str]:
    model, mesh = config.model, config.mesh
    size, halves = model.context_size, 2 if model.context_attention == "ring" else 1
    otherwise = f", or mesh.context {_nearest_divisors(size, halves, mesh.context)}"
    if halves == 2 and mesh.context > 1:
        of, least = "2 x mesh.context", 2 * mesh.context
        otherwise += ", or model.context_attention all_gather"
    else:
        of, least = "mesh.context", mesh.context
    problems = [*_multiple("model.context_size", size, of, least, otherwise)]
    if model.split_residual and not problems:
        both = mesh.context * mesh.tensor
        otherwise = ", another mesh.tensor, or model.split_residual False"
        of = f"mesh.context {mesh.context} x mesh.tensor {mesh.tensor}"
        problems += _multiple("model.context_size", size, of, both, otherwise)
    yield from problems


def _nearest_divisors(size: int, halves: int, given: int) -> str:
    """The numbers next to the given one that divide a size, each with so many parts."""
    allowed = [n for n in range(1, size + 1) if size % (n * halves) == 0] or [1]
    below = [n for n in allowed if n <= given][-1:]
    return " or ".join(str(n) for n in below + [n for n in allowed if n > given][:1])


def _split_sizes(config: Config, _: int | None) -> Iterator[str]:
    model, mesh = config.model, config.mesh
    yield from _multiple(
        "model.width", model.width, "mesh.fsdp", mesh.fsdp, ", or another mesh.fsdp"
    )
    sizes = {name: getattr(model, name) for name in ("num_heads", "num_kv_heads", "vocab_multiple")}
    sizes["ffn_size"] = model.ffn_size or default_ffn_size(model.width, model.activation)
    for name, size in sizes.items():
        if size:
            otherwise = ", or another mesh.tensor"
            yield from _multiple(f"model.{name}", size, "mesh.tensor", mesh.tensor, otherwise)


def _devices(config: Config, num_devices: int | None) -> Iterator[str]:
    mesh = config.mesh
    rest = {axis: getattr(mesh, axis) for axis in ("fsdp", "tensor", "context", "pipe")}
    rest_size, data = math.prod(rest.values()), mesh.data
    if num_devices is not None:
        given = rest if data is None else {"data": data} | rest
        used = math.prod(given.values())
        if used != num_devices and (data is not None or num_devices % used):
            product = " x ".join(f"{axis} {size}" for axis, size in given.items())
            divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
            wanted = num_devices if data is not None else f"one of {divisors}"
            yield (
                f"mesh: {product} = {used}, but there are {num_devices} devices: "
                f"give axes whose product is {wanted}"
            )
            return
        data = num_devices // rest_size
    of = f"mesh.data {data or 1} x mesh.fsdp {mesh.fsdp} x accumulate {config.accumulate}"
    rows, otherwise = (data or 1) * mesh.fsdp * config.accumulate, ", or another accumulate"
    if mesh.pipe > 1 and mesh.microbatches and config.batch_size % rows == 0:
        nearest = _nearest_divisors(config.batch_size // rows, 1, mesh.microbatches)
        of += f" x mesh.microbatches {mesh.microbatches}"
        rows, otherwise = rows * mesh.microbatches, f", or mesh.microbatches {nearest}"
    yield from _multiple("batch_size", config.batch_size, of, rows, otherwise)
    across = data if mesh.across == "data" else getattr(mesh, mesh.across)
    if mesh.slices and across:
        name = f"mesh.{mesh.across}"
        yield from _multiple(name, across, "mesh.slices", mesh.slices, ", or another mesh.across")


RULES = (
    _name_is_a_folder,
    _head,
    _learning_rates,
    _schedule,
    _guard,
    _data,
    _task,
    _task_evaluation,
    _task_texts,
    _mixture_alone,
    _mixture_stores,
    _mixture_weights,
    _skip,
    _devices,
)
MODEL_RULES = (
    _heads,
    _rope_scaling,
    _tune,
    _windows,
    _task_losses,
    _stages,
    _positions,
    _split_sizes,
)
