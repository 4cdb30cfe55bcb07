"""Training on labelled tasks, from the examples to the predictions."""

import fcntl
import io
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from launch import in_processes

from gptjax.best import NO_BEST, best_of
from gptjax.checkpoint import Checkpoints
from gptjax.cli import run_verb
from gptjax.config import (
    Config,
    ConfigError,
    DataConfig,
    GPTConfig,
    OptimizerConfig,
    TaskConfig,
    TuneConfig,
    to_json,
)
from gptjax.loading import check_origin, take_over
from gptjax.metrics import read_metrics
from gptjax.outcome import is_wrong, over_seeds
from gptjax.prompting import Asking, Model, _Asker
from gptjax.rundir import BusyError, CheckpointError, read_run
from gptjax.sources import DataError
from gptjax.tasks import Problems, make_task
from gptjax.tasks.classification import Classified
from gptjax.tasks.dialogue import Message
from gptjax.tasks.pairs import Pair
from gptjax.tokenizer import ByteTokenizer
from gptjax.train import fit

MODEL = GPTConfig(
    context_size=48,
    num_layers=1,
    width=32,
    num_heads=2,
    positions="rope",
    compute_dtype="float32",
)


def write_classes(folder, count=64):
    """Texts of words in two colours, and which there is more of."""
    rng = random.Random(0)
    for name in ("train", "valid"):
        lines = ["text\tlabel"]
        for _ in range(count):
            label = rng.choice(["warm", "cold"])
            words = ["red", "fire"] if label == "warm" else ["blue", "ice"]
            between = " " if len(lines) > 1 else "\u2028"  # which ends no line of a file
            lines.append(between.join(rng.choice(words) for _ in range(3)) + f"\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return {name: (str(folder / f"{name}.tsv"),) for name in ("train", "valid")}


def classes(folder, **fields) -> Config:
    task = {"kind": "classify"} | write_classes(folder) | fields.pop("task", {})
    values = {
        "model": MODEL,
        "task": TaskConfig(**task),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "steps": 12,
        "batch_size": 8,
        "eval_every": 4,
        "save_every": 4,
        "log_every": 1,
        "tensorboard": False,
    }
    return Config(**values | fields)


def test_a_task_is_learnt_and_its_figures_are_logged(tmp_path, capsys):
    config = classes(tmp_path)
    config = replace(config, task=replace(config.task, test=config.task.valid))
    fit(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["eval/accuracy"] > 0.9
    best = best_of(lines, config)
    figures = next(line for line in lines if line["step"] == best.step)
    # The test split is the validation split here, and the step the same.
    assert lines[-1]["test/accuracy"] == figures["eval/accuracy"]
    assert lines[-1]["test/loss"] == pytest.approx(figures["eval/loss"], rel=1e-5)
    assert "accuracy" in capsys.readouterr().err


def test_a_run_on_a_task_goes_on_as_if_it_had_never_stopped(tmp_path):
    config = classes(tmp_path, task={"class_weights": "balanced", "label_smoothing": 0.1})
    steady = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2)
    config = replace(config, optimizer=steady)
    fit(config, tmp_path / "whole")
    fit(replace(config, steps=5), tmp_path / "parts")
    fit(config, tmp_path / "parts")
    whole, again = (Checkpoints(tmp_path / name).read_params(12)[1] for name in ("whole", "parts"))
    for path, value in whole.items():
        assert np.array_equal(value, again[path]), path


def test_the_best_step_stays_and_the_run_ends_when_nothing_gets_better(tmp_path):
    config = classes(tmp_path, steps=40, keep_last=1, save_every=None, eval_every=2)
    rate = OptimizerConfig(learning_rate=0.0)
    config = replace(config, optimizer=rate, task=replace(config.task, patience=3))
    fit(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    best = best_of(lines, config)
    assert (best.step, best.since) == (2, 3)  # of equals the first
    assert lines[-1]["step"] == 8
    assert Checkpoints(tmp_path / "run").steps() == [2, 8]
    fit(config, tmp_path / "run")  # it is over already
    assert read_metrics(tmp_path / "run")[-1]["step"] == 8
    fit(replace(config, task=replace(config.task, patience=4)), tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["step"] == 10


def test_a_run_without_a_validation_split_has_a_report_of_its_test_split(tmp_path):
    files = write_classes(tmp_path)
    task = {"valid": (), "test": files["valid"]}
    config = replace(classes(tmp_path, task=task, steps=2), eval_every=None)
    fit(config, tmp_path / "run")
    run("report", tmp_path / "run")
    assert "accuracy" in (tmp_path / "run" / "report.md").read_text()
    assert "accuracy" in (tmp_path / "run" / "report.html").read_text()


def test_a_report_has_what_was_written_beside_what_is_right(tmp_path):
    files = files_of("pairs", tmp_path)
    task = {"kind": "pairs", "train": files, "valid": files, "written": 3}
    fit(classes(tmp_path, task=task, steps=6, log_every=4), tmp_path / "run")
    said = [json.loads(line) for line in (tmp_path / "run/said/valid.jsonl").open()]
    assert [line["right"] for line in said] == ["eins", "zwei", "eins"]
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 6 and 0 <= last["eval/chrf"] <= 100
    run("report", tmp_path / "run")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "run" / name).read_text()
        assert "chrf" in text and f"{last['eval/chrf']:.4f}" in text
    wrong = [line for line in said if is_wrong(line)]
    assert len(wrong) == round(3 * (1 - last["eval/exact"]))
    title = f"Texts that are not exactly the right ones, {len(wrong)} of 3 of task.valid"
    assert (title in (tmp_path / "run" / "report.md").read_text()) == bool(wrong)


def test_a_run_that_is_told_to_be_less_patient_is_over(tmp_path):
    config = classes(tmp_path, steps=40, eval_every=2, log_every=100)
    still = OptimizerConfig(learning_rate=0.0, final_learning_rate=0.0)
    config = replace(config, optimizer=still, save_every=3)
    config = replace(config, task=replace(config.task, test=config.task.valid))
    fit(replace(config, steps=5), tmp_path / "run")  # the last step is logged by no other rule
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < 5]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(kept))
    fit(replace(config, task=replace(config.task, patience=1)), tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 5 and "test/accuracy" in last


def test_an_evaluation_that_was_cut_short_may_end_the_run(tmp_path):
    config = classes(tmp_path, steps=20, eval_every=1, save_every=1)
    still = OptimizerConfig(learning_rate=0.0, final_learning_rate=0.0)
    config = replace(config, optimizer=still, task=replace(config.task, patience=2))
    fit(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert lines[-1]["step"] == 3
    lines[-1] = {name: x for name, x in lines[-1].items() if not name.startswith("eval/")}
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    fit(config, tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 3 and "eval/accuracy" in last


def test_one_label_alone_is_refused(tmp_path):
    config = classes(tmp_path)
    (tmp_path / "train.tsv").write_text("text\tlabel\nice\tcold\nsnow\tcold\n")
    with pytest.raises(DataError, match="'cold' is the label of all records"):
        fit(config, tmp_path / "run")


def test_epochs_are_the_steps_that_they_are(tmp_path):
    config = classes(tmp_path, task={"epochs": 2.0}, steps=Config.steps, eval_every=None)
    warm = replace(config, optimizer=OptimizerConfig(warmup_steps=Config.steps + 1))
    with pytest.raises(ConfigError, match=r"steps = 6, as task\.epochs = 2 are: give fewer"):
        fit(warm, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fit(replace(config, steps=5), tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["step"] == 6


def test_the_best_of_several_figures_is_the_first_of_the_largest():
    config = Config(task=TaskConfig(kind="classify"))
    figures = [0.5, 0.7, 0.7, 0.6]
    lines = [{"step": i, "eval/accuracy": figure} for i, figure in enumerate(figures, 1)]
    assert best_of([{"step": 0}, *lines], config) == (2, 0.7, 2)
    assert best_of([], config) == NO_BEST
    unknown = {"step": 0, "eval/accuracy": float("nan")}
    assert best_of([unknown, *lines, unknown], config).step == 2
    losses = [{"step": 1, "eval/loss": 2.0}, {"step": 2, "eval/loss": 1.0}]
    assert best_of(losses, replace(config, task=TaskConfig(kind="pairs"))).step == 2


def text_run(folder, **fields):
    """A run on text."""
    (folder / "text.txt").write_text("the ice is cold and the fire is warm. " * 200)
    data = DataConfig(path=(str(folder / "text.txt"),), store_dir=str(folder / "stores"))
    config = classes(folder, task={"kind": None, "train": (), "valid": ()}, data=data, **fields)
    fit(replace(config, steps=2, eval_every=None), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return text_run(tmp_path_factory.mktemp("base"))


def test_rules_are_those_of_the_model_that_a_run_begins_with(base, tmp_path):
    config = replace(classes(tmp_path, model=GPTConfig(), steps=1), init_from=str(base))
    with pytest.raises(ConfigError, match=r"tune\.layers = 2, but model\.num_layers = 1"):
        fit(replace(config, tune=TuneConfig(layers=2)), tmp_path / "run")
    short = replace(config, model=GPTConfig(context_size=24))  # no parameter depends on it
    assert take_over(short, base).model.context_size == 24
    learned = text_run(tmp_path, model=replace(MODEL, positions="learned"))
    with pytest.raises(CheckpointError, match=r"model\.context_size is 48 there and 24 here"):
        check_origin(learned, take_over(short, learned).model, ByteTokenizer())


def read(run_dir) -> dict[str, np.ndarray]:
    return Checkpoints(run_dir).read_params()[1]


@pytest.mark.slow
@pytest.mark.parametrize("tune", [TuneConfig(), TuneConfig(lora_rank=2)], ids=["full", "lora"])
def test_a_run_begins_with_the_trunk_of_another_and_a_head_of_its_own(tune, base, tmp_path, capsys):
    # Of the model nothing is said but its dropout, so it is that of the base.
    config = replace(
        classes(tmp_path, model=GPTConfig(dropout=0.1), steps=2, eval_every=1, tune=tune),
        init_from=str(base),
        optimizer=OptimizerConfig(learning_rate=0.0),
    )
    fit(config, tmp_path / "tuned")
    before, after = read(base), read(tmp_path / "tuned")
    new = {path for path in {*after} - {*before} if not path.startswith("lora/")}
    assert new == {"head/label", "head/label_bias"}
    assert any(path.startswith("lora/") for path in after) == (tune.lora_rank is not None)
    for path, value in before.items():
        assert np.array_equal(value, after[path]), path
    fit(replace(config, init_from=str(tmp_path / "tuned")), tmp_path / "again")
    assert np.array_equal(read(tmp_path / "again")["head/label"], after["head/label"])
    # The head that is there is known by the names of its labels, in any order.
    task = replace(config.task, labels=("warm", "cold"))
    begun = replace(config, init_from=str(tmp_path / "tuned"), task=task)
    fit(begun, tmp_path / "turned")
    assert "its head among them" in capsys.readouterr().err
    for path in ("head/label", "head/label_bias"):
        turned = read(tmp_path / "turned")[path]
        assert np.array_equal(turned, after[path][..., ::-1])
        assert path == "head/label_bias" or not np.array_equal(turned, after[path])
    task = replace(config.task, labels=("cold", "warm", "mild"))
    fit(replace(begun, task=task), tmp_path / "more")
    assert "under a new head" in capsys.readouterr().err
    run("evaluate", tmp_path / "tuned")
    figure = best_of(read_metrics(tmp_path / "tuned"), config).figure
    assert f"accuracy         {figure:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_adapters_alone_are_a_model_with_what_they_began_with(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    model, tune = replace(MODEL, positions="learned"), TuneConfig(lora_rank=2, lora_alpha=4.0)
    base = text_run(tmp_path / "text", model=model)
    config = classes(tmp_path, model=model, tune=tune, steps=4)
    fit(replace(config, init_from=str(base)), tmp_path / "run")
    run("export", tmp_path / "run", tmp_path / "apart", "--adapters")
    assert "adapters of a GPT2ForSequenceClassification: attn.c_attn of rank 4" in (
        capsys.readouterr().out
    )
    size = {path.name: path.stat().st_size for path in (tmp_path / "apart").iterdir()}
    assert size["adapter_model.safetensors"] < 8000
    # Merged, apart, and gone on with for no step, it says the same.
    run("convert", tmp_path / "apart", tmp_path / "merged")
    run("convert", tmp_path / "apart", tmp_path / "kept", "--adapters")
    assert read_run(tmp_path / "kept")[0].tune == tune
    still = OptimizerConfig(learning_rate=0.0)
    again = replace(config, init_from=str(tmp_path / "apart"), steps=1, optimizer=still)
    fit(again, tmp_path / "again")
    capsys.readouterr()
    said = {}
    for name in ("run", "merged", "kept", "again"):
        out = tmp_path / f"{name}.jsonl"
        run("predict", tmp_path / name, config.task.valid[0], "--out", out)
        said[name] = [json.loads(line)["probabilities"]["warm"] for line in out.open()]
    for name, shares in said.items():
        assert shares == pytest.approx(said["run"], abs=1e-5), name
    run("export", tmp_path / "again", tmp_path / "once more", "--adapters")
    with pytest.raises(ConfigError, match="has none"):
        run("export", base, tmp_path / "none", "--adapters")
    fit(replace(read_run(base)[0], steps=3), base)  # the base moves on
    with pytest.raises(CheckpointError, match="has other parameters now"):
        run("export", tmp_path / "run", tmp_path / "late", "--adapters")


KINDS = ("entities", "questions", "pairs")  # and dialogue
TAGGED = "Ann B-PER\nmet O\nLee B-PER\nin O\nRome B-LOC\n\nshe O\nleft O\nRome B-LOC\n\n"


def files_of(kind, folder):
    """A file of each kind of task."""
    if kind == "entities":
        path, text = folder / "tags.conll", TAGGED * 8
    elif kind == "questions":
        asked = [
            {"id": str(i), "question": "who?", "answers": [{"text": "Ann", "answer_start": 0}]}
            for i in range(8)
        ]
        paragraph = {"context": "Ann met Lee in Rome, which is far away.", "qas": asked}
        path = folder / "asked.json"
        text = json.dumps({"data": [{"paragraphs": [paragraph]}]})
    elif kind == "pairs":
        path, text = folder / "pairs.tsv", "source\ttarget\n" + "one\teins\ntwo\tzwei\n" * 8
    else:
        said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        path, text = folder / "said.jsonl", (json.dumps({"messages": said}) + "\n") * 8
    path.write_text(text)
    return (str(path),)


@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS), "dialogue"],
)
def test_every_kind_of_task_is_learnt(kind, tmp_path, monkeypatch, capsys):
    files = files_of(kind, tmp_path)
    task = {"kind": kind, "train": files, "valid": files, "test": files, "overlap": 8}
    model = replace(MODEL, bidirectional=kind == "entities")
    config = classes(tmp_path, model=model, task=task, steps=8)
    if kind == "questions":
        config = replace(config, task=replace(config.task, lm_weight=0.5))
    fit(config, tmp_path / "run")
    evaluations = [line for line in read_metrics(tmp_path / "run") if "eval/loss" in line]
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]
    assert ("eval/f1" in evaluations[0]) == (kind in ("entities", "questions"))
    best = best_of(evaluations, config).step
    chosen = next(line for line in evaluations if line["step"] == best)
    assert evaluations[-1]["test/loss"] == pytest.approx(chosen["eval/loss"], rel=1e-4)
    run("evaluate", tmp_path / "run", "--max-tokens", 4, "--out", tmp_path / "out.jsonl")
    run("predict", tmp_path / "run", files[0], "--out", tmp_path / "more.jsonl", "--max-tokens", 4)
    said, more = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out.jsonl", "more.jsonl")
    )
    words = {"entities": "tags", "questions": "no_answer"}.get(kind, "text")
    assert [one[words] for one in said] == [one[words] for one in more]
    if kind == "dialogue":
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nhow are you\n"))
        capsys.readouterr()
        run("chat", tmp_path / "run", "--max-tokens", 5, "--temperature", 0, "--system", "be")
        talked = capsys.readouterr().out
        scene = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
        (tmp_path / "given.jsonl").write_text(json.dumps({"messages": scene}) + "\n")
        how = ["--out", tmp_path / "one.jsonl", "--max-tokens", 5]
        run("predict", tmp_path / "run", tmp_path / "given.jsonl", *how)
        (reply,) = map(json.loads, (tmp_path / "one.jsonl").open())
        assert reply["text"] and talked.strip().startswith(reply["text"])


def test_a_column_for_each_label_is_learnt(tmp_path, capsys):
    rows = [f"{'hot' * hot}{'wet' * wet}-,{wet},{hot}\n" for hot in (0, 1) for wet in (0, 1)]
    path = tmp_path / "x.csv"
    path.write_text("text,wet,hot\n" + "".join(rows * 8))
    files, columns = (str(path),), ("hot", "wet")
    task = {"several": True, "label_columns": columns, "train": files, "valid": files}
    fit(classes(tmp_path, task=task, steps=4), tmp_path / "run")
    config = read_run(tmp_path / "run")[0]
    assert config.task.labels == columns and config.model.num_labels == 2
    run("evaluate", tmp_path / "run")
    figure = best_of(read_metrics(tmp_path / "run"), config).figure
    assert f"micro_f1         {figure:.4f}" in capsys.readouterr().out
    run("predict", tmp_path / "run", path, "--out", tmp_path / "out.jsonl")
    said = [json.loads(line)["probabilities"] for line in (tmp_path / "out.jsonl").open()]
    assert len(said) == 32 and all([*one] == [*columns] for one in said)


def test_a_choice_that_no_row_holds_is_left_out_of_the_figures(tmp_path):
    choices = [["red", "blue " * 12], ["warm", "cold"]]
    lines = [{"query": "fire:", "choices": one, "gold": 0} for one in choices]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines * 4))
    files = (str(tmp_path / "asked.jsonl"),)
    task = {"kind": "choices", "train": files, "valid": files}
    model = replace(MODEL, window=8)  # which reads a text of any length
    fit(classes(tmp_path, task=task, model=model, steps=2), tmp_path / "run")
    assert len((tmp_path / "run/said/valid.jsonl").read_text().splitlines()) == 4
    assert 0 <= read_metrics(tmp_path / "run")[-1]["eval/accuracy"] <= 1


