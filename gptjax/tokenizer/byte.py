"""Text to the bytes of UTF-8."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gptjax.tokenizer.files import save_tokenizer
from gptjax.tokenizer.protocol import refuse_strange


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
    normalises = ()

    def __reduce__(self) -> tuple:
        return type(self), ()

    @property
    def begin(self) -> int:
        return self.end

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
        return max(after, 1) if max(after, 1) < len(text) else None

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for.

        Raises:
          ValueError: for an id that is not from 0 to 257.
        """
        ids = np.asarray(ids, np.int64)
        refuse_strange(ids, self)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        save_tokenizer(folder, self, {})
