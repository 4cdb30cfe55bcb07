"""The verbs of a run's checkpoints: `gptjax inspect | prune`."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config import Count, Whole, refuse, to_json


@dataclass(frozen=True)
class Inspect:
    """List the steps, the config and the parameters of the run directory RUN, or RUN@STEP."""

    step: Whole | None = None  # of the checkpoint; None: the newest, or all with --verify
    verify: bool = False  # compare every byte and value of the checkpoints with what was saved
    # another RUN, or RUN@STEP: how far each parameter is from its own
    diff: str | None = None
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class Prune:
    """Remove what the run directory RUN has no use for: leftovers, and old steps if you say so;
    never the newest step, nor the best one of a task.
    """

    # steps that stay: the newest ones; None: all of them, or 1 with --keep-every
    keep_last: Count | None = None
    keep_every: Count | None = None  # and those whose number is a multiple of this
    dry_run: bool = False  # only say what would be removed
    debug: bool = False  # show the traceback of an error


def inspect(target: str, given: Inspect) -> None:
    """Print what a run directory holds, on one CPU whatever wrote it."""
    refuse([*_problems(given)])
    import jax

    jax.config.update("jax_platforms", "cpu")
    run_dir, step = _split(target)
    step = given.step if step is None else step
    if given.verify:
        _verify(run_dir, step)
    elif given.diff:
        _compare((run_dir, step), _split(given.diff))
    else:
        _list(run_dir, step)


def _problems(given: Inspect) -> Iterator[str]:
    if given.verify and given.diff:
        yield "--verify and --diff are two questions: give one of them"


def _split(target: str) -> tuple[Path, int | None]:
    """RUN or RUN@STEP."""
    match = re.fullmatch(r"(.+)@(\d+)", target)
    if match is None or Path(target).exists():
        return Path(target), None
    return Path(match[1]), int(match[2])


def _list(run_dir: Path, step: int | None) -> None:
    from gptjax.checkpoint import Checkpoints
    from gptjax.model import param_letters
    from gptjax.resume import read_fork
    from gptjax.rundir import read_run

    config, _ = read_run(run_dir)
    checkpoints = Checkpoints(run_dir)
    print(f"run {run_dir}")
    for origin in read_fork(run_dir):
        print(f"fork of {origin.run} at step {origin.step}")
    print(f"steps {', '.join(map(str, checkpoints.steps())) or 'none yet'}")
    print(f"config {to_json(config)}", end="")
    if step is None and not checkpoints.steps():
        return
    stored = checkpoints.stored(step)
    axes = " x ".join(f"{axis} {size}" for axis, size in stored.mesh.items() if size > 1)
    print(f"parameters of step {stored.step}, written on {axes or 'one device'}")
    print(_parameter_table(stored.params, param_letters(config.model)))


def _parameter_table(params: Any, letters: Any) -> str:
    """A line for each parameter: path, letters, shape, dtype, bytes; and their sums."""
    import jax

    rows, count, size = [("parameter", "letters", "shape", "dtype", "bytes")], 0, 0
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), dimensions in zip(leaves, jax.tree.leaves(letters), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape, nbytes = " x ".join(map(str, leaf.shape)), leaf.size * leaf.dtype.itemsize
        rows.append((name, dimensions, shape, str(leaf.dtype), f"{nbytes:,}"))
        count, size = count + leaf.size, size + nbytes
    rows.append((f"{count:,} parameters", "", "", "", f"{size:,}"))
    return _table(rows, numbers=1)


def _verify(run_dir: Path, step: int | None) -> None:
    """Print a line for each step: whole, or what is wrong with it.

    Raises:
      CheckpointError: if any is damaged.
    """
    from tqdm import tqdm

    from gptjax.checkpoint import Checkpoints
    from gptjax.rundir import CheckpointError

    checkpoints, found, rows = Checkpoints(run_dir), {}, [("step", "verdict", "bytes", "seconds")]
    steps = checkpoints.candidates() if step is None else [checkpoints.known(step)]
    for one in tqdm(steps, "verifying", unit="step", leave=False, disable=not sys.stderr.isatty()):
        began = time.monotonic()
        found[one] = checkpoints.verify(one)
        seconds = time.monotonic() - began
        verdict = "damaged" if found[one] else "whole"
        rows.append((str(one), verdict, f"{checkpoints.num_bytes(one):,}", f"{seconds:.1f}"))
    print(_table(rows, numbers=2))
    for one, lines in found.items():
        for line in lines:
            print(f"step {one}: {line}")
    damaged = [one for one, lines in found.items() if lines]
    if damaged:
        raise CheckpointError(
            f"{run_dir}: of {len(steps)} checkpoints {len(damaged)} are damaged -- step "
            f"{', '.join(map(str, damaged))} -- restore them from a copy; `gptjax train` goes on "
            "from the newest that is whole"
        )


def _compare(left: tuple[Path, int | None], right: tuple[Path, int | None]) -> None:
    """Print how far the parameters of two checkpoints are apart."""
    import numpy as np

    from gptjax.checkpoint import Checkpoints

    stepped = []
    for run_dir, step in (left, right):
        found, params = Checkpoints(run_dir).read_params(step)
        print(f"{'from' if stepped else 'of'} {run_dir}, step {found}")
        stepped.append(params)
    ours, theirs = stepped
    rows = [("parameter", "norm", "norm of the difference", "relative")]
    squares = np.zeros(2)
    for path in sorted(ours | theirs):
        a, b = ours.get(path), theirs.get(path)
        if a is None or b is None:
            rows.append((path, "only here" if b is None else "only there", "", ""))
        elif a.shape != b.shape or a.dtype != b.dtype:
            what = [f"{one.dtype}{list(one.shape)}" for one in (a, b)]
            rows.append((path, what[0], what[1], ""))
        else:
            wide = a.astype(np.float64), b.astype(np.float64)
            both = np.array([np.sum(wide[0] ** 2), np.sum((wide[0] - wide[1]) ** 2)])
            rows.append((path, *_norms(both, a.tobytes() == b.tobytes())))
            squares += both
    rows.append(("all that are comparable", *_norms(squares, False)))
    print(_table(rows, numbers=3))


def _norms(squares: Any, identical: bool) -> tuple[str, str, str]:
    """The norm of a parameter, of its difference, and their ratio."""
    norm, apart = (float(square) ** 0.5 for square in squares)
    if identical:
        return f"{norm:.6g}", "identical", ""
    return f"{norm:.6g}", f"{apart:.6g}", f"{apart / norm:.3g}" if norm else ""


def _table(rows: Sequence[tuple[str, ...]], numbers: int) -> str:
    """Cells in columns, of which so many at the right are of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = len(widths) - numbers
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:words], widths[:words], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[words:], widths[words:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    return "\n".join(lines)


def prune(run_dir: str, given: Prune) -> None:
    """Remove leftovers and old steps, and say how many bytes that frees."""
    from gptjax.best import best_step
    from gptjax.checkpoint import Checkpoints
    from gptjax.rundir import RunLock, read_run

    config, _ = read_run(Path(run_dir))  # refuses what is no run directory
    best = best_step(Path(run_dir), config)
    with nullcontext() if given.dry_run else RunLock(Path(run_dir)):
        removed = Checkpoints(Path(run_dir)).prune(
            keep=() if best is None else (best,),
            keep_last=given.keep_last,
            keep_every=given.keep_every,
            dry_run=given.dry_run,
        )
    for path, size in removed:
        print(f"{size:>15,}  {path}")
    total = sum(size for _, size in removed)
    what = "would be removed" if given.dry_run else "are removed"
    print(f"{total:>15,}  bytes {what}")
