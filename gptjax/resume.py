"""What may change between the two commands of one run, and what may not."""

import dataclasses
from dataclasses import replace
from pathlib import Path

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config
from gptjax.rundir import CheckpointError, read_run
from gptjax.tokenizer import Tokenizer


def begun(run_dir: Path, tokenizer: Tokenizer) -> Config | None:
    """The config of the run that a folder holds; None if none was begun there.

    Raises:
      CheckpointError: if its tokenizer is another.
    """
    if not (run_dir / "config.json").exists():
        return None
    before, kept = read_run(run_dir)
    if (kept.kind, kept.fingerprint) != (tokenizer.kind, tokenizer.fingerprint):
        raise CheckpointError(
            f"{run_dir} holds a run whose tokenizer is of kind {kept.kind!r} with fingerprint "
            f"{kept.fingerprint}, but data.tokenizer is now of kind {tokenizer.kind!r} with "
            f"{tokenizer.fingerprint}. Give --data.tokenizer {run_dir / 'tokenizer'}, which the "
            "run kept, to go on with it, or another --run-dir to begin a new one"
        )
    return before


# Fields of how, where and how long to compute, not of what. Where the tokenizer lies is one.
CHOICES = {
    "model": {"attention", "remat", "loss_piece", "compute_dtype"},
    "data": {
        "tokenizer",
        "store_dir",
        "workers",
        "prefetch",
        "tfds_dir",
        "tfds_prepare",
        "max_epochs",
        "skip",
    },
}


def refuse_another_run(before: Config, config: Config, run_dir: Path) -> None:
    """Refuse to go on with a run whose numbers another config began."""
    if not before.data.path and not before.data.mixture:  # a converted one, which has seen no text
        before = replace(before, seed=config.seed, batch_size=config.batch_size, data=config.data)
    pairs = [
        ("seed", before.seed, config.seed),
        ("batch_size", before.batch_size, config.batch_size),
    ]
    for part, choices in CHOICES.items():
        old, new = getattr(before, part), getattr(config, part)
        names = {field.name for field in dataclasses.fields(old)} - choices - {"mixture"}
        pairs += [
            (f"{part}.{name}", getattr(old, name), getattr(new, name)) for name in sorted(names)
        ]
    mixtures = [
        tuple(replace(one, max_epochs=None) for one in given.data.mixture)
        for given in (before, config)
    ]
    pairs.append(("data.mixture", *mixtures))
    step = Checkpoints(run_dir).latest() or 0
    changes = [f"{name} was {old!r} and is now {new!r}" for name, old, new in pairs if old != new]
    skips = [_passed_over(given.data.skip, step) for given in (before, config)]
    if skips[0] != skips[1]:
        changes.append(
            f"data.skip up to step {step:,}, which is saved, was {skips[0]} and is now {skips[1]}"
        )
    if changes:
        raise CheckpointError(
            f"{run_dir} holds a run of another config: {'; '.join(changes)}. "
            "Give those values again to go on with it, or another --run-dir to begin a new one"
        )


def _passed_over(skip: tuple[tuple[int, int], ...], step: int) -> tuple[tuple[int, int], ...]:
    """The ranges that the first steps have met."""
    met, passed = [], 0
    for first, last in skip:
        if first - passed <= step:
            met.append((first, last))
        passed += last - first + 1
    return tuple(met)
