"""Runs of the real command: stopped, killed, moved to other meshes and processes, and gone on
with.
"""

import json
import random
import signal
from dataclasses import replace

import pytest
from launch import (
    assert_same,
    figures,
    finish,
    in_processes,
    make_folder,
    start,
    start_processes,
    wait_for_step,
)
from small import PLAIN

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, DataConfig, OptimizerConfig, SampleConfig
from gptjax.metrics import read_metrics
from gptjax.rundir import CheckpointError, read_run, save_run
from gptjax.sources import DataError
from gptjax.tokenizer import make_tokenizer, train_sentencepiece
from gptjax.train import DivergenceError, fit

STEPS = 12
WITH_SAMPLE = ("--sample.max-tokens", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("runs"))


def assert_near(folder, run, other):
    a, b = figures(folder, run), figures(folder, other)
    assert a.keys() == b.keys()
    for step in a:
        assert a[step]["data/batch_hash"] == b[step]["data/batch_hash"]
        assert a[step]["train/loss"] == pytest.approx(b[step]["train/loss"], rel=5e-5)
        assert (a[step]["eval/loss"] is None) == (b[step]["eval/loss"] is None)
        if a[step]["eval/loss"]:
            assert a[step]["eval/loss"] == pytest.approx(b[step]["eval/loss"], rel=5e-5)


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing disturbed."""
    output = finish(start(folder, "whole", *WITH_SAMPLE))
    assert "result     validation loss" in output and "sample" in output
    assert list(figures(folder, "whole")) == list(range(1, STEPS + 1))
    return "whole"


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(folder, whole):
    """As after SIGTERM and kill -9, of which test_stop.py and faults/ have more."""
    run = "interrupted"
    process = start(folder, run)
    wait_for_step(folder, run, 6, process)
    process.send_signal(signal.SIGINT)
    finish(process, 75)
    assert Checkpoints(folder / run).latest() == max(figures(folder, run)) < STEPS
    finish(start(folder, run))
    assert_same(folder, run, whole)


@pytest.mark.slow
def test_a_finished_run_trains_no_more(folder, whole):
    before = figures(folder, whole)
    finish(start(folder, whole))
    assert figures(folder, whole) == before


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_give_the_numbers_of_one(folder, whole, count):
    run = f"{count}-processes"
    options = () if count == 2 else ("--mesh.fsdp", "2", "--mesh.tensor", "2", *WITH_SAMPLE)
    outputs = in_processes(folder, run, count, *options)
    assert_near(folder, run, whole)
    assert not any("step 1/" in output for output in outputs[1:])


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh_and_with_two_processes(folder, whole):
    run = "moved"
    process = start(folder, run)
    wait_for_step(folder, run, 3, process)
    process.send_signal(signal.SIGTERM)
    finish(process, 75)
    process = start(folder, run, "--mesh.fsdp", "4", "--mesh.tensor", "2", devices=8)
    wait_for_step(folder, run, 6, process)
    process.send_signal(signal.SIGTERM)
    finish(process, 75)
    in_processes(folder, run, 2, "--mesh.fsdp", "2")
    assert_near(folder, run, whole)


@pytest.mark.slow
def test_all_processes_save_the_same_step_when_one_is_told_to_stop(folder, whole):
    run = "one-of-two"
    steps = ["--steps", "4000", "--save-every", "4000", "--eval-every", "4000"]
    both = start_processes(folder, run, 2, *steps)
    wait_for_step(folder, run, 5, both[0])
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        finish(process, 75)
    assert Checkpoints(folder / run).latest() == max(figures(folder, run)) > 5


@pytest.mark.slow
def test_a_fault_in_one_process_is_skipped_by_both_and_both_go_back(folder):
    """Which then are as if they had never seen those batches."""
    options = ["--guard.rollback-after", "2", "--mesh.data", "2"]
    both = start_processes(
        folder, "back", 2, *options, faults=("", "batch_read:nan@3,batch_read:nan@6-7")
    )
    for process in both:
        finish(process)
    (went_back,) = json.loads((folder / "back" / "rollbacks.json").read_text())
    assert went_back == {"first": 6, "last": 7, "step": 7, "to_step": 4}
    log = (folder / "back" / "events.jsonl").read_text()
    assert log.count('"skipped_update"') == 3 and log.count('"rollback"') == 1
    options += ["--data.skip", "6", "7"]
    for process in start_processes(folder, "never", 2, *options, faults=["", "batch_read:nan@3"]):
        finish(process)
    assert_same(folder, "back", "never")


@pytest.mark.slow
def test_the_time_zone_the_locale_and_the_order_of_hashes_change_no_number(
    folder, whole, monkeypatch
):
    for name, value in [("TZ", "Asia/Kathmandu"), ("PYTHONHASHSEED", "7"), ("LC_ALL", "C")]:
        monkeypatch.setenv(name, value)
    finish(start(folder, "elsewhere"))
    assert_same(folder, "elsewhere", whole)


# --- mixtures ------------------------------------------------------------------------------------

MIXTURE = """
from gptjax import *

