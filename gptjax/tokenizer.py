"""Text to ids and back."""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from gptjax.config import ConfigError, DataConfig

SAVED_NAME = "gptjax_tokenizer.json"


class Tokenizer(Protocol):
    """A mapping between text and ids from 0 to vocab_size - 1. Special ids stand for no text."""

    kind: str  # as in DataConfig.tokenizer
    vocab_size: int
    end: int  # special: ends a text, and so begins the next
    pad: int  # special: fills a row
    fingerprint: str  # SHA-256 in hex; two tokenizers with the same one map every text alike
    bytes_per_token: np.ndarray  # [vocab_size] int32: bytes of text an id stands for; special: 0

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text, int32 [tokens]; never a special one."""

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The ids of one text that comes in pieces: joined, they are those of the joined text."""

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that ids stand for, with U+FFFD for what is not UTF-8."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` reads."""


class ByteTokenizer:
    """The bytes of UTF-8, and two special ids. Exact on every byte string.

    >>> ByteTokenizer().encode("hé")
    array([104, 195, 169], dtype=int32)
    """

    kind = "bytes"
    vocab_size = 258
    end = 256
    pad = 257
    fingerprint = hashlib.sha256(b"0 to 255 are bytes, 256 is end, 257 is pad").hexdigest()

    @property
    def bytes_per_token(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text.encode() if isinstance(text, str) else text
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_pieces(self, pieces: Iterable[bytes], begins: bool = True) -> Iterator[np.ndarray]:
        return map(self.encode, pieces)

    def cut(self, text: bytes, after: int) -> int | None:
        return after if 0 < after < len(text) else None

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for.

        Raises:
          ValueError: for an id that is not from 0 to 257.
        """
        ids = np.asarray(ids, np.int64)
        strange = ids[(ids < 0) | (ids >= self.vocab_size)]
        if strange.size:
            raise ValueError(f"id {strange[0]}: ids of bytes go from 0 to {self.vocab_size - 1}")
        return ids[ids < 256].astype(np.uint8).tobytes()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAVED_NAME).write_text(json.dumps(_identity(self), indent=2) + "\n")


class StreamDecoder:
    """Text from ids that come one at a time; a character comes out when its last byte is in.

    What all `push` and the last `flush` return, joined, is `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this id completes; often none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left when no id follows: U+FFFD for an unfinished character."""
        return self._decoder.decode(b"", final=True)


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that a config names."""
    match config.tokenizer:
        case "bytes":
            return ByteTokenizer()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved in a folder.

    Raises:
      ConfigError: if there is none, or the one that was saved maps text otherwise than this one.
    """
    path = folder / SAVED_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give the folder `tokenizer` of a run")
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); copy the saved tokenizer again") from None
    tokenizer = ByteTokenizer()
    if saved != _identity(tokenizer):
        raise ConfigError(
            f"{path}: saved was {saved}, but this version of gptjax has {_identity(tokenizer)}; "
            "use the version that saved it"
        )
    return tokenizer


def _identity(tokenizer: Tokenizer) -> dict[str, str | int]:
    return {name: getattr(tokenizer, name) for name in ("kind", "vocab_size", "fingerprint")}
