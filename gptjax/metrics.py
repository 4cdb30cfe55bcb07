"""The log of a run, the FLOPs of a token, and the share of a chip's peak that a run reaches."""

import errno
import json
import math
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gptjax.config import GPTConfig

# Dense bfloat16 FLOP/s of a JAX device, by the first words of its `device_kind`; of several that
# fit the longest counts. TPUs: the page of each at docs.cloud.google.com/tpu/docs. NVIDIA: the data
# sheet of each, halved where it counts sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,  # Jouppi et al. 2021, "Ten Lessons From Three Generations", table 1
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # the chip has two cores, each a device
    "Tesla V100": 125e12,  # float16; it has no bfloat16 units
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA H100": 989.4e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,  # SXM
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA B200": 2250e12,
}

WARN_SECONDS = 60  # between two warnings that lines could not be logged
MEASURE_SECONDS = 0.5  # that the ceiling of a CPU may take to measure, compilation aside


# --- FLOPs ---------------------------------------------------------------------------------------


def flops_per_token(config: GPTConfig) -> float:
    """Model FLOPs of a token in training: forward and backward, nothing counted that is recomputed.

    6 for each parameter that is multiplied with, so all matrices but the looked-up embeddings, and
    12 N H for each key that a query sees in each layer (Chowdhery et al. 2022, appendix B). As
    there, all T keys count, though a causal query sees half of them; in a banded layer its window.
    """
    size = config.sizes
    D, N, K, H, F, V, L, T = (size[letter] for letter in "DNKHFVLP")
    V = V if config.head == "lm" else size["C"]
    block = 2 * D * (N + K) * H + (3 if config.activation == "swiglu" else 2) * D * F
    keys = L / len(config.windows) * sum(min(window or T, T) for window in config.windows)
    return 6 * (L * block + V * D) + 12 * N * H * keys


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """The FLOP/s that a device could reach: by its data sheet, or as measured if it is a CPU.

    Args:
      device: one of this process.
      dtype: of the matrix products.
    Returns:
      None for a chip that is not in PEAK_FLOPS, and for float32 on an accelerator, which runs it in
      one of several ways.
    """
    if device.platform == "cpu":
        return _measured_flops(device, dtype) / jax.local_device_count("cpu")  # they share cores
    if dtype != "bfloat16":
        return None
    fits = [name for name in PEAK_FLOPS if re.match(rf"{name}\b", device.device_kind)]
    return PEAK_FLOPS[max(fits, key=len)] if fits else None


def _measured_flops(device: jax.Device, dtype: str) -> float:
    """The best FLOP/s of a few square matrix products."""
    best, began = 0.0, time.perf_counter()
    for size in (1024, 1536, 2048):
        matrix = jax.device_put(np.ones((size, size), jnp.dtype(dtype)), device)
        multiply = jax.jit(jnp.dot).lower(matrix, matrix).compile()
        for _ in range(3):
            before = time.perf_counter()
            multiply(matrix, matrix).block_until_ready()
            after = time.perf_counter()
            best = max(best, 2 * size**3 / (after - before))
            if after - began > MEASURE_SECONDS:
                return best
    return best


def mfu(tokens_per_second: float, config: GPTConfig, num_devices: int, peak: float) -> float:
    """Model FLOPs utilization, as a share of 1 (Chowdhery et al. 2022, appendix B)."""
    return tokens_per_second * flops_per_token(config) / (num_devices * peak)


# --- the log -------------------------------------------------------------------------------------

# What the console shows, in this order.
SHOWN = {
    "train/loss": "loss {:.4f}",
    "eval/loss": "eval loss {:.4f}",
    "eval/bits_per_byte": "bits per byte {:.4f}",
    "eval/accuracy": "accuracy {:.4f}",
    "eval/micro_f1": "micro F1 {:.4f}",
    "eval/f1": "F1 {:.4f}",
    "eval/bleu": "BLEU {:.2f}",
    "eval/chrf": "chrF {:.2f}",
    "train/learning_rate": "lr {:.1e}",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
    "perf/mfu": "mfu {:.1%}",
}
SHOWN_IN_BAR = ("train/loss", "eval/loss", "perf/tokens_per_second")