def config():
    return Config(
        model=GPTConfig(context_size=32, num_layers=1, width=16, num_heads=2),
        data=DataConfig(
            mixture=(
                MixtureConfig(name="words", path=("text.txt",)),
                MixtureConfig(name="lines", path=("lines.jsonl",), weights=((40, 4.0),)),
            ),
            skip=((7, 9), (60, 60)),
        ),
        sample=SampleConfig(max_tokens=0),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        steps=96, batch_size=12, log_every=1, eval_every=48, save_every=8, tensorboard=False,
    )
"""


@pytest.fixture(scope="module")
def mixed(folder):
    """A run of a mixture that nothing disturbed; it reads the shorter store several times."""
    (folder / "mixed").mkdir()
    (folder / "mixed" / "run.py").write_text(MIXTURE)
    (folder / "mixed" / "text.txt").write_bytes((folder / "text.txt").read_bytes())
    lines = [json.dumps({"text": f"{n} squared is {n * n}"}) for n in range(200)]
    (folder / "mixed" / "lines.jsonl").write_text("\n".join(lines))
    finish(start(folder / "mixed", "whole"))
    whole = figures(folder / "mixed", "whole")
    assert list(whole) == list(range(1, 97))
    assert len({values["data/batch_hash"] for values in whole.values()}) == 96
    return folder / "mixed"


@pytest.mark.slow
def test_a_mixture_that_is_killed_again_and_again_goes_on_bit_for_bit(mixed):
    draw, logged = random.Random(0), 0
    for _ in range(3):
        process = start(mixed, "killed")
        wait_for_step(mixed, "killed", logged + draw.randint(1, 12), process)
        process.kill()
        finish(process, -signal.SIGKILL)
        logged = max(figures(mixed, "killed"))
    assert logged < 96
    finish(start(mixed, "killed"))
    assert_same(mixed, "killed", "whole")


@pytest.mark.slow
def test_processes_share_the_batches_of_a_mixture(mixed):
    in_processes(mixed, "shared", 3, "--mesh.data", "3")
    hashes, whole = (
        {step: values["data/batch_hash"] for step, values in figures(mixed, one).items()}
        for one in ("shared", "whole")
    )
    assert hashes == whole


# --- what is refused, in this process ------------------------------------------------------------


def small_run(folder, **changes):
    values = {
        "model": replace(PLAIN, vocab_size=None),
        "data": DataConfig(path=(str(folder / "text.txt"),), store_dir=str(folder / "stores")),
        "sample": SampleConfig(max_tokens=0),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "steps": 3,
        "batch_size": 8,
        "eval_every": None,
        "tensorboard": False,
    }
    return Config(**values | changes)


def test_a_text_too_short_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(DataError, match="context_size"):
        fit(small_run(tmp_path), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.slow
def test_another_config_does_not_go_on_with_a_run(folder, tmp_path):
    fit(small_run(folder), tmp_path)
    lines = read_metrics(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)seed was 0 and is now 1.*another --run-dir"):
        fit(small_run(folder, seed=1), tmp_path)
    assert read_metrics(tmp_path) == lines
    longer = fit(small_run(folder, steps=5, log_every=1), tmp_path)
    assert int(longer.step) == 5
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 4, 5]


def with_tokenizer(config, path):
    return replace(config, data=replace(config.data, tokenizer=str(path)))


@pytest.fixture
def begun(folder, tmp_path):
    """The config of a run that was begun with a tokenizer of its own, which then was changed."""
    model, text = tmp_path / "a.model", (folder / "text.txt").read_text()
    (tmp_path / "text.txt").write_text("too short")
    train_sentencepiece([text], model, vocab_size=270)
    config = with_tokenizer(small_run(tmp_path), model)
    known = replace(config, model=replace(config.model, vocab_size=270))
    save_run(tmp_path / "run", known, make_tokenizer(config.data))
    model.unlink()
    train_sentencepiece([text], model, vocab_size=280)
    return config


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_another_tokenizer_does_not_go_on_with_a_run(begun, tmp_path, kind):
    config = begun if kind == "sentencepiece" else with_tokenizer(begun, "bytes")
    _, kept = read_run(tmp_path / "run")
    now = make_tokenizer(config.data)
    was = f"of kind 'sentencepiece' with fingerprint {kept.fingerprint}, but"
    words = f"{was} data.tokenizer is now of kind '{kind}' with {now.fingerprint}"
    with pytest.raises(CheckpointError, match=f"{words}. Give --data.tokenizer {tmp_path}/run"):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "stores").exists()


def test_the_same_tokenizer_elsewhere_goes_on_with_a_run(begun, tmp_path):
    with pytest.raises(DataError, match="context_size"):  # the next that is wrong
        fit(with_tokenizer(begun, tmp_path / "run" / "tokenizer"), tmp_path / "run")


@pytest.mark.slow
def test_every_process_refuses_another_tokenizer(folder, begun, tmp_path):
    before = sorted(folder.rglob("*"))
    model = ["--data.tokenizer", begun.data.tokenizer]
    for output in in_processes(folder, tmp_path / "run", 2, *model, code=4):
        assert "error[4]" in output and output.count("sentencepiece") == 2
    assert sorted(folder.rglob("*")) == before


def test_a_run_that_diverges_stops(folder, tmp_path):
    wild = small_run(folder, optimizer=OptimizerConfig(learning_rate=1e30), steps=50)
    with pytest.raises(DivergenceError, match="5 steps in a row"):
        fit(wild, tmp_path)
