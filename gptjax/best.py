"""The best step of a run on a task, by the figures that were logged."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gptjax.config import Config
from gptjax.metrics import read_metrics


def best_by(config: Config) -> tuple[str, int]:
    """The figure that the best step is chosen by; 1 if a larger one is better, or else -1."""
    match config.task.kind:
        case "classify":
            return ("eval/micro_f1" if config.task.several else "eval/accuracy"), 1
        case "entities" | "questions":
            return "eval/f1", 1
    return "eval/loss", -1


class Best(NamedTuple):
    """The best step so far."""

    step: int | None = None  # None: none was evaluated
    figure: float = float("nan")
    since: int = 0  # evaluations after it

    def then(self, step: int, figure: float, sign: int) -> "Best":
        """The best after one more evaluation; of equals the first."""
        if math.isnan(self.figure) or sign * figure > sign * self.figure:
            return Best(step, figure)
        return self._replace(since=self.since + 1)


NO_BEST = Best()


def best_of(lines: Iterable[dict[str, float]], config: Config) -> Best:
    """The best of the steps that were logged."""
    name, sign = best_by(config)
    best = NO_BEST
    for line in lines:
        if name in line:
            best = best.then(line["step"], line[name], sign)
    return best


def best_step(run_dir: Path, config: Config) -> int | None:
    """The best step of a run on a task; None if there is none, or no task."""
    return None if config.task.kind is None else best_of(read_metrics(run_dir), config).step
