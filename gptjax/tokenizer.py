"""Text to ids and back: bytes, SentencePiece, and byte-pair encoding."""

import codecs
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from gptjax.config import ConfigError, DataConfig, did_you_mean

SAVED_NAME = "gptjax_tokenizer.json"
PIECE_BYTES = 1 << 18  # of a text in pieces, joined before they are encoded
CONTEXT = 4  # bytes before a place that decide whether a text is cut there
LONGEST_UNIT = 1 << 20  # bytes that are encoded at once; a text without a `cut` is cut there
TRAINING_THREADS = 4  # always: in how many parts sums are made changes them in their last bits
MEASURED_SENTENCES = 10_000  # of those it was trained on, for a tokenizer's bytes per token
SENTENCE_BYTES = 4096  # the trainer of SentencePiece passes over sentences above 4,192

END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<|end|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<PAD>")
WORD_START = "▁"  # U+2581, which stands for a space in pieces

Encode = Callable[[list[bytes]], list[np.ndarray]]  # texts, in UTF-8, to their ids


class Tokenizer(Protocol):
    """A mapping between text and ids from 0 to vocab_size - 1. Special ids stand for no text."""

    kind: str  # bytes, sentencepiece or bpe
    vocab_size: int
    end: int  # special: ends a text, and so begins the next
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
        _refuse_strange(ids, self)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        _save(folder, self, {})


# --- vocabularies of pieces --------------------------------------------------------------------

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


