"""Examples become tokens and targets, and what a model says of them becomes predictions again."""

import functools
import io
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import jax
import numpy as np
import pytest
from small import PLAIN, fresh

from gptjax.config import ConfigError, TaskConfig, kind_of
from gptjax.model import token_losses
from gptjax.sources import DataError
from gptjax.tasks import Encoded, ExampleRows, Problems, Task, encode_examples, make_task
from gptjax.tasks.classification import Classified
from gptjax.tasks.dialogue import Dialogue, Message
from gptjax.tasks.entities import Tagged
from gptjax.tasks.packing import check_examples, pack
from gptjax.tasks.pairs import Pair
from gptjax.tasks.prompts import choice_scores, filled, last_line, shots_of, with_shots
from gptjax.tasks.questions import Question, Span, best_passage
from gptjax.tasks.task import encode_with_places, space_between, windows
from gptjax.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    train_sentencepiece,
)
from gptjax.tokenizer.bpe import read_bpe

TEXTS = [
    "The quick brown fox, isn't it? 2009年\uff0c施力的大小不同。\n  Two  spaces — and “quotes”.",
    "北京大学的学生在北京。naïve café ﬁnal Ⅻ 😀 \uff05",
    "a",
    " leading, and trailing ",
]
SAID = " ".join(TEXTS) * 3


@functools.cache
def tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """Of every kind; the last one changes characters and puts a space before the text."""
    from sentencepiece import SentencePieceTrainer
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [SAID], trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    library.save(str(folder / "tokenizer.json"))
    content = read_bpe(folder / "tokenizer.json")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SAID.split(".")),
        model_writer=model,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc_cf",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return {
        "bytes": ByteTokenizer(),
        "bpe": BPETokenizer(content, "tokenizer.json"),
        "sentencepiece": train_sentencepiece(
            [SAID], folder / "exact.model", vocab_size=340, kind="bpe"
        ).tokenizer,
        "normalising": SentencePieceTokenizer(model.getvalue(), "normalising.model"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(params=["bytes", "bpe", "sentencepiece", "normalising"])
def tokenizer(request, folder) -> Tokenizer:
    return tokenizers(folder)[request.param]


EXACT = pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "sentencepiece"], indirect=True)
BYTES = ByteTokenizer()


def encode(task, example, tokenizer: Tokenizer = BYTES, size: int = 1000) -> list:
    problems = Problems("error", "task.train")
    encoded = task.encode(example, tokenizer, size, problems)
    problems.refuse()
    assert all(len({*map(len, one[:3])}) == 1 and len(one.tokens) <= size for one in encoded)
    return encoded


@pytest.mark.parametrize("kind", kind_of(get_type_hints(TaskConfig)["kind"]).choices)
def test_every_kind_is_a_task(kind):
    task = make_task(TaskConfig(kind=kind, labels=("O", "B-A", "I-A")))
    assert task.name == kind and task.fitted([]) == task
    members = {*Task.__annotations__, *(name for name in vars(Task) if name[0] != "_")}
    assert all(hasattr(task, name) for name in members)


# --- places in a text --------------------------------------------------------------------------


@EXACT
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_know_their_characters(tokenizer, text):
    """The bytes of each token lie in its characters, and no character is left out."""
    ids, places = encode_with_places(text, tokenizer, begins=True)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    at = 0
    for token, (first, after) in zip(ids, places, strict=True):
        content = tokenizer.decode_bytes([token])
        before = len(text[:first].encode())
        assert before <= at and at + len(content) <= len(text[:after].encode())
        assert len(text[: first + 1].encode()) > at and len(text[: after - 1].encode()) < at + len(
            content
        )
        at += len(content)
    assert at == len(text.encode())


