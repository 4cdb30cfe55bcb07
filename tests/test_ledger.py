"""The documents behind a step: told, blamed and left out, and what is replayed stays as it was."""

import json
import re
import string
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small import PLAIN, fresh

from gptjax import cli
from gptjax.config import (
    Config,
    DataConfig,
    MeshConfig,
    MixtureConfig,
    OptimizerConfig,
    SampleConfig,
)
from gptjax.data import Member, Rows, batch_at, passages_at
from gptjax.evaluate import document_losses
from gptjax.exclusions import Exclusion, exclude, read_exclusions, write_exclusions
from gptjax.metrics import read_metrics
from gptjax.model import token_losses
from gptjax.rows import load_rows
from gptjax.rundir import CheckpointError, read_run
from gptjax.sources import DataError
from gptjax.step import batch_hash
from gptjax.store import build_store
from gptjax.tokenizer import ByteTokenizer
from gptjax.train import fit

TOKENIZER = ByteTokenizer()
END, PAD = TOKENIZER.end, TOKENIZER.pad
# Noise, of letters that no other document has.
POISON = "".join(np.random.default_rng(0).choice([*string.ascii_uppercase], 160))
TEXTS = f"""
import random

def letters():
    draw = random.Random(0)
    for i in range(60):
        yield " ".join(draw.choice(["abc", "bcd", "cab"]) for _ in range(draw.randint(3, 20)))
        if i == 30:
            yield {POISON!r}

def digits():
    draw = random.Random(1)
    for _ in range(40):
        yield " ".join(draw.choice(["123", "231", "445"]) for _ in range(draw.randint(3, 20)))
"""


# --- in memory -----------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    documents = [[b"abcde", b"f", b"ghijklmnopqr"], [bytes([i]) * (i % 7 + 1) for i in range(40)]]
    members = tuple(
        Member(store=build_store(texts, TOKENIZER, tmp_path / name), name=name)
        for name, texts in zip("ab", documents, strict=True)
    )
    return Rows(
        members=members, context_size=8, batch_size=6, seed=3, shuffle=True, pad=PAD, end=END
    )


def entry(rows, name, number, **changes):
    store = next(member.store for member in rows.members if member.name == name)
    fields = store.document(number)._asdict()
    fields |= {"store": name, "document": fields.pop("number"), "text": "", "taken_up": True}
    return Exclusion(**fields | {"from_step": 0} | changes)


@pytest.mark.parametrize("which", [slice(0, 6), slice(2, 5)])
def test_passages_are_all_that_a_batch_shows(rows, which):
    for step in range(12):
        batch = batch_at(step, rows, which=which)
        passages = passages_at(step, rows, which=which)
        assert {one.row for one in passages} == {*range(6)[which]}
        for row in range(6)[which]:
            mine = [one for one in passages if one.row == row]
            shown = [
                one.member.store.read(np.array([one.start]), one.stop - one.start, PAD)[0]
                for one in mine
            ]
            i = row - which.start
            real = batch.weights_BT[i] == 1
            assert np.concatenate(shown).tolist() == batch.tokens_BT[i][real].tolist()
            lengths = np.bincount(batch.segments_BT[i][real])[1:]
            assert [len(part) for part in shown] == lengths.tolist()
            for one, part in zip(mine, shown, strict=True):
                assert one.document.start <= one.start < one.stop <= one.document.stop
                assert (part[0] == END) == (one.start == one.document.start)


def test_losses_of_documents_are_those_of_their_tokens(rows):
    model = replace(PLAIN, vocab_size=258, context_size=8)
    params = fresh(model, jax.random.key(0))
    batch = batch_at(2, rows, which=slice(1, 6))
    passages = passages_at(2, rows, which=slice(1, 6))
    losses_BT = np.asarray(token_losses(params, batch, model))
    # Five rows, two at a time: the last part is given a row that has been before.
    given = document_losses(params, batch, passages, model, rows_at_once=2)
    assert sum(count for _, count in given) == batch.weights_BT.sum()
    segment = {}
    for one, (nats, count) in zip(passages, given, strict=True):
        segment[one.row] = segment.get(one.row, 0) + 1
        mine = batch.segments_BT[one.row - 1] == segment[one.row]
        assert count == mine.sum()
        assert nats == pytest.approx(losses_BT[one.row - 1][mine].sum(), rel=1e-5)


def test_the_record_comes_back(rows, tmp_path):
    assert read_exclusions(tmp_path) == ()
    entries = (entry(rows, "b", 7, from_step=12, text="naïve\n"), entry(rows, "a", 1))
    write_exclusions(tmp_path, entries)
    assert read_exclusions(tmp_path) == entries
    assert [path.name for path in tmp_path.glob("skipped*")] == ["skipped.json"]
    kept = exclude(rows, entries)
    assert [member.excluded.from_steps.tolist() for member in kept.members] == [[0], [12]]
    for step, gone in [(11, False), (12, True)]:
        passages = passages_at(step, kept, which=slice(0, 6))
        sevens = {
            one.excluded for one in passages if (one.member.name, one.document.number) == ("b", 7)
        }
        assert sevens <= {gone}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "not a list of documents"),
        ('[{"from_step": 3}]', "not a list of documents"),
        ("[3]", "not a list of documents"),
    ],
)
def test_a_record_that_cannot_be_read(tmp_path, content, words):
    (tmp_path / "skipped.json").write_text(content)
    with pytest.raises(DataError, match=f"skipped.json: {words}"):
        read_exclusions(tmp_path)