class _PieceTokenizer:
    """What tokenizers have in common whose ids stand for pieces that a library finds.

    A text is encoded in units, which end where a cut changes no id. If nothing is normalised, bytes
    that are not UTF-8, and the characters in `apart`, are encoded one byte at a time.
    """

    kind: str
    file_name: str  # in a run's folder `tokenizer`

    def __init__(
        self,
        content: bytes,
        where: str,
        *,
        table: list[bytes],
        special: dict[int, str],
        end: int | None,
        pad: int | None,
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
          normalises: what is changed, by what the file says.
          byte_ids: of each byte; needed if nothing is normalised.
          apart: characters that the library would change.
          cuts: patterns of a space or line break that a text is cut at, before or after it.
          unit: bytes from which on a unit ends at the next cut; 1: it ends at every cut.
          first, rest: the ids of texts that begin a text, and of texts that go on from a cut.
        """
        self._content, self._where = content, where
        self._first, self._rest = first, rest
        self._cuts = re.compile(b"|".join(cuts)) if cuts else None
        self._unit, self._byte_ids, self._apart = unit, byte_ids, apart
        self._apart_runs = re.compile(f"([\udc80-\udcff{apart}]+)")
        self._table = [*table]
        self.end = self._special(end)
        self.pad = self._special(pad)
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
        return type(self), (self._content, self._where)

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
            return _by_two(units, begins, self._first, self._rest)
        if self._is_plain(b"\n".join(units)):  # halves of a character must not meet
            return self._rest(units)
        return _by_two(units, [*map(self._is_plain, units)], self._rest, self._ids_apart)

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
        _refuse_strange(ids, self)
        return b"".join(map(self._table.__getitem__, ids.tolist()))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` reads: a copy of the model, and its fingerprint.

        Raises:
          ConfigError: if another tokenizer was saved there.
        """
        _save(folder, self, {self.file_name: self._content})


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


def _by_two(
    texts: list[bytes], choices: list[bool], one: Encode, other: Encode
) -> list[np.ndarray]:
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


# --- SentencePiece -----------------------------------------------------------------------------


class SentencePieceTokenizer(_PieceTokenizer):
    """The pieces of a SentencePiece model, without sampling; ids are the model's own.

    End and padding are the model's, or ids after its last. A model with byte fallback that
    normalises nothing, such as `train_sentencepiece` makes, is exact on every byte string. To be
    so, "▁" itself, which SentencePiece takes for a space, is encoded as its three bytes.
    """

    kind = "sentencepiece"
    file_name = "sentencepiece.model"

    def __init__(self, content: bytes, where: str):
        """
        Args:
          content: of a `.model` file.
          where: it comes from, for messages.
        Raises:
          ConfigError: if that is not a whole model, or one that cannot be used.
        """
        try:
            spec = dict(_fields(content))
            trainer, normalizer = dict(_fields(spec[2])), dict(_fields(spec[3]))
            processor = _processor(content)
            count = processor.get_piece_size()
            pieces = processor.id_to_piece(list(range(count)))
            # By the numbers of sentencepiece_model.proto, in SentencePiece's repository.
            unknown = trainer.get(44, " ⁇ ".encode()).decode()
            rule = normalizer.get(1, b"").decode()
            dummy_prefix, one_space, escaped = (normalizer.get(number, 1) for number in (3, 4, 5))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise ConfigError(
                f"{where}: not a whole SentencePiece model ({error!r}); copy or train it again"
            ) from None
        if trainer.get(24):
            raise ConfigError(
                f"{where}: puts spaces at the end of pieces (treat_whitespace_as_suffix), which is "
                "not supported; train a model without that"
            )
        controls = {i: piece for i, piece in enumerate(pieces) if processor.is_control(i)}
        byte_ids = {
            int(piece[3:5], 16): i for i, piece in enumerate(pieces) if processor.is_byte(i)
        }
        table = [
            b""
            if i in controls
            else bytes([int(piece[3:5], 16)])
            if processor.is_byte(i)
            else unknown.encode()
            if processor.is_unknown(i)
            else piece.replace(WORD_START, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        by_rule = bool(normalizer.get(2))
        complete = len(byte_ids) == 256 and WORD_START in pieces
        normalises = []
        if by_rule:
            normalises.append(f"characters are changed by the rule {rule!r}")
        if one_space:
            normalises.append("spaces at both ends are left out, and several become one")
        if dummy_prefix:
            normalises.append("a space is put before the text")
        if not complete:
            normalises.append(f"characters outside the vocabulary become {unknown!r}")
        if not escaped or spec.get(5):
            normalises.append("spaces or characters are changed when ids become text")
        if normalises:
            normalises.append("bytes that are not UTF-8 become U+FFFD")
        # No piece goes on after the end of a word, or of a line.
        words = WORD_START in pieces and not any(
            WORD_START in piece.lstrip(WORD_START) or " " in piece[1:] for piece in pieces
        )
        lines = not normalises and not any("\n" in piece[:-1] for piece in pieces)
        known = not by_rule or rule in ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
        spaces = [ASCII_SPACES if normalises else SPACES] if words and known else []
        # Fields that are appended to a model in protobuf take the place of those before.
        bare = _processor(content + b"\x1a\x02\x18\x00") if dummy_prefix else processor
        dummy = (
            _processor(content + b"\x1a\x02\x18\x01")
            if one_space and not dummy_prefix
            else processor
        )

        def rest(texts: list[bytes]) -> list[np.ndarray]:
            # A space at the beginning is left out, so one that is put there takes its place.
            lost = [text.startswith(b" ") for text in texts]
            return _by_two(texts, lost, _encoder(dummy), _encoder(bare))

        super().__init__(
            content,
            where,
            table=table,
            special=controls,
            end=processor.eos_id() if processor.eos_id() in controls else None,
            pad=processor.pad_id() if processor.pad_id() in controls else None,
            normalises=normalises,
            byte_ids=np.array([byte_ids[byte] for byte in range(256 * complete)], np.int32),
            apart=WORD_START,
            cuts=spaces + [ALL_BREAKS] * lines,
            # Unigram adds up scores in 32 bits: where a unit begins can turn a tie.
            unit=1,
            first=_encoder(processor),
            rest=rest if one_space else _encoder(bare),
        )


def _processor(content: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=content, num_threads=1)


def _encoder(processor: Any) -> Encode:
    return lambda texts: processor.encode(texts, return_type="numpy") if texts else []


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in protobuf: number and value, a number or bytes.

    Raises:
      ValueError: if it is not whole.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(message):
                raise ValueError("it ends too soon")
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        match key & 7:
            case 0:
                yield key >> 3, varint()
                continue
            case 1 | 5 as wire:
                size = 8 if wire == 1 else 4
            case 2:
                size = varint()
            case wire:
                raise ValueError(f"no wire type {wire}")
        if position + size > len(message):
            raise ValueError("it ends too soon")
        yield key >> 3, message[position : position + size]
        position += size


class Trained(NamedTuple):
    """A tokenizer, and how much of the text it was trained on."""

    tokenizer: SentencePieceTokenizer
    used_sentences: int  # parts of lines, of at most SENTENCE_BYTES
    num_sentences: int
    used_bytes: int
    num_bytes: int
    bytes_per_token: float  # of what was used, or a part of that


def train_sentencepiece(
    texts: Iterable[str | bytes],
    path: Path,
    *,
    vocab_size: int,
    kind: Literal["unigram", "bpe"] = "unigram",
    character_coverage: float = 0.9995,
    split_digits: bool = False,
    max_bytes: int = 100 << 20,
) -> Trained:
    """Train a SentencePiece model that is exact on every byte string, and write it.

    The same text gives the same model on every machine.

    Args:
      texts: read once, and one at a time.
      path: of the new file.
      vocab_size: pieces, with 256 of bytes, and unknown, end and padding.
      character_coverage: share of the text's characters that have pieces; others become bytes.
      split_digits: each digit is a piece of its own.
      max_bytes: of text that the trainer sees at once. Of more, a sample spread over all of it is
        taken: memory holds up to this, and the trainer takes some 20 times as much.
    Raises:
      ConfigError: if the file is there already, or the text is too little for so many pieces.
    """
    import io

    from sentencepiece import SentencePieceTrainer

    if path.exists():
        raise ConfigError(f"{path}: is there already; delete it, or give another file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first")
    sentences, num_sentences, num_bytes = _sample(texts, max_bytes)
    if not sentences:
        raise ConfigError("there is nothing but white space to train on; give files with text")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            split_digits=split_digits,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            required_chars=WORD_START,
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=2,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).replace("\n", " ").rpartition("] ")[2]
        raise ConfigError(
            f"vocab_size = {vocab_size:,}: SentencePiece cannot train that on "
            f"{sum(map(len, sentences)):,} characters ({reason}); give another size, or more text"
        ) from None
    content = model.getvalue()
    tokenizer = SentencePieceTokenizer(content, str(path))
    assert not tokenizer.normalises, tokenizer.normalises
    _write(path, content)
    used = [sentence.encode() for sentence in sentences]
    some = used[:: 1 + len(used) // MEASURED_SENTENCES]
    ratio = sum(map(len, some)) / sum(map(len, tokenizer.encode_batch(some)))
    used_bytes = sum(map(len, used))
    return Trained(tokenizer, len(used), num_sentences, used_bytes, num_bytes, ratio)


def _sample(texts: Iterable[str | bytes], max_bytes: int) -> tuple[list[str], int, int]:
    """Sentences of at most `max_bytes` together; the number of all sentences and their bytes.

    Which are taken depends on their numbers alone, and half as many each time there are too many.
    """
    taken: list[tuple[int, str]] = []
    number = size = num_bytes = 0
    below = 1 << 32
    for sentence in chain.from_iterable(map(_sentences, texts)):
        length = len(sentence.encode())
        num_bytes += length
        place = zlib.crc32(number.to_bytes(8))
        number += 1
        if place >= below:
            continue
        taken.append((place, sentence))
        size += length
        while size > max_bytes:
            below //= 2
            taken = [(place, sentence) for place, sentence in taken if place < below]
            size = sum(len(sentence.encode()) for _, sentence in taken)
    return [sentence for _, sentence in taken], number, num_bytes


def _sentences(text: str | bytes) -> Iterator[str]:
    """The lines of a text, in parts that the trainer takes.

    Without what is encoded as bytes: what is not UTF-8, "▁", line breaks, and characters that the
    trainer keeps for itself, for one of which it would pass over the whole sentence.
    """
    content = text.encode() if isinstance(text, str) else text
    for line in content.split(b"\n"):
        for start in range(0, len(line), SENTENCE_BYTES):
            part = line[start : start + SENTENCE_BYTES].decode(errors="ignore")
            yield from (run for run in re.split("[\0▁▅]", part) if run and not run.isspace())


# --- byte-pair encoding ------------------------------------------------------------------------

# The texts that these patterns split are split before a lone space, and after a lone line break,
# wherever that is cut. GPT-2's is that of ByteLevel itself; then those of cl100k and Llama 3, of
# Qwen 2.
_KNOWN_SPLITS = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + numbers
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r"\p{N}{1,3}", r"\p{N}")
)
# What these do with a space, and with the printable ASCII beside it, stays between spaces.
_KNOWN_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace")


class BPETokenizer(_PieceTokenizer):
    """Byte-pair encoding as the library `tokenizers` has it, with the ids of its files.

    Byte-level BPE without a normaliser, such as GPT-2's, is exact on every byte string; bytes that
    are not UTF-8 are encoded one at a time. Special tokens that a text spells are text; added
    tokens that are not special are found in it.
    """

    kind = "bpe"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, where: str):
        """
        Args:
          content: of a `tokenizer.json`, without what `_read_bpe` leaves out.
          where: it comes from, for messages.
        Raises:
          ConfigError: if that is not a whole tokenizer, or one that cannot be used.
        """
        try:
            spec = json.loads(content)
            library = _library(spec)
            model, vocab, added = spec["model"], spec["model"]["vocab"], spec["added_tokens"]
            normalizers = list(_steps(spec["normalizer"]))
            splitters = list(_steps(spec["pre_tokenizer"]))
            ids = [*vocab.values()]
            names = {token: name for name, token in vocab.items()}
            names |= {one["id"]: one["content"] for one in added}
        except Exception as error:  # the library raises nothing more special
            raise ConfigError(
                f"{where}: not a whole tokenizer ({error!r}); copy it again"
            ) from None
        if len({*ids}) != len(ids) or {*names} != {*range(len(names))}:
            raise ConfigError(
                f"{where}: the ids of {len(names):,} tokens are not those from 0 to "
                f"{len(names) - 1:,}, each once; copy it again"
            )
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise ConfigError(
                    f"{where}: {name} {model[name]!r} is not supported; use byte-level BPE, such "
                    "as GPT-2's, or BPE with '▁' for spaces"
                )
        kinds = [step["type"] for step in splitters]
        byte_level = "ByteLevel" in kinds
        if not byte_level and not any(
            "Metaspace" in step["type"] or step.get("content") == WORD_START
            for step in [*normalizers, *splitters]
        ):
            raise ConfigError(
                f"{where}: takes texts apart by {', '.join(kinds) or 'nothing'}, which is not "
                "supported; use byte-level BPE, such as GPT-2's, or BPE with '▁' for spaces"
            )
        alphabet = _byte_alphabet()
        if byte_level and not {*alphabet} <= {*vocab}:
            lost = sorted(byte for byte, name in enumerate(alphabet) if name not in vocab)
            raise ConfigError(
                f"{where}: has no token for {len(lost)} of the 256 bytes, such as {lost[0]:#04x}, "
                "which it would leave out; train it with all bytes in its alphabet"
            )
        special = {one["id"]: one["content"] for one in added if one["special"]}
        unknown = model.get("unk_token")
        texts = {one["id"]: one["content"].encode() for one in added if not one["special"]}
        bytes_of = {name: byte for byte, name in enumerate(alphabet)}

        def meaning(token: int, name: str) -> bytes:
            if token in special:
                return b""
            if token in texts:
                return texts[token]
            if byte_level and {*name} <= {*bytes_of}:
                return bytes(bytes_of[character] for character in name)
            if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", name):
                return bytes([int(name[3:5], 16)])
            return name.replace(WORD_START, " ").encode()

        normalises = []
        if others := [step["type"] for step in normalizers if not _starts_words(step)]:
            normalises.append(f"characters are changed by {', '.join(others)}")
        if any(map(_is_prefix, [*normalizers, *splitters])):
            normalises.append("a space is put before the text")
        if any(one["lstrip"] or one["rstrip"] for one in added if not one["special"]):
            normalises.append("white space beside some added tokens is left out")
        if unkept := [step["type"] for step in splitters if not _keeps_all(step)]:
            normalises.append(f"some characters may be left out by {', '.join(unkept)}")
        if not byte_level:
            normalises.append("'▁' becomes a space")
            if not model.get("byte_fallback"):
                becomes = f"become {unknown!r}" if unknown else "are lost"
                normalises.append(f"characters outside the vocabulary {becomes}")
        if normalises:
            normalises.append("bytes that are not UTF-8 become U+FFFD")

        bare = library
        if any(map(_is_prefix, [*normalizers, *splitters])):
            parts = ("normalizer", "pre_tokenizer")
            bare = _library(spec | {part: _without_prefix(spec[part]) for part in parts})
        super().__init__(
            content,
            where,
            table=[meaning(token, names[token]) for token in range(len(names))],
            special={token: name for token, name in special.items() if name != unknown},
            end=_first_named(END_NAMES, special),
            pad=_first_named(PAD_NAMES, special),
            normalises=normalises,
            byte_ids=np.array([vocab[name] for name in alphabet if byte_level], np.int32),
            apart="",
            cuts=_bpe_cuts(normalizers, splitters, vocab, added, bool(normalises)),
            unit=1 << 13,  # the library is slower on long texts, and on short ones
            first=lambda texts: _encode_fast(library, texts),
            rest=lambda texts: _encode_fast(bare, texts),
        )


