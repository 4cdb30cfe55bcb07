"""Figures are those of the programs that each field takes them from, on random inputs."""

import re
import warnings
from collections import Counter

import numpy as np
import pytest

from gptjax.tasks.metrics import (
    answer_figures,
    answer_scores,
    best_threshold,
    bleu_tokens,
    bootstrap,
    chinese_words,
    class_figures,
    confusion,
    entity_counts,
    entity_figures,
    figure_of,
    label_set_figures,
    text_figures,
)
from gptjax.tasks.tags import Entity, entities, first_broken, plain_tag, write_tags

# So many random inputs of each kind; as many as the second number when there is time.
COUNTS = [40, pytest.param(5000, marks=pytest.mark.slow)]
SCHEMES = ("iob1", "iob2", "bioes")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # references warn of figures that are 0 / 0
        yield


@pytest.fixture
def scikit_learn():
    sklearn = pytest.importorskip("sklearn", reason="the package scikit-learn")
    from sklearn import metrics

    with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):  # quicker
        yield metrics


# --- classes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_classes_as_scikit_learn(scikit_learn, count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        labels = range(rng.integers(1, 7))  # numbers, for scikit-learn is slow on strings
        truth, said = rng.choice(labels, (2, rng.integers(1, 30)))
        figures = class_figures(truth.tolist(), said.tolist())
        assert figures["accuracy"] == pytest.approx(scikit_learn.accuracy_score(truth, said))
        assert figures["macro_f1"] == pytest.approx(
            scikit_learn.f1_score(truth, said, average="macro", zero_division=0)
        )
        assert figures["matthews"] == pytest.approx(
            scikit_learn.matthews_corrcoef(truth, said), abs=1e-12
        )
        expected = scikit_learn.confusion_matrix(truth, said, labels=labels)
        np.testing.assert_array_equal(confusion(truth.tolist(), said.tolist(), labels), expected)


