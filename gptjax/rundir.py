"""The run directory.

RUN/config.json  RUN/tokenizer/  RUN/checkpoints/STEP/  RUN/metrics.jsonl  RUN/tensorboard/
"""

import os
from pathlib import Path

import jax

from gptjax.config import Config, ConfigError, did_you_mean, from_json, to_json
from gptjax.tokenizer import Tokenizer, load_tokenizer


class CheckpointError(ValueError):
    """A run or checkpoint that is not there, cannot be read, or is not what is asked for."""


def save_run(run_dir: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Write what later commands need to know of a run, from process 0.

    Raises:
      OSError: if the folder cannot be written.
    """
    if jax.process_index() != 0:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(run_dir / "tokenizer")
    new = run_dir / "config.json.new"
    new.write_text(to_json(config))
    sync(new)
    new.rename(run_dir / "config.json")
    sync(run_dir)


def read_run(run_dir: Path) -> tuple[Config, Tokenizer]:
    """What `save_run` wrote.

    Raises:
      CheckpointError: if there is no such folder, it is not of a run, or its config or tokenizer
        cannot be read.
    """
    if not run_dir.is_dir():
        siblings = [path.name for path in _runs_in(run_dir.parent)]
        hint = did_you_mean(run_dir.name, siblings)
        raise CheckpointError(f"{run_dir}: there is no such folder.{hint}")
    path = run_dir / "config.json"
    if not path.is_file():
        runs = ", ".join(map(str, _runs_in(run_dir)))
        hint = f"give one of {runs}" if runs else "give the folder that `gptjax train` wrote to"
        raise CheckpointError(f"{run_dir} is not a run directory, it has no config.json: {hint}")
    try:
        return from_json(path.read_text()), load_tokenizer(run_dir / "tokenizer")
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{run_dir} cannot be read as a run: {error}") from error


def _runs_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/config.json"))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
