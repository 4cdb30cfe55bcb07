"""Train an experiment twice, and say whether the numbers are identical or where they part.

    python tools/compare_losses.py experiments/tiny.py --steps 20 --a HEAD~3
    python tools/compare_losses.py experiments/tiny.py --b="--model.remat full" --tolerance 1e-5
    python tools/compare_losses.py experiments/tiny.py --tolerance 5e-5 \\
        --b="XLA_FLAGS=--xla_force_host_platform_device_count=8 --mesh.fsdp 8"

A side, --a or --b, is written like a command: [NAME=VALUE ...] [COMMIT] [--field value ...]. These
are variables of its environment; the commit whose code trains, the working tree if there is none;
and overrides. Fields given outside of a side hold for both. Both sides read the same experiment
file, text and folder of stores; a commit has to have this tool.

The first --steps steps of the experiment are trained, and its schedule stays as it is. The sides
part at the first step whose loss, gradient norm or batch differs. There the parameters before the
step are compared leaf by leaf, and if they agree the gradients. Exit code 0: identical, or within
the tolerance; 1: they part; 2: it could not be tried.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.cli import parse
from gptjax.config import ConfigError, check, load_experiment, refuse
from gptjax.errors import BUG, explain

REPOSITORY = Path(__file__).resolve().parent.parent
COMPARED = ("data/batch_hash", "train/loss", "train/grad_norm")


# --- in the process of a side --------------------------------------------------------------------


def train_side(
    experiment: str, fields: list[str], num_steps: int, folder: str, leaves: bool
) -> None:
    """Train the first steps of an experiment on all devices.

    Args:
      fields: overrides, as on the command line.
      folder: gets metrics.jsonl; with `leaves` also parameters.npz, as they are after these steps,
        and gradients.npz, those of the step to come, by path.
    """
    config, problems = parse(load_experiment(experiment), "compare_losses", fields)
    refuse(problems)  # without waiting for JAX
    import jax

    from gptjax.data import batch_at
    from gptjax.model import resolve
    from gptjax.rows import load_rows
    from gptjax.sharding import local_rows, make_mesh, to_devices
    from gptjax.step import abstract_state, init_state, jit_train_step, loss_and_grads
    from gptjax.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(config.data)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    check(config, jax.device_count())
    mesh = make_mesh(config.mesh)
    resolved = replace(config, model=resolve(config.model, mesh.devices.flat[0].platform)[0])
    rows, _ = load_rows(config, tokenizer)
    which = local_rows(mesh, config.batch_size)

    def batch_of(step: int) -> Any:
        return to_devices(mesh, batch_at(step, rows, which=which), config.batch_size)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    init = jax.jit(lambda key: init_state(config, key), out_shardings=shardings)
    state, train_step = init(jax.random.key(config.seed)), jit_train_step(config, mesh)
    with Path(folder, "metrics.jsonl").open("w") as lines:
        for step in range(num_steps):
            state, metrics = train_step(state, batch_of(step))
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            print(json.dumps({"step": step + 1} | values), file=lines)
    if not leaves:
        return

    @jax.jit
    def gradients(params: Any, batch: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(config.seed), num_steps)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss_and_grads(params, batch, resolved, key)[1]

    for name, tree in {
        "parameters": state.params,
        "gradients": gradients(state.params, batch_of(num_steps)),
    }.items():
        paths = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
        keystr = jax.tree_util.keystr
        arrays = {keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
        np.savez(Path(folder, name), **arrays)


def side_main() -> int:
    """Train what the only argument says, the arguments of `train_side` in JSON; the exit code."""
    try:
        train_side(*json.loads(sys.argv[1]))
        return 0
    except Exception as error:
        code, message = explain(error)
        if code == BUG:
            raise
        print(message, file=sys.stderr)
        return code


# --- comparing -----------------------------------------------------------------------------------


class Side(NamedTuple):
    """One of the two runs."""

    name: str
    variables: dict[str, str]  # of the environment
    commit: str | None  # None: the working tree
    fields: list[str]  # overrides


def side_of(name: str, text: str, fields: list[str]) -> Side:
    """The side that `[NAME=VALUE ...] [COMMIT] [--field value ...]` is, quoted as in a shell.

    Args:
      fields: overrides of both sides, which come before its own.
    """
    words, variables = shlex.split(text), {}
    while words and (match := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0])):
        variables[match[1]] = match[2]
        words.pop(0)
    commit = words.pop(0) if words and not words[0].startswith("-") else None
    return Side(name, variables, commit, fields + words)


@contextmanager
def checked_out(commit: str | None) -> Iterator[Path]:
    """A folder with the code of a commit, which is gone afterwards.

    Raises:
      ConfigError: if git does not know it, or it has no such tool.
    """
    if commit is None:
        yield REPOSITORY
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "code")
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        words = [*git, "add", "--quiet", "--detach", str(folder), commit]
        added = subprocess.run(words, capture_output=True, text=True)
        if added.returncode:
            raise ConfigError(f"commit {commit}: {added.stderr.strip()}")
        try:
            if not (folder / "tools" / Path(__file__).name).exists():
                raise ConfigError(f"commit {commit} has no tools/{Path(__file__).name}")
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def run_side(
    side: Side, code: Path, experiment: str, num_steps: int, folder: Path, leaves: bool
) -> None:
    """Run `train_side` in a process of its own, with the code of a folder.

    Raises:
      ConfigError: if it fails.
    """
    paths = [str(code), str(code / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths)} | side.variables
    arguments = json.dumps([experiment, side.fields, num_steps, str(folder), leaves])
    program = "import compare_losses, sys; sys.exit(compare_losses.side_main())"
    words = [sys.executable, "-P", "-c", program, arguments]  # -P: no code of the current folder
    if subprocess.run(words, env=os.environ | variables, stdout=sys.stderr).returncode:
        raise ConfigError(f"{side.name} failed, as it says above")


def difference(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest magnitude; infinite if shapes differ."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return np.inf
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    with np.errstate(invalid="ignore"):
        relative = np.abs(a - b).max() / max(np.abs(a).max(), np.abs(b).max())
    return relative if np.isfinite(relative) else np.inf


def parting(a: list[dict], b: list[dict], tolerance: float) -> tuple[int, str] | None:
    """The first step whose metrics differ, and how; None if none does."""
    for ours, theirs in zip(a, b, strict=True):
        for name in COMPARED:
            apart = difference(ours[name], theirs[name])
            if apart > (0 if name == "data/batch_hash" else tolerance):
                how = f"{name} {ours[name]!r} against {theirs[name]!r}, {apart:.3g} relative"
                return ours["step"], how
    return None


def leaf_parting(a: dict, b: dict, tolerance: float) -> str | None:
    """The first leaf that differs, and how; None if none does.

    Args:
      a, b: arrays by path.
    """
    if a.keys() != b.keys():
        return f"leaves of one side only: {', '.join(sorted(a.keys() ^ b.keys()))}"
    apart = {path: difference(a[path], b[path]) for path in a}
    different = [path for path in a if apart[path] > tolerance]
    if not different:
        return None
    path, others = different[0], f"{len(different)} of {len(a)} leaves differ"
    if a[path].shape != b[path].shape:
        return f"{path} has shape {a[path].shape} against {b[path].shape}; {others}"
    largest = np.abs(a[path] - b[path]).max()
    return f"{path} differs first, by up to {largest:.3g}, {apart[path]:.3g} relative; {others}"


def compare(experiment: str, sides: list[Side], num_steps: int, tolerance: float) -> bool:
    """Train both sides and print what came of it; whether they agree."""
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        codes = [stack.enter_context(checked_out(side.commit)) for side in sides]

        def train(num_steps: int, leaves: bool) -> list[Path]:
            folders = [Path(tempfile.mkdtemp(dir=temporary)) for _ in sides]
            for side, code, folder in zip(sides, codes, folders, strict=True):
                run_side(side, code, experiment, num_steps, folder, leaves)
            return folders

        a, b = ((folder / "metrics.jsonl").read_text() for folder in train(num_steps, False))
        a, b = ([json.loads(line) for line in text.splitlines()] for text in (a, b))
        parted = parting(a, b, tolerance)
        if parted is None:
            word = f"within {tolerance:g}" if tolerance else "identical"
            first, last = a[0]["train/loss"], a[-1]["train/loss"]
            print(f"{word}: {num_steps} steps, train/loss from {first} to {last}")
            return True
        step, how = parted
        print(f"they part at step {step}: {how}")
        folders = train(step - 1, True)
        for name, when in {"parameters": "before", "gradients": "of"}.items():
            trees = [dict(np.load(folder / f"{name}.npz")) for folder in folders]
            how = leaf_parting(*trees, tolerance)
            print(f"{name} {when} step {step}: {how or 'they agree'}")
            if how:
                break
        return False


def main() -> int:
    """Compare what the arguments say; the exit code."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s EXPERIMENT [--field value ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=20, help="of each side (%(default)s)")
    for name in "ab":
        parser.add_argument(f"--{name}", default="", metavar="SIDE", help="a side")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative (%(default)s)")
    arguments = sys.argv[1:]
    experiment = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    given, fields = parser.parse_known_args(arguments)
    if experiment is None or given.steps < 1:
        parser.error("give an EXPERIMENT first, and --steps of at least 1")
    sides = [side_of("--a", given.a, fields), side_of("--b", given.b, fields)]
    try:
        return 0 if compare(experiment, sides, given.steps, given.tolerance) else 1
    except ConfigError as error:
        print(f"compare_losses: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