def _library(spec: dict) -> Any:
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(json.dumps(spec))
    library.encode_special_tokens = True
    return library


def _encode_fast(library: Any, texts: list[bytes]) -> list[np.ndarray]:
    found = library.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
    return [np.array(one.ids, np.int32) for one in found]


def _steps(step: dict | None) -> Iterator[dict]:
    """The parts of a normaliser or pre-tokeniser that may be a sequence."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for one in step.get("normalizers") or step.get("pretokenizers") or []:
            yield from _steps(one)
    else:
        yield step


def _starts_words(step: dict) -> bool:
    """Whether all that a normaliser does is put "▁" for spaces, and before the text."""
    space = step.get("pattern") == {"String": " "} and step.get("content") == WORD_START
    return step["type"] == "Prepend" or (step["type"] == "Replace" and space)


def _is_prefix(step: dict) -> bool:
    """Whether a step puts something before the text."""
    return (
        step["type"] == "Prepend"
        or step.get("add_prefix_space", False)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
    )


def _keeps_all(step: dict) -> bool:
    """Whether a pre-tokeniser leaves no character out."""
    if step["type"] in ("Split", "Punctuation"):
        return step["behavior"] != "Removed"
    return step["type"] in ("ByteLevel", "Metaspace", "Digits")


def _without_prefix(step: dict | None) -> dict | None:
    """A normaliser or pre-tokeniser without what puts something before the text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        return step | {name: [one for one in map(_without_prefix, step[name]) if one]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if "add_prefix_space" in step else step


def _bpe_cuts(
    normalizers: list[dict],
    splitters: list[dict],
    vocab: Iterable[str],
    added: list[dict],
    normalised: bool,
) -> list[bytes]:
    """The patterns of places that a text may be cut at, as `_PieceTokenizer` takes them."""
    types = [step["type"] for step in splitters]
    found = [one for one in added if not one["special"]]
    if any(re.search(r"\n|(?<!^)\s", one["content"]) or one["rstrip"] for one in found):
        return []
    # What is put before the text is put before what follows an added token, too.
    if found and any(map(_is_prefix, [*normalizers, *splitters])):
        return []
    if any(step["type"] not in _KNOWN_NORMALIZERS for step in normalizers):
        return []
    if any(step["type"] == "Replace" and not _starts_words(step) for step in normalizers):
        return []
    if types in ([], ["Metaspace"]):
        inside = any(WORD_START in name.lstrip(WORD_START) for name in vocab)
        return [] if inside else [ASCII_SPACES]
    patterns = [step["pattern"].get("Regex") for step in splitters if step["type"] == "Split"]
    gpt2 = types == ["ByteLevel"] and splitters[0].get("use_regex", True)
    known = types == ["Split", "ByteLevel"] and (
        patterns[0] in _KNOWN_SPLITS
        and splitters[0]["behavior"] == "Isolated"
        and not splitters[0].get("invert")
        and not splitters[1].get("use_regex", True)
    )
    if not (gpt2 or known):
        return []
    return [ASCII_SPACES] if normalised else [SPACES, LONE_BREAKS]


def _first_named(names: tuple[str, ...], special: dict[int, str]) -> int | None:
    """The id of the special token that has the first of these names."""
    ids = {name: token for token, name in special.items()}
    return next((ids[name] for name in names if name in ids), None)


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE: its own in Latin-1 if that can be
    seen, and else the next from U+0100 on.
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 0x100 + hidden.index(byte)) for byte in range(256)]


