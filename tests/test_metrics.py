"""Laws of metrics.py: the log is exact, strict and resumable; FLOPs are those that are computed."""

import dataclasses
import errno
import io
import json
import math
import os
import pty
import resource
import sys
import termios
import time
import types
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPT2, GPT3, GPTConfig
from gptjax.metrics import PEAK_FLOPS, Log, flops_per_token, mfu, peak_flops, read_metrics
from gptjax.model import forward, init_params, unroll_blocks


def lines(run_dir) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def strict(line: str) -> dict:
    """JSON without the NaN and Infinity that Python adds to it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


# --- metrics.jsonl -------------------------------------------------------------------------------


def test_numbers_come_back_bit_for_bit(tmp_path):
    loss, tokens = jnp.float32(math.pi), 12345.678901234567
    with Log(tmp_path, first_step=1, last_step=2) as log:
        log.write(1, {"train/loss": loss, "data/batch_hash": jnp.uint32(2**32 - 1)})
        log.write(2, {"perf/tokens_per_second": tokens, "train/skipped": np.int32(0)})
    first, second = read_metrics(tmp_path)
    assert np.float32(first.pop("train/loss")) == loss
    assert first == {"step": 1, "data/batch_hash": 2**32 - 1}
    assert second == {"step": 2, "perf/tokens_per_second": tokens, "train/skipped": 0}


def test_every_line_is_strict_json(tmp_path):
    values = {"train/loss": jnp.nan, "train/grad_norm": math.inf, "eval/loss": -math.inf, "x": 1.5}
    with Log(tmp_path, first_step=1, last_step=1, tensorboard=True) as log:
        log.write(1, values)
    assert [strict(line) for line in lines(tmp_path)] == [
        {"step": 1, "train/loss": None, "train/grad_norm": None, "eval/loss": None, "x": 1.5}
    ]
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["train/loss"])
    assert read["x"] == 1.5


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
    with Log(tmp_path, first_step=1, last_step=2) as log:
        for step in (1, 2):
            log.write(step, {"train/loss": 1.0})
            assert len(read_metrics(tmp_path)) == step


@pytest.mark.parametrize("tensorboard", [False, True])
def test_on_a_full_disk_lines_are_lost_and_nothing_else(tmp_path, capsys, tensorboard):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Log(tmp_path, first_step=1, last_step=60, tensorboard=tensorboard) as log:
        log.write(1, {"train/loss": 1.0})
        room = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        resource.setrlimit(resource.RLIMIT_FSIZE, (room + 10, before[1]))  # of any file
        try:
            for step in range(2, 50):
                log.write(step, {"train/loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.write(50, {"train/loss": 2.0})
    steps = [strict(line)["step"] for line in lines(tmp_path)]
    assert steps[0] == 1 and steps[-1] == 50 and len(steps) < 10
    assert capsys.readouterr().err.count("warning    step ") == 1


def test_a_line_that_is_none_costs_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = ['{"step": 1, "train/loss": 0.1}', '{"step": 3, "train/loss": null}']
    path.write_bytes(f"{good[0]}\n\0\0\0\n[1]\n{good[1]}\n".encode() + b'{"step"')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
    with Log(tmp_path, first_step=4, last_step=4) as log:
        log.write(4, {"train/loss": 1.0})
    assert path.read_text().splitlines()[:2] == good and len(read_metrics(tmp_path)) == 3


def test_more_of_a_step_that_the_disk_does_not_take_ends_nothing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Log(tmp_path, first_step=1, last_step=2) as log:
        log.write(1, {"train/loss": 1.0})
        with monkeypatch.context() as patched:
            patched.setattr("gptjax.metrics._replace", full)
            log.amend(1, {"eval/loss": 0.5})
        log.write(2, {"train/loss": 0.5})
    assert "more of step 1 is not logged: No space left" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_more_is_logged_of_the_last_step(tmp_path):
    with Log(tmp_path, first_step=1, last_step=3) as log:
        for step in (1, 2):
            log.write(step, {"train/loss": math.nan})
    with Log(tmp_path, first_step=3, last_step=3) as log:
        log.amend(2, {"eval/loss": 0.5})
        log.write(3, {"train/loss": 1.0})
    assert [strict(line) for line in lines(tmp_path)] == [
        {"step": 1, "train/loss": None},
        {"step": 2, "train/loss": None, "eval/loss": 0.5},
        {"step": 3, "train/loss": 1.0},
    ]
    with Log(tmp_path, first_step=6, last_step=5) as log:
        log.amend(5, {"test/loss": 0.25})  # which was not logged
    assert [strict(line) for line in lines(tmp_path)][2:] == [
        {"step": 3, "train/loss": 1.0},
        {"step": 5, "test/loss": 0.25},
    ]


@pytest.mark.parametrize("torn", ["", '{"step": 7, "train/lo', "{"])
def test_after_a_resume_no_step_stands_twice(tmp_path, torn):
    with Log(tmp_path, first_step=1, last_step=10) as log:
        for step in range(1, 7):
            log.write(step, {"train/loss": step / 3})
    before = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert len(read_metrics(tmp_path)) == 6
    with Log(tmp_path, first_step=5, last_step=10) as log:
        assert lines(tmp_path) == before[:4]
        for step in range(5, 11):
            log.write(step, {"train/loss": step / 3})
    assert lines(tmp_path)[:6] == before
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 11))
    with Log(tmp_path, first_step=1, last_step=10):
        assert lines(tmp_path) == []


def test_after_a_rollback_no_step_stands_twice(tmp_path):
    with Log(tmp_path, first_step=1, last_step=6) as log:
        for step in range(1, 6):
            log.write(step, {"train/loss": step})
        log.rewind(4)
        for step in range(4, 7):
            log.write(step, {"train/loss": 10 * step})
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [1, 2, 3, 40, 50, 60]


def test_a_step_is_written_once(tmp_path):
    with Log(tmp_path, first_step=3, last_step=10) as log:
        for step in (3, 5):
            log.write(step, {})
        for step in (5, 4):
            with pytest.raises(AssertionError, match="after step 5"):
                log.write(step, {})
    with Log(tmp_path, first_step=3, last_step=10) as log, pytest.raises(AssertionError):
        log.write(2, {})


def test_a_log_that_is_not_enabled_does_nothing(tmp_path, capfd):
    with Log(tmp_path, first_step=1, last_step=10, tensorboard=True, enabled=False) as log:
        log.write(1, {"train/loss": 1.0})
        log.advance(1)
        log.say("something")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert read_metrics(tmp_path) == []


# --- TensorBoard ---------------------------------------------------------------------------------


def events(run_dir) -> list[tuple]:
    """Steps and values of all event files, read by the format's own rules.

    A record is a length (uint64), its checksum (uint32), the data and their checksum (uint32).
    """
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data = io.BytesIO(path.read_bytes())
        while header := data.read(12):
            event = Event.FromString(data.read(int.from_bytes(header[:8], "little")))
            data.read(4)
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.session_log.status:
                found += [(event.step, "start")]
    return found


def test_tensorboard_has_the_finite_numbers_and_forgets_on_resume(tmp_path):
    with Log(tmp_path, first_step=1, last_step=9, tensorboard=True) as log:
        log.write(4, {"train/loss": 2.5, "eval/loss": math.nan})
        log.write(8, {"train/loss": 1.5})
    time.sleep(1.1)  # the name of an event file has its second
    with Log(tmp_path, first_step=5, last_step=9, tensorboard=True) as log:
        log.write(8, {"train/loss": 1.25})
    found = [event for event in events(tmp_path) if event != (1, "start")]
    # TensorBoard drops what it has of step 5 and later when it reads the start.
    assert found == [
        (4, "train/loss", 2.5),
        (8, "train/loss", 1.5),
        (5, "start"),
        (8, "train/loss", 1.25),
    ]


# --- the console ---------------------------------------------------------------------------------


def test_without_a_terminal_each_write_is_a_line(tmp_path, capfd):
    with Log(tmp_path, first_step=119, last_step=1120) as log:
        log.advance(119)
        time.sleep(0.1)
        log.advance(120)
        values = {"train/loss": 2.34561, "train/learning_rate": 6e-4, "train/grad_norm": 1.0}
        log.write(120, values | {"perf/tokens_per_second": 12345.4, "perf/mfu": 0.4123})
        log.say("a word")
        log.write(1120, {"eval/loss": jnp.nan, "eval/bits_per_byte": 1.2})
    out, err = capfd.readouterr()
    first, word, last = err.splitlines()
    shown, _, eta = first.partition("  ETA ")
    assert shown == "step 120/1120  loss 2.3456  lr 6.0e-04  12,345 tokens/s  mfu 41.2%"
    assert "0:01:40" <= eta < "0:05:00", "a thousand steps of a tenth of a second"
    assert word == "a word"
    assert last.startswith("step 1120/1120  eval loss nan  bits per byte 1.2000")
    assert out == ""


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch):
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    with open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Log(tmp_path, first_step=6, last_step=20) as log:
            log.write(6, {"train/loss": 2.34561, "train/learning_rate": 6e-4})
            log.advance(6)
            log.say("a word")
            log.write(10, {"eval/loss": 2.5})
            log.advance(20)
    shown = b""
    with suppress(OSError):  # which is how the end of a terminal reads
        while part := os.read(reader, 10**5):
            shown += part
    shown = shown.decode()
    os.close(reader)
    frames = [frame for frame in shown.replace("\r", "\n").splitlines() if frame.strip()]
    assert " 5/20" in frames[0]
    assert "a word" in frames
    assert " 20/20" in frames[-1]
    assert "loss 2.3456  eval loss 2.5000" in frames[-1]
    assert "lr" not in shown


# --- FLOPs ---------------------------------------------------------------------------------------


def test_flops_of_gpt2_small_by_hand():
    attention = 4 * 768 * 768
    feed_forward = 2 * 768 * 3072
    unembedding = 50304 * 768  # the vocabulary is padded to a multiple of 64
    parameters = 12 * (attention + feed_forward) + unembedding
    assert flops_per_token(GPT2["small"]) == 6 * parameters + 12 * 12 * 12 * 64 * 1024
    assert flops_per_token(GPT2["small"]) == 854_654_976


def test_flops_of_a_banded_layer_are_those_of_its_window():
    banded = GPT3["small"]
    dense = dataclasses.replace(banded, window=None, window_every=1)
    heads = 12 * 12 * 64
    assert flops_per_token(dense) - flops_per_token(banded) == heads * 6 * (2048 - 256)
    wide = dataclasses.replace(banded, window=4096)
    assert flops_per_token(wide) == flops_per_token(dense)


@pytest.mark.parametrize(
    "change",
    [{}, {"activation": "swiglu", "num_kv_heads": 1, "tied_embedding": False, "positions": "rope"}],
)
def test_flops_are_those_that_xla_counts(change):
    """A forward and a backward pass, layers unrolled since XLA counts a loop's body once."""
    config = GPTConfig(
        vocab_size=512, context_size=128, num_layers=2, width=768, num_heads=12,
        compute_dtype="float32", attention="xla", remat="none", **change,
    )  # fmt: skip
    tokens_BT = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    logits_BTV = jax.ShapeDtypeStruct((2, 128, 512), jnp.float32)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def both(params, tokens_BT, dlogits_BTV):
        run = lambda params: forward(params, tokens_BT, config, run=unroll_blocks)[0]  # noqa: E731
        logits_BTV, backward = jax.vjp(run, params)
        return logits_BTV, backward(dlogits_BTV)

    counted = jax.jit(both).lower(params, tokens_BT, logits_BTV).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(flops_per_token(config) * 2 * 128, rel=0.01)


def test_mfu_by_hand():
    assert mfu(1e5, GPT2["small"], 8, 1e12) == pytest.approx(1e5 * 854_654_976 / 8e12)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("Radeon", None),
    ],
)
def test_a_chip_is_found_by_its_first_words(kind, peak):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    assert peak_flops(device, "bfloat16") == peak
    assert peak_flops(device, "float32") is None


def test_every_chip_of_the_table_is_found():
    for kind, peak in PEAK_FLOPS.items():
        assert (
            peak_flops(types.SimpleNamespace(platform="tpu", device_kind=kind), "bfloat16") == peak
        )


def test_the_peak_of_all_cpu_devices_is_what_a_matrix_product_reaches():
    x = jnp.ones((1024, 1024))
    seconds = []
    for _ in range(10):
        before = time.perf_counter()
        jnp.dot(x, x).block_until_ready()
        seconds.append(time.perf_counter() - before)
    reached = 2 * 1024**3 / min(seconds)
    peak = peak_flops(jax.devices()[0], "float32") * jax.local_device_count()
    assert reached / 4 < peak < reached * 4, "virtual devices share the cores of one machine"