def test_records_that_do_not_fit_are_refused(rows, tmp_path):
    write_exclusions(tmp_path, [entry(rows, "a", 1, start="8")])
    with pytest.raises(DataError, match=r"skipped.json: entry 0.start = '8': must be a whole"):
        read_exclusions(tmp_path)
    with pytest.raises(DataError, match=r"document 1 of a was tokens 6 to 9, but is 6 to 8"):
        exclude(rows, [entry(rows, "a", 1, stop=9)])
    for changes in ({"store": "c"}, {"document": 3}):
        with pytest.raises(DataError, match="there is no document"):
            exclude(rows, [entry(rows, "a", 1, **changes)])
    with pytest.raises(
        DataError, match=r"a: all of its 3 documents would be left out.*--data.skip"
    ):
        exclude(rows, [entry(rows, "a", number) for number in range(3)])


# --- a run ---------------------------------------------------------------------------------------


def config_of(folder: Path, **changes) -> Config:
    texts = folder / "texts.py"
    texts.write_text(TEXTS)
    names = {"letters": 2.0, "digits": 1.0}
    mixture = tuple(
        MixtureConfig(name=name, path=(f"{texts}:{name}",), weight=weight)
        for name, weight in names.items()
    )
    data = DataConfig(mixture=mixture, store_dir=str(folder / "stores"), workers=1)
    values = {
        "model": replace(PLAIN, vocab_size=None),
        "data": data,
        "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        "mesh": MeshConfig(fsdp=8),  # Orbax saves what is whole on eight devices slowly
        "sample": SampleConfig(max_tokens=0),
        "steps": 16,
        "batch_size": 8,
        "log_every": 1,
        "save_every": None,
        "eval_every": None,
        "tensorboard": False,
    }
    return Config(**values | changes)


