"""Fine-tuning a model on labelled examples: classes, named entities, questions, texts, dialogue.

    gptjax train experiments/finetune.py:classify --init-from runs/base \\
        --task.train train.tsv --task.valid valid.tsv --run-dir runs/classes
    gptjax predict runs/classes new.tsv --out said.jsonl

The model and its tokenizer are those of `--init-from`, a run or a folder of Transformers; without
it give `--model.*`. Each of the functions is a task; what its files look
like is in `--task.*`.

What base.py's model makes of sets, by `tools/records.py` with its settings (batches of 4 rows of
256 tokens, of questions 16; a learning rate of 1e-3, of adapters 2e-3), on one core of an AMD EPYC
each (2026-11-29 and 30; code of commit 2a88885, and for questions, pairs and adapters of 7aea2f3;
settings of the tool of c8981c7). The figures are of the validation split, which also chose the best
of ten evaluations: the median of three seeds with the least and the most, but of adapters one seed.

Accuracy of classes, by the mean of a text's tokens, after 3 epochs of movie-sentiment, 10 of
poem-sentiment and sib200, and 5 of the others, beside TF-IDF with logistic regression; adapters are
of rank 8 in all matrices of the blocks:

    set              TF-IDF   from scratch            from base.py            adapters
    movie-sentiment  0.746    0.748 (0.742 to 0.756)  0.765 (0.762 to 0.772)  0.733
    clinc150         0.857    0.889 (0.887 to 0.890)  0.895 (0.892 to 0.901)  0.845
    poem-sentiment   0.667    0.657 (0.657 to 0.657)  0.686 (0.657 to 0.686)  0.676
    med-nli          0.472    0.551 (0.546 to 0.567)  0.779 (0.765 to 0.781)  0.732
    sib200, English  0.465    0.576 (0.566 to 0.596)  0.636 (0.606 to 0.657)  0.545
    sib200, Chinese  0.636    0.707 (0.677 to 0.747)  0.737 (0.717 to 0.747)  0.727
    sib200, German   0.394    0.566 (0.505 to 0.576)  0.596 (0.596 to 0.596)  0.465

The validation splits of poem-sentiment and sib200 have about a hundred texts, so that a hundredth
is one text.

F1 of entities after 3 epochs from base.py, by what a word sees, beside the most frequent tag of
each word:

    set            tags   before it alone         both sides              it twice
    wnut17         0.096  0.281 (0.281 to 0.294)  0.256 (0.256 to 0.279)  0.277 (0.263 to 0.286)
    broad-twitter  0.154  0.590 (0.589 to 0.605)  0.598 (0.582 to 0.608)  0.591 (0.586 to 0.596)
    uner-zh        0.258  0.469 (0.456 to 0.469)  0.549 (0.536 to 0.560)  0.531 (0.527 to 0.545)

With attention to both sides and one seed, from scratch and by adapters: wnut17 0.075 and 0.292,
broad-twitter 0.518 and 0.587, uner-zh 0.403 and 0.469.

F1 of the answers of squad's subset after 3 epochs is 0.206 (0.195 to 0.207), beside 0.187 of the
passage with the most words near the question; with batches of 4 it was 0.184. From scratch it is
0.144, by adapters 0.185, with one seed each.
Of cmrc2018, whose 3,219 questions to learn from have 200 answers that are not where the file says,
or nowhere, which are counted and left out, F1 is 0.149 with one seed, beside 0.193: too little to
learn to find answers in Chinese.

BLEU and chrF of 300 sentences of tatoeba, beside a copy of the nearest training sentence:

    pair                epochs  copy         from base.py
    German to English   3       16.6, 33.0   31.6 (30.2 to 33.3), 46.1 (45.0 to 46.5)
    Chinese to English  6       17.5, 34.3   26.9 (26.5 to 27.0), 45.8 (45.3 to 46.3)

With one seed, from scratch German to English has 30.0 and 44.8, Chinese to English 26.9 and 47.0:
what base.py has read helps little here. Adapters have 5.9 and 23.3, and 6.8 and 21.9: they are too
few parameters to learn to translate, for which all of the model should be trained.
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
