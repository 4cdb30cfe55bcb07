"""SentencePiece: its models, and training one."""

import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gptjax.config import ConfigError
from gptjax.tokenizer.files import write_whole
from gptjax.tokenizer.pieces import (
    ALL_BREAKS,
    ASCII_SPACES,
    SPACES,
    WORD_START,
    Encode,
    PieceTokenizer,
    by_two,
)

TRAINING_THREADS = 4  # always: in how many parts sums are made changes them in their last bits
MEASURED_SENTENCES = 10_000  # of those it was trained on, for a tokenizer's bytes per token
SENTENCE_BYTES = 4096  # the trainer of SentencePiece passes over sentences above 4,192


class SentencePieceTokenizer(PieceTokenizer):
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
        given = _read_model(content, where)
        processor, normalises = given.processor, _changes(given)
        # Fields that are appended to a model in protobuf take the place of those before.
        bare = _processor(content + b"\x1a\x02\x18\x00") if given.dummy_prefix else processor
        dummy = processor
        if given.one_space and not given.dummy_prefix:
            dummy = _processor(content + b"\x1a\x02\x18\x01")

        def rest(texts: list[bytes]) -> list[np.ndarray]:
            # A space at the beginning is left out, so one that is put there takes its place.
            lost = [text.startswith(b" ") for text in texts]
            return by_two(texts, lost, _encoder(dummy), _encoder(bare))

        controls, bytes_of = given.controls, given.byte_ids
        super().__init__(
            content,
            where,
            table=_meanings(given),
            special=controls,
            end=processor.eos_id() if processor.eos_id() in controls else None,
            pad=processor.pad_id() if processor.pad_id() in controls else None,
            normalises=normalises,
            byte_ids=np.array([bytes_of[byte] for byte in range(256 * given.complete)], np.int32),
            apart=WORD_START,
            cuts=_cuts(given, bool(normalises)),
            # Unigram adds up scores in 32 bits: where a unit begins can turn a tie.
            unit=1,
            first=_encoder(processor),
            rest=rest if given.one_space else _encoder(bare),
        )


class _Model(NamedTuple):
    """What a model says of its pieces, and of what is done to texts before and after them."""

    processor: Any
    pieces: list[str]
    unknown: str  # what stands for characters outside the vocabulary
    rule: str  # by which characters are changed
    by_rule: bool  # whether they are
    one_space: bool
    dummy_prefix: bool
    changed_after: bool  # spaces or characters, when ids become text

    @property
    def controls(self) -> dict[int, str]:
        """The pieces that are no text."""
        return {i: one for i, one in enumerate(self.pieces) if self.processor.is_control(i)}

    @property
    def byte_ids(self) -> dict[int, int]:
        """The ids of the bytes that have one."""
        return {
            int(piece[3:5], 16): i
            for i, piece in enumerate(self.pieces)
            if self.processor.is_byte(i)
        }

    @property
    def complete(self) -> bool:
        """Whether there are pieces for every text."""
        return len(self.byte_ids) == 256 and WORD_START in self.pieces


def _read_model(content: bytes, where: str) -> _Model:
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        raise ConfigError(
            f"{where}: a file of tiktoken, as Llama 3's, not of SentencePiece: give the "
            "tokenizer.json of the same tokenizer"
        )
    try:
        spec = dict(_fields(content))
        trainer, normalizer = dict(_fields(spec[2])), dict(_fields(spec[3]))
        processor = _processor(content)
        # By the numbers of sentencepiece_model.proto, in SentencePiece's repository.
        found = _Model(
            processor=processor,
            pieces=processor.id_to_piece(list(range(processor.get_piece_size()))),
            unknown=trainer.get(44, " ⁇ ".encode()).decode(),
            rule=normalizer.get(1, b"").decode(),
            by_rule=bool(normalizer.get(2)),
            one_space=bool(normalizer.get(4, 1)),
            dummy_prefix=bool(normalizer.get(3, 1)),
            changed_after=not normalizer.get(5, 1) or bool(spec.get(5)),
        )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{where}: not a whole SentencePiece model ({error!r}); copy or train it again"
        ) from None
    if trainer.get(24):
        raise ConfigError(
            f"{where}: puts spaces at the end of pieces (treat_whitespace_as_suffix), which is not "
            "supported; train a model without that"
        )
    return found


def _meanings(given: _Model) -> list[bytes]:
    """The bytes that each id stands for; none of control pieces."""
    controls, bytes_of = given.controls, {i: byte for byte, i in given.byte_ids.items()}

    def meaning(i: int, piece: str) -> bytes:
        if i in controls:
            return b""
        if i in bytes_of:
            return bytes([bytes_of[i]])
        if given.processor.is_unknown(i):
            return given.unknown.encode()
        return piece.replace(WORD_START, " ").encode()

    return [meaning(i, piece) for i, piece in enumerate(given.pieces)]


def _changes(given: _Model) -> list[str]:
    """In what a text may come back other than it was, in words."""
    found = []
    if given.by_rule:
        found.append(f"characters are changed by the rule {given.rule!r}")
    if given.one_space:
        found.append("spaces at both ends are left out, and several become one")
    if given.dummy_prefix:
        found.append("a space is put before the text")
    if not given.complete:
        found.append(f"characters outside the vocabulary become {given.unknown!r}")
    if given.changed_after:
        found.append("spaces or characters are changed when ids become text")
    if found:
        found.append("bytes that are not UTF-8 become U+FFFD")
    return found


def _cuts(given: _Model, normalised: bool) -> list[bytes]:
    """The patterns of places that a text may be cut at, as `PieceTokenizer` takes them."""
    # No piece goes on after the end of a word, or of a line.
    words = WORD_START in given.pieces and not any(
        WORD_START in piece.lstrip(WORD_START) or " " in piece[1:] for piece in given.pieces
    )
    lines = not normalised and not any("\n" in piece[:-1] for piece in given.pieces)
    rules = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
    known = not given.by_rule or given.rule in rules
    spaces = [ASCII_SPACES if normalised else SPACES] if words and known else []
    return spaces + [ALL_BREAKS] * lines


class Pieces(NamedTuple):
    """What a model of SentencePiece says."""

    pieces: list[str]
    scores: list[float]
    controls: list[int]
    unknown: int
    user_defined: bool  # some pieces are found in a text before all others
    is_bpe: bool
    byte_fallback: bool
    rule: str  # by which characters are changed
    one_space: bool
    dummy_prefix: bool


def read_pieces(content: bytes) -> Pieces:
    """What the content of a `.model` file says, which a tokenizer was made of."""
    spec = dict(_fields(content))
    trainer, normalizer = dict(_fields(spec[2])), dict(_fields(spec[3]))
    processor = _processor(content)
    ids = range(processor.get_piece_size())
    kinds = [dict(_fields(piece)).get(3, 1) for number, piece in _fields(content) if number == 1]
    # By the numbers of sentencepiece_model.proto, in SentencePiece's repository.
    return Pieces(
        pieces=[processor.id_to_piece(i) for i in ids],
        scores=[processor.get_score(i) for i in ids],
        controls=[i for i in ids if processor.is_control(i)],
        unknown=processor.unk_id(),
        user_defined=4 in kinds,
        is_bpe=trainer.get(3, 1) == 2,
        byte_fallback=bool(trainer.get(35, 0)),
        rule=normalizer.get(1, b"").decode() if normalizer.get(2) else "",
        one_space=bool(normalizer.get(4, 1)),
        dummy_prefix=bool(normalizer.get(3, 1)),
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
    write_whole(path, content)
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
