"""Training on labelled tasks, from the examples to the predictions."""

import json
import random
from dataclasses import replace

import jax
import numpy as np
import pytest

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, DataConfig, GPTConfig, OptimizerConfig, TaskConfig
from gptjax.labelled import NO_BEST, best_of
from gptjax.metrics import read_metrics
from gptjax.train import fit

MODEL = GPTConfig(
    context_size=48,
    num_layers=1,
    width=32,
    num_heads=2,
    positions="rope",
    compute_dtype="float32",
)


def write_classes(folder, count=64):
    """Texts of words in two colours, and which there is more of."""
    rng = random.Random(0)
    for name in ("train", "valid"):
        lines = ["text\tlabel"]
        for _ in range(count):
            label = rng.choice(["warm", "cold"])
            words = ["red", "fire"] if label == "warm" else ["blue", "ice"]
            lines.append(" ".join(rng.choice(words) for _ in range(3)) + f"\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return {name: (str(folder / f"{name}.tsv"),) for name in ("train", "valid")}


def classes(folder, **fields) -> Config:
    task = {"kind": "classify"} | write_classes(folder) | fields.pop("task", {})
    values = {
        "model": MODEL,
        "task": TaskConfig(**task),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "steps": 12,
        "batch_size": 8,
        "eval_every": 4,
        "save_every": 4,
        "log_every": 1,
        "tensorboard": False,
    }
    return Config(**values | fields)


def test_a_task_is_learnt_and_its_figures_are_logged(tmp_path, capsys):
    config = classes(tmp_path)
    config = replace(config, task=replace(config.task, test=config.task.valid))
    fit(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["eval/accuracy"] > 0.9
    best = best_of(lines, config)
    figures = next(line for line in lines if line["step"] == best.step)
    # The test split is the validation split here, and the step the same.
    assert lines[-1]["test/accuracy"] == figures["eval/accuracy"]
    assert lines[-1]["test/loss"] == pytest.approx(figures["eval/loss"], rel=1e-5)
    assert "accuracy" in capsys.readouterr().err