def gptjax(monkeypatch, capsys, *arguments: object) -> str:
    """What the command line prints."""
    monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, arguments)])
    code = cli.main()
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def poisoned_steps(run_dir, steps):
    """The steps whose batch, as the run sees it, has a byte of the poisonous document."""
    config, tokenizer = read_run(run_dir)
    rows = exclude(load_rows(config, tokenizer)[0], read_exclusions(run_dir))
    batches = {step: batch_at(step - 1, rows, which=slice(0, 8)) for step in steps}
    poison = [*POISON.encode()]
    return [
        step
        for step, batch in batches.items()
        if np.isin([batch.tokens_BT, batch.targets_BT], poison).any()
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    fit(config_of(folder), folder / "run")
    return folder / "run"


def test_a_mixture_is_evaluated_together_and_apart(trained):
    line = read_metrics(trained)[-1]
    names = [name for name in line if name.startswith("eval/")]
    assert sorted(names) == [
        f"eval/{name}{figure}"
        for name in ("bits_per_byte", "digits/", "letters/", "loss")
        for figure in (("bits_per_byte", "loss") if name.endswith("/") else ("",))
    ]
    apart = sorted([line["eval/digits/loss"], line["eval/letters/loss"]])
    assert apart[0] < line["eval/loss"] < apart[1]


def test_the_hash_and_the_documents_of_a_step(trained, monkeypatch, capsys):
    for line in read_metrics(trained)[::7]:
        step, expected = line["step"], line["data/batch_hash"]
        out = gptjax(monkeypatch, capsys, "data", trained, "--step", step, "--rows", 2, 3)
        first, header, *lines = out.splitlines()
        assert first == f"step {step}: batch hash {expected:.0f} (as in metrics.jsonl)"
        assert header.split() == "row store document source position tokens text".split()
        assert {line.split()[0] for line in lines} == {"2", "3"}
        assert {line.split()[1] for line in lines} <= {"letters", "digits"}


def test_a_poisonous_document_is_blamed_left_out_and_never_seen_again(trained, monkeypatch, capsys):
    before = read_metrics(trained)
    seen = poisoned_steps(trained, range(1, 41))
    assert len(seen) >= 2 and seen[0] <= 16 < seen[-1]
    out = gptjax(monkeypatch, capsys, "data", trained, "--step", seen[0], "--blame", "--top", 2)
    _, header, worst, second = out.splitlines()
    assert header.split() == "loss tokens store document source position text".split()
    noise = re.compile("[A-Z]{20}")
    assert noise.search(worst) and not noise.search(second)
    assert float(worst.split()[0]) > 2 * float(second.split()[0])

    arguments = ["data", trained, "--skip", *seen[:1], "--blame", "--top", 1]
    out = gptjax(monkeypatch, capsys, *arguments)
    assert noise.search(out) and "left out of letters: 1 documents, 161 tokens" in out
    assert "goes on after step 16" in out
    assert "nothing new is left out" in gptjax(monkeypatch, capsys, *arguments)
    (recorded,) = json.loads((trained / "skipped.json").read_text())
    assert (recorded["from_step"], recorded["store"]) == (16, "letters")
    assert not recorded["taken_up"]
    assert POISON.startswith(recorded["text"].rstrip("."))
    assert not poisoned_steps(trained, range(17, 41))

    fit(replace(read_run(trained)[0], steps=40), trained)
    assert read_metrics(trained)[:15] == before[:15]  # the last one was that of an evaluation
    for step in (seen[0], 16, seen[-1]):  # which compares the hash with the log's
        assert "as in metrics.jsonl" in gptjax(monkeypatch, capsys, "data", trained, "--step", step)
    out = gptjax(monkeypatch, capsys, "data", trained, "--step", seen[-1])
    assert re.search(r"letters +\d+ .* \(left out\)$", out, re.MULTILINE)
    assert all(one.taken_up and one.from_step == 16 for one in read_exclusions(trained))


def test_what_a_run_has_not_taken_up_changes_no_step_that_it_has_done(trained, monkeypatch, capsys):
    """As when documents are left out while the run goes on."""
    (line,) = [line for line in read_metrics(trained) if line["step"] == 12]
    config, tokenizer = read_run(trained)
    rows, _ = load_rows(config, tokenizer)
    document = passages_at(11, rows, which=slice(0, 8))[0]
    recorded = read_exclusions(trained)
    new = entry(rows, document.member.name, document.document.number, from_step=10, taken_up=False)
    write_exclusions(trained, [*recorded, new])
    out = gptjax(monkeypatch, capsys, "data", trained, "--step", 12)
    assert f"hash {line['data/batch_hash']:.0f} (as in" in out and "(left out)" not in out
    write_exclusions(trained, [*recorded, replace(new, taken_up=True)])
    monkeypatch.setattr(sys, "argv", ["gptjax", "data", str(trained), "--step", "12"])
    assert cli.main() == 3
    assert "but metrics.jsonl says" in capsys.readouterr().err
    write_exclusions(trained, recorded)


def test_verify_reads_all_stores(trained, monkeypatch, capsys):
    out = gptjax(monkeypatch, capsys, "data", trained, "--verify").splitlines()
    assert len(out) == 4 and all(line.endswith("tokens as built") for line in out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing is asked for"),
        (["--step", 3, "--skip", 4], "give one of them"),
        (["--verify", "--blame"], "--rows and --blame are of a step"),
        (["--step", 3, "--top", 2], "give --blame with them"),
        (["--step", 3, "--rows", 5, 4], "rows = 5 4: the first comes after the last"),
        (["--step", 3, "--rows", 5], "rows = (5,): must be (a whole number"),
        (["--step", 4100], "step 4,100: the run has"),
        (["--step", 3, "--rows", 5, 8], "rows: 8 is given: a batch has rows 0 to 7"),
        (["--skip", "a"], "skip[0] = 'a': must be a whole number"),
    ],
)
def test_bad_options(trained, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["gptjax", "data", str(trained), *map(str, arguments)])
    assert cli.main() == 2
    assert words in capsys.readouterr().err


# --- going on with a run -------------------------------------------------------------------------


@pytest.mark.slow
def test_what_may_change_when_a_run_goes_on(tmp_path):
    config = config_of(tmp_path, steps=3)
    fit(config, tmp_path / "run")

    def with_data(**changes):
        return replace(config, data=replace(config.data, **changes))

    first, second = config.data.mixture
    other = (first, replace(second, weight=3.0))
    for changes, words in [
        (
            {"mixture": other},
            r"data.mixture.\w+.weight was .* and is now 3.0: makes it another run",
        ),
        ({"skip": ((3, 3),)}, r"data.skip up to step 3, which is saved, was \(\) and is now"),
        ({"shuffle": False}, "data.shuffle was True"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            fit(with_data(**changes), tmp_path / "run")
    rarely = replace(first, max_epochs=1), second
    with pytest.raises(DataError, match=r"400 steps would read letters .* \(max_epochs = 1\)"):
        fit(replace(with_data(mixture=rarely), steps=400), tmp_path / "run")

    mixture = replace(first, max_epochs=40), second
    going_on = with_data(mixture=mixture, skip=((4, 6),), workers=2, max_epochs=99, prefetch=0)
    fit(replace(going_on, steps=4), tmp_path / "run")
    rows, _ = load_rows(config, TOKENIZER)
    seventh = batch_at(6, rows, which=slice(0, 8))
    assert read_metrics(tmp_path / "run")[-1]["data/batch_hash"] == int(batch_hash(seventh))
