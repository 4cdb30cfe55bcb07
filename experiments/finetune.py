"""Fine-tuning a model on labelled examples: classes, named entities, questions, texts, dialogue.

    gptjax train experiments/finetune.py:classify --init-from runs/base \\
        --task.train train.tsv --task.valid valid.tsv --run-dir runs/classes
    gptjax predict runs/classes new.tsv --out said.jsonl

The model and its tokenizer are those of `--init-from`, a run or a folder of Transformers; without
it give `--model.*`. Each of the functions is a task; what its files look
like is in `--task.*`.

What base.py's model makes of sets, by `tools/records.py` with its settings (batches of 4 rows of
256 tokens, a learning rate of 1e-3), on one core of an AMD EPYC each (2026-11-29 and 30; code
of commit 2a88885, settings of the tool of 7ad8c70, and for squad and tatoeba of 93c3dcb). The
figures are of the validation split, which also chose the best of ten evaluations: the median of
three seeds with the least and the most.

Accuracy of classes, by the mean of a text's tokens, after 3 epochs of movie-sentiment, 10 of
poem-sentiment and sib200, and 5 of the others, beside TF-IDF with logistic regression:

    set              TF-IDF   from scratch            from base.py
    movie-sentiment  0.746    0.748 (0.742 to 0.756)  0.765 (0.762 to 0.772)
    clinc150         0.857    0.888 (two seeds)       0.895 (0.892 to 0.901)
    poem-sentiment   0.667    0.657 (0.657 to 0.657)  0.686 (0.657 to 0.686)
    med-nli          0.472    0.551 (0.546 to 0.567)  0.779 (0.765 to 0.781)
    sib200, English  0.465    0.576 (0.566 to 0.596)  0.636 (0.606 to 0.657)
    sib200, Chinese  0.636    0.707 (0.677 to 0.747)  0.737 (0.717 to 0.747)
    sib200, German   0.394    0.566 (0.505 to 0.576)  0.596 (0.596 to 0.596)

The validation splits of poem-sentiment and sib200 have about a hundred texts, so that a hundredth
is one text.

F1 of entities after 3 epochs from base.py, by what a word sees, beside the most frequent tag of
each word:

    set            tags   before it alone         both sides              it twice
    wnut17         0.096  0.281 (0.281 to 0.294)  0.256 (0.256 to 0.279)  0.277 (0.263 to 0.286)
    broad-twitter  0.154  0.590 (0.589 to 0.605)  0.598 (0.582 to 0.608)  0.591 (0.586 to 0.596)
    uner-zh        0.258  0.469 (0.456 to 0.469)  0.549 (0.536 to 0.560)  0.531 (0.527 to 0.545)

With one seed so far: the answers of squad have an F1 of 0.184 after 3 epochs, below the 0.187 of
the passage with the most words near the question (0.133 after 2 with attention to both sides), and
German to English of tatoeba a BLEU of 31.6 and a chrF of 46.1 over 300 texts, beside 16.6 and 33.0
of a copy of the nearest training sentence. Adapters, cmrc2018 and Chinese to English are not
recorded yet.
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