def _read_bpe(path: Path) -> bytes:
    """The content of a `tokenizer.json`, less what has no part in text becoming ids.

    That is truncation, padding, the special tokens that a post-processor adds, and dropout.

    Raises:
      ConfigError: if it is not one, or not of BPE.
    """
    spec = _read_json(path)
    model = spec.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise ConfigError(
            f"{path}: is no tokenizer.json, it has no model with a vocabulary; for vocab.json and "
            "merges.txt, or encoder.json and vocab.bpe, give their folder"
        )
    if model.get("type", "BPE") != "BPE":
        raise ConfigError(
            f"{path}: a model of type {model['type']}; give one of type BPE, or the SentencePiece "
            ".model that it was made from"
        )
    fixed = {"truncation": None, "padding": None, "post_processor": None}
    parts = {"normalizer": None, "pre_tokenizer": None, "added_tokens": []}
    return _canonical(parts | spec | fixed | {"model": model | {"dropout": None}})


def _read_gpt2(vocab_path: Path, merges_path: Path) -> bytes:
    """The same of GPT-2's two files.

    Raises:
      ConfigError: if one is not whole, or they are not of one tokenizer.
    """
    vocab = _read_json(vocab_path)
    lines = _read(merges_path).decode(errors="replace").replace("\r\n", "\n").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        if len(pair := line.split(" ")) != 2:
            raise ConfigError(
                f"{merges_path}: line {number} is {line!r}, but a merge is two pieces with a space "
                "between them; copy the file again"
            )
        merges.append(pair)
    made = {"".join(pair) for pair in merges} | {*_byte_alphabet()}
    special = [name for name in vocab if name not in made]
    unmade = [name for name in special if not re.fullmatch("<.+>", name)]
    if unmade or not made <= {*vocab}:
        what = f"{vocab_path.name} has {len(unmade):,} pieces that no merge makes"
        if not unmade:
            lost = sorted(made - {*vocab})
            what = f"{vocab_path.name} lacks {len(lost):,} pieces, such as {lost[0]!r}"
        raise ConfigError(f"{merges_path}: {what}; copy both files again, from the same tokenizer")
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocab[name], "content": name, **flags, "special": True} for name in special
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return _canonical(spec)


