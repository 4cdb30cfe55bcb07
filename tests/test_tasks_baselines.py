"""The classical baselines, on files of a few lines whose answers are plain."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from gptjax.config import TaskConfig


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import baselines

    return baselines.measure


def config(folder: Path, kind: str, train: str, valid: str, ending: str, **fields) -> TaskConfig:
    for name, text in (("train", train), ("valid", valid)):
        (folder / f"{name}.{ending}").write_text(text)
    paths = {name: (f"{folder}/{name}.{ending}",) for name in ("train", "valid")}
    return TaskConfig(kind=kind, **paths, **fields)


def test_words_tell_classes(tmp_path, measure):
    pytest.importorskip("sklearn", reason="the package scikit-learn")
    rows = "text\tlabel\n" + "a good film\tyes\na bad film\tno\n" * 5
    figures = measure(config(tmp_path, "classify", rows, rows, "tsv"))
    assert figures["accuracy"] == 1 and figures["examples"] == [10, 10]
    assert figures["interval"] == {"accuracy": [1, 1]}
    several = rows.replace("good film\tyes", "good film\tyes,film").replace("\tno", "\tno,film")
    figures = measure(config(tmp_path, "classify", several, several, "tsv", several=True))
    assert figures["micro_f1"] == 1
    pairs = "text\tmore\tlabel\n" + "a\tgood\tyes\na\tbad\tno\n" * 5
    figures = measure(config(tmp_path, "classify", pairs, pairs, "tsv", second_column="more"))
    assert figures["accuracy"] == 1


def test_words_have_their_usual_tag(tmp_path, measure):
    train = "Rome\tB-LOC\nis\tO\n\nRome\tB-LOC\n\nRome\tO\n"
    figures = measure(config(tmp_path, "entities", train, "In\tO\nRome\tB-LOC\n", "conll"))
    assert figures["f1"] == figures["tag_accuracy"] == 1


def test_answers_are_near_the_words_of_the_question(tmp_path, measure):
    def asked(question: str, context: str, answer: str) -> str:
        answers = [{"text": answer, "answer_start": context.index(answer)}]
        one = {"id": "1", "question": question, "answers": answers}
        return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": [one]}]}]})

    far = "Filler words that say nothing at all here. " * 5
    context = f"{far}Later the tower of Pisa was finished, 1372, and built over. {far}"
    text = asked("When was the tower of Pisa finished and built over?", context, "1372")
    figures = measure(config(tmp_path, "questions", text, text, "json"))
    assert figures["exact"] == 1 and figures["interval"] == {"f1": [1, 1]}
    chinese = asked("塔是哪年建的?", "其他的话" * 9 + "塔是1173年建的。" + "其他的话" * 9, "1173")
    figures = measure(config(tmp_path, "questions", chinese, chinese, "json", answers="cmrc"))
    assert figures["f1"] > 0.5


def test_the_nearest_sentence_is_copied(tmp_path, measure):
    pytest.importorskip("sklearn", reason="the package scikit-learn")
    pytest.importorskip("sacrebleu", reason="the package sacrebleu")
    train = "I see a big dog here.\tIch sehe hier einen Hund.\nGo home.\tGeh heim.\n"
    valid = "I see a big dog.\tIch sehe hier einen Hund.\n"
    columns = {"source_column": "1", "target_column": "2"}
    figures = measure(config(tmp_path, "pairs", train, valid, "tsv", **columns))
    assert figures["exact"] == 1 and figures["bleu"] > 99


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["--kind", "dialogue"], 2, "give one of classify"), (["--kind", "pairs"], 3, "is empty")],
)
def test_what_cannot_be_measured_is_said(arguments, code, said):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "baselines.py"), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == code and said in done.stderr, done.stderr
