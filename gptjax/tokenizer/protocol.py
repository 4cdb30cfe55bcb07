"""What a tokenizer is, and text from its ids as they come."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """A mapping between text and ids from 0 to vocab_size - 1. Special ids stand for no text."""

    kind: str  # bytes, sentencepiece or bpe
    vocab_size: int
    end: int  # special: ends a text, and so begins the next
    begin: int  # special: begins a text, where that has a token of its own, as Llama's; else end
    pad: int  # special: fills a row
    fingerprint: str  # SHA-256 in hex; two tokenizers with the same one map every text alike
    bytes_per_token: np.ndarray  # [vocab_size] int32: bytes of text an id stands for; special: 0
    normalises: tuple[str, ...]  # what does not come back as it was; empty: every byte string does

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text, int32 [tokens]; never a special one."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, as `encode` gives them; quicker than one at a time."""

    def encode_pieces(self, pieces: Iterable[bytes], begins: bool = True) -> Iterator[np.ndarray]:
        """The ids of one text that comes in pieces: joined, they are those of the joined text.

        Args:
          pieces: of any lengths; they may split characters.
          begins: False if the text goes on from a `cut`.
        """

    def cut(self, text: bytes, after: int) -> int | None:
        """The first place from `after` on that `encode` cuts at; None if there is none.

        encode(text) is encode(text[:place]) and then encode_pieces([text[place:]], begins=False).
        """

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for: those of each, joined."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that ids stand for, with U+FFFD for what is not UTF-8."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` reads."""


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


def refuse_strange(ids: np.ndarray, tokenizer: Tokenizer) -> None:
    strange = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if strange.size:
        last = tokenizer.vocab_size - 1
        raise ValueError(f"id {strange[0]}: ids of {tokenizer.kind} go from 0 to {last}")