def _canonical(spec: dict) -> bytes:
    return json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()


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


# --- files -------------------------------------------------------------------------------------


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
        return SentencePieceTokenizer(_read(path), str(path))
    if path.suffix == ".json":
        return BPETokenizer(_read_bpe(path), str(path))
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
        return BPETokenizer(_read_bpe(path), str(path))
    halves = []
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        there = [name for name in names if (folder / name).is_file()]
        if len(there) == 2:
            return BPETokenizer(_read_gpt2(*(folder / name for name in names)), str(folder))
        halves += [f"{there[0]} but no {name}" for name in names if there and name not in there]
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return SentencePieceTokenizer(_read(models[0]), str(models[0]))
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
    saved = _read_json(path)
    if kind := _KEPT.get(str(saved.get("kind"))):
        path = folder / kind.file_name
        content = _read(path)
        now = hashlib.sha256(content).hexdigest()
        if saved.get("fingerprint") != now:
            raise ConfigError(
                f"{path}: damaged, or of another tokenizer: its fingerprint is {now}, but was "
                f"{saved.get('fingerprint')} when it was saved; copy it again"
            )
        tokenizer = kind(content, str(path))
    else:
        tokenizer = ByteTokenizer()
    if saved != _identity(tokenizer):
        raise ConfigError(
            f"{path}: saved was {saved}, but this version of gptjax has {_identity(tokenizer)}; "
            "use the version that saved it"
        )
    return tokenizer