def test_a_tokenizer_that_changes_characters(folder):
    """What is equal in both texts has its own place; what is not, its neighbours'."""
    tokenizer = tokenizers(folder)["normalising"]
    for text in [*TEXTS[:2], "Ⅻ \uff26ox  ﬁnal"]:
        ids, places = encode_with_places(text, tokenizer, begins=True)
        assert (np.diff(places[:, 0]) >= 0).all() and places.max() <= len(text)
        for token, (first, after) in zip(ids, places, strict=True):
            shown = tokenizer.decode([token]).strip()
            if shown and shown.isascii() and shown.isalnum():
                assert shown in unicodedata.normalize("NFKC", text[first:after]).casefold()


# --- windows -----------------------------------------------------------------------------------


def test_windows_hold_every_unit_once():
    rng = np.random.default_rng(0)
    for _ in range(300):
        room, overlap = int(rng.integers(3, 20)), int(rng.integers(0, 6))
        sizes = rng.integers(1, 4, rng.integers(1, 40))
        found = windows(sizes, room, overlap)
        counted = [unit for one in found for unit in range(one.counted, one.stop)]
        assert counted == [*range(len(sizes))]
        for one in found:
            assert one.start <= one.counted < one.stop and one.counted - one.start <= overlap
            assert sizes[one.start : one.stop].sum() <= room
    assert windows(np.array([1, 9]), 8, 2) is None


# --- classes -----------------------------------------------------------------------------------

CLASSES = make_task(TaskConfig(kind="classify", labels=("no", "yes", "so")))


def test_a_class_is_said_at_the_last_token(tokenizer):
    (one,) = encode(CLASSES, Classified("x:1", TEXTS[0], None, ("so",)), tokenizer)
    assert one.tokens[0] == one.tokens[-1] == tokenizer.end
    assert one.weights.tolist() == [0.0] * (len(one.tokens) - 1) + [1.0]
    assert one.targets[-1] == 2
    logits = np.random.default_rng(0).normal(size=(len(one.tokens), 3))
    said = CLASSES.decode(None, [one], [logits])
    np.testing.assert_allclose(sum(said["probabilities"].values()), 1)
    assert said["label"] == CLASSES.labels[logits[-1].argmax()]


def test_a_long_text_has_windows_and_one_class():
    example = Classified("x:1", "abcdefghij" * 5, None, ("yes",))
    encoded = encode(CLASSES, example, size=30)
    assert len(encoded) > 1 and all(one.targets[-1] == 1 for one in encoded)
    assert sum(one.weights.sum() for one in encoded) == pytest.approx(1)  # as a short one
    outputs = [np.zeros((len(one.tokens), 3)) for one in encoded]
    outputs[0][-1] = [0, 0, 9]
    outputs[1][-1] = [0, 1, 0]
    assert CLASSES.decode(example, encoded, outputs)["label"] == "so"
    for policy, raises in (("error", True), ("skip", False)):
        task = make_task(TaskConfig(kind="classify", too_long=policy, labels=("yes",)))
        problems = Problems("error", "task.train")
        assert task.encode(example, BYTES, 30, problems) == []
        assert problems.counts["too long", "left out"] == 1
        assert bool(problems.refused) == raises
    with pytest.raises(DataError, match=r"52 tokens, but a row holds 30: give a larger"):
        encode(
            make_task(TaskConfig(kind="classify", too_long="error", labels=("yes",))),
            example,
            size=30,
        )


