"""What may change between two commands of a run, what a run keeps of it, and forks."""

import json
import sys
from dataclasses import fields, is_dataclass, replace

import jax
import numpy as np
import pytest
from small import PLAIN

from gptjax import cli
from gptjax.checkpoint import Checkpoints
from gptjax.config import (
    Config,
    ConfigError,
    DataConfig,
    GuardConfig,
    MeshConfig,
    MixtureConfig,
    OptimizerConfig,
    SampleConfig,
    TaskConfig,
)
from gptjax.events import read_events
from gptjax.exclusions import Rollback
from gptjax.faults import arm
from gptjax.metrics import read_metrics
from gptjax.resume import (
    Allowed,
    Origin,
    Past,
    changes_of,
    config_at,
    data_changes,
    find_past,
    keep_past,
    read_fork,
    refuse_changes,
    told,
)
from gptjax.rundir import CheckpointError, read_run, save_run
from gptjax.tokenizer import ByteTokenizer
from gptjax.train import fit

BEFORE = Config(data=DataConfig(path=("a.txt",)), steps=100)


def past_of(run_dir, config=BEFORE, step=10, **values):
    return Past(**{"run_dir": run_dir, "step": step, "config": config, "ancestry": ()} | values)


def with_part(config, part, **changes):
    return replace(config, **{part: replace(getattr(config, part), **changes)})


def kinds(config, before=BEFORE, step=10):
    return {change.name: change.kind for change in changes_of(before, config, step)}


@pytest.mark.parametrize(
    ("part", "changes", "kind"),
    [
        (None, {"log_every": 7, "keep_last": 9, "accumulate": 2, "name": "other"}, "free"),
        (None, {"steps": 101}, "free"),
        (None, {"steps": 99}, "config"),
        (None, {"seed": 1, "batch_size": 16}, "fatal"),
        ("mesh", {"fsdp": 4, "tensor": 2}, "free"),
        ("sample", {"top_k": 3}, "free"),
        ("guard", {"max_nonfinite": 2}, "free"),
        ("model", {"remat": "full", "attention": "xla", "loss_piece": 4}, "free"),
        ("model", {"dropout": 0.1, "compute_dtype": "bfloat16"}, "config"),
        ("model", {"width": 64, "num_layers": 3, "rope_base": 1.0, "norm": "rmsnorm"}, "fatal"),
        ("optimizer", {"learning_rate": 1.0, "beta2": 0.9, "clip_norm": None}, "config"),
        ("data", {"workers": 3, "prefetch": 0, "store_dir": "b", "max_epochs": 3}, "free"),
        ("data", {"tokenizer": "elsewhere"}, "free"),  # its fingerprint is compared
        ("data", {"path": ("b.txt",), "holdout": 0.2, "deduplicate": True}, "data"),
        ("data", {"shuffle": False}, "fatal"),
        ("data", {"skip": ((11, 12),)}, "free"),
        ("task", {"test": ("c.tsv",), "patience": 3, "max_answer": 9}, "free"),
        ("task", {"label_smoothing": 0.1}, "config"),
        ("task", {"train": ("b.tsv",), "text_column": "said", "on_bad_example": "skip"}, "data"),
        ("task", {"several": True, "labels": ("a", "b"), "separator": " "}, "fatal"),
    ],
)
def test_what_a_change_means(part, changes, kind):
    config = with_part(BEFORE, part, **changes) if part else replace(BEFORE, **changes)
    names = {f"{part}.{name}" if part else name for name in changes}
    assert kinds(config) == dict.fromkeys(names, kind)


def test_a_converted_run_has_seen_no_data_but_its_head_has_labels():
    before = Config(task=TaskConfig(kind="classify", labels=("bad", "good")))
    task = replace(before.task, train=("a.tsv",), text_column="said", separator=" ")
    assert not kinds(replace(BEFORE, task=task, seed=1), before)
    other = replace(task, labels=("good", "bad"))
    assert kinds(replace(BEFORE, task=other), before) == {"task.labels": "fatal"}
    assert not kinds(replace(BEFORE, task=other), replace(before, task=TaskConfig()))


def test_no_field_is_forgotten():
    """Of every field, also of those that are yet to come, a change is seen."""

    def others(value, section=""):
        for field in fields(value):
            inner = getattr(value, field.name)
            if is_dataclass(inner):
                for name, changed in others(inner, f"{section}{field.name}."):
                    yield name, replace(value, **{field.name: changed})
            elif field.name not in ("mixture", "skip"):
                yield f"{section}{field.name}", replace(value, **{field.name: "another"})

    for name, config in others(BEFORE):
        if name != "steps":
            assert kinds(config).keys() == {name}