class Log:
    """Metrics by step, to `metrics.jsonl`, to TensorBoard, and to the console.

    A line of `metrics.jsonl` is a JSON object: `step`, then the names of the metrics. Floats have
    all their digits; one that is not finite, for which JSON has no number, is null.
    On a terminal there is a progress bar, and elsewhere a line for each `write`, both on stderr.

        with Log(run_dir, first_step=1, last_step=2000) as log:
            log.write(10, {"train/loss": 2.5})
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        last_step: int,
        tensorboard: bool = False,
        enabled: bool = True,
    ):
        """Open the log for the steps from `first_step`; what it has of them is forgotten.

        Args:
          run_dir: the run directory, which is there.
          first_step: the first that is still to be done.
          last_step: the last one of the run.
          tensorboard: whether to write event files, to `tensorboard/`.
          enabled: False does nothing at all, for processes that have nothing to say.
        """
        self._enabled, self._last = enabled, last_step
        self._run_dir, self._tensorboard = run_dir, tensorboard
        self._shown: dict[str, float] = {}
        self._file = self._events = self._bar = None
        self._warned = -math.inf
        self._open(first_step)
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=last_step, initial=first_step - 1, unit="step", dynamic_ncols=True
            )

    def _open(self, first_step: int) -> None:
        self._written = first_step - 1
        self._done, self._began = first_step - 1, None
        if not self._enabled:
            return
        self._path = self._run_dir / "metrics.jsonl"
        _forget(self._path, first_step)
        self._file = self._path.open("ab", buffering=0)
        if self._tensorboard:
            self._events = _TensorBoard(self._run_dir / "tensorboard", first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        for part in (self._bar, self._events, self._file):
            if part is not None:
                with suppress(OSError):
                    part.close()

    def rewind(self, first_step: int) -> None:
        """Forget the steps from this one on, which are still to be done again."""
        for part in (self._events, self._file):
            if part is not None:
                part.close()
        self._open(first_step)
        if self._bar is not None:
            self._bar.n = first_step - 1
            self._bar.refresh()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log all metrics of a step at once; steps ascend. Numbers may be scalar arrays."""
        if not self._enabled:
            return
        assert step > self._written, f"step {step} is written after step {self._written}"
        self._written = step
        values = {name: np.asarray(value).item() for name, value in jax.device_get(values).items()}
        try:
            self._append(_line(step, values))
            self._add_events(step, values)
        except OSError as error:
            self._warn(f"step {step} is not logged: {error.strerror or error}; training goes on")
        self._show(step, values)

    def amend(self, step: int, values: dict[str, float]) -> None:
        """Log more of the last step, which may be one that was not logged."""
        if not self._enabled:
            return
        logged = _logged(self._path)
        newest = logged[-1]["step"] if logged else 0
        assert newest <= step, f"step {step} is not the last, that is {newest}"
        before = logged.pop() if newest == step and logged else {}
        try:
            _replace(self._path, [*map(json.dumps, logged), _line(step, before | values)])
            self._file.close()
            self._file = self._path.open("ab", buffering=0)
            self._add_events(step, values)
        except OSError as error:
            self._warn(f"more of step {step} is not logged: {error.strerror or error}")
        self._show(step, values)

    def _append(self, line: str) -> None:
        """Add a whole line or nothing."""
        content, size = f"{line}\n".encode(), os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(content)
        except OSError:
            written = 0
            raise
        finally:
            if written < len(content):
                self._file.truncate(size)
        if written < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _add_events(self, step: int, values: dict[str, float]) -> None:
        if self._events:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._events.add(step, finite)

    def _warn(self, text: str) -> None:
        """Say it, unless something was said of the kind less than a minute ago."""
        if time.monotonic() - self._warned > WARN_SECONDS:
            self._warned = time.monotonic()
            self.say(f"warning    {text}")

    def advance(self, step: int) -> None:
        """Tell the console that a step is done; cheap enough for every one."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if self._began is None:  # after the first step, for that one has been compiled too
            self._began = (step, time.monotonic())
        self._done = step

    def say(self, text: str) -> None:
        """Print a line to stderr, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def _show(self, step: int, values: dict[str, float]) -> None:
        self._shown |= {name: values[name] for name in SHOWN_IN_BAR if name in values}
        if self._bar is not None:
            self._bar.set_postfix_str(_text(self._shown), refresh=False)
        else:
            parts = [f"step {step}/{self._last}", _text(values), self._eta()]
            self.say("  ".join(part for part in parts if part))

    def _eta(self) -> str:
        """The time to the end at the speed so far, or nothing if that is not known yet."""
        if self._began is None or self._began[0] == self._done:
            return ""
        step, then = self._began
        seconds = (time.monotonic() - then) / (self._done - step) * (self._last - self._done)
        minutes, seconds = divmod(round(seconds), 60)
        return f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, with NaN for null; those that are not whole are left out."""
    return [
        {name: math.nan if value is None else value for name, value in line.items()}
        for line in _logged(run_dir / "metrics.jsonl")
    ]


def _text(values: dict[str, float]) -> str:
    return "  ".join(text.format(values[name]) for name, text in SHOWN.items() if name in values)


def _logged(path: Path) -> list[dict[str, Any]]:
    """The lines that were written to their end. A machine that lost its power may have left others
    between them.
    """
    if not path.exists():
        return []
    logged = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        with suppress(ValueError):
            one = json.loads(line)
            logged += [one] if isinstance(one, dict) and isinstance(one.get("step"), int) else []
    return logged


def _line(step: int, values: dict[str, Any]) -> str:
    """JSON has no number for what is not finite: that is null."""
    finite = {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in values.items()
    }
    return json.dumps({"step": step} | finite, allow_nan=False)


def _forget(path: Path, first_step: int) -> None:
    """Remove the lines of this step and later ones, and what a kill left of one."""
    _replace(path, [json.dumps(one) for one in _logged(path) if one["step"] < first_step])


def _replace(path: Path, lines: list[str]) -> None:
    """Write all lines anew, at once."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


class _TensorBoard:
    """Scalars for TensorBoard, written by the thread that logs.

    The library's own writer has a thread and a queue: on a full disk the thread dies, and the queue
    then waits for ever.
    """

    def __init__(self, folder: Path, first_step: int):
        """Scalars of that step and later ones, which another command wrote, are to be forgotten."""
        from tensorboardX.event_file_writer import EventsWriter  # slow: may import PyTorch
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{first_step}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def add(self, step: int, values: dict[str, float]) -> None:
        scalars = [
            self._summary.Value(tag=name, simple_value=value) for name, value in values.items()
        ]
        self._write(step=step, summary=self._summary(value=scalars))

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **fields))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
