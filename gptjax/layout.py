"""Which documents stay, which are held out, and what goes into which shard: a pure function of
what there is."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from gptjax.config import DataConfig
from gptjax.sources import DataError, Source
from gptjax.store import FORMAT, LISTED
from gptjax.survey import Span, Spool, Survey, find_cut
from gptjax.tokenizer import Tokenizer

SHARD_BYTES = 64 << 20  # of text in a shard of a large corpus
NUM_SHARDS = 64  # of a smaller one, so that every worker has some
LEAST_BYTES = 4 << 20  # of text in a shard, if there is more
PACKED_SHARDS = 16  # of a source that can only be read from its start, as each shard does
PACKED_BYTES = 1 << 30  # of text in a shard of such a source at most
MOST_BAD = Fraction("0.001")  # of records

# Of training and validation text; those of validation only if it has paths of its own.
Sources = dict[str, Sequence[Source | Spool]]
Surveys = dict[str, list[Survey]]
Spans = dict[str, list[Span]]


class Output(NamedTuple):
    """A shard of a store."""

    store: str  # train or valid
    shard: int  # its number
    closes: bool  # the last of its store


class Entry(NamedTuple):
    """What is made in one go: a shard of a store, or of both where documents are held out."""

    listing: str  # train or valid: which list of sources the spans number
    spans: tuple[Span, ...]
    first: int  # number of the first document, of those that stay
    held: tuple[int, int]  # numerator and denominator of the share of documents for validation
    outputs: tuple[Output, ...]
    made_from: str = ""  # a hash of all that decides what is made

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(span.size for span in self.spans)

    def store_of(self, number: int) -> str:
        """The store that a document goes to."""
        if not self.held[0]:
            return self.outputs[0].store
        return "valid" if num_held(number + 1, self.held) > num_held(number, self.held) else "train"


class Layout(NamedTuple):
    """How stores are made from sources."""

    split: str  # which documents go to which store, in words
    entries: list[Entry]
    num_documents: int  # that stay
    dropped: dict[str, dict[str, int]]  # of each list of sources: those that do not, by reason
    bad: dict[str, tuple[str, ...]]  # of each list of sources: the first messages

    @property
    def num_shards(self) -> dict[str, int]:
        """Of each store."""
        return {
            output.store: output.shard + 1 for entry in self.entries for output in entry.outputs
        }


def num_held(count: int, share: tuple[int, int]) -> int:
    """How many of the first `count` documents are held out."""
    return count * share[0] // share[1]


def lay_out(
    surveys: Surveys,
    sources: Sources,
    stores: Sequence[str],
    config: DataConfig,
    tokenizer: Tokenizer,
) -> Layout:
    """Decide what becomes of every document. Reads but a few bytes around a place to cut.

    Args:
      stores: that there are to be.
    Raises:
      DataError: if there are too many bad records, or no documents for a store.
    """
    _check_bad([one for listed in surveys.values() for one in listed])
    spans, num_duplicates = _without_duplicates(surveys)
    num_documents = sum(span.num_documents for listed in spans.values() for span in listed)
    size = sum(span.size for listed in spans.values() for span in listed)
    target = min(max(size // NUM_SHARDS, LEAST_BYTES), SHARD_BYTES)
    share = Fraction(str(config.holdout))  # as written: 0.29 of 100 documents are 29, not 28.999
    split, held = "nothing is held out", (0, 1)
    if config.valid_path:
        split = "as data.valid_path says"
    elif share and num_documents == 1:
        spans, place = _tail(spans["train"], sources["train"], share, tokenizer)
        split = f"the last {config.holdout} is held out, from byte {place} on"
    elif share:
        rule = "document i is held out if floor((i + 1) x {0}) > floor(i x {0})"
        split, held = rule.format(config.holdout), share.as_integer_ratio()
    entries = []
    for name, listed in spans.items():
        listing, first = name if name in sources else "train", 0
        for group in _grouped(listed, target, sources[listing]):
            entries.append(Entry(listing, group, first, held, (Output(name, 0, False),)))
            first += sum(span.num_documents for span in group)
    entries = list(_numbered(entries))
    for name in stores:
        if not any(output.store == name for entry in entries for output in entry.outputs):
            raise DataError(no_text(name, num_documents, config))
    return Layout(
        split,
        [_sealed(one, surveys, tokenizer) for one in entries],
        num_documents,
        {name: _dropped(listed, num_duplicates[name]) for name, listed in surveys.items()},
        {
            name: tuple(islice((text for one in listed for text in one.bad), LISTED))
            for name, listed in surveys.items()
        },
    )


def _dropped(surveys: list[Survey], num_duplicates: int) -> dict[str, int]:
    counts = {
        "bad record": sum(one.num_bad for one in surveys),
        "filter": sum(one.num_filtered for one in surveys),
        "duplicate": num_duplicates,
    }
    return {reason: count for reason, count in counts.items() if count}


def no_text(name: str, num_documents: int, config: DataConfig) -> str:
    """Why a split has no text, and what to do."""
    if name == "valid" and not config.valid_path and 0 < num_documents * config.holdout < 1:
        return (
            f"data.holdout = {config.holdout}: of {num_documents} documents that is none; give at "
            f"least {math.ceil(100 / num_documents) / 100}, or data.valid_path, or more documents"
        )
    field = "valid_path" if name == "valid" and config.valid_path else "path"
    what = {"train": "training", "valid": "validation"}[name]
    paths = " ".join(getattr(config, field))
    left = ", or nothing that data.filter keeps" if config.filter else ""
    return f"data.{field}: {paths}: nothing but white space for {what}{left}; give files with text"


def _check_bad(surveys: Iterable[Survey]) -> None:
    surveys = list(surveys)
    num_bad = sum(one.num_bad for one in surveys)
    total = num_bad + sum(span.count for one in surveys for span in one.spans if span.begins)
    if num_bad > 1 and num_bad > MOST_BAD * total:
        first = next(one.bad[0] for one in surveys if one.bad)
        raise DataError(
            f"data.on_bad_record = 'skip': {num_bad:,} of {total:,} records are bad, more than "
            f"{float(MOST_BAD):.1%}; mend them, or leave their files out. The first: {first}"
        )


# --- duplicates --------------------------------------------------------------------------------


def _without_duplicates(surveys: Surveys) -> tuple[Spans, dict[str, int]]:
    """All spans less the documents whose text has been before, and how many those are."""
    hashes = [text for listed in surveys.values() for one in listed for text in one.hashes]
    if not any(hashes):
        spans = {
            name: [span for one in listed for span in one.spans] for name, listed in surveys.items()
        }
        return spans, dict.fromkeys(surveys, 0)
    begun = (
        span for listed in surveys.values() for one in listed for span in one.spans if span.begins
    )
    out = np.concatenate([np.isin(np.arange(span.count), span.dropped) for span in begun])
    again = np.zeros(len(out), bool)
    again[~out] = repeated(
        np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(-1, 2)[~out]
    )
    spans, num_duplicates, index = {}, {}, 0
    for name, listed in surveys.items():
        spans[name], begin, stays = [], index, True
        for span in (span for one in listed for span in one.spans):
            if span.begins:
                gone = np.flatnonzero((again | out)[index : index + span.count])
                index += span.count
                span = span._replace(dropped=tuple(gone.tolist()))
                stays = span.stop is None or not span.dropped  # with all its parts
            if stays:
                spans[name].append(span)
        num_duplicates[name] = int(again[begin:index].sum())
    return spans, num_duplicates


def repeated(hashes: np.ndarray) -> np.ndarray:
    """Which rows of [n, 2] are the same as one before them."""
    order = np.lexsort(hashes.T)  # equal ones stay in order
    again = np.zeros(len(hashes), bool)
    again[order[1:]] = (hashes[order[1:]] == hashes[order[:-1]]).all(axis=1)
    return again


# --- the tail of a single document -------------------------------------------------------------


def _tail(
    spans: list[Span], sources: Sequence[Source | Spool], share: Fraction, tokenizer: Tokenizer
) -> tuple[Spans, int]:
    """The only document in two, and where it is cut."""
    parts = [span for span in spans if span.num_documents or not span.begins]
    whole, *rest = parts
    source = sources[whole.source]
    records = source.records(whole.cursor, lambda error: None, whole.position)
    record = next(
        one for i, one in enumerate(islice(records, whole.count)) if i not in whole.dropped
    )
    place = find_cut(record, math.floor(record.size * (1 - share)), tokenizer)
    bounds = [0, *(span.start for span in rest), record.size]

    def between(begin: int, end: int) -> list[Span]:
        inside = [begin, *(bound for bound in bounds if begin < bound < end), end]
        return [
            whole._replace(start=start, stop=stop, size=stop - start, begins=start == begin)
            for start, stop in pairwise(inside)
            if start < stop
        ]

    return {"train": between(0, place), "valid": between(place, record.size)}, place


# --- shards ------------------------------------------------------------------------------------


def _grouped(
    spans: list[Span], target: int, sources: Sequence[Source | Spool]
) -> Iterator[tuple[Span, ...]]:
    """The spans of each shard."""
    sizes: dict[int, int] = {}
    for span in spans:
        sizes[span.source] = sizes.get(span.source, 0) + span.size
    group: list[Span] = []
    size = 0
    for span in spans:
        limit = target
        if not sources[span.source].seekable:
            limit = max(limit, min(sizes[span.source] // PACKED_SHARDS, PACKED_BYTES))
        if group and size + span.size > limit:
            yield tuple(group)
            group, size = [], 0
        size += span.size
        if group and (joined := _joined(group[-1], span)):
            group[-1] = joined
        else:
            group.append(span)
    if group:
        yield tuple(group)


def _joined(one: Span, other: Span) -> Span | None:
    """The span of two that follow one another; None if they are not of a kind."""
    if one.source != other.source:
        return None
    size = one.size + other.size
    if one.stop is None and other.stop is None:
        dropped = (*one.dropped, *(one.count + index for index in other.dropped))
        return one._replace(count=one.count + other.count, size=size, dropped=dropped)
    if not other.begins:
        return one._replace(size=size, stop=other.stop)
    return None


def _numbered(entries: list[Entry]) -> Iterator[Entry]:
    """The entries that hold text, each with all of its outputs."""
    made: dict[str, int] = {}
    numbered = []
    for entry in entries:
        count = sum(span.num_documents for span in entry.spans)
        first = entry.first - (not entry.spans[0].begins)
        count += entry.first - first
        stores = [entry.outputs[0].store] if count else []
        if entry.held[0]:
            num_valid = num_held(first + count, entry.held) - num_held(first, entry.held)
            stores = ["train"] * (count > num_valid) + ["valid"] * (num_valid > 0)
        outputs = []
        for store in stores:
            outputs.append(Output(store, made.get(store, 0), False))
            made[store] = made.get(store, 0) + 1
        if outputs:
            numbered.append(entry._replace(outputs=tuple(outputs)))
    for entry in numbered:
        closing = (
            output._replace(closes=output.shard == made[output.store] - 1)
            for output in entry.outputs
        )
        yield entry._replace(outputs=tuple(closing))


def _sealed(entry: Entry, surveys: Surveys, tokenizer: Tokenizer) -> Entry:
    """The entry with its hash."""
    listed = surveys[entry.listing]
    content = [
        [*listed[span.source].fingerprint[:3], listed[span.source].spooled] for span in entry.spans
    ]
    identity = json.dumps([entry, content, tokenizer.fingerprint, FORMAT])
    return entry._replace(made_from=hashlib.sha256(identity.encode()).hexdigest())
