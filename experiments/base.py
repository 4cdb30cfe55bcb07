"""A small general model of English, Chinese and German, to begin from where labelled data is small.

    cd DATA  # the folder that holds the folders named below
    gptjax tokenizer train english-novels/train/*.gz german-novels/*.gz \\
        REPOSITORY/experiments/base.py:english REPOSITORY/experiments/base.py:german \\
        REPOSITORY/experiments/base.py:chinese --vocab-size 12000 --out base.model
    gptjax train REPOSITORY/experiments/base.py --run-dir runs/base
    gptjax train REPOSITORY/experiments/finetune.py:classify --init-from runs/base ...

Two thirds of what is read is not books, but encyclopedias, instructions, tweets, dialogue,
translations and poems: texts of labelled sets, without their labels. They are of the training
splits, but for wikitext-2, CMRC 2018 and KdConv, of which other splits are read: those are not for
evaluating this model.

15.4 million tokens took 57 minutes, 4,663 a second, on 2 cores of an AMD EPYC (2026-11-29, this
file as of commit 6661b7e with the rest of 439fa09), the first fifteen beside other work.
Validation loss 3.9313 nats per token, 1.7073 bits per byte: novels 1.5917, english 1.6016, german
1.6578, chinese 2.2582. What that is worth to labelled sets, finetune.py says.

Runs on one of the cores chose the model: 500 steps of five layers of width 320 (10 million
parameters, tied) gave a validation loss of 5.2636, and in the same time 850 steps of four of width
256 4.9851. Untied, as here, costs no time, and was as good. So small a batch wants a long mean of
squares: with beta2 of 0.95 the 500 steps gave 5.3492, with 0.99, as here, 5.2636; with 0.999 the
850 gave 5.0098.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

from gptjax import Config, DataConfig, GPTConfig, MixtureConfig, OptimizerConfig, SampleConfig

HERE = Path(__file__)


def config() -> Config:
    """Returns the run."""
    return Config(
        name="base",
        model=GPTConfig(
            context_size=256,
            num_layers=4,
            width=256,
            num_heads=4,
            positions="rope",
            norm="rmsnorm",
            activation="swiglu",
            bias=False,
            tied_embedding=False,
        ),
        data=DataConfig(
            mixture=(
                MixtureConfig(name="novels", path=("english-novels/train/*.gz",), weight=0.25),
                MixtureConfig(name="english", path=(f"{HERE}:english",), weight=0.4, holdout=0.02),
                MixtureConfig(name="chinese", path=(f"{HERE}:chinese",), weight=0.22, holdout=0.02),
                MixtureConfig(
                    name="german", path=("german-novels/*.gz", f"{HERE}:german"), weight=0.13
                ),
            ),
            tokenizer="base.model",
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=200, schedule="constant", beta2=0.99
        ),
        sample=SampleConfig(prompt="The history of the city", max_tokens=64),
        steps=7500,
        batch_size=8,
        log_every=50,
        eval_every=2500,
        eval_batches=25,
        save_every=500,
    )


def english() -> Iterator[str]:
    """Yields texts of today's English, each of a sentence to a page."""
    yield from text("wikitext-2/valid.txt.gz").split("\n = ")
    for article in json.loads(text("squad/train-v1.1-subset.json.gz"))["data"]:
        yield from (paragraph["context"] for paragraph in article["paragraphs"])
    for one in lines("dolly-hhrlhf/dolly_hhrlhf_train_small.jsonl.gz"):
        yield one["prompt"] + one["response"]
    for one in json.loads(text("casino/casino_train.json.gz")):
        yield "\n".join(turn["text"] for turn in one["chat_logs"])
    for path in sorted(Path("sgd/train").glob("dialogues_*.json.gz")):
        for one in json.loads(text(path)):
            yield "\n".join(turn["utterance"] for turn in one["turns"])
    yield from (row["text"] for row in table("movie-sentiment/train.tsv"))
    yield from (row["text"] for row in table("sib200/eng_Latn/train.tsv"))
    for row in table("med-nli/train.tsv"):
        yield f"{row['sentence1']} {row['sentence2']}"
    for name in ("wnut17/wnut17train.conll", *(f"broad-twitter/{one}.conll" for one in "abeg")):
        yield from sentences(name, 0, " ")
    for query, _ in json.loads(text("clinc150/data_full_train_val.json.gz"))["train"]:
        yield query
    yield from pairs("tatoeba-deu-eng/train.txt.gz", 0)
    yield from pairs("tatoeba-cmn-eng/train.txt.gz", 0)


def german() -> Iterator[str]:
    """Yields German sentences."""
    yield from pairs("tatoeba-deu-eng/train.txt.gz", 1)
    yield from (row["text"] for row in table("sib200/deu_Latn/train.tsv"))


def chinese() -> Iterator[str]:
    """Yields texts of today's Chinese, each of a sentence to a page, and poems."""
    for article in json.loads(text("cmrc2018/cmrc2018_dev.json.gz"))["data"]:
        yield from (paragraph["context"] for paragraph in article["paragraphs"])
    for domain in ("film", "music", "travel"):
        known = set()
        for one in json.loads(text(f"kdconv/{domain}_dev.json.gz")):
            yield "\n".join(turn["message"] for turn in one["messages"])
            for turn in one["messages"]:
                facts = [fact["attrvalue"] for fact in turn.get("attrs", [])]
                yield from (fact for fact in facts if len(fact) >= 30 and fact not in known)
                known.update(facts)
    yield from sentences("uner-zh/zh_gsdsimp-ud-train.iob2.gz", 1, "")
    yield from pairs("tatoeba-cmn-eng/train.txt.gz", 1)
    yield from (row["text"] for row in table("sib200/zho_Hans/train.tsv"))
    for path in sorted(Path("chinese-poetry/train").glob("*.json.gz"))[:6]:
        yield from ("\n".join(poem["paragraphs"]) for poem in json.loads(text(path)))


# --- files ---------------------------------------------------------------------------------------


def text(name: str | Path) -> str:
    content = Path(name).read_bytes()
    return (gzip.decompress(content) if str(name).endswith(".gz") else content).decode()


def lines(name: str) -> Iterator[dict]:
    yield from map(json.loads, text(name).splitlines())


def table(name: str) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(text(name)), delimiter="\t", quoting=csv.QUOTE_NONE)


def pairs(name: str, column: int) -> Iterator[str]:
    """A column of a file of translations; one sentence with several of them stands there once."""
    before = None
    for line in text(name).splitlines():
        sentence = line.split("\t")[column]
        if sentence != before:
            yield sentence
        before = sentence


def sentences(name: str, column: int, between: str) -> Iterator[str]:
    """Of columns of CoNLL, a word a line."""
    for sentence in text(name).split("\n\n"):
        rows = [line for line in sentence.split("\n") if line and not line.startswith("# ")]
        words = [line.split("\t")[column] for line in rows if "\t" in line]
        if words:
            yield between.join(words)
