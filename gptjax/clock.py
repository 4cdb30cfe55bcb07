"""How fast the devices are, and when they have nothing to do."""

import math
import queue
import threading
import time
from contextlib import suppress
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.metrics import flops_per_token, peak_flops
from gptjax.model import resolve


class Clock:
    """Speed since the last reading, without evaluations, checkpoints, and the first step, which
    compiles.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.tokens = config.batch_size * config.model.context_size
        dtype = resolve(config.model, mesh.devices.flat[0].platform)[0].compute_dtype
        peak = peak_flops(mesh.devices.flat[0], dtype)
        # Tokens a second that the devices could reach.
        self.most = None if peak is None else peak * mesh.size / flops_per_token(config.model)
        self.step, self.time = None, 0.0

    def restart(self, step: int) -> None:
        self.step, self.time = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """The speed from the last reading to the end of `step`, which has just been fetched;
        nothing at first.
        """
        before, since = self.step, self.time
        self.restart(step)
        if before is None or step == before:
            return {}
        seconds = (self.time - since) / (step - before)
        speed = {"perf/step_seconds": seconds, "perf/tokens_per_second": self.tokens / seconds}
        return speed | ({"perf/mfu": self.tokens / seconds / self.most} if self.most else {})


class DeviceWatch:
    """When the devices were done with the last step that they were given: a thread of its own waits
    for it, so the main one never does.
    """

    def __init__(self):
        self._given: queue.SimpleQueue = queue.SimpleQueue()
        self._number, self._last = 0, (0, -math.inf)  # of steps given, and the last one done: when

    def given(self, metrics: dict[str, jax.Array]) -> None:
        self._number += 1
        self._given.put((self._number, metrics["train/loss"]))

    def done_at(self, now: float) -> float:
        """When they had nothing more to compute; `now` if they still have."""
        number, time_done = self._last
        return time_done if number == self._number else now

    def _wait(self) -> None:
        while one := self._given.get():
            number, loss = one
            with suppress(Exception):  # what has failed comes out where it is fetched
                loss.block_until_ready()
            self._last = (number, time.perf_counter())

    def __enter__(self) -> "DeviceWatch":
        threading.Thread(target=self._wait, daemon=True, name="device watch").start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._given.put(None)