def _save(folder: Path, tokenizer: Tokenizer, files: dict[str, bytes]) -> None:
    """Write what `load_tokenizer` reads, unless it is there.

    Raises:
      ConfigError: if another tokenizer was saved there.
    """
    path, identity = folder / SAVED_NAME, _identity(tokenizer)
    if path.is_file() and (saved := _read_json(path)) != identity:
        raise ConfigError(
            f"{path}: saved was a tokenizer of kind {saved.get('kind')!r} with fingerprint "
            f"{saved.get('fingerprint')}, but data.tokenizer is now of kind {tokenizer.kind!r} "
            f"with {tokenizer.fingerprint}; give that one again, or another run directory"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _write(folder / name, content)
    _write(path, (json.dumps(identity, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.rename(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; copy the tokenizer again") from None


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); copy the tokenizer again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a JSON object; copy the tokenizer again")
    return values


def _identity(tokenizer: Tokenizer) -> dict[str, str | int]:
    return {name: getattr(tokenizer, name) for name in ("kind", "vocab_size", "fingerprint")}


def _refuse_strange(ids: np.ndarray, tokenizer: Tokenizer) -> None:
    strange = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if strange.size:
        last = tokenizer.vocab_size - 1
        raise ValueError(f"id {strange[0]}: ids of {tokenizer.kind} go from 0 to {last}")