GIVEN = """
from pathlib import Path
from gptjax.config import from_json

def config():
    return from_json(Path("given.json").read_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classify", "questions", "dialogue"])
def test_two_processes_learn_a_task_as_one_does(kind, tmp_path, capsys):
    files = files_of(kind, tmp_path) if kind != "classify" else ()
    task = dict.fromkeys(("train", "valid", "test"), files) if files else {}
    config = classes(tmp_path, task={"kind": kind, "overlap": 8} | task)
    config = replace(config, task=replace(config.task, test=config.task.valid))
    (tmp_path / "given.json").write_text(to_json(config))
    (tmp_path / "run.py").write_text(GIVEN)
    in_processes(tmp_path, "two", 2, devices=2)
    fit(config, tmp_path / "one")
    lines = [read_metrics(tmp_path / name) for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 12
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if not name.startswith("time/") and "second" not in name and "perf" not in name:
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    names = ("one", "two")
    said = [(tmp_path / name / "said" / "test.jsonl").open().readlines() for name in names]
    words = "label" if kind == "classify" else "text"
    one, two = ([json.loads(line)[words] for line in lines] for lines in said)
    assert one == two
    assert (tmp_path / "two" / "report.html").exists()
    run("evaluate", tmp_path / "two")
    figure = f" {best_of(lines[1], config).figure:.4f}  (95 %"
    assert (figure in capsys.readouterr().out) == (kind != "dialogue")


def test_a_long_dialogue_gives_up_its_first_messages_but_not_the_scene():
    task, tokenizer = make_task(TaskConfig(kind="dialogue")), ByteTokenizer()
    messages = [Message("system", "be kind"), *[Message("user", f"{i}") for i in range(9)]]
    for late in (0, 3):  # where the scene is set
        given = [*messages[1 : 1 + late], messages[0], *messages[1 + late :]]
        ids, dropped = task.fitting_ids(given, tokenizer, 60)
        text = tokenizer.decode(ids.tolist())
        assert len(ids) <= 60 and "be kind" in text and "8" in text and "0" not in text
        assert text.count("user") == 9 - dropped
    assert len(task.fitting_ids(messages[1:2], tokenizer, 1)[0]) > 1  # the last one stays


def test_a_reply_ends_where_its_turn_does(tmp_path, monkeypatch, capsys):
    files = files_of("dialogue", tmp_path)
    turn = "<|{role}|>{content}<|end|>\n"
    task = {"kind": "dialogue", "train": files, "valid": files, "turn": turn}
    config = classes(tmp_path, task=task, steps=30, eval_every=None, save_every=None)
    fit(config, tmp_path / "run")
    run("predict", tmp_path / "run", files[0], "--out", tmp_path / "out.jsonl")
    assert {json.loads(line)["text"] for line in (tmp_path / "out.jsonl").open()} == {"ho"}
    figures = read_metrics(tmp_path / "run")[-1]
    assert "exact 1.0000; of what that step says" in capsys.readouterr().err
    assert figures["eval/exact"] == 1 and figures["eval/chrf"] == 100
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nhi\n"))
    capsys.readouterr()
    run("chat", tmp_path / "run", "--temperature", 0)
    assert capsys.readouterr().out.splitlines()[0] == "ho"
    # What the context does not hold is told; a reply may be longer than what is left of it.
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nhi\nhi\n" + "hi " * 20 + "\n"))
    run("chat", tmp_path / "run", "--temperature", 0, "--max-tokens", 100, "--system", "be")
    told = capsys.readouterr().err
    assert "messages are no longer seen: the context is 48 tokens" in told
    assert "the beginning is not seen: " in told
    with pytest.raises(ConfigError, match="--system: not UTF-8 at byte 2"):
        run("chat", tmp_path / "run", "--system", "be\udcff")
    spaced = make_task(TaskConfig(kind="dialogue", turn="{role}: {content}\n"))
    assert (spaced.stops, spaced.reply("ho\n"), spaced.reply("ho")) == ((), "ho", "ho")


@pytest.mark.slow
def test_a_text_is_as_long_as_it_wants_and_one_without_an_end_is_told(tmp_path, capsys):
    given = tmp_path / "long.tsv"
    given.write_text("source\ttarget\n" + f"so\t{'a' * 70}\n" * 8)
    task = {"kind": "pairs", "train": (str(given),), "valid": (str(given),)}
    how = {"model": replace(MODEL, context_size=256), "steps": 12, "eval_every": None}
    fit(classes(tmp_path, task=task, **how), tmp_path / "run")
    logged = read_metrics(tmp_path / "run")[-1]
    capsys.readouterr()
    run("evaluate", tmp_path / "run")
    assert f"chrf             {logged['eval/chrf']:.4f}" in capsys.readouterr().out
    run("evaluate", tmp_path / "run", "--max-tokens", 3)
    assert "a text without an end: 8 cut" in capsys.readouterr().out
    run("predict", tmp_path / "run", given, "--out", tmp_path / "out", "--max-tokens", 3)
    lines = [json.loads(line) for line in (tmp_path / "out").open()]
    assert all(line["cut"] and len(line["text"]) <= 3 for line in lines)
    run("predict", tmp_path / "run", given, "--out", tmp_path / "more")
    texts = [json.loads(line)["text"] for line in (tmp_path / "more").open()]
    assert all(len(text) > 64 for text in texts)
    # Beams write as far as the context goes.
    given.write_text(f"source\ttarget\nso\t{'a' * 70}\n{'so ' * 80}\ta\n")
    run("evaluate", tmp_path / "run", "--beams", 2, "--out", tmp_path / "beams")
    assert len((tmp_path / "beams").read_text().splitlines()) == 2


def test_several_labels_are_read_as_they_are_written():
    labels = ("b", "food", "food, drink")
    task = make_task(TaskConfig(kind="classify", several=True, labels=labels)).fitted([])
    for chosen in (("food, drink", "b"), ("b", "food"), ("food",), ()):
        example = Classified("x:1", "t", None, chosen)
        assert task.from_text(example, task.target(example)) == {"labels": [*chosen]}
    assert task.from_text(None, " foods, b or so\nfood") == {"labels": []}


def test_no_example_is_among_its_own_shots():
    task = make_task(TaskConfig(kind="pairs"))
    training = [Pair(f"x:{i}", f"{i}", f"{i * i}", (("source", f"{i}"),)) for i in range(10)]
    model = Model({}, replace(MODEL, context_size=999), ByteTokenizer())
    other = replace(training[0], target="none")  # of the same prompt, but not the same
    for shots in (3, 10):
        asker = _Asker(model, task, training, Asking(shots=shots), Problems("error", "x"))
        for number, example in enumerate(training):
            text, count = asker.shown(number, example, task.prompt(example), 10)
            assert count == min(shots, 9) and text.endswith(f"\n\n{number}\n")
            assert f"{number}\n{number**2}\n" not in text
        assert asker.shown(0, other, task.prompt(other), 10)[1] == shots


def run(*arguments) -> None:
    run_verb([str(one) for one in arguments])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    fit(classes(folder), folder / "run")
    return folder


def test_evaluate_prints_the_figures_that_were_logged(tuned, capsys):
    run("evaluate", tuned / "run", "--batch-size", 5)
    out = capsys.readouterr().out
    best = best_of(read_metrics(tuned / "run"), classes(tuned))
    assert f"64 examples of task.valid, at step {best.step}\n" in out
    assert f"accuracy         {best.figure:.4f}  (95 % of resamples" in out


def test_predict_goes_on_with_a_file_that_is_not_whole(tuned):
    files = [tuned / "whole.jsonl", tuned / "parts.jsonl"]
    run("predict", tuned / "run", tuned / "valid.tsv", "--out", files[0])
    lines = files[0].read_text().splitlines(keepends=True)
    assert len(lines) == 64
    one = json.loads(lines[0])
    assert one["where"].endswith("valid.tsv:2") and one["label"] in ("warm", "cold")
    assert sum(one["probabilities"].values()) == pytest.approx(1)
    files[1].write_text("".join(lines[:10]) + lines[10][:7])
    run("predict", tuned / "run", tuned / "valid.tsv", "--out", files[1])
    parts = [json.loads(line) for line in files[1].read_text().splitlines()]
    for mine, theirs in zip(parts, map(json.loads, lines), strict=True):
        assert mine["where"] == theirs["where"]
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)


def test_a_text_that_is_drawn_is_the_same_in_any_batch_and_after_a_kill(base, tmp_path):
    given = tmp_path / "pairs.tsv"
    given.write_text("source\ttarget\n" + "".join(f"{'one ' * (i % 5)}two\t\n" for i in range(12)))

    def said(name, *options):
        path = tmp_path / name
        how = ["--task.kind", "pairs", "--max-tokens", 5, *options]
        run("predict", base, given, "--out", path, *how)
        return path.read_text().splitlines(keepends=True)

    drawn = said("whole", "--temperature", 1)
    (tmp_path / "parts").write_text("".join(drawn[:7]))
    assert said("parts", "--temperature", 1, "--batch-size", 3) == drawn
    assert len({json.loads(line)["text"] for line in drawn[3::5]}) > 1  # one prompt, its own draws
    assert said("other", "--temperature", 1, "--seed", 1) != drawn
    searched = said("searched", "--beams", 3)
    assert len(searched) == 12 and searched != drawn
    with pytest.raises(ConfigError, match="beams want temperature 0"):
        said("both", "--beams", 3, "--temperature", 1)


def test_predict_reads_a_file_as_it_is_told(tuned, tmp_path):
    lines = (tuned / "valid.tsv").read_text().splitlines()[1:9]
    rows = [f'{i},"{line.partition(chr(9))[0]}"' for i, line in enumerate(lines)]
    given, out = tmp_path / "given.csv", tmp_path / "out.jsonl"
    given.write_text("\n".join(["number,said", *rows]) + "\n")
    run("predict", tuned / "run", given, "--out", out, "--task.text-column", "said")
    assert [json.loads(line)["where"] for line in out.open()] == [
        f"{given}:{i}" for i in range(2, 10)
    ]
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="its line 1 does not say of"):
        run("predict", tuned / "run", tuned / "valid.tsv", "--out", out)
    # A file of something else stays, also one whose last line has no end.
    mine = tmp_path / "mine.json"
    for text in ('{"mine": 1}', out.open().readline() + '{"where": "else'):
        mine.write_text(text)
        with pytest.raises(ConfigError, match="does not say of"):
            run("predict", tuned / "run", given, "--out", mine, "--task.text-column", "said")
        assert mine.read_text() == text
    told = ["predict", tuned / "run", given, "--out", out, "--task.text-column", "said"]
    with pytest.raises(ConfigError, match="or was made by another run, step or option"):
        run(*told, "--step", 12)
    run(*told)
    given.write_text(given.read_text().replace("red", "rad").replace("blue", "blau"))
    with pytest.raises(ConfigError, match="does not say of"):
        run(*told)
    with pytest.raises(ConfigError, match="give --out FILE"):
        run("predict", tuned / "run", "red fire", "--task.text-column", "said")
    assert out.read_bytes() == before


def test_one_process_at_a_time_writes_a_file_of_predictions(tuned, tmp_path):
    out = tmp_path / "out.jsonl"
    with out.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="is being written by another process"):
            run("predict", tuned / "run", tuned / "valid.tsv", "--out", out)
    run("predict", tuned / "run", tuned / "valid.tsv", "--out", out)
    assert len(out.read_text().splitlines()) == 64


def test_a_language_model_is_asked_in_words(base, tuned, capsys):
    asked = ["--task.kind", "classify", "--task.valid", tuned / "valid.tsv", "--limit", 6]
    asked += ["--task.train", tuned / "train.tsv"]
    scored = {}
    for options in ("", "--shots 1", "--task.score unconditional"):
        how = ["--task.template", "{text}:", "--out", tuned / "scored.jsonl", *options.split()]
        run("evaluate", base, *asked, *how)
        said = capsys.readouterr().out
        assert "accuracy " in said and ("after 1 examples" in said) == ("shots" in options)
        lines = map(json.loads, (tuned / "scored.jsonl").open())
        scored[options] = [one["probabilities"]["warm"] for one in lines]
    plain, shown, conditional = scored.values()
    assert plain != pytest.approx(shown) and plain != pytest.approx(conditional)
    assert min(conditional) < max(conditional)
    with pytest.raises(ConfigError, match="is of no task"):
        run("evaluate", base)
    run("evaluate", base, *asked, "--task.several")  # of several labels they are written
    assert "micro_f1 " in capsys.readouterr().out
    words = ["--task.words", "yes", "no"]  # for which labels is not said
    with pytest.raises(ConfigError, match="a word for each of them"):
        run("evaluate", base, *asked, *words)
    with pytest.raises(ConfigError, match="choices, which are scored: leave it out"):
        run("evaluate", base, *asked, "--beams", 2)
    with pytest.raises(ConfigError, match="the run answers by its head: leave it out"):
        run("evaluate", tuned / "run", "--shots", 2)
    with pytest.raises(FileNotFoundError):  # before anything is asked
        run("evaluate", base, *asked, "--out", tuned / "nowhere" / "out.jsonl")
    pairs = ["--task.kind", "pairs", "--task.source-column", "text", "--task.target-column"]
    pairs += ["label", "--task.valid", tuned / "valid.tsv", "--task.train", tuned / "train.tsv"]
    how = ["--limit", 3, "--max-tokens", 6, "--shots", 1, "--beams", 2]
    run("evaluate", base, *pairs, *how, "--out", tuned / "beams.jsonl")
    said = ["predict", base, tuned / "valid.tsv", "--out", tuned / "asked.jsonl"]
    with pytest.raises(ConfigError, match="the labels are not known"):
        run(*said, "--task.kind", "classify")
    run(*said, "--task.kind", "classify", "--task.labels", "cold", "warm")
    said = [json.loads(line)["label"] for line in (tuned / "asked.jsonl").open()]
    assert len(said) == 64 and {*said} <= {"cold", "warm"}


def test_a_text_after_shots_ends_where_the_next_would_begin(monkeypatch):
    """With beams, which know of no strings that end a text."""
    model, how = Model({}, MODEL, ByteTokenizer()), Asking(shots=1, max_tokens=9, beams=2)
    asker = _Asker(model, make_task(TaskConfig(kind="pairs")), (), how, Problems("error", "x"))
    written = SimpleNamespace(text="one\n\ntwo", reason="length")
    monkeypatch.setattr(_Asker, "completed", lambda *_: [written])
    assert asker.texts({0: np.arange(3)}) == {0: ("one", True)}
    asker = asker._replace(how=how._replace(shots=0))
    assert asker.texts({0: np.arange(3)}) == {0: ("one\n\ntwo", False)}


def test_a_split_that_was_trained_on_is_evaluated_whole(tmp_path):
    """Without what training passes over, and each example once."""
    data = DataConfig(skip=((1, 1),))
    fit(classes(tmp_path, steps=2, eval_every=None, data=data), tmp_path / "run")
    out = tmp_path / "out.jsonl"
    run("evaluate", tmp_path / "run", "--split", "train", "--batch-size", 2, "--out", out)
    where = [json.loads(line)["where"].rpartition(":")[2] for line in out.open()]
    assert where == [*map(str, range(2, 66))]


def test_what_the_context_does_not_hold_is_not_asked_about(base, tmp_path, capsys):
    given, out = tmp_path / "given.tsv", tmp_path / "out.jsonl"
    long = "long " * 20
    given.write_text(f"text\tlabel\nred\twarm\n{long}\tcold\nblue\tcold\n")
    asked = ["evaluate", base, "--task.kind", "classify", "--task.valid", given]
    with pytest.raises(DataError, match=r"given\.tsv:3: 1\d\d tokens, but a row holds 48"):
        run(*asked)
    run(*asked, "--task.too-long", "skip")
    said = capsys.readouterr().out
    assert "2 examples of task.valid" in said and "too long: 1 left out" in said
    given.write_text(f"source\ttarget\nred\twarm\n{long}\tcold\nblue\tcold\n")
    how = ["--task.kind", "pairs", "--task.too-long", "skip", "--max-tokens", 4]
    run("predict", base, given, "--out", out, *how)
    assert "too long: 1 left out" in capsys.readouterr().out
    texts, lost = [], []
    for number, line in enumerate(map(json.loads, out.open())):
        (lost if line.get("too_long") else texts).append(number)
    assert (texts, lost) == ([0, 2], [1])
    # Of a dialogue the first messages are given up, as in training and in chat.
    messages = [{"role": "user", "content": "long"}, {"role": "assistant", "content": "so"}] * 8
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"messages": messages}) + "\n")
    how = ["--task.kind", "dialogue", "--max-tokens", 4]
    run("predict", base, given, "--out", tmp_path / "said.jsonl", *how)
    assert "text" in json.loads((tmp_path / "said.jsonl").read_text())


def test_a_report_has_the_figures_the_labels_taken_for_others_and_the_errors(tuned, capsys):
    run("report", tuned / "run")
    assert "report.md" in capsys.readouterr().out
    words, page = ((tuned / "run" / name).read_text() for name in ("report.md", "report.html"))
    best = best_of(read_metrics(tuned / "run"), classes(tuned))
    assert f"| accuracy | {best.figure:.4f} |" in words and f"{best.figure:.4f}" in page
    lines = [json.loads(line) for line in (tuned / "run/said/valid.jsonl").open()]
    wrong = sum(is_wrong(line) for line in lines)
    assert 1 - wrong / len(lines) == pytest.approx(best.figure)
    for right in ("cold", "warm"):
        counts = [
            sum(one["right"] == [right] and one["label"] == said for one in lines)
            for said in ("cold", "warm")
        ]
        assert f"| {right} | {counts[0]} | {counts[1]} |" in words
        assert f"<td>{right}</td><td>{counts[0]}</td><td>{counts[1]}</td>" in page


def test_what_is_wrong_of_each_kind():
    assert is_wrong({"right": "so", "text": "no"}) and not is_wrong({"right": "so ", "text": "so"})
    assert is_wrong({"right": 1, "choice": 0}) and not is_wrong({"right": 1, "choice": 1})
    assert is_wrong({"right": ["a"], "label": "b"}) and not is_wrong({"right": ["a"], "label": "a"})
    assert is_wrong({"right": ["a", "b"], "labels": ["a"]})
    assert not is_wrong({"right": ["a", "b"], "labels": ["b", "a"]})  # they have no order
    assert not is_wrong({"right": ["O"], "tags": ["O"]})
    answer = {"passage": "x", "text": "x"}
    assert not is_wrong(answer | {"right": ["The X."]})  # as exact match has it
    assert is_wrong(answer | {"right": ["y"]}) and not is_wrong(answer | {"right": ["y", "x"]})
    assert not is_wrong({"passage": "x", "text": "", "right": []})


def test_several_seeds_give_a_mean_and_a_deviation(tmp_path):
    lines = {0: [0.5, 0.7], 1: [0.9, 0.6]}
    for seed, figures in lines.items():
        (tmp_path / f"seed-{seed}").mkdir()
        text = [
            json.dumps({"step": step, "eval/loss": 1.0, "eval/accuracy": figure})
            for step, figure in enumerate(figures, 1)
        ]
        (tmp_path / f"seed-{seed}" / "metrics.jsonl").write_text("\n".join(text) + "\n")
    config = Config(task=TaskConfig(kind="classify"))
    words = over_seeds([tmp_path / "seed-0", tmp_path / "seed-1"], config)
    assert "valid accuracy             0.8000    0.1414" in words
