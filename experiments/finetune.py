"""Fine-tuning a model on labelled examples: classes, named entities, questions, texts, dialogue.

    gptjax train experiments/finetune.py:classify --init-from runs/base \\
        --task.train train.tsv --task.valid valid.tsv --run-dir runs/classes
    gptjax predict runs/classes new.tsv --out said.jsonl

The model and its tokenizer are those of `--init-from`, a run or a folder of Transformers; without
it give `--model.*`. Each of the functions is a task; what its files look
like is in `--task.*`.
"""

from dataclasses import replace

from gptjax import Config, GPTConfig, OptimizerConfig, TaskConfig


def config() -> Config:
    """Returns the run of `classify`."""
    return classify()


def classify() -> Config:
    """Returns a run on classes of a text, by columns `text` and `label`."""
    return _run("classify", TaskConfig(kind="classify", epochs=5))


def tag() -> Config:
    """Returns a run on named entities, by columns of CoNLL. A word's tag may depend on what comes
    after it, so attention sees both ways.
    """
    config = _run("tag", TaskConfig(kind="entities", epochs=5))
    return replace(config, model=replace(config.model, bidirectional=True))


def answer() -> Config:
    """Returns a run on questions whose answers are passages of a text, as SQuAD has them."""
    return _run("answer", TaskConfig(kind="questions", epochs=2))


def translate() -> Config:
    """Returns a run on texts for texts, by columns `source` and `target`."""
    return _run("translate", TaskConfig(kind="pairs", epochs=5))


def chat() -> Config:
    """Returns a run on what an assistant says, by lists of messages."""
    return _run("chat", TaskConfig(kind="dialogue", epochs=3))


def _run(name: str, task: TaskConfig) -> Config:
    return Config(
        name=name,
        model=GPTConfig(dropout=0.1),
        task=task,
        optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.01),
        batch_size=16,
        eval_every=50,
        save_every=None,
    )
