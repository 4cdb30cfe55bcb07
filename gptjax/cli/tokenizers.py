"""The verbs of a tokenizer: `gptjax tokenizer train | inspect | encode`."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptjax.cli.runs import token_text
from gptjax.config import ConfigError, Count, DataConfig, Probability

if TYPE_CHECKING:
    from tqdm import tqdm

    from gptjax.sources import DataError

PIECE_BYTES = 1 << 22  # of a line that is learnt from at once


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How texts are read: what DataConfig has of it."""

    exclude: tuple[str, ...] = ()  # globs; files whose path matches one are left out
    # of files: auto goes by the ending, and takes those that have none of its own as text
    format: Literal["auto", "text", "json", "jsonl", "csv", "tsv", "parquet"] = "auto"
    text_field: str = "text"  # of a record that has several fields, such as a line of JSON
    tfds_split: str = "train"  # of tfds:NAME and Hugging Face data sets of several splits
    tfds_dir: str | None = None  # where TFDS keeps data sets; None: as TFDS does
    tfds_prepare: bool = False  # download and prepare a data set that is not there
    on_bad_record: Literal["error", "skip"] = "error"  # skip: they are counted


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a SentencePiece model on text, given as to --data.path."""

    more: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT ...]")] = ()
    out: str | None = None  # FILE.model, the new file
    vocab_size: Count = 8000  # pieces, with 256 of bytes, and unknown, end and padding
    kind: Literal["unigram", "bpe"] = "unigram"
    character_coverage: Probability = 0.9995  # of the text has pieces; the rest becomes bytes
    split_digits: bool = False  # each digit is a piece of its own
    max_bytes: Count = 100 << 20  # of text that is learnt from; of more, a sample spread over it
    data: TextConfig = field(default_factory=TextConfig)
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class InspectTokenizer:
    """Say what a tokenizer is, what it changes, and how many bytes of a text a token has."""

    text: tuple[str, ...] = ()  # as --data.path; one of each language perhaps
    data: TextConfig = field(default_factory=TextConfig)
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class EncodeText:
    """Print the ids of a text, each with what it stands for."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")] = ""
    debug: bool = False  # show the traceback of an error


def train_tokenizer(first: str, given: TrainTokenizer) -> None:
    """Train a tokenizer, and say how well it does."""
    from tqdm import tqdm

    from gptjax.tokenizer import train_sentencepiece

    if not (given.out or "").endswith(".model"):
        raise ConfigError(f"out = {given.out!r}: give the new file, as in --out text.model")
    with tqdm(desc="reading", unit="B", unit_scale=True) as bar:
        trained = train_sentencepiece(
            _text_of((first, *given.more), given.data, bar, then="training"),
            Path(given.out),
            vocab_size=given.vocab_size,
            kind=given.kind,
            character_coverage=given.character_coverage,
            split_digits=given.split_digits,
            max_bytes=given.max_bytes,
        )
    print(f"text       {trained.used_bytes:,} of {trained.num_bytes:,} bytes were learnt from")
    print(
        f"tokenizer  {given.out}: {trained.tokenizer.vocab_size:,} pieces, {given.kind}, "
        f"{trained.bytes_per_token:.3f} bytes per token of that text"
    )
    print(f"next       gptjax train FILE.py --data.tokenizer {given.out}")


def _text_of(
    paths: tuple[str, ...], how: TextConfig, bar: "tqdm", then: str = ""
) -> Iterator[bytes]:
    """The text of what paths name, in pieces that end where a line does; the bar says `then` at
    the end, and before that how many records were bad.
    """
    from gptjax.sources import find_sources

    bad: list[DataError] = []
    on_bad = bad.append if how.on_bad_record == "skip" else None
    sources = find_sources(DataConfig(path=paths, **vars(how)))
    for record in (record for source in sources for record in source.records(on_bad=on_bad)):
        left = b""
        for piece in record.pieces():
            bar.update(len(piece))
            lines, end, left = (left + piece).rpartition(b"\n")
            yield lines + end
            if len(left) >= PIECE_BYTES:
                yield left
                left = b""
        yield left
    if bad:
        bar.write(f"skipped    {len(bad):,} bad records; the first: {bad[0]}", file=sys.stderr)
    bar.set_description_str(then)


def inspect_tokenizer(name: str, given: InspectTokenizer) -> None:
    """Print what a tokenizer is, and what it makes of texts."""
    from tqdm import tqdm

    from gptjax.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(DataConfig(tokenizer=name))
    print(f"kind         {tokenizer.kind}")
    print(f"ids          {tokenizer.vocab_size:,}")
    begin = f", beginning {tokenizer.begin}" if tokenizer.begin != tokenizer.end else ""
    print(f"special      end of text {tokenizer.end}, padding {tokenizer.pad}{begin}")
    print(f"fingerprint  {tokenizer.fingerprint}")
    changes = tokenizer.normalises or ("nothing: every text, and every byte string, comes back",)
    print("changes      " + "\n             ".join(changes))
    for path in given.text:
        num_bytes = num_tokens = 0
        start = time.perf_counter()
        with tqdm(desc=path, unit="B", unit_scale=True, leave=False) as bar:
            for text in _text_of((path,), given.data, bar):
                num_bytes += len(text)
                num_tokens += len(tokenizer.encode(text))
        speed = num_bytes / (time.perf_counter() - start) / 1e6
        print(
            f"text         {path}: {num_bytes:,} bytes, {num_tokens:,} tokens, "
            f"{num_bytes / max(num_tokens, 1):.3f} bytes per token, {speed:.1f} MB/s"
        )


def encode_text(name: str, given: EncodeText) -> None:
    """Print the ids of a text."""
    from gptjax.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(DataConfig(tokenizer=name))
    for token in tokenizer.encode(os.fsencode(given.text)).tolist():
        print(f"{token:8}  {token_text(tokenizer, token)}")
