"""What a run says of itself as it begins and as it ends."""

import hashlib
import os
import re
import socket
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.attention import choose_across
from gptjax.config import Config, to_json
from gptjax.data import Rows
from gptjax.exclusions import Exclusion
from gptjax.model import resolve
from gptjax.pipeline import describe_pipeline
from gptjax.tuning import abstract_all, abstract_trained

# What one would do with a run of each kind of task, if not ask it about the examples of a file.
NEXT = {None: "generate {} --prompt TEXT", "dialogue": "chat {}"}


def describe(config: Config, mesh: Mesh, reason: str, data: str) -> str:
    """What is about to run, in a few lines.

    Args:
      reason: for the attention that it has.
      data: what it sees, as `describe_text` or a task says.
    """
    device = mesh.devices.flat[0]
    model, _ = resolve(config.model, device.platform)
    params = abstract_all(config, mesh)
    num_params, num_trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (params, abstract_trained(params, config))
    )
    part = "" if num_trained == num_params else f", {num_trained:,} of them trained"
    axes = (
        " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        or "one device"
    )
    split = mesh.shape["context"]
    if across := choose_across(model.context_attention, model.attention, model.context_size, split):
        reason += f"; {across} over context"
    pipeline = ""
    if mesh.shape["pipe"] > 1:
        pipeline = f"pipeline   {describe_pipeline(config, mesh.shape['data'])}\n"
    return (
        f"model      {num_params:,} parameters{part}, {model.compute_dtype} compute, "
        f"attention {model.attention} ({reason})\n"
        f"mesh       {axes}: {mesh.size} x {device.device_kind}\n{pipeline}"
        f"data       {data}"
    )


def describe_text(config: Config, train: Rows, valid: dict[str, Rows]) -> str:
    """The text that a run sees."""
    steps = f"{config.steps:,} steps of {config.batch_size * config.model.context_size:,} tokens"
    read = train.rows_read(config.steps)
    stores = []
    for i, member in enumerate(train.members):
        name = member.name if config.data.mixture else ""
        held_out = f"{valid[name].num_tokens[0]:,}" if name in valid else "none"
        epochs = read[i] / train.epoch_rows[i]
        stores.append(
            f"{member.store.num_tokens:,} tokens ({held_out} held out), {epochs:.2f} epochs"
        )
    if config.data.mixture:
        shares = [f"{count / read.sum():.1%}" for count in read]
        width = max(len(member.name) for member in train.members)
        lines = [
            f"           {member.name:{width}}  {share:>6} of the rows, {store}"
            for member, share, store in zip(train.members, shares, stores, strict=True)
        ]
        return "\n".join([f"a mixture, in {steps}", *lines])
    return f"{stores[0]} in {steps}"


def left_out(exclusions: tuple[Exclusion, ...]) -> str:
    num_tokens = sum(one.stop - one.start for one in exclusions)
    return f"{len(exclusions):,} documents, {num_tokens:,} tokens"


WRITTEN = ("bleu", "chrf", "exact", "accuracy")  # figures of texts, and of choices


def summary(
    lines: list[dict[str, float]],
    run_dir: Path,
    *,
    task: str | None = None,
    best: int | None = None,
) -> str:
    """The figures of a finished run, and its folders; of a `task` those of its `best` step."""
    evaluated = (line for line in reversed(lines) if "eval/loss" in line)
    evaluation = next((line for line in evaluated if best in (None, line["step"])), None)
    speeds = [line["perf/tokens_per_second"] for line in lines if "perf/tokens_per_second" in line]
    figures = []
    if evaluation and "eval/bits_per_byte" in evaluation:
        figures.append(
            f"result     validation loss {evaluation['eval/loss']:.4f} nats per token, "
            f"{evaluation['eval/bits_per_byte']:.4f} bits per byte, at step {evaluation['step']:,}"
        )
        names = [name.split("/")[1] for name in evaluation if re.fullmatch("eval/.+/loss", name)]
        figures += [
            f"           {evaluation[f'eval/{name}/loss']:.4f} nats per token, "
            f"{evaluation[f'eval/{name}/bits_per_byte']:.4f} bits per byte: {name}"
            for name in names
        ]
        said = [name for name in WRITTEN if f"eval/{name}" in lines[-1]] if task else []
        if said:
            texts = ", ".join(f"{name} {lines[-1][f'eval/{name}']:.4f}" for name in said)
            figures.append(f"           {texts}; of what that step says of the first examples")
    elif evaluation:
        figures += _task_figures("eval", f"validation, at step {evaluation['step']:,}", evaluation)
    if task and lines:
        figures += _task_figures("test", "test, with the parameters of that step", lines[-1])
    if speeds:
        figures.append(f"speed      {statistics.median(speeds):,.0f} tokens per second")
    return "\n".join(
        [
            *figures,
            f"run        {run_dir}: config.json, metrics.jsonl, checkpoints/, tokenizer/",
            f"next       gptjax {NEXT.get(task, 'predict {} FILE --out FILE').format(run_dir)}",
        ]
    )


def _task_figures(prefix: str, what: str, line: dict[str, float]) -> list[str]:
    """The figures of a line whose names begin so, if there are any."""
    found = [
        f"{name.partition('/')[2]} {value:.4f}"
        for name, value in line.items()
        if name.startswith(f"{prefix}/")
    ]
    return [f"result     {', '.join(found)}; {what}"] if found else []


def versions(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What an attempt runs on, for its first event."""
    device = mesh.devices.flat[0]
    return {
        "gptjax": version("gptjax"),
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "processes": jax.process_count(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "steps": config.steps,
        "step_tokens": config.batch_size * config.model.context_size,
        "config": hashlib.sha256(to_json(config).encode()).hexdigest()[:12],
    }
