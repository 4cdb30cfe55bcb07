"""A tokenizer's files: read and written as a whole, and kept by a run."""

import json
from pathlib import Path

from gptjax.config import ConfigError
from gptjax.tokenizer.protocol import Tokenizer

SAVED_NAME = "gptjax_tokenizer.json"


def save_tokenizer(folder: Path, tokenizer: Tokenizer, files: dict[str, bytes]) -> None:
    """Write what `load_tokenizer` reads, unless it is there.

    Raises:
      ConfigError: if another tokenizer was saved there.
    """
    path, identity = folder / SAVED_NAME, identity_of(tokenizer)
    if path.is_file() and (saved := read_json(path)) != identity:
        raise ConfigError(
            f"{path}: saved was a tokenizer of kind {saved.get('kind')!r} with fingerprint "
            f"{saved.get('fingerprint')}, but data.tokenizer is now of kind {tokenizer.kind!r} "
            f"with {tokenizer.fingerprint}; give that one again, or another run directory"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)
    write_whole(path, (json.dumps(identity, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.rename(path)


def read_whole(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; copy the tokenizer again") from None


def read_json(path: Path) -> dict:
    try:
        values = json.loads(read_whole(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); copy the tokenizer again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a JSON object; copy the tokenizer again")
    return values


def identity_of(tokenizer: Tokenizer) -> dict[str, str | int]:
    return {name: getattr(tokenizer, name) for name in ("kind", "vocab_size", "fingerprint")}