def test_batches_passed_over_may_change_ahead_but_not_behind():
    def skipping(*skip):
        return with_part(BEFORE, "data", skip=skip)

    assert kinds(skipping((3, 4), (20, 30)), skipping((3, 4))) == {"data.skip": "free"}
    (change,) = changes_of(skipping((3, 4)), skipping((3, 5)), 10)
    assert (change.kind, change.before, change.now) == ("fatal", ((3, 4),), ((3, 5),))


A, B, C = (MixtureConfig(name=name, path=(f"{name}.txt",)) for name in "abc")


@pytest.mark.parametrize(
    ("mixture", "kinds_then"),
    [
        ((A, replace(B, weights=((11, 5.0),))), {"data.mixture.b.weights": "config"}),
        ((A, replace(B, weights=((10, 5.0),))), {"data.mixture.b.weights": "fatal"}),
        ((replace(A, weight=2.0), B), {"data.mixture.a.weight": "fatal"}),
        ((A, replace(B, max_epochs=3)), {"data.mixture.b.max_epochs": "free"}),
        ((A, replace(B, path=("x.txt",))), {"data.mixture.b.path": "data"}),
        ((A, B, replace(C, weight=0.0, weights=((11, 1.0),))), {"data.mixture": "config"}),
        ((A, B, C), {"data.mixture": "fatal"}),
        ((B, A), {"data.mixture": "fatal"}),
        ((A,), {"data.mixture": "fatal"}),
        ((), {"data.mixture": "fatal"}),
    ],
)
def test_a_mixture_may_change_from_here_on(mixture, kinds_then):
    before = Config(data=DataConfig(mixture=(A, B)))
    assert kinds(with_part(before, "data", mixture=mixture), before) == kinds_then


@pytest.mark.parametrize("by", ["skip", "rollback"])
def test_a_mixture_may_not_change_in_batches_behind_the_run(by):
    """Ten steps after five batches that were passed over are behind fifteen."""
    skip = ((3, 7),) if by == "skip" else ()
    went_back = () if skip else (Rollback(first=3, last=7, step=7, to_step=2),)
    before = Config(data=DataConfig(mixture=(A, B), skip=skip))
    for first, kind in ((11, "fatal"), (15, "fatal"), (16, "config")):
        mixture = (A, replace(B, weights=((first, 9.0),)))
        config = with_part(before, "data", mixture=mixture)
        (change,) = changes_of(before, config, 10, went_back)
        assert change.kind == kind, first


def test_one_message_lists_all_and_what_each_needs(tmp_path):
    config = with_part(replace(BEFORE, seed=3, log_every=7), "optimizer", learning_rate=0.5)
    config = with_part(config, "data", path=("b.txt",))
    changes = changes_of(BEFORE, config, 10)
    with pytest.raises(CheckpointError) as caught:
        refuse_changes(changes, past_of(tmp_path), Allowed(config=True, data=True))
    words = str(caught.value)
    assert words.count("\n  - ") == 4
    assert "seed was 0 and is now 3: makes it another run" in words
    assert "optimizer.learning_rate was 0.0006 and is now 0.5: needs --allow-config-change" in words
    assert "data.path was ('a.txt',) and is now ('b.txt',): needs --allow-data-change" in words


@pytest.mark.parametrize("allowed", [Allowed(), Allowed(config=True), Allowed(data=True)])
def test_each_option_allows_its_own_kind(tmp_path, allowed):
    config = with_part(BEFORE, "optimizer", learning_rate=0.5)
    data = with_part(BEFORE, "data", path=("b.txt",))
    free = changes_of(BEFORE, replace(BEFORE, log_every=3), 10)
    refuse_changes(free, past_of(tmp_path), Allowed())
    for given, may in [(config, allowed.config), (data, allowed.data)]:
        changes = changes_of(BEFORE, given, 10)
        if may:
            refuse_changes(changes, past_of(tmp_path), allowed)
        else:
            with pytest.raises(CheckpointError):
                refuse_changes(changes, past_of(tmp_path), allowed)


def test_the_beginning_of_a_fork_allows_what_changes_no_batch(tmp_path):
    fork = past_of(tmp_path, ancestry=(Origin(tmp_path, 10),))
    changes = changes_of(BEFORE, with_part(BEFORE, "optimizer", learning_rate=0.5), 10)
    refuse_changes(changes, fork, Allowed())
    with pytest.raises(CheckpointError):  # and it does not go on as another
        refuse_changes(changes, fork._replace(run_dir=tmp_path / "fork"), Allowed())
    with pytest.raises(CheckpointError, match="seed"):
        refuse_changes(changes_of(BEFORE, replace(BEFORE, seed=1), 10), fork, Allowed())


