"""What the tools print, with the smallest of models."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from gptjax.config import ConfigError

EXPERIMENT = """
from gptjax import Config, DataConfig, GPTConfig

def config():
    return Config(
        model=GPTConfig(context_size=16, num_layers=1, width=16, num_heads=2),
        data=DataConfig(path=("text.txt",)),
        batch_size=2,
        steps=10,
    )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an experiment and its text."""
    (tmp_path / "small.py").write_text(EXPERIMENT)
    (tmp_path / "text.txt").write_text("".join(f"{n} squared is {n * n}\n" for n in range(200)))
    return tmp_path


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools can be imported."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")


def run(
    tool: str, folder: Path, *arguments: str, code: Path = REPOSITORY
) -> subprocess.CompletedProcess:
    """Run a tool in a folder, on one device."""
    words = [sys.executable, str(code / "tools" / tool), "small.py", *arguments]
    variables = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)


# --- compare_losses ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_run_is_identical(folder):
    done = run("compare_losses.py", folder, "--steps", "3", "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical: 3 steps, train/loss from 5."), done.stdout


@pytest.mark.slow
def test_a_commit_is_compared_with_a_working_tree_of_another_learning_rate(folder):
    for name in ("gptjax", "tools"):
        shutil.copytree(REPOSITORY / name, folder / name)
    author = ["-c", "user.name=author", "-c", "user.email=author@example.org"]
    for words in ["init"], ["add", "."], [*author, "commit", "--message=as it was"]:
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    with (folder / "gptjax" / "optim.py").open("a") as optim:
        optim.write("rate = learning_rate\nlearning_rate = lambda *given: 2 * rate(*given)\n")
    done = run("compare_losses.py", folder, "--steps=2", "--a=HEAD", code=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("they part at step 2: train/loss 5."), done.stdout
    assert second.startswith("parameters before step 2: blocks/"), done.stdout
    assert not list((folder / ".git").glob("worktrees/*"))


def test_a_side_that_cannot_run_says_why(folder):
    done = run("compare_losses.py", folder, "--a=--model.widht 8 --seed 1")
    assert done.returncode == 2
    assert "Did you mean '--model.width'?" in done.stderr
    assert "--a failed" in done.stderr


def test_a_side_is_written_like_a_command():
    from compare_losses import side_of

    side = side_of("--a", "A=1 B='2 3' HEAD~3 --data.path 'a b'", ["--seed", "1"])
    assert side.variables == {"A": "1", "B": "2 3"}
    assert side.commit == "HEAD~3"
    assert side.fields == ["--seed", "1", "--data.path", "a b"]
    assert side_of("--a", "--seed=1", []).commit is None


def test_sides_part_at_the_first_metric_beyond_the_tolerance():
    from compare_losses import parting

    def metrics(**changes: float) -> list[dict]:
        same = {"data/batch_hash": 7, "train/loss": 4.0, "train/grad_norm": float("nan")}
        return [{"step": 1} | same, {"step": 2} | same | {"train/loss": 3.0}, {"step": 3} | changes]

    ends = {"data/batch_hash": 8, "train/loss": 2.0, "train/grad_norm": 1.0}
    exact = metrics(**ends)
    assert parting(exact, exact, 0.0) is None
    near = metrics(**ends | {"train/grad_norm": 1.0 + 1e-6})
    assert parting(exact, near, 1e-5) is None
    step, how = parting(exact, near, 0.0)
    assert step == 3
    assert how.startswith("train/grad_norm 1.0 against 1.000001")
    assert parting(exact, metrics(**ends | {"data/batch_hash": 9}), 1.0)[0] == 3
    assert parting(exact, metrics(**ends | {"train/loss": float("nan")}), 1.0)[0] == 3


def test_the_first_leaf_that_differs_is_named():
    from compare_losses import leaf_parting

    a = {"x": np.zeros(3), "y": np.ones((2, 2)), "z": np.ones(1)}
    assert leaf_parting(a, dict(a), 0.0) is None
    b = a | {"y": np.array([[1, 1], [1, 0.75]]), "z": np.zeros(1)}
    assert (
        leaf_parting(a, b, 0.0)
        == "y differs first, by up to 0.25, 0.25 relative; 2 of 3 leaves differ"
    )
    assert leaf_parting(a, b, 0.5).startswith("z differs first, by up to 1")
    assert "y has shape (2, 2) against (4,)" in leaf_parting(a, a | {"y": np.ones(4)}, 0.0)
    assert leaf_parting(a, {"x": a["x"], "y": a["y"]}, 0.0) == "leaves of one side only: z"


# --- bench ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_prints_one_line_of_json(folder):
    done = run("bench.py", folder, "--rounds=2", "--threads=1", "--batch-size=4", "--steps=3")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    printed = json.loads(line)
    assert printed.keys() == {"date", "commit", "hardware", "config", "rounds", "programs"}
    assert printed["rounds"] == 2
    assert printed["config"]["batch_size"] == 4
    assert printed["hardware"].endswith(", 1 cores")
    ours = printed["programs"]["gptjax"]
    assert 0 < ours["step_seconds_min"] <= ours["step_seconds"] < ours["compile_seconds"]
    assert ours["tokens_per_second"] == pytest.approx(4 * 16 / ours["step_seconds"])
    assert ours["first_step_seconds"] > ours["compile_seconds"]
    assert 5e7 < ours["peak_bytes"] < 5e9
    assert 0 < ours["mfu"] < 1


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ["torch", "transformers"])), reason="needs transformers"
)
def test_a_peer_takes_turns(folder):
    done = run("bench.py", folder, "--rounds=3", "--accumulate=2", "--peer=transformers")
    assert done.returncode == 0, done.stderr
    peer = json.loads(done.stdout)["programs"]["transformers"]
    assert 0 < peer["ratio_min"] <= peer["ratio_median"] <= peer["ratio_max"]


def test_a_peer_that_cannot_be_is_refused_with_all_reasons():
    from bench import SIZES, peer_of

    model = replace(SIZES["tiny"].model, norm="rmsnorm", ffn_size=64)
    with pytest.raises(ConfigError) as error:
        peer_of("nanogpt=nowhere", replace(SIZES["tiny"], model=model))
    for reason in ("nowhere holds no model.py", "model.norm = 'rmsnorm'", "model.ffn_size = 64"):
        assert reason in str(error.value)
    for text in ("nanogpt", "transformers=folder", "other"):
        with pytest.raises(ConfigError, match="give transformers, or nanogpt=FOLDER"):
            peer_of(text, SIZES["tiny"])


# --- bench_data ----------------------------------------------------------------------------------


def run_data(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(REPOSITORY / "tools" / "bench_data.py"), *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


SMALL = "--shards 20 --shard-tokens 3000 --context-size 64 --batch-sizes 8 --windows 32 --rounds 2"


def test_bench_data_measures_what_it_says(folder):
    (folder / "text.txt").write_text("some words of a text\n" * 10_000)
    words = f"{SMALL} --text text.txt --memory-bytes 3000000 --folder {folder} --workers 1".split()
    done = run_data(folder, *words)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    printed = json.loads(line)
    reading, tokenising = printed["reading"], printed["tokenising"]
    assert (reading["shards"], reading["tokens"]) == (20, 60_000)
    rates = reading["windows_per_second"]["8"]
    assert all(rates[name] > 1 for name in ("read", "batches", "mixture"))
    assert reading["first_read"] > 1
    assert rates["ratio"] == pytest.approx(rates["mixture"] / rates["batches"], rel=1)
    assert (tokenising["tokenizer"], tokenising["bytes"]) == ("bytes", 210_000)
    assert tokenising["store"]["bytes_per_second"] > 1000 and "library" not in tokenising
    assert printed["opening"]["tokens"] > 1e11 and 0 < printed["opening"]["open_seconds"] < 1
    memory = printed["memory"]
    assert memory["large"]["bytes"] == pytest.approx(3e6, rel=0.1)
    assert 5e7 < memory["small"]["peak_bytes"] < 5e9
    assert sorted(path.name for path in folder.iterdir()) == ["small.py", "text.txt"]


def test_bench_data_needs_a_text_for_some_parts(folder):
    done = run_data(folder, "--only", "opening", "memory")
    assert done.returncode == 2 and "give a --text to tokenise, or --only reading" in done.stderr
    done = run_data(folder, "--only", "tokenising", "--text", "text.tx")
    assert done.returncode == 2 and "Did you mean 'text.txt'?" in done.stderr


@pytest.mark.parametrize("text", [b"", b"short", b"words of a text " * 5000, b"\n" * 9000])
def test_pieces_for_a_library_are_the_text(text):
    from bench_data import PIECE_BYTES, cut

    pieces = list(cut(text))
    assert b"".join(pieces) == text
    assert all(len(piece) >= PIECE_BYTES for piece in pieces[:-1])
    assert all(len(piece) < 2 * PIECE_BYTES for piece in pieces)


def test_linked_shards_are_a_store(tmp_path):
    from bench_data import linked_store

    store = linked_store(tmp_path, 19, 500)
    windows = store.read(np.arange(19) * 500, 500, 0)
    assert store.num_tokens == 19 * 500
    np.testing.assert_array_equal(windows[:8], windows[8:16])
    assert len({window.tobytes() for window in windows}) == 8


# --- plan_grid ---------------------------------------------------------------------------------


def test_the_grid_counts_what_is_off_and_what_is_said_wrongly():
    from plan_grid import table_of

    def line(total, peak, **others):
        case = {"topology": "v5e:8", "size": "small", "options": "", "seconds": 1.0}
        return case | {"sum": total, "peak": peak, "device": 100, "flops_ratio": 1.0} | others

    lines = [
        line(90, 95, state_off=0),
        line(98, 105, state_off=None),  # by the compiler, it does not fit
        line(40, 80, state_off=8),
        {"topology": "v5e:8", "size": "xl", "options": "--x", "error": ["no compiler"]},
    ]
    table = table_of(lines)
    assert "within 10% of the peak: 2 of 3, the median 6.7% off, the worst 50.0%" in table
    assert "fits or does not, said alike: 2 of 3" in table
    assert "bytes of the state exact: 1 of 2" in table
    assert "['no compiler']  v5e:8 xl --x" in table
