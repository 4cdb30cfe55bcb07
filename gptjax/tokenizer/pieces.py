"""What SentencePiece and byte-pair encoding share: a text in units, and what ids stand for."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from gptjax.config import ConfigError
from gptjax.tokenizer.files import save_tokenizer
from gptjax.tokenizer.protocol import Tokenizer, refuse_strange

PIECE_BYTES = 1 << 18  # of a text in pieces, joined before they are encoded
CONTEXT = 4  # bytes before a place that decide whether a text is cut there
LONGEST_UNIT = 1 << 20  # bytes that are encoded at once; a text without a `cut` is cut there

WORD_START = "▁"  # U+2581, which stands for a space in pieces

Encode = Callable[[list[bytes]], list[np.ndarray]]  # texts, in UTF-8, to their ids

# A text may be cut at a lone space, one between two characters that are not white space, and at a
# lone line break. What may come before: printable ASCII, or the end of a longer character that is
# no white space. What may come after: the same, whole and in UTF-8. White space here includes
# U+2581, and U+180E, which Unicode once counted.
_WHITE = (
    rb"\xc2[\x85\xa0]",
    rb"\xe1\x9a\x80|\xe1\xa0\x8e|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]"
    rb"|\xe2\x81\x9f|\xe2\x96\x81|\xe3\x80\x80",
)  # of two bytes, and of three
_AFTER = (
    rb"(?=[!-~]|(?!%b|%b)(?:"
    % _WHITE
    + rb"[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    rb"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}"
    rb"|\xf4[\x80-\x8f][\x80-\xbf]{2}))"
)
# A place to cut at is where a match of these ends. Of the ends of sentences, and of lines, it is
# those after one byte in eight, which are enough: libraries are slower on short texts. (4 of every
# 8, for then no place is another's context: white space and what ends a sentence are not of them.)
_EIGHTH = b"[" + b"".join(b"\\x%02x" % byte for byte in range(4, 256, 8)) + b"]"
_SENTENCE = rb"[.!?](?<=%b[.!?])(?= )" % _EIGHTH
SPACES = _SENTENCE + rb"(?= %b)" % _AFTER
ASCII_SPACES = _SENTENCE + rb"(?= [!-~])"
LONE_BREAKS = rb"\n(?<=[!-~\x80-\xff]\n)(?<!(?:%b)\n)(?<!(?:%b)\n)" % _WHITE + _AFTER
# The Chinese full stop, exclamation and question mark end in the three bytes.
ALL_BREAKS = rb"\n(?<=%b[\n.!?\x81\x82\x9f]\n)(?=[\x00-\xff])" % _EIGHTH


class PieceTokenizer:
    """What tokenizers have in common whose ids stand for pieces that a library finds.

    A text is encoded in units, which end where a cut changes no id. If nothing is normalised, bytes
    that are not UTF-8, and the characters in `apart`, are encoded one byte at a time.
    """

    kind: str
    file_name: str  # in a run's folder `tokenizer`
    content: bytes  # of that file

    def __init__(
        self,
        content: bytes,
        where: str,
        *,
        table: list[bytes],
        special: dict[int, str],
        end: int | None,
        pad: int | None,
        begin: int | None = None,
        normalises: list[str],
        byte_ids: np.ndarray,
        apart: str,
        cuts: list[bytes],
        unit: int,
        first: Encode,
        rest: Encode,
    ):
        """
        Args:
          content: of the file that is kept.
          where: it comes from, for messages.
          table: what each id stands for.
          special: what is spelled as ids that no text may become.
          end, pad: None if there is none yet.
          begin: None if texts begin with end.
          normalises: what is changed, by what the file says.
          byte_ids: of each byte; needed if nothing is normalised.
          apart: characters that the library would change.
          cuts: patterns of a space or line break that a text is cut at, before or after it.
          unit: bytes from which on a unit ends at the next cut; 1: it ends at every cut.
          first, rest: the ids of texts that begin a text, and of texts that go on from a cut.
        """
        self.content, self._where = content, where
        self._first, self._rest = first, rest
        self._cuts = re.compile(b"|".join(cuts)) if cuts else None
        self._unit, self._byte_ids, self._apart = unit, byte_ids, apart
        self._apart_runs = re.compile(f"([\udc80-\udcff{apart}]+)")
        self._table = [*table]
        self.end = self._special(end)
        self.pad = self._special(pad)
        self.begin = self.end if begin is None else begin
        self.vocab_size = len(self._table)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.bytes_per_token = np.array([len(piece) for piece in self._table], np.int32)
        self.normalises = tuple(normalises)
        self.normalises += tuple(_changed(self)) if normalises else ()
        for spelling in special.values():
            if not set(special).isdisjoint(self.encode(spelling).tolist()):
                raise ConfigError(
                    f"{where}: the text {spelling!r} becomes the special id of that name; use a "
                    "tokenizer whose special tokens have longer names"
                )

    def _special(self, token: int | None) -> int:
        if token is None:
            self._table.append(b"")
            return len(self._table) - 1
        return token

    def __reduce__(self) -> tuple:
        return type(self), (self.content, self._where)

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([text.encode() if isinstance(text, str) else text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        units, begins, bounds = [], [], [0]
        for text in texts:
            found, _ = self._units(text, 0, last=True)
            units += found
            begins += [True, *[False] * (len(found) - 1)] if found else []
            bounds.append(len(units))
        ids = self._ids(units, begins)
        return [_join(ids[start:stop]) for start, stop in pairwise(bounds)]

    def encode_pieces(self, pieces: Iterable[bytes], begins: bool = True) -> Iterator[np.ndarray]:
        text, start = b"", 0
        for piece, last in _large(pieces):
            text = text[max(start - CONTEXT, 0) :] + piece
            start = min(start, CONTEXT)
            units, start = self._units(text, start, last)
            if units:
                yield _join(self._ids(units, [begins, *[False] * (len(units) - 1)]))
                begins = False

    def cut(self, text: bytes, after: int) -> int | None:
        after = max(after, 1)
        found = self._cuts.finditer(text, after - 1) if self._cuts else ()
        return next((one.end() for one in found if one.end() >= after), None)

    def _units(self, text: bytes, start: int, last: bool) -> tuple[list[bytes], int]:
        """The units from `start` on, and where they end: at the end if this is the text's last.

        Where LONGEST_UNIT bytes have no place to cut at, they are cut at a character.
        """
        if last and len(text) - start <= min(self._unit, LONGEST_UNIT):
            return [text[start:]], len(text)
        stops, place = [start], start

        def force(end: int) -> None:
            nonlocal place
            while end - place > LONGEST_UNIT:
                place = _character_start(text, place + LONGEST_UNIT)
                stops.append(place)

        for found in self._cuts.finditer(text, start) if self._cuts else ():
            force(found.end())
            place = found.end()
            if place - stops[-1] >= self._unit:
                stops.append(place)
        # What is less than 8 bytes from the end may yet turn out to be a place.
        force(len(text) if last else len(text) - 8)
        if last and stops[-1] < len(text):
            stops.append(len(text))
        return [text[start:stop] for start, stop in pairwise(stops)], stops[-1]

    def _ids(self, units: list[bytes], begins: list[bool]) -> list[np.ndarray]:
        """The ids of each unit."""
        if self.normalises:
            units = [unit.decode(errors="replace").encode() for unit in units]
            return by_two(units, begins, self._first, self._rest)
        if self._is_plain(b"\n".join(units)):  # halves of a character must not meet
            return self._rest(units)
        return by_two(units, [*map(self._is_plain, units)], self._rest, self._ids_apart)

    def _is_plain(self, text: bytes) -> bool:
        """Whether no byte of a text must be encoded by itself."""
        try:
            text.decode()
        except UnicodeDecodeError:
            return False
        return not (self._apart and self._apart.encode() in text)

    def _ids_apart(self, units: list[bytes]) -> list[np.ndarray]:
        """The ids of units, some of whose bytes are encoded by themselves."""
        ids = []
        for unit in units:
            runs = self._apart_runs.split(unit.decode(errors="surrogateescape"))
            runs = [run.encode(errors="surrogateescape") for run in runs]
            parts = self._rest(runs[::2])
            single = [self._byte_ids[np.frombuffer(run, np.uint8)] for run in runs[1::2]]
            pairs = zip(parts, [*single, self._byte_ids[:0]], strict=True)
            ids.append(_join([*chain.from_iterable(pairs)]))
        return ids

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for.

        Raises:
          ValueError: for an id that is not from 0 to vocab_size - 1.
        """
        ids = np.asarray(ids, np.int64)
        refuse_strange(ids, self)
        return b"".join(map(self._table.__getitem__, ids.tolist()))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` reads: a copy of the model, and its fingerprint.

        Raises:
          ConfigError: if another tokenizer was saved there.
        """
        save_tokenizer(folder, self, {self.file_name: self.content})


def _character_start(text: bytes, position: int) -> int:
    """The last byte up to `position` that can begin a character of UTF-8, which has at most 4."""
    earliest = position - 3
    while position > earliest and text[position] & 0xC0 == 0x80:
        position -= 1
    return position


def _large(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Pieces joined to large ones, each with whether it is the last."""
    waiting, size = [], 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= PIECE_BYTES:
            yield b"".join(waiting), False
            waiting, size = [], 0
    yield b"".join(waiting), True


def by_two(texts: list[bytes], choices: list[bool], one: Encode, other: Encode) -> list[np.ndarray]:
    """The ids of texts: by `one` where the choice is True, and else by `other`."""
    chosen = list(zip(texts, choices, strict=True))
    ones = iter(one([text for text, choice in chosen if choice]))
    others = iter(other([text for text, choice in chosen if not choice]))
    return [next(ones if choice else others) for choice in choices]


def _join(ids: list[np.ndarray]) -> np.ndarray:
    return ids[0] if len(ids) == 1 else np.concatenate([np.empty(0, np.int32), *ids])


def _changed(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts that do not come back, each with what comes back in their place."""
    tried = [
        " a",
        "a ",
        "a  b",
        "a\tb",
        "a\nb",
        "A",
        "e\u0301",
        "\ufb01",
        "\uff21",
        "中",
        "\0",
        "▁",
    ]
    for text in tried:
        if (back := tokenizer.decode(tokenizer.encode(text))) != text:
            yield f"tried: {text!a} comes back as {back!a}"
