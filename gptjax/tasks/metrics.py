"""The fields' own figures, equal to those of the programs that each field takes them from."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from gptjax.config import ConfigError
from gptjax.sources import needed
from gptjax.tasks.tags import Entity, Scheme, entities, strict_entities
from gptjax.tasks.task import spaceless

# --- classes -----------------------------------------------------------------------------------


def confusion(
    truth: Sequence[Hashable], said: Sequence[Hashable], labels: Sequence[Hashable]
) -> np.ndarray:
    """How often each label, a row, was called each other one, a column: int64 [labels, labels]."""
    number = {label: i for i, label in enumerate(labels)}
    pairs = [
        number[one] * len(labels) + number[other] for one, other in zip(truth, said, strict=True)
    ]
    counts = np.bincount(np.array(pairs, np.int64), minlength=len(labels) ** 2)
    return counts.reshape(len(labels), len(labels))


def class_figures(truth: Sequence[Hashable], said: Sequence[Hashable]) -> dict[str, float]:
    """Accuracy, F1 averaged over the labels that are there or were said, and Matthews' correlation
    (Gorodkin 2004), as scikit-learn has them; 0 where a figure is 0 / 0.
    """
    labels = list(dict.fromkeys([*truth, *said]))
    counts = confusion(truth, said, labels).astype(np.float64)
    right, total = np.diag(counts), counts.sum()
    are, were_said = counts.sum(axis=1), counts.sum(axis=0)
    covariance = right.sum() * total - are @ were_said
    spread = (total**2 - were_said @ were_said) * (total**2 - are @ are)
    return {
        "accuracy": ratio(right.sum(), total),
        "macro_f1": float(np.mean(_ratios(2 * right, are + were_said))) if labels else 0.0,
        "matthews": float(covariance / np.sqrt(spread)) if spread > 0 else 0.0,
    }


def label_set_figures(truth: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """Of several labels at once, bool [examples, labels]: F1 of all together, F1 averaged over the
    labels, and the share of examples whose labels are all right.
    """
    right, are, were_said = (truth & said).sum(0), truth.sum(0), said.sum(0)
    return {
        "micro_f1": ratio(2 * right.sum(), are.sum() + were_said.sum()),
        "macro_f1": float(np.mean(_ratios(2 * right, are + were_said))),
        "exact": float(np.mean((truth == said).all(axis=1))),
    }


def ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _ratios(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    return np.divide(parts, wholes, out=np.zeros(len(parts)), where=wholes > 0)


# --- entities ----------------------------------------------------------------------------------


def entity_counts(
    truth: Sequence[Sequence[str]], said: Sequence[Sequence[str]], strict: Scheme | None = None
) -> np.ndarray:
    """Of each sentence the entities that are right, that were said, and that are there: int64
    [sentences, 3]. One is right if its kind and both its ends are.

    Args:
      strict: only entities that are spelled as this scheme demands; None: as conlleval reads them.
    """
    pairs = zip(_entity_sets(truth, strict), _entity_sets(said, strict), strict=True)
    counts = [(len(there & other), len(other), len(there)) for there, other in pairs]
    return np.array(counts, np.int64).reshape(-1, 3)


def _entity_sets(sentences: Sequence[Sequence[str]], strict: Scheme | None) -> list[set[Entity]]:
    return [{*(strict_entities(one, strict) if strict else entities(one))} for one in sentences]


def entity_figures(
    truth: Sequence[Sequence[str]], said: Sequence[Sequence[str]], strict: Scheme | None = None
) -> dict[str, float]:
    """Precision, recall and F1 over all entities, as seqeval has them; of each kind its F1; and the
    share of tags that are right.
    """
    figures = _f1_figures(entity_counts(truth, said, strict).sum(axis=0))
    kinds = [Counter(), Counter(), Counter()]  # right, said, there
    for there, other in zip(_entity_sets(truth, strict), _entity_sets(said, strict), strict=True):
        for counter, found in zip(kinds, (there & other, other, there), strict=True):
            counter.update(one.kind for one in found)
    for kind in sorted({*kinds[1], *kinds[2]}):
        counts = np.array([counter[kind] for counter in kinds])
        figures[f"f1_{kind}"] = _f1_figures(counts)["f1"]
    same = [
        one == other
        for tags, others in zip(truth, said, strict=True)
        for one, other in zip(tags, others, strict=True)
    ]
    return figures | {"tag_accuracy": ratio(sum(same), len(same))}


def _f1_figures(counts: np.ndarray) -> dict[str, float]:
    right, were_said, are = counts.tolist()
    return {
        "f1": ratio(2 * right, were_said + are),
        "precision": ratio(right, were_said),
        "recall": ratio(right, are),
    }


# --- answers -----------------------------------------------------------------------------------

# What CMRC 2018's evaluation leaves out of answers: signs of ASCII, of Chinese, and wide ones.
CMRC_SIGNS = frozenset(
    "-:_*^/\\~`+="
    "\u3001\u3002\u300a\u300b\u300c\u300d\u300e\u300f\u00b7\u2019\u201c\u201d"
    "\uff01\uff08\uff09\uff0c\uff0d\uff1a\uff1b\uff1f\uff5e"
)


def plain_answer(text: str) -> str:
    """As SQuAD compares answers: in small letters, without ASCII's signs and English articles."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(right: Sequence[str], said: str, rules: str) -> tuple[float, float]:
    """Exact match and F1 of an answer: the best over the answers that are right.

    Args:
      right: of "squad2" none, where the right answer is no answer.
      rules: of `task.answers`.
    """
    if rules == "cmrc":
        pairs = [_cmrc_scores(one, said) for one in right]
    else:
        if rules == "squad2":
            right = [one for one in right if plain_answer(one)] or [""]
        pairs = [_squad_scores(one, said, rules) for one in right]
    return max(one for one, _ in pairs), max(one for _, one in pairs)


