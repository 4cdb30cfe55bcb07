"""What a run leaves out of its data: documents that it sees no more, and batches passed over."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import Count, Whole, field_problems
from gptjax.data import Excluded, Item, Rows
from gptjax.sources import DataError

# --- documents -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """A document that a run sees no more: an entry of RUN/skipped.json."""

    from_step: int  # the last step that may have seen it
    taken_up: bool  # by a run that was started since, which sets from_step to where it started
    store: str  # name of the member
    document: int  # number in its store
    start: int  # its tokens there
    stop: int
    source: str
    position: int
    text: str  # how it begins


def read_exclusions(run_dir: Path) -> tuple[Exclusion, ...]:
    """What is recorded in a run directory; nothing if there is no record.

    Raises:
      DataError: if the record cannot be read.
    """
    return _read_record(run_dir / "skipped.json", Exclusion, "documents")


def write_exclusions(run_dir: Path, exclusions: Iterable[Exclusion]) -> None:
    """Record what a run sees no more, all of it at once."""
    _write_record(run_dir / "skipped.json", exclusions)


def exclude(rows: Rows, exclusions: Iterable[Exclusion]) -> Rows:
    """The same rows without these documents.

    Raises:
      DataError: if a document is not where it was when it was excluded, or no text is left.
    """
    names = {member.name: i for i, member in enumerate(rows.members)}
    found: list[list[tuple[int, int, int]]] = [[] for _ in rows.members]
    for one in exclusions:
        store = rows.members[names[one.store]].store if one.store in names else None
        if store is None or one.document >= store.num_documents:
            raise DataError(f"skipped.json: there is no document {one.document} in {one.store!r}")
        document = store.document(one.document)
        if (document.start, document.stop) != (one.start, one.stop):
            raise DataError(
                f"skipped.json: document {one.document} of {one.store} was tokens {one.start:,} to "
                f"{one.stop:,}, but is {document.start:,} to {document.stop:,}: the store is "
                "another; give the store that the run began with"
            )
        found[names[one.store]].append((one.start, one.stop, one.from_step))
    members = []
    for member, ranges in zip(rows.members, found, strict=True):
        columns = np.array(sorted(ranges), np.int64).reshape(-1, 3).T
        excluded = Excluded(*columns)
        if len(ranges) == member.store.num_documents:
            raise DataError(
                f"{member.name}: all of its {len(ranges):,} documents would be left out; leave out "
                "fewer, or pass over batches with --data.skip FIRST LAST"
            )
        members.append(replace(member, excluded=excluded))
    return replace(rows, members=tuple(members))


# --- batches passed over -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Batches that a run passed over when it went back: an entry of RUN/rollbacks.json."""

    first: Count  # batch, as in DataConfig.skip
    last: Count
    step: Count  # from which the run went back
    to_step: Whole  # that of the checkpoint


def read_rollbacks(run_dir: Path) -> tuple[Rollback, ...]:
    """What is recorded in a run directory; nothing if there is no record.

    Raises:
      DataError: if the record cannot be read.
    """
    return _read_record(run_dir / "rollbacks.json", Rollback, "rollbacks")


def write_rollbacks(run_dir: Path, rollbacks: Iterable[Rollback]) -> None:
    """Record what a run passed over, all of it at once."""
    _write_record(run_dir / "rollbacks.json", rollbacks)


def pass_over(rows: Rows, rollbacks: Iterable[Rollback]) -> Rows:
    """The same rows without the batches of these rollbacks. No step up to a rollback's `to_step`
    sees another batch than before.
    """
    return replace(rows, skip=join_ranges([*rows.skip, *((r.first, r.last) for r in rollbacks)]))


def join_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges that have no number in common, ascending, for ranges that may; ends included."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            first, before = joined.pop()
            last = max(last, before)
        joined.append((first, last))
    return tuple(joined)


# --- files ---------------------------------------------------------------------------------------


def _read_record(path: Path, kind: type[Item], noun: str) -> tuple[Item, ...]:
    if not path.exists():
        return ()
    try:
        entries = tuple(kind(**entry) for entry in json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a list of {noun} ({error}); restore a copy") from error
    for i, entry in enumerate(entries):
        for problem in field_problems(entry, path=f"entry {i}").values():
            raise DataError(f"{path}: {problem}")
    return entries


def _write_record(path: Path, entries: Iterable[Any]) -> None:
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        json.dump([asdict(one) for one in entries], file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