def test_what_is_told_of_a_change(tmp_path):
    config = with_part(BEFORE, "optimizer", learning_rate=0.0003)
    text = told(changes_of(BEFORE, config, 10), past_of(tmp_path), config)
    assert text.startswith(
        "--- changed since step 10: optimizer.learning_rate 0.0006 -> 0.0003 (learning rate of the "
        "next step 0.0005868 -> 0.0002934)"
    )


def test_every_step_can_tell_its_config(tmp_path):
    configs = [replace(BEFORE, log_every=n) for n in (1, 2, 3)]

    def begin(config, step):
        keep_past(tmp_path, config, step, {})
        save_run(tmp_path, config, ByteTokenizer())

    begin(configs[0], 0)
    begin(configs[0], 5)
    begin(configs[1], 10)
    assert [config_at(tmp_path, step).log_every for step in (1, 10, 11, 99)] == [1, 1, 2, 2]
    begin(configs[2], 20)
    begin(configs[2], 10)  # what followed step 10 is done again
    assert [config_at(tmp_path, step).log_every for step in (1, 10, 11, 25)] == [1, 1, 3, 3]


def store(sha, tokens=10, **sources):
    listed = [[name, 1, digest] for name, digest in sources.items()]
    return {"sha256": sha, "documents": 2, "tokens": tokens, "sources": listed}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (store("s", x="1", y="2"), []),
        (store("s", elsewhere="1"), []),  # the same content from another place
        (store("t", x="1", y="3"), ["y holds other text"]),
        (store("t", 12, x="1", z="3"), ["y is gone", "z is new", "10 -> 12 tokens"]),
        (store("t", y="2", x="1"), ["another order"]),
        (store("t", x="1", y="2"), ["checksum s -> t"]),
        (None, ["train store a: is gone"]),
    ],
)
def test_stores_that_hold_something_else_are_named(tmp_path, now, words):
    before = {"train": {"a": store("s", x="1", y="2")}}
    assert data_changes(tmp_path, before) == []
    (tmp_path / "data.json").write_text(json.dumps(before))
    changes = data_changes(tmp_path, {"train": {"a": now} if now else {}})
    assert len(changes) == bool(words)
    assert all(word in changes[0] for word in words)


def test_a_list_of_many_sources_is_short(tmp_path):
    before = {"train": {"a": store("s", **{f"file{n}": "1" for n in range(1000)})}}
    (tmp_path / "data.json").write_text(json.dumps(before))
    (change,) = data_changes(tmp_path, {"train": {"a": store("t")}})
    assert "and 995 more" in change and len(change) < 400


# --- real runs -----------------------------------------------------------------------------------

FIGURES = ("train/loss", "train/grad_norm", "data/batch_hash")


