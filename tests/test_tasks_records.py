"""The record of fine-tuning: which results are wanted, which are there, and the table of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY

from gptjax.config import ConfigError, TaskConfig


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import records

    return records


@pytest.fixture
def options(records, tmp_path):
    """Of a folder with one set that the tool knows, and one that it is told of."""
    for path in ("wnut17/wnut17train.conll", "wnut17/emerging.dev.conll", "mine/a.tsv"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
    mine = {"kind": "classify", "train": ["mine/a.tsv"], "valid": ["mine/a.tsv"], "epochs": 1.0}
    (tmp_path / "sets.json").write_text(json.dumps({"mine": mine}))
    sets, out = str(tmp_path / "sets.json"), str(tmp_path / "out.jsonl")
    return records.Options(run="runs/x", folders=(str(tmp_path),), sets=sets, out=out, seeds=2)


def test_sets_are_found_and_what_has_a_line_is_not_done_again(records, options):
    tasks = records.find(options)
    assert {*tasks} == {"wnut17", "mine"}
    assert isinstance(tasks["mine"], TaskConfig) and tasks["mine"].epochs == 1
    todo = [(name, way, seed) for name, _, way, seed in records.todo(options, tasks)]
    ways = ["scratch", "pretrained", "lora", "last"]
    expected = [(way, seed) for way in ways for seed in (0, 1)]
    assert [one[1:] for one in todo if one[0] == "mine"] == [("baseline", 0), *expected]
    assert ("wnut17", "repeated", 1) in todo
    key = records.key_of(options, "mine", "lora", 1)
    with open(options.out, "w") as file:
        file.write(json.dumps(key | {"figure": 0.5}) + '\n{"set": "mi')  # it was killed there
    again = [(name, way, seed) for name, _, way, seed in records.todo(options, tasks)]
    assert {*todo} - {*again} == {("mine", "lora", 1)}
    records.append(Path(options.out), {"set": "other"})
    assert records.lines_of(options)[1:] == [{"set": "other", "given": {}}]
    # What was made by other settings is another result.
    other = replace(options, lora_rank=16)
    third = [(name, way, seed) for name, _, way, seed in records.todo(other, tasks)]
    assert {*third} == {*todo}


def test_the_table_has_the_median_over_seeds(records, options):
    tasks = records.find(options)
    with open(options.out, "w") as file:
        for seed, figure in enumerate((0.5, 0.9, 0.6)):
            line = records.key_of(options, "mine", "lora", seed) | {"figure": figure}
            file.write(json.dumps(line) + "\n")
    assert "| mine | accuracy |  |  |  | 0.6000 (0.5000 to 0.9000) |" in (
        records.table(options, tasks)
    )


def test_sets_that_are_not_there_are_named(records, options):
    with pytest.raises(ConfigError, match="clinc150: not in"):
        records.find(replace(options, only=("clinc150",)))