def _squad_scores(right: str, said: str, rules: str) -> tuple[float, float]:
    right, said = plain_answer(right), plain_answer(said)
    words, others = right.split(), said.split()
    exact = float(right == said)
    if rules == "squad2" and not (words and others):
        return exact, float(words == others)
    shared = (Counter(words) & Counter(others)).total()
    return exact, ratio(2 * shared, len(words) + len(others))


def _cmrc_scores(right: str, said: str) -> tuple[float, float]:
    """F1 of CMRC is of the longest run of characters and words that both have."""
    plain = [
        "".join(char for char in text.lower().strip() if char not in CMRC_SIGNS)
        for text in (right, said)
    ]
    words, others = chinese_words(right), chinese_words(said)
    shared = _longest_run(words, others)
    return float(plain[0] == plain[1]), ratio(2 * shared, len(words) + len(others))


def chinese_words(text: str) -> list[str]:
    """Ideographs one by one, and of what is between them words and signs, without those that CMRC
    leaves out. (The official program takes the words of NLTK, which differ in contractions.)
    """
    text = "".join(char for char in text.lower().strip() if char not in CMRC_SIGNS)
    return re.findall(r"[\u4e00-\u9fa5]|[^\W\u4e00-\u9fa5]+|[^\w\s]", text)


def _longest_run(one: Sequence[str], other: Sequence[str]) -> int:
    longest, before = 0, [0] * (len(other) + 1)
    for word in one:
        row = [0] * (len(other) + 1)
        for place, there in enumerate(other, 1):
            if word == there:
                row[place] = before[place - 1] + 1
        longest, before = max(longest, max(row)), row
    return longest


def answer_figures(
    right: Sequence[Sequence[str]],
    said: Sequence[str],
    rules: str,
    *,
    passages: Sequence[str] | None = None,
    no_answer: Sequence[float] | None = None,
) -> dict[str, float]:
    """Exact match and F1 over all questions, from 0 to 1; of "squad2" also for those with and
    without an answer, and the best that any threshold of `no_answer` gives.

    Args:
      passages: what would be said, were there an answer to each question.
      no_answer: how sure it is that there is none.
    """
    scores = np.array(
        [answer_scores(one, other, rules) for one, other in zip(right, said, strict=True)]
    ).reshape(-1, 2)
    figures = {"exact": _mean(scores[:, 0]), "f1": _mean(scores[:, 1])}
    if rules != "squad2":
        return figures
    has = np.array([any(map(plain_answer, one)) for one in right], bool)
    for name, chosen in (("answered", has), ("unanswered", ~has)):
        if chosen.any():
            figures[f"exact_{name}"] = _mean(scores[chosen, 0])
            figures[f"f1_{name}"] = _mean(scores[chosen, 1])
    if passages is not None and no_answer is not None:
        asked = np.array(
            [answer_scores(one, other, rules) for one, other in zip(right, passages, strict=True)]
        ).reshape(-1, 2)
        for column, name in enumerate(("exact", "f1")):
            best, threshold = best_threshold(asked[:, column], passages, no_answer, has)
            figures |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
    return figures


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def best_threshold(
    scores: np.ndarray, passages: Sequence[str], no_answer: Sequence[float], has: np.ndarray
) -> tuple[float, float]:
    """The best mean score, and the threshold that gives it: what has a greater `no_answer` is
    answered by nothing. As in SQuAD 2.0's evaluation: 0 is tried first, though `no_answer` may be
    less, and the questions are then answered one more at a time.

    Args:
      scores: of each passage.
      has: whether there is an answer.
    """
    current = float((~has).sum())
    best, threshold = current, 0.0
    for i in np.argsort(np.asarray(no_answer, np.float64), kind="stable"):
        current += scores[i] if has[i] else -bool(passages[i])
        if current > best:
            best, threshold = current, float(no_answer[i])
    return float(ratio(best, len(scores))), threshold


