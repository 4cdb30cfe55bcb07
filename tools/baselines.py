"""What a task can do without a language model: the classical way that one would try first.

    python tools/baselines.py --kind classify --train train.tsv --valid dev.tsv
    python tools/baselines.py --kind entities --train train.conll --valid dev.conll

Takes the fields of config.task, fits the files of --train, and prints the figures on those of
--valid as a JSON line, with a bootstrap interval of 95 % for the first of them.

classify: TF-IDF of words and pairs of words, or for scripts without spaces of one to three
characters, and logistic regression, both as scikit-learn sets them; of two texts each has its own.

entities: the tag that a word has most often, and O for a word that is new.

questions: the passage with the most words of the question near it, but not in it: the nearer and
the rarer a word is, the more it weighs (after the sliding window of Richardson et al. 2013). What
suits the training questions best decides how long it is, whether its own words should be rare, and
whether the sentence that shares most with the question is chosen first.

pairs: the training source with the nearest TF-IDF, and a copy of its target.
"""

import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import tyro

from gptjax.config import ConfigError, TaskConfig
from gptjax.sources import DataError
from gptjax.tasks import Prediction, Problems, Task, make_task
from gptjax.tasks.metrics import answer_scores, bootstrap, figure_of
from gptjax.tasks.task import spaceless

AROUND = 10  # words on each side of an answer that are compared with the question
TRIED = 500  # training questions that the length of answers is chosen by
SENTENCE_END = r"[.!?]\s|[\u3002\uff01\uff1f\uff1b]"
WORD = r"[\u2e80-\u9fff]|[^\W\u2e80-\u9fff]+"  # ideographs one by one


class Way(NamedTuple):
    """Of choosing a passage."""

    length: int  # words
    rare: int  # 1: its own words should be rare
    by_sentence: int  # 1: the sentence is chosen first