def small_run(folder, **changes):
    values = {
        "model": replace(PLAIN, vocab_size=None, num_layers=1),
        "data": DataConfig(path=(str(folder / "text.txt"),), store_dir=str(folder / "stores")),
        "sample": SampleConfig(max_tokens=0),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "steps": 6,
        "batch_size": 8,
        "log_every": 1,
        "eval_every": None,
        "save_every": 2,
        "keep_last": 9,
        "tensorboard": False,
        "guard": GuardConfig(),
        "mesh": MeshConfig(data=8),
    }
    return Config(**values | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    words = np.random.default_rng(0).choice(["ab", "cde", "f", "ghij"], 3000)
    (folder / "text.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def source(folder):
    """A run of six steps, all of its saves kept: each has the time to be done before the next."""
    arm("step_end:sleep=0.7@1-6")
    fit(small_run(folder), folder / "source")
    arm("")
    return folder / "source"


def figures(run_dir):
    return {line["step"]: [line[name] for name in FIGURES] for line in read_metrics(run_dir)}


def snapshot(run_dir):
    return {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_fork_without_changes_is_its_origin_going_on(folder, source):
    before = snapshot(source)
    fork, whole = folder / "fork", Checkpoints(source)
    state = fit(small_run(folder), fork, fork_from=Origin(source, 2))
    assert snapshot(source) == before
    expected = {step: one for step, one in figures(source).items() if step > 2}
    assert figures(fork) == expected
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    jax.tree.map(np.testing.assert_array_equal, state, whole.restore(like, 6))
    assert read_fork(fork) == (Origin(source, 2),)
    (told_once,) = [one for one in read_events(fork) if one["event"] == "fork"]
    assert (told_once["run"], told_once["step"]) == (str(source), 2)

    fit(small_run(folder), fork, fork_from=Origin(source, 2))  # the same command again
    fit(small_run(folder), fork, fork_from=Origin(source, None))
    assert figures(fork) == expected
    for origin, words in [
        (Origin(source, 4), f"holds a fork of {source} at step 2"),
        (Origin(fork, 4), "holds a fork of"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            find_past(fork, ByteTokenizer(), origin)
    with pytest.raises(CheckpointError, match="holds a run that is no fork"):
        find_past(source, ByteTokenizer(), Origin(fork, 4))
    with pytest.raises(ConfigError, match="that is the run itself"):
        find_past(folder / "new", ByteTokenizer(), Origin(folder / "new", None))
    with pytest.raises(CheckpointError, match="no checkpoint of step 3: give one of 2, 4, 6"):
        find_past(folder / "new", ByteTokenizer(), Origin(source, 3))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_past(folder / "new", ByteTokenizer(), Origin(folder / "none", 3))
    with pytest.raises(ConfigError, match="the fork begins after step 6: give more"):
        fit(small_run(folder), folder / "new", fork_from=Origin(source, None))
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_a_fork_goes_its_own_way_and_can_be_killed_before_it_saves(folder, source, capsys):
    config = with_part(small_run(folder, steps=5), "optimizer", learning_rate=3e-2)
    config = replace(config, save_every=None)
    fork = folder / "other"
    fit(config, fork, fork_from=Origin(source, 4))
    assert "optimizer.learning_rate 0.01 -> 0.03" in capsys.readouterr().err
    lines = figures(fork)
    assert list(lines) == [5]
    assert lines[5][2] == figures(source)[5][2]  # the same batch
    assert [config_at(fork, step).optimizer.learning_rate for step in (4, 5)] == [0.01, 0.03]
    for step in Checkpoints(fork).steps():  # as if it had been killed before its first save
        (fork / "checkpoints" / str(step)).rename(fork / "checkpoints" / f"{step}.gone")
    fit(config, fork)  # without being told, it knows where it began
    assert figures(fork) == lines
    second = folder / "second"
    fit(replace(config, steps=7), second, fork_from=Origin(fork, None))
    assert read_fork(second) == (Origin(fork, 5), Origin(source, 4))
    assert [config_at(second, step).steps for step in (1, 5, 6)] == [6, 5, 7]


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_only_if_told(folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    fit(small_run(folder, steps=2), run)
    lower = with_part(small_run(folder, steps=3), "optimizer", learning_rate=5e-3)
    before = snapshot(run)
    with pytest.raises(CheckpointError, match=r"learning_rate was 0.01 .*--allow-config-change"):
        fit(lower, run)
    after = snapshot(run)
    assert after.pop(run / "events.jsonl") > before.pop(run / "events.jsonl")  # it is told there
    assert after == before
    fit(lower, run, allowed=Allowed(config=True))
    assert (
        "--- changed since step 2: optimizer.learning_rate 0.01 -> 0.005, steps 2 -> 3"
        in capsys.readouterr().err
    )
    assert [config_at(run, step).optimizer.learning_rate for step in (2, 3)] == [0.01, 0.005]
    assert read_run(run)[0].optimizer.learning_rate == 0.005
    (event,) = [one for one in read_events(run) if one["event"] == "config"]
    assert [one["name"] for one in event["changes"]] == ["optimizer.learning_rate", "steps"]

    # The same command once more changes nothing; the text behind the store does.
    fit(lower, run)
    own = tmp_path / "text.txt"
    own.write_text((folder / "text.txt").read_text() + " more")
    moved = with_part(replace(lower, steps=4), "data", path=(str(own),))
    with pytest.raises(CheckpointError, match=r"data.path was .*--allow-data-change"):
        fit(moved, run)
    fit(moved, run, allowed=Allowed(data=True))
    assert "train store text: " in capsys.readouterr().err
    own.write_text((folder / "text.txt").read_text() + " and more")
    (tmp_path / "stores").mkdir()
    rebuilt = with_part(replace(moved, steps=5), "data", store_dir=str(tmp_path / "stores"))
    with pytest.raises(CheckpointError, match=r"(?s)another data.*text.txt holds other text"):
        fit(rebuilt, run)
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]


def test_the_options_of_the_verb(monkeypatch, tmp_path, folder):
    asked = []
    monkeypatch.setattr("gptjax.train.fit", lambda *given, **named: asked.append(named))
    (tmp_path / "run.py").write_text(
        "from gptjax import *\n"
        "def config():\n"
        "    return Config(data=DataConfig(path=('text.txt',)), eval_every=None)\n"
    )
    for fork, origin in [
        ("a/b@12", ("a/b", 12)),
        ("a/b", ("a/b", None)),
        ("x@y", ("x@y", None)),
    ]:
        options = ["--fork-from", fork, "--allow-config-change"]
        arguments = ["gptjax", "train", str(tmp_path / "run.py"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr("gptjax.cli.runs._join_processes", lambda given: None)
        assert cli.main() == 0
        assert (str(asked[-1]["fork_from"].run), asked[-1]["fork_from"].step) == origin
        assert asked[-1]["allowed"] == Allowed(config=True, data=False)
