"""Laws of cli/inspecting.py: what is wrong with a run's checkpoints is said, and what goes."""

import re
import shutil
import sys

import pytest
from test_checkpoint import flip, make_state, names, saved

from gptjax import cli
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, DataConfig
from gptjax.rundir import save_run
from gptjax.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    save_run(run_dir, Config(), make_tokenizer(DataConfig()))
    saved(run_dir, 5, 10)
    return run_dir


@pytest.fixture
def run_dir(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def said(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, arguments)])
    code = cli.main()
    return code, *capsys.readouterr()


def test_verify_says_of_every_step_whether_it_is_whole(monkeypatch, capsys, run_dir):
    code, out, _ = said(monkeypatch, capsys, "inspect", run_dir, "--verify")
    assert code == 0
    assert re.findall(r"^(\d+) +(\w+)", out, re.M) == [("5", "whole"), ("10", "whole")]
    flip(run_dir / "checkpoints/5/params/_METADATA", 7)
    before = names(run_dir)
    code, out, err = said(monkeypatch, capsys, "inspect", run_dir, "--verify")
    assert code == 4
    assert re.findall(r"^(\d+) +(\w+)", out, re.M) == [("5", "damaged"), ("10", "whole")]
    assert "step 5: params/_METADATA: its bytes are not those that were written" in out
    assert "of 2 checkpoints 1 are damaged -- step 5 --" in err
    assert said(monkeypatch, capsys, "inspect", f"{run_dir}@10", "--verify")[0] == 0
    assert names(run_dir) == before


def test_diff_says_how_far_each_parameter_is(monkeypatch, capsys, run_dir, tmp_path):
    first = make_state(5)
    head = first.params["head"]
    moved = {"tokens": head["tokens"], "scale": head["scale"] * 1.5, "bias": head["scale"]}
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(7, first._replace(params=first.params | {"head": moved}), wait=True)
    code, out, _ = said(
        monkeypatch, capsys, "inspect", f"{run_dir}@5", "--diff", tmp_path / "other"
    )
    assert code == 0
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:]}
    assert lines["blocks/up"][1:] == lines["head/tokens"][1:] == ["identical"]
    assert lines["head/bias"] == ["only", "there"]
    assert lines["head/scale"][2] == "0.5"
    code, out, _ = said(monkeypatch, capsys, "inspect", f"{run_dir}@5", "--diff", run_dir)
    assert "identical" not in out
    code, _, err = said(monkeypatch, capsys, "inspect", run_dir, "--diff", run_dir, "--verify")
    assert code == 2
    assert "give one of them" in err


def test_prune_says_what_it_removes(monkeypatch, capsys, run_dir):
    shutil.copytree(run_dir / "checkpoints/5", run_dir / "checkpoints/quarantine/5")
    code, out, _ = said(monkeypatch, capsys, "prune", run_dir, "--dry-run")
    assert code == 0
    assert "would be removed" in out
    assert names(run_dir) == {"5", "10", "quarantine"}
    code, out, _ = said(monkeypatch, capsys, "prune", run_dir, "--keep-last", "1")
    assert [line.split("/")[-2:] for line in out.splitlines()[:-1]] == [
        ["quarantine", "5"],
        ["checkpoints", "5"],
    ]
    assert not list((run_dir / "checkpoints/quarantine").iterdir())
    assert Checkpoints(run_dir).steps() == [10]