@pytest.mark.parametrize("count", [3, 31, 32, 130])
def test_several_labels_are_bits(count):
    """Any set of any number of labels comes back from the targets, whatever the text's length."""
    labels = tuple(f"l{i}" for i in range(count))
    task = make_task(TaskConfig(kind="classify", several=True, labels=labels))
    rng = np.random.default_rng(0)
    for chosen in (rng.random((20, count)) < 0.3).tolist():
        names = tuple(label for label, there in zip(labels, chosen, strict=True) if there)
        (one,) = encode(task, Classified("x:1", "a", None, names))
        last = len(one.tokens) - 1
        assert one.weights.nonzero()[0].tolist() == [last]
        bits = [bool(one.targets[last - i // 31] >> i % 31 & 1) for i in range(count)]
        assert bits == chosen
        logits = np.zeros((last + 1, count))
        logits[last] = np.where(chosen, 3, -3)
        assert tuple(task.decode(None, [one], [logits])["labels"]) == names


def test_rare_labels_may_weigh_more():
    config = TaskConfig(kind="classify", class_weights="balanced")
    examples = [Classified("", "x", None, (label,)) for label in "aaab"]
    task = make_task(config).fitted(examples)
    weights = [encode(task, one)[0].weights[-1] for one in examples]
    np.testing.assert_allclose(weights, [2 / 3] * 3 + [2])


# --- entities ----------------------------------------------------------------------------------

KINDS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SENTENCES = [
    Tagged("x:1", ("Ann", "Lee", "saw", "Rome", "."), ("B-PER", "I-PER", "O", "B-LOC", "O")),
    Tagged(
        "x:2",
        ("施力", "的", "北京", "\uff0c", "Rome", "的"),
        ("O", "O", "B-LOC", "O", "B-LOC", "O"),
    ),
    Tagged("x:3", ("x",) * 60, ("B-PER", "I-PER", "I-PER") * 20),
    Tagged(
        "x:4", ("的", "\u200b", "Ann"), ("O", "O", "B-PER")
    ),  # nothing may be left of the second
]


@pytest.mark.parametrize("repeat", [False, True], ids=["once", "repeated"])
def test_tags_go_to_tokens_and_back(tokenizer, repeat):
    """From logits that are right come the tags; every word counts once, at its last token."""
    task = make_task(TaskConfig(kind="entities", labels=KINDS, repeat=repeat))
    for example in SENTENCES:
        for size in (1000, 50):
            encoded = encode(task, example, tokenizer, size)
            assert len(encoded) > 1 or size == 1000 or len(example.words) < 60
            words = np.concatenate([one.units[:, 1] for one in encoded])
            assert words.tolist() == [*range(len(example.words))]
            for one in encoded:
                assert sorted(one.units[:, 0]) == one.weights.nonzero()[0].tolist()
            outputs = [np.eye(len(KINDS))[one.targets] for one in encoded]
            assert task.decode(example, encoded, outputs)["tags"] == [*example.tags]


def test_a_repeated_sentence_is_tagged_the_second_time():
    task = make_task(TaskConfig(kind="entities", labels=KINDS, repeat=True))
    (one,) = encode(task, SENTENCES[0])
    assert BYTES.decode(one.tokens) == "Ann Lee saw Rome .\nAnn Lee saw Rome ."
    assert (one.units[:, 0] >= 20).all()


def test_words_are_joined_as_their_script_is():
    task = make_task(TaskConfig(kind="entities", labels=KINDS))
    (one,) = encode(task, SENTENCES[1])
    assert BYTES.decode(one.tokens) == "施力的北京\uff0cRome的"
    assert space_between("a", "b") == " " and space_between("a ", "b") == ""
    task = make_task(TaskConfig(kind="entities", labels=KINDS, joiner="_"))
    (one,) = encode(task, SENTENCES[0])
    assert BYTES.decode(one.tokens) == "Ann_Lee_saw_Rome_."


HEADS = {
    "IO": ("O", "PER", "LOC"),
    "numbers": ("I-PER", "O", "I-LOC"),
    "BIOES": ("O", *(f"{letter}-{kind}" for kind in ("PER", "LOC") for letter in "BIES")),
    "underscores": ("B_LOC", "B_PER", "O", "I_LOC", "I_PER"),
}


@pytest.mark.parametrize("labels", HEADS.values(), ids=HEADS)
def test_a_head_may_have_tags_of_any_scheme(labels):
    """What it has learnt of a sentence, it says of it; where a scheme can tell."""
    task = make_task(TaskConfig(kind="entities", labels=labels))
    for example in SENTENCES[:2]:
        (one,) = encode(task, example)
        logits = np.eye(len(labels))[one.targets]
        said = task.decode(example, [one], [logits])
        assert tuple(said["tags"]) == example.tags
        assert {one["kind"] for one in said["entities"]} <= {"PER", "LOC"}
    assert task.metrics(SENTENCES[:1], [task.decode(SENTENCES[0], [], [])])["f1"] == 0


def test_rare_tags_may_weigh_more():
    task = make_task(TaskConfig(kind="entities", class_weights="balanced"))
    example = Tagged("", ("a", "b", "c", "d"), ("O", "O", "O", "B-X"))
    task = task.fitted([example])
    assert task.labels == ("O", "B-X", "I-X")
    (one,) = encode(task, example)
    np.testing.assert_allclose(one.weights[one.units[:, 0]], [2 / 3] * 3 + [2], rtol=1e-6)
    assert task.weights == pytest.approx((2 / 3, 2, 1))  # I-X is nowhere


@pytest.mark.parametrize("several", [True, False])
def test_windows_say_together_what_they_say_of_the_opposite(several):
    task = make_task(TaskConfig(kind="classify", labels=("no", "yes"), several=several))
    example = Classified("x:1", "a" * 50, None, ("yes",))
    encoded = encode(task, example, size=40)
    assert len(encoded) == 2
    shares = np.array([0.9, 0.2])
    odds = np.log(shares / (1 - shares))
    sides = {}
    for sign in (1, -1):
        logits = np.stack([0 * odds, sign * odds], axis=1)
        outputs = [
            np.repeat(row[None], len(one.tokens), axis=0)
            for row, one in zip(logits, encoded, strict=True)
        ]
        sides[sign] = task.decode(example, encoded, outputs)["probabilities"]["yes"]
    assert sides[1] == pytest.approx(0.6) and sides[1] + sides[-1] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["classify", "entities", "questions"])
def test_examples_without_delimiters_are_bare(kind):
    """As Transformers shows them; the label of a text is at its last token."""
    examples = {
        "classify": Classified("", "ab", None, ("x",)),
        "entities": Tagged("", ("a", "b"), ("O", "B-PER")),
        "questions": Question("", "0", "who?", "Ann Lee", ("Ann",), (Span(0, 3),)),
    }
    texts = {"classify": "ab", "entities": "a b", "questions": "who?\nAnn Lee"}
    labels = {"classify": ("x", "y"), "entities": KINDS, "questions": ()}[kind]
    config = TaskConfig(kind=kind, labels=labels, delimit=False)
    (one,) = encode(make_task(config), examples[kind])
    (same,) = encode(make_task(replace(config, delimit=True)), examples[kind])
    assert one.tokens.tolist() == [*texts[kind].encode()]
    begun = len(same.tokens) - (kind != "entities")
    assert same.tokens[1:begun].tolist() == one.tokens.tolist()
    said = same.targets[same.weights > 0].tolist()
    assert one.targets[one.weights > 0].tolist() == said
    if kind != "classify":
        np.testing.assert_array_equal(one.units[:, 0] + 1, same.units[:, 0])
    else:
        assert one.units[0, 0] == 1


def test_entities_can_be_written():
    task = make_task(TaskConfig(kind="entities", labels=KINDS))
    for example in SENTENCES[:2]:
        assert task.from_text(example, task.target(example))["tags"] == [*example.tags]
    assert task.target(Tagged("", ("a",), ("O",))) == " none"
    said = task.from_text(SENTENCES[0], " Rome (LOC); Rome (LOC); Bonn (LOC); saw (X)\nmore")
    assert [one["text"] for one in said["entities"]] == ["Rome"]


# --- questions ---------------------------------------------------------------------------------

LONG = "".join(f"Number {i} is green, 第{i}个。 " for i in range(40))


@EXACT
@pytest.mark.parametrize("size", [2000, 120])
def test_answers_come_back_to_the_character(tokenizer, size):
    """From the targets of windows, as logits, comes the answer, wherever it lies."""
    task = make_task(TaskConfig(kind="questions", max_answer=200))
    for answer in ("Number 7 ", "Number 31 is", "个。", "第39个", "Number 0"):
        start = LONG.index(answer.strip())
        span = Span(start, start + len(answer.strip()))
        text = LONG[span.start : span.stop]
        example = Question("x", "1", "Which?", LONG, (text,), (span,))
        encoded = encode(task, example, tokenizer, size)
        assert (len(encoded) > 1) == (size < 1000)
        np.testing.assert_allclose([one.weights.sum() for one in encoded], 1)
        outputs = [np.stack([one.targets & 1, one.targets >> 1 & 1], axis=1) for one in encoded]
        said = task.decode(example, encoded, [9.0 * out for out in outputs])
        assert text in said["text"]
        assert LONG[said["start"] : said["stop"]] == said["text"]
        assert said["no_answer"] < 0
        if tokenizer.kind == "bytes":
            assert (said["start"], said["stop"]) == span
        # No token more than the answer needs.
        assert len(said["text"]) <= len(text) + 8


def test_no_answer_is_at_the_last_token():
    task = make_task(TaskConfig(kind="questions", answers="squad2"))
    example = Question("x", "1", "Which?", "Rome.", (), ())
    (one,) = encode(task, example)
    assert (one.targets[-1], one.weights[-1], one.targets[:-1].any()) == (3, 1.0, False)
    logits = np.zeros((len(one.tokens), 2))
    logits[-1] = 2
    said = task.decode(example, [one], [logits])
    assert (said["text"], said["no_answer"]) == ("", 4.0) and said["passage"]
    logits[-1] = -2
    assert task.decode(example, [one], [logits])["text"] == said["passage"]
    assert task.metrics([example], [said])["exact"] == 1


def test_an_answer_that_is_nowhere_is_not_learnt():
    task = make_task(TaskConfig(kind="questions"))
    example = Question("x", "1", "Which?", "Rome.", ("Bonn",), ())
    (one,) = encode(task, example)
    assert not one.weights.any()
    problems = Problems("skip", "task.train")
    assert not len(encode_examples(task, [example], BYTES, 99, problems, to_learn=True).tokens)
    assert problems.counts == {("nothing to learn", "left out"): 1}
    kept = encode_examples(task, [example], BYTES, 99, problems, to_learn=False)
    assert kept.example_of.tolist() == [0]
    encoded = encode_examples(task, [example], BYTES, 99, problems, to_learn=True)
    with pytest.raises(DataError, match=r"no example is left\n  nothing to learn: 2 left out"):
        check_examples(encoded, problems)


def test_white_space_around_an_answer_is_not_part_of_it():
    task = make_task(TaskConfig(kind="questions"))
    example = Question("x", "1", "Where?", "in  Rome \nnow", ("Rome",), ())
    units = np.int32([[0, 0, 2], [1, 2, 9], [2, 9, 13]])
    window = Encoded(np.zeros(4), np.zeros(4), np.zeros(4), units)
    said = task.decode(example, [window], [np.float32([[0, 0], [5, 5], [0, 0], [0, 0]])])
    assert (said["text"], said["start"], said["stop"]) == ("Rome", 4, 8)


def test_the_best_passage_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(100):
        begin, end = rng.normal(size=(2, rng.integers(1, 12)))
        most = int(rng.integers(1, 6))
        scores = {
            (i, j): begin[i] + end[j]
            for i in range(len(begin))
            for j in range(i, min(i + most, len(begin)))
        }
        score, first, last = best_passage(begin, end, most)
        assert score == pytest.approx(max(scores.values())) and scores[first, last] == score


# --- what is written ---------------------------------------------------------------------------


def learnt(one, tokenizer: Tokenizer) -> str:
    """The targets that count, as text, with | for end-of-text."""
    ids = one.targets[one.weights > 0].tolist()
    return "".join("|" if i == tokenizer.end else tokenizer.decode([i]) for i in ids)


@EXACT
def test_the_loss_is_on_the_target_only(tokenizer):
    task = make_task(TaskConfig(kind="pairs"))
    example = Pair("x", "Yes.", "Quick brown fox", (("source", "Yes."),))
    (one,) = encode(task, example, tokenizer)
    assert learnt(one, tokenizer) == "Quick brown fox|"
    np.testing.assert_array_equal(one.tokens[1:], one.targets[:-1])
    assert tokenizer.decode(one.tokens) == "Yes.\nQuick brown fox"
    # The prompt alone has the same ids.
    (alone,) = encode(task, Pair("x", "Yes.", None, (("source", "Yes."),)), tokenizer)
    np.testing.assert_array_equal(alone.tokens, one.tokens[: len(alone.tokens)])
    assert not alone.weights.any()
    assert len(alone.tokens) == (one.weights == 0).sum() + 1


TALK = Dialogue(
    "x",
    (
        Message("system", "Be brief."),
        Message("user", "Quick?"),
        Message("assistant", "Yes:\n it is."),
        Message("user", "Brown?"),
        Message("assistant", "No."),
    ),
)


@EXACT
def test_the_loss_is_on_the_assistant_only(tokenizer):
    task = make_task(TaskConfig(kind="dialogue"))
    (one,) = encode(task, TALK, tokenizer)
    assert learnt(one, tokenizer) == "Yes:\n it is.|No.|"
    ids = [*one.tokens.tolist(), one.targets[-1]]
    # What the assistant is asked with is how its turn begins.
    asked = task.fitting_ids(TALK.messages[:2], tokenizer, 1000)[0].tolist()
    assert ids[: len(asked)] == asked
    assert one.weights[len(asked) - 1] == 1 and one.weights[len(asked) - 2] == 0


@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_a_long_dialogue_has_every_reply_once(overlap):
    task = make_task(TaskConfig(kind="dialogue", overlap=overlap))
    for size in (45, 60, 75):
        encoded = encode(task, TALK, BYTES, size)
        assert len(encoded) > 1
        assert "".join(learnt(one, BYTES) for one in encoded) == "Yes:\n it is.|No.|"
    # As much is shown again as there is room for, and no more than half of the row.
    again = "assistant:\nYes:\n it is." in BYTES.decode(encoded[-1].tokens)
    assert again == (overlap > 1)


def test_a_reply_is_learnt_after_its_question_if_both_fit():
    """Also where the question is more than half of them."""
    said = [Message("user", "q" * 40), Message("assistant", "a" * 9)] * 5
    task = make_task(TaskConfig(kind="dialogue"))
    encoded = encode(task, Dialogue("x:1", tuple(said)), BYTES, 80)
    learning = [one for one in encoded if one.weights.any()]
    assert len(learning) == 5
    for one in learning:
        text = BYTES.decode(one.tokens)
        assert text.index("q" * 40) < text.index("a" * 9)


# --- prompts -----------------------------------------------------------------------------------


def test_templates():
    assert filled("{a} {json: {b}}", {"a": "{b}", "b": "2"}) == "{b} {json: 2}"
    with pytest.raises(ConfigError, match=r"no column 'txt'.* Did you mean 'text'"):
        filled("{txt}", {"text": "x"})
    assert last_line("{text}\nAnswer:") == "Answer:" and last_line("so {text}") == ""


def test_shots_are_drawn_by_seed_and_number():
    drawn = [shots_of(number, 50, 5, seed=1) for number in range(20)]
    assert drawn == [shots_of(number, 50, 5, seed=1) for number in range(20)]
    assert all(len({*one}) == 5 and max(one) < 50 for one in drawn)
    assert len({*map(tuple, drawn)}) == 20 and drawn[0] != shots_of(0, 50, 5, seed=2)
    assert sorted(shots_of(0, 3, 5, seed=1)) == [0, 1, 2]


def test_as_many_shots_as_fit():
    shots = [("p1", " t1"), ("p2", " t2")]
    assert with_shots(shots, "p") == ("p1 t1\n\np2 t2\n\np", 2)
    assert with_shots(shots, "p", lambda text: len(text) < 10) == ("p2 t2\n\np", 1)
    assert with_shots(shots, "p", lambda text: False) == ("p", 0)


def test_scores_of_choices():
    nats, figures = [-6.0, -4.0, -4.5], {"num_tokens": [3, 1, 2], "num_bytes": [9, 2, 9]}
    scores = {
        rule: choice_scores(rule, nats, bare_nats=[-6.0, -1.0, -5.0], **figures)
        for rule in ("sum", "token", "byte", "unconditional")
    }
    np.testing.assert_allclose(scores["token"], [-2, -4, -2.25])
    np.testing.assert_allclose(scores["unconditional"], [0, -3, 0.5])
    assert [int(one.argmax()) for one in scores.values()] == [1, 0, 2, 2]


def test_choices_of_a_class_are_its_words():
    config = TaskConfig(kind="classify", labels=("0", "1"), words=("bad", "good"))
    task = make_task(config)
    example = Classified("x", "fine", None, ("1",))
    asked = task.requests(example)
    assert [(one.prompt, one.target, one.bare) for one in asked] == [
        ("fine\nlabel:", " bad", "label:"),
        ("fine\nlabel:", " good", "label:"),
    ]
    assert task.target(example) == " good"
    assert task.from_scores(example, np.array([-3.0, -1.0]))["label"] == "1"
    assert task.from_text(example, " good film")["label"] == "1"
    assert task.from_text(example, "else")["label"] == ""


# --- rows --------------------------------------------------------------------------------------


def test_packing_cuts_and_loses_nothing():
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = int(rng.integers(4, 40))
        lengths = rng.integers(1, size + 1, rng.integers(0, 60))
        packed = pack(lengths, size, seed=int(rng.integers(9)))
        used = np.zeros((packed.row.max() + 1 if len(lengths) else 0, size), int)
        for row, start, length in zip(*packed, lengths, strict=True):
            assert start + length <= size
            used[row, start : start + length] += 1
        assert (used <= 1).all() and used.sum() == lengths.sum()
        # First fit: of two rows the contents never fit one (Garey et al. 1972).
        filled_rows = used.sum(axis=1)
        if len(filled_rows) > 1:
            assert (filled_rows[:-1] + filled_rows[1:] > size).all()
    with pytest.raises(ValueError, match="does not fit"):
        pack([5], 4, seed=0)


def test_packing_is_a_function_of_the_seed():
    lengths = np.random.default_rng(0).integers(1, 20, 500)
    first, again, other = (pack(lengths, 64, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.row, again.row)
    assert (first.row != other.row).any()
    # A tree of n leaves: that it is quick is seen at a size at which n x n would not be.
    many = pack(np.random.default_rng(0).integers(1, 20, 20_000), 64, seed=0)
    assert many.row.max() + 1 < 20_000 * 10 / 64 * 1.03


def rows_of(examples: list[Tagged], **fields) -> ExampleRows:
    task = make_task(TaskConfig(kind="entities", labels=KINDS))
    problems = Problems("error", "task.train")
    encoded = encode_examples(task, examples, BYTES, 64, problems, to_learn=True)
    given = {"batch_size": 4, "seed": 3, "shuffle": True} | fields
    return ExampleRows(encoded=encoded, context_size=64, pad=BYTES.pad, **given)


MANY = [
    Tagged(f"x:{i}", ("w" * (1 + i % 9), str(i)), ("B-PER", "O")) for i in range(150)
]  # their texts differ


@pytest.mark.parametrize("alone", [False, True], ids=["packed", "alone"])
def test_every_epoch_has_every_example_once_and_whole(alone):
    rows = rows_of(MANY, alone=alone)
    assert rows.epochs(rows.num_batches) >= 1
    steps = 2 * rows.num_rows // rows.batch_size + 1
    seen = [
        (step * 4 + place.row, place.number, place)
        for step in range(steps)
        for place in rows.places_at(step, which=slice(None))
    ]
    for epoch in range(2):
        here = slice(epoch * rows.num_rows, (epoch + 1) * rows.num_rows)
        numbers = [number for row, number, _ in seen if row in range(here.start, here.stop)]
        assert sorted(numbers) == [*range(150)]
    for row, number, place in seen[:40]:
        batch, one = rows.batch_at(row // 4, which=slice(None)), rows.encoded.one(number)
        at = (row % 4, slice(place.start, place.stop))
        np.testing.assert_array_equal(batch.tokens_BT[at], one.tokens)
        np.testing.assert_array_equal(batch.targets_BT[at], one.targets)
        np.testing.assert_array_equal(batch.weights_BT[at], one.weights)
        np.testing.assert_array_equal(batch.positions_BT[at], np.arange(len(one.tokens)))
        assert len({*batch.segments_BT[at].tolist()}) == 1
        assert (batch.segments_BT[row % 4] == batch.segments_BT[at][0]).sum() == len(one.tokens)


def test_padding_is_told_from_examples():
    rows = rows_of(MANY[:20], once=True, shuffle=False)
    batches = [rows.batch_at(step, which=slice(None)) for step in range(rows.num_batches + 1)]
    for batch in batches:
        padding = batch.segments_BT == 0
        assert (batch.tokens_BT[padding] == BYTES.pad).all() and not batch.weights_BT[padding].any()
    assert sum(batch.weights_BT.sum() for batch in batches) == 40
    assert not batches[-1].segments_BT.any()


def test_hosts_see_the_same_batches_and_epochs_differ():
    rows = rows_of(MANY)
    whole = rows.batch_at(5, which=slice(None))
    halves = [rows.batch_at(5, which=which) for which in (slice(0, 2), slice(2, 4))]
    for one, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(one, np.concatenate(parts))
    again = rows.batch_at(5 + rows.num_rows, which=slice(None))
    assert (whole.tokens_BT != again.tokens_BT).any()
    other = rows_of(MANY, seed=4).batch_at(5, which=slice(None))
    assert (whole.tokens_BT != other.tokens_BT).any()


def test_packed_is_as_if_alone():
    """The losses of every example are those that it has in a row of its own."""
    model = replace(PLAIN, vocab_size=BYTES.vocab_size, context_size=64)
    params = fresh(model, jax.random.key(0))
    losses = jax.jit(functools.partial(token_losses, config=model))
    examples = [
        Pair("x", text, text[::-1], (("source", text),))
        for text in ("ab", "sentence", "a longer one", "c", "dd", "another one", "eee")
    ]
    task, problems = make_task(TaskConfig(kind="pairs")), Problems("error", "task.train")
    encoded = encode_examples(task, examples, BYTES, 64, problems, to_learn=True)
    sums = {}
    for alone in (False, True):
        rows = ExampleRows(
            encoded=encoded,
            context_size=64,
            batch_size=2,
            seed=0,
            shuffle=False,
            pad=BYTES.pad,
            once=True,
            alone=alone,
        )
        found = sums.setdefault(alone, {})
        for step in range(rows.num_batches):
            batch = rows.batch_at(step, which=slice(None))
            losses_BT = np.asarray(losses(params, batch)) * batch.weights_BT
            for place in rows.places_at(step, which=slice(None)):
                found[place.number] = losses_BT[place.row, place.start : place.stop].sum()
    assert sums[False].keys() == sums[True].keys() == {*range(7)}
    for number, total in sums[True].items():
        np.testing.assert_allclose(sums[False][number], total, rtol=1e-5)