# --- written texts -----------------------------------------------------------------------------


def text_figures(
    right: Sequence[Sequence[str]], said: Sequence[str], tokens: str = "auto"
) -> dict[str, float]:
    """BLEU and chrF by sacrebleu, from 0 to 100, and the share of texts that are exactly right.

    Args:
      right: one text or several for each that was said.
      tokens: how BLEU divides texts, as sacrebleu calls it; auto: as `bleu_tokens` says.
    """
    exact = [other.strip() in map(str.strip, one) for one, other in zip(right, said, strict=True)]
    figures = {"exact": _mean(np.array(exact, float))}
    if not said:
        return {"bleu": 0.0, "chrf": 0.0} | figures
    sacrebleu = needed("sacrebleu", "tasks", "task.kind pairs")
    tokens = bleu_tokens(right) if tokens == "auto" else tokens
    most = max(map(len, right))
    # One list for the first text of each, one for the second; None where there is none.
    columns = [[one[i] if i < len(one) else None for one in right] for i in range(most)]
    bleu = sacrebleu.BLEU(tokenize=tokens).corpus_score([*said], columns)
    chrf = sacrebleu.CHRF().corpus_score([*said], columns)
    return {"bleu": bleu.score, "chrf": chrf.score} | figures


def need_packages(kind: str, otherwise: str = "") -> None:
    """Refuse a kind of task whose figures need a package that is not there.

    Raises:
      ConfigError: with how to install it, and what else can be done.
    """
    if kind in ("pairs", "dialogue"):
        try:
            needed("sacrebleu", "tasks", f"task.kind {kind}")
        except ConfigError as error:
            raise ConfigError(f"{error}{otherwise}") from error


def bleu_tokens(right: Sequence[Sequence[str]]) -> str:
    """How BLEU divides texts, by the script they are mostly written in: "zh" for ideographs, "char"
    for others without spaces, as kana and Thai are, and "13a", of the WMT, for all the rest.

    >>> bleu_tokens([["Komm schnell!"]]), bleu_tokens([["快点。"]]), bleu_tokens([["はやく来て"]])
    ('13a', 'zh', 'char')
    """
    letters = [char for one in right for text in one for char in text if char.isalpha()]
    without = [char for char in letters if spaceless(char)]
    if 2 * len(without) <= len(letters):
        return "13a"
    others = sum(not unicodedata.name(char, "").startswith("CJK") for char in without)
    return "char" if 5 * others > len(without) else "zh"


# --- intervals ---------------------------------------------------------------------------------


def bootstrap(
    parts: np.ndarray | Sequence[Any],
    figure: Callable[[Any], float],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval in which a figure lies in most resamples of its examples (Efron 1979): the
    percentiles of `resamples` draws with replacement, as many examples in each as there are.

    Args:
      parts: what each example adds: an array, or a list.
      figure: of the parts of a resample.

    >>> bootstrap(np.array([0.0, 1.0] * 50), lambda parts: parts.mean())
    (0.4, 0.6)
    """
    rng, count = np.random.default_rng(seed), len(parts)
    values = []
    for _ in range(resamples):
        drawn = rng.integers(0, count, count)
        some = parts[drawn] if isinstance(parts, np.ndarray) else [parts[i] for i in drawn]
        values.append(figure(some))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def figure_of(name: str) -> Callable[[np.ndarray], float]:
    """What makes the figure that a task is measured by of the parts that its `measure` gives: an F1
    of counts (right, said, there), and else a mean.
    """
    if name.endswith("f1"):
        return lambda parts: (
            _f1_figures(parts.sum(axis=0))["f1"] if parts.shape[1] == 3 else _mean(parts[:, 0])
        )
    return lambda parts: _mean(parts[:, 0])
