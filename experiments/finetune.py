"""Fine-tuning a model on labelled examples: classes, named entities, questions, texts, dialogue.

    gptjax train experiments/finetune.py:classify --init-from runs/base \\
        --task.train train.tsv --task.valid valid.tsv --run-dir runs/classes
    gptjax predict runs/classes new.tsv --out said.jsonl

The model and its tokenizer are those of `--init-from`, a run or a folder of Transformers; without
it give `--model.*`. Each of the functions is a task; what its files look
like is in `--task.*`.

What base.py's model makes of classes, by `tools/records.py` with its settings (batches of 4 rows of
256 tokens, the mean of a text's tokens, learning rates of 1e-3 from scratch and 6e-4 from base.py),
on one core of an AMD EPYC each (2026-11-29, commit 2a88885). Accuracy on the validation split,
which also chose the best of ten evaluations: the median of three seeds with the least and the most,
beside TF-IDF with logistic regression:

    set              TF-IDF   from scratch            from base.py
    movie-sentiment  0.746    0.748 (0.742 to 0.756)  0.765 (0.752 to 0.772)
    clinc150         0.857    0.888 (two seeds)       0.878 (two seeds)
    poem-sentiment   0.667    0.657 (0.657 to 0.657)  0.676 (0.657 to 0.714)
    med-nli          0.472    0.551 (0.546 to 0.567)  0.707 (0.656 to 0.712)
    sib200, English  0.465    0.576 (0.566 to 0.596)  0.586 (0.566 to 0.586)
    sib200, Chinese  0.636    0.707 (0.677 to 0.747)  0.727 (0.717 to 0.737)
    sib200, German   0.394    0.566 (0.505 to 0.576)  0.586 (0.546 to 0.606)

The validation splits of poem-sentiment and sib200 have about a hundred texts, so that a hundredth
is one text. Adapters, and the other tasks, are not recorded yet.
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