def vectorizer(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    sample = "".join(texts[:1000])
    if sum(map(spaceless, sample)) > len(sample) / 10:
        return TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit(texts)
    return TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b").fit(texts)


def classify(task: Task, train: list, valid: list) -> list[Prediction]:
    from scipy.sparse import hstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer

    columns = ["text", "second"] if task.config.second_column else ["text"]
    parts: tuple[list, list] = ([], [])
    for column in columns:
        texts = [getattr(one, column) for one in train]
        fitted = vectorizer(texts)
        parts[0].append(fitted.transform(texts))
        parts[1].append(fitted.transform([getattr(one, column) for one in valid]))
    features, others = (hstack(part).tocsr() for part in parts)
    model = LogisticRegression(max_iter=1000)
    if task.several:
        binarizer = MultiLabelBinarizer(classes=task.labels)
        model = OneVsRestClassifier(model).fit(
            features, binarizer.fit_transform([one.labels for one in train])
        )
        return [{"labels": [*said]} for said in binarizer.inverse_transform(model.predict(others))]
    model.fit(features, [one.labels[0] for one in train])
    return [{"label": str(label)} for label in model.predict(others)]


def entities(task: Task, train: list, valid: list) -> list[Prediction]:
    tags: dict[str, Counter] = defaultdict(Counter)
    for one in train:
        for word, tag in zip(one.words, one.tags, strict=True):
            tags[word][tag] += 1
    usual = {word: counts.most_common(1)[0][0] for word, counts in tags.items()}
    return [{"tags": [usual.get(word, "O") for word in one.words]} for one in valid]


def questions(task: Task, train: list, valid: list) -> list[Prediction]:
    """Passages as they suit the training questions best."""
    contexts = {one.context for one in train}
    seen = Counter(word for text in contexts for word in {*words_of(text)})
    count, rules = len(contexts), task.config.answers
    known = [one for one in train if one.answers]
    if not known:
        raise DataError("task.train: no question has an answer")
    usual = max(int(np.median([len(words_of(one.answers[0])) for one in known])), 1)
    tried = known[:: 1 + len(known) // TRIED]

    def fitness(way: Way) -> float:
        said = [passage(one, way, seen, count) for one in tried]
        pairs = zip(tried, said, strict=True)
        return sum(answer_scores(one.answers, text, rules)[1] for one, text in pairs)

    ways = [Way(times * usual, *how) for times in (1, 2, 3, 4) for how in product((0, 1), repeat=2)]
    best = max(ways, key=fitness)
    return [
        {"id": one.id, "text": passage(one, best, seen, count), "no_answer": 0.0} for one in valid
    ]


def words_of(text: str) -> list[str]:
    return [word.lower() for word in re.findall(WORD, text)]


def passage(example: Any, way: Way, seen: Counter, count: int) -> str:
    """So many words of the text that are not in the question, but near to what is."""
    places = [found.span() for found in re.finditer(WORD, example.context)]
    words, asked = words_of(example.context), {*words_of(example.question)}
    if not words:
        return example.context.strip()
    rare = np.array([max(np.log((count + 1) / (seen[word] + 0.5)), 0.0) for word in words])
    shared = rare * [word in asked for word in words]
    near = 1 / (1 + np.abs(np.arange(-AROUND, AROUND + 1)))
    worth = np.convolve(shared, near)[AROUND : AROUND + len(words)] + way.rare * rare - 4 * shared
    inside = np.arange(len(words))
    if way.by_sentence:
        sentence = np.cumsum(
            [False]
            + [
                bool(re.search(SENTENCE_END, example.context[before[1] : after[0]]))
                for before, after in pairwise(places)
            ]
        )
        inside = np.flatnonzero(sentence == np.bincount(sentence, weights=shared).argmax())
    if len(inside) > way.length:
        sums = np.convolve(worth[inside], np.ones(way.length), "valid")
        inside = inside[sums.argmax() :][: way.length]
    return example.context[places[inside[0]][0] : places[inside[-1]][1]]


def pairs(task: Task, train: list, valid: list) -> list[Prediction]:
    sources = [one.source for one in train]
    fitted = vectorizer(sources)
    known, asked = fitted.transform(sources), fitted.transform([one.source for one in valid])
    nearest = [
        (asked[first : first + 100] @ known.T).toarray().argmax(axis=1)
        for first in range(0, len(valid), 100)
    ]
    return [{"text": train[number].target} for number in np.concatenate(nearest)]


BASELINES = {"classify": classify, "entities": entities, "questions": questions, "pairs": pairs}


def main() -> int:
    config = tyro.cli(TaskConfig, description=__doc__)
    began = time.perf_counter()
    try:
        if config.kind not in BASELINES:
            raise ConfigError(f"kind = {config.kind}: give one of {', '.join(BASELINES)}")
        line = measure(config)
    except (ConfigError, DataError) as error:
        print(f"baselines: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3
    print(json.dumps(line | {"seconds": round(time.perf_counter() - began, 1)}, ensure_ascii=False))
    return 0


def measure(config: TaskConfig) -> dict[str, Any]:
    task, splits = make_task(config), {}
    for split in ("train", "valid"):
        problems = Problems(config.on_bad_example, f"task.{split}")
        splits[split] = list(task.read(getattr(config, split), problems))
        problems.refuse()
        print("\n".join(problems.lines()), end="\n" if problems.counts else "", file=sys.stderr)
        task = task.fitted(splits["train"])
    train, valid = splits["train"], splits["valid"]
    predictions = BASELINES[config.kind](task, train, valid)
    name, parts = task.measure(valid, predictions)
    line = {"task": config.kind, "train": [*config.train], "examples": [len(train), len(valid)]}
    line |= {key: round(value, 4) for key, value in task.metrics(valid, predictions).items()}
    if parts is not None:
        interval = bootstrap(parts, figure_of(name))
        line["interval"] = {name: [round(end, 4) for end in interval]}
    return line


if __name__ == "__main__":
    sys.exit(main())
