"""Prompts: templates, examples that come before, and what makes a choice the likeliest."""

import bisect
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gptjax.config import ConfigError, did_you_mean

BETWEEN = "\n\n"  # the examples of a prompt


def filled(template: str, columns: Mapping[str, str]) -> str:
    """A template with the columns that it names in braces; other braces are text.

    Raises:
      ConfigError: for a column that is not there.
    """

    def column(match: re.Match) -> str:
        if match[1] not in columns:
            raise ConfigError(
                f"task.template = {template!r}: there is no column {match[1]!r}; there are "
                f"{', '.join(map(repr, columns))}.{did_you_mean(match[1], columns)}"
            )
        return columns[match[1]]

    return re.sub(r"\{(\w+)\}", column, template)


def last_line(template: str) -> str:
    """The last line of a template if no column is in it, such as `Answer:`; else nothing.

    Likelihoods are compared with those of the same choices after this alone (Brown et al. 2020,
    section 2.4).
    """
    line = template.rpartition("\n")[2]
    return "" if re.search(r"\{\w+\}", line) else line


def shots_of(number: int, count: int, shots: int, seed: int) -> list[int]:
    """The training examples that come before an example: other ones for each, drawn without
    replacement; a function of the seed and the example's number alone.

    Args:
      number: of the example that is asked about.
      count: training examples that there are.
    """
    rng = np.random.default_rng([seed, number])
    return rng.choice(count, size=min(shots, count), replace=False).tolist()


def with_shots(
    shots: Sequence[tuple[str, str]], prompt: str, fits: Callable[[str], bool] = lambda text: True
) -> tuple[str, int]:
    """A prompt with examples before it, and how many there are: as many as fit, the last ones.
    Where some do not fit, more do not.

    Args:
      shots: prompts and targets.
      fits: whether a prompt is short enough. That without examples is not asked about.
    """

    def text(first: int) -> str:
        return BETWEEN.join([*(shown + said for shown, said in shots[first:]), prompt])

    first = bisect.bisect_left(range(len(shots)), True, key=lambda first: fits(text(first)))
    return text(first), len(shots) - first


def choice_scores(
    rule: str,
    nats: Sequence[float] | np.ndarray,
    *,
    num_tokens: Sequence[int] | np.ndarray,
    num_bytes: Sequence[int] | np.ndarray,
    bare_nats: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """What each choice is worth; the greatest is the model's.

    Args:
      rule: of `task.score`: sum, token, byte or unconditional.
      nats: the log-likelihood of each choice, the sum over its tokens.
      num_tokens: of each choice.
      num_bytes: of each choice, in UTF-8.
      bare_nats: log-likelihoods without the example; needed for unconditional.
    """
    nats = np.asarray(nats, np.float64)
    match rule:
        case "sum":
            return nats
        case "token":
            return nats / np.maximum(num_tokens, 1)
        case "byte":
            return nats / np.maximum(num_bytes, 1)
        case "unconditional":
            assert bare_nats is not None
            return nats - np.asarray(bare_nats, np.float64)
    raise AssertionError(rule)