@pytest.mark.parametrize("count", COUNTS)
def test_several_labels_as_scikit_learn(scikit_learn, count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        truth, said = rng.random((2, rng.integers(1, 20), rng.integers(2, 6))) < rng.random()
        figures = label_set_figures(truth, said)
        for average in ("micro", "macro"):
            expected = scikit_learn.f1_score(truth, said, average=average, zero_division=0)
            assert figures[f"{average}_f1"] == pytest.approx(expected)
        assert figures["exact"] == pytest.approx(scikit_learn.accuracy_score(truth, said))


# --- entities ----------------------------------------------------------------------------------


def random_tags(rng: np.random.Generator, scheme: str, length: int) -> list[str]:
    """Any letters of a scheme in any order: mostly broken."""
    letters = "BIES" if scheme == "bioes" else "BI"
    tags = [f"{letter}-{kind}" for letter in letters for kind in ("PER", "LOC", "e-mail")]
    return rng.choice(["O"] * 3 + tags, length).tolist()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_entities_as_seqeval(scheme, strict, count):
    pytest.importorskip("seqeval", reason="the package seqeval")
    from seqeval import scheme as schemes
    from seqeval.metrics import sequence_labeling, v1

    reference, how = sequence_labeling, {}
    if strict:
        name = {"iob1": "IOB1", "iob2": "IOB2", "bioes": "IOBES"}[scheme]
        reference, how = v1, {"scheme": getattr(schemes, name)}
    rng = np.random.default_rng(0)
    for _ in range(count):
        lengths = rng.integers(1, 12, rng.integers(1, 4))
        truth, said = ([random_tags(rng, scheme, length) for length in lengths] for _ in range(2))
        said = [
            one if rng.random() < 0.4 else other for one, other in zip(truth, said, strict=True)
        ]
        figures = entity_figures(truth, said, scheme if strict else None)
        expected = reference.precision_recall_fscore_support(
            truth, said, average="micro", zero_division=0, **how
        )
        got = [figures[name] for name in ("precision", "recall", "f1")]
        assert got == pytest.approx(expected[:3]), (truth, said)
        assert figures["tag_accuracy"] == pytest.approx(
            sequence_labeling.accuracy_score(truth, said)
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tags_written_and_read_again(scheme):
    """Every set of entities that do not overlap comes back, and its tags are not broken."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        found, place = [], 0
        while place < 12:
            stop = place + int(rng.integers(1, 4))
            if rng.random() < 0.6:
                found.append(Entity(str(rng.choice(["PER", "LOC"])), place, stop))
            place = stop
        tags = write_tags(found, 16, scheme)
        assert entities(tags) == found
        assert first_broken(tags, scheme) is None


def test_broken_tags_are_found():
    assert first_broken(["O", "I-PER", "I-PER"], "iob2") == 1
    assert first_broken(["O", "I-PER", "I-PER"], "iob1") is None
    assert first_broken(["B-PER", "I-LOC"], "iob2") == 1
    assert first_broken(["O", "B-PER"], "iob1") == 1
    assert first_broken(["B-PER", "I-PER", "O"], "bioes") == 1
    assert plain_tag("L-PER", "bioes") == "E-PER" and plain_tag("B_PER", "iob2") == "B-PER"
    assert plain_tag("X-PER", "iob2") is None and plain_tag("", "iob2") is None
    assert entities(["I-A", "I-A", "I-B"]) == [Entity("A", 0, 2), Entity("B", 2, 3)]


# --- answers: SQuAD's definition, in other words -------------------------------------------------

PIECES = ["the", "An", "a", "cat", "Cat,", "dog.", "e.g.", "7", "—", "", "theatre", "it's"]


def words_of(text: str) -> list[str]:
    text = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
    return [word for word in re.sub(r"\b(?:the|an|a)\b", " ", text).split() if word]


def f1_of(right: str, said: str, second: bool) -> float:
    one, other = Counter(words_of(right)), Counter(words_of(said))
    if second and not (one and other):
        return float(one == other)
    same = sum(min(one[word], other[word]) for word in one)
    if not same:
        return 0.0
    precision, recall = same / other.total(), same / one.total()
    return 2 * precision * recall / (precision + recall)


def random_answer(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(PIECES, rng.integers(0, 4)).tolist())


@pytest.mark.parametrize("rules", ["squad1", "squad2"])
def test_answers_as_squad(rules):
    rng = np.random.default_rng(0)
    second = rules == "squad2"
    for _ in range(5000):
        right = [random_answer(rng) for _ in range(rng.integers(0 if second else 1, 4))]
        said = random_answer(rng)
        golds = right
        if second:
            golds = [one for one in right if words_of(one)] or [""]
        exact = max(float(words_of(one) == words_of(said)) for one in golds)
        f1 = max(f1_of(one, said, second) for one in golds)
        assert answer_scores(right, said, rules) == pytest.approx((exact, f1))


def test_best_threshold_as_squad():
    """Of all thresholds the best is found, where no question is answered by nothing at first."""
    rng = np.random.default_rng(0)
    for _ in range(5000):
        size = int(rng.integers(1, 9))
        has, scores = rng.random(size) < 0.6, rng.choice([0.0, 0.5, 1.0], size)
        passages = [str(one) for one in rng.choice(["", "x"], size)]
        no_answer = rng.permutation(size) + rng.random(size) / 2
        best, threshold = best_threshold(scores, passages, no_answer, has)
        # What is said where no_answer is above a threshold is nothing.
        possible = {}
        for limit in [-1.0, *no_answer]:
            said = no_answer <= limit
            nothing = ~said | np.array([not one for one in passages])
            possible[limit] = np.where(has, np.where(said, scores, 0.0), nothing).mean()
        assert best == pytest.approx(max(possible.values()))
        assert possible[threshold if threshold in possible else -1.0] == pytest.approx(best)


def test_figures_of_questions_without_answers():
    figures = answer_figures(
        [["Rome"], [], ["a cat"]],
        ["Rome", "", "dog"],
        "squad2",
        passages=["Rome", "Paris", "dog"],
        no_answer=[-3.0, 2.0, -1.0],
    )
    assert figures["exact"] == pytest.approx(2 / 3)
    assert figures["exact_unanswered"] == 1 and figures["f1_answered"] == 0.5
    assert figures["best_f1"] == pytest.approx(2 / 3)
    assert figures["best_f1_threshold"] == -3.0


def test_chinese_answers():
    """The longest run that both have counts, in ideographs and words."""
    assert chinese_words("“战国 Musou 3”、Nr. 4") == ["战", "国", "musou", "3nr", ".", "4"]
    assert answer_scores(["《战国无双3》"], "战国无双3", "cmrc") == (1.0, 1.0)
    exact, f1 = answer_scores(["北京大学"], "在北京", "cmrc")
    assert (exact, f1) == (0.0, pytest.approx(2 * 2 / (4 + 3)))
    assert answer_scores(["光荣和ω-force", "光荣"], "光荣", "cmrc") == (1.0, 1.0)


def test_answers_as_cmrc():
    """Exact match without signs, and F1 of the longest run of words that both have."""
    rng = np.random.default_rng(0)

    def f1(one: list[str], other: list[str]) -> float:
        runs = {tuple(one[i:j]) for i in range(len(one)) for j in range(i + 1, len(one) + 1)}
        found = [run for run in runs if any([*run] == other[i:][: len(run)] for i in range(9))]
        return 2 * max(map(len, found), default=0) / (len(one) + len(other))

    for _ in range(5000):
        said, *right = (
            [str(one) for one in rng.choice(["战", "国", "3", "fun", "ω"], rng.integers(1, 8))]
            for _ in range(rng.integers(2, 4))
        )
        signs = [("", ""), ("《", "》")]
        texts = [" ".join(one).join(signs[rng.integers(2)]) for one in (said, *right)]
        expected = max(float(one == said) for one in right), max(f1(one, said) for one in right)
        assert answer_scores(texts[1:], texts[0], "cmrc") == pytest.approx(expected), texts


# --- written texts -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, pytest.param(5000, marks=pytest.mark.slow)])
def test_texts_as_sacrebleu(count):
    sacrebleu = pytest.importorskip("sacrebleu", reason="the package sacrebleu")
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens, words = ("zh", ["我", "们", "好", "。"]) if rng.random() < 0.5 else ("13a", PIECES)
        size = rng.integers(1, 6)
        said, first, second = (
            [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(size)] for _ in range(3)
        )
        figures = text_figures([[*pair] for pair in zip(first, second, strict=True)], said, tokens)
        columns = [first, second]
        bleu = sacrebleu.corpus_bleu(said, columns, tokenize=tokens).score
        assert figures["bleu"] == pytest.approx(bleu)
        assert figures["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, columns).score)


@pytest.mark.parametrize(
    ("right", "tokens"),
    [
        ("Komm schnell, Tom!", "13a"),
        ("서둘러 주세요", "13a"),  # Hangul has spaces
        ("", "13a"),
        ("快点。汤姆。", "zh"),
        ("汤姆 says 快点快点", "zh"),
        ("早くきてください", "char"),
        ("เร็วเข้า", "char"),
    ],
)
def test_bleu_divides_texts_as_their_script_has_it(right, tokens):
    assert bleu_tokens([[right], [right, right]]) == tokens


def test_bleu_sees_what_is_right_in_a_text_without_spaces():
    pytest.importorskip("sacrebleu", reason="the package sacrebleu")
    said, right = ["他说快点走吧。"], [["他说快点跑吧。"]]
    assert text_figures(right, said) == text_figures(right, said, "zh")
    assert text_figures(right, said)["bleu"] > text_figures(right, said, "13a")["bleu"]


def test_a_text_may_have_more_right_ones_than_another():
    pytest.importorskip("sacrebleu", reason="the package sacrebleu")
    figures = text_figures([["a b c d e"], ["f g h i j", "k l m n o"]], ["a b c d e", "k l m n o"])
    assert figures == {"bleu": pytest.approx(100), "chrf": pytest.approx(100), "exact": 1.0}
    assert text_figures([], [])["bleu"] == 0


# --- intervals ---------------------------------------------------------------------------------


def test_intervals_hold_what_they_should():
    """Of 95 % intervals about as many hold the mean that the examples were drawn with."""
    rng, held = np.random.default_rng(0), 0
    for number in range(60):
        parts = (rng.random(80) < 0.7).astype(float)
        low, high = bootstrap(parts, lambda some: some.mean(), resamples=200, seed=number)
        held += low <= 0.7 <= high
    assert 50 <= held <= 60


def test_intervals_are_a_function_of_the_seed():
    counts = entity_counts([["B-A", "O"]] * 90 + [["O", "B-A"]] * 10, [["B-A", "O"]] * 100)
    first, again, other = (bootstrap(counts, figure_of("f1"), seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] <= figure_of("f1")(counts) == 0.9 <= first[1]
