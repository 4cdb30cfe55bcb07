"""Text to ids and back: bytes, SentencePiece, and byte-pair encoding."""

import hashlib
import os
from pathlib import Path

from gptjax.config import ConfigError, DataConfig, did_you_mean
from gptjax.tokenizer.bpe import BPETokenizer, read_bpe, read_gpt2
from gptjax.tokenizer.byte import ByteTokenizer
from gptjax.tokenizer.files import SAVED_NAME, identity_of, read_json, read_whole
from gptjax.tokenizer.protocol import StreamDecoder, Tokenizer
from gptjax.tokenizer.sentencepiece import SentencePieceTokenizer, Trained, train_sentencepiece

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "Trained",
    "load_tokenizer",
    "make_tokenizer",
    "train_sentencepiece",
]


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that a config names.

    Raises:
      ConfigError: if it is not there, not whole, or of a kind that is not known.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    path = Path(config.tokenizer)
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        while not path.parent.is_dir():
            path = path.parent
        names = [*os.listdir(path.parent), *["bytes"] * (path.parent == Path())]
        raise ConfigError(
            f"data.tokenizer: {config.tokenizer}: there is no {path.name!r} in "
            f"{path.parent.absolute()}; give bytes, or a file or folder."
            f"{did_you_mean(path.name, names)}"
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(read_whole(path), str(path))
    if path.suffix == ".json":
        return BPETokenizer(read_bpe(path), str(path))
    raise ConfigError(
        f"data.tokenizer: {path}: give bytes, a SentencePiece .model, a tokenizer.json, or a "
        "folder with that, vocab.json and merges.txt, or encoder.json and vocab.bpe"
    )


def _from_folder(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, whose files have the names that they usually have."""
    if (folder / SAVED_NAME).is_file():
        return load_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        return BPETokenizer(read_bpe(path), str(path))
    halves = []
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        there = [name for name in names if (folder / name).is_file()]
        if len(there) == 2:
            return BPETokenizer(read_gpt2(*(folder / name for name in names)), str(folder))
        halves += [f"{there[0]} but no {name}" for name in names if there and name not in there]
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return SentencePieceTokenizer(read_whole(models[0]), str(models[0]))
    names = sorted(os.listdir(folder))
    holds = halves[0] if halves else ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ConfigError(
        f"data.tokenizer: {folder} holds {holds or 'nothing'}; give a folder with tokenizer.json, "
        "vocab.json and merges.txt, encoder.json and vocab.bpe, or one .model"
    )


_KEPT = {kind.kind: kind for kind in (SentencePieceTokenizer, BPETokenizer)}  # as a file


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved in a folder.

    Raises:
      ConfigError: if there is none, or the one that is there maps text otherwise than the one that
        was saved.
    """
    path = folder / SAVED_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give the folder `tokenizer` of a run")
    saved = read_json(path)
    if kind := _KEPT.get(str(saved.get("kind"))):
        path = folder / kind.file_name
        content = read_whole(path)
        now = hashlib.sha256(content).hexdigest()
        if saved.get("fingerprint") != now:
            raise ConfigError(
                f"{path}: damaged, or of another tokenizer: its fingerprint is {now}, but was "
                f"{saved.get('fingerprint')} when it was saved; copy it again"
            )
        tokenizer = kind(content, str(path))
    else:
        tokenizer = ByteTokenizer()
    if saved != identity_of(tokenizer):
        raise ConfigError(
            f"{path}: saved was {saved}, but this version of gptjax has {identity_of(tokenizer)}; "
            "use the version that saved it"
        )
    return tokenizer
