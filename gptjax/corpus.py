"""From sources of text to stores of tokens, which are built once and found again.

Three steps. A survey reads every source and says where its text can be divided. From all surveys
follows a layout: what goes into which shard. Then each shard is written by itself. So the bytes of
a store are the same for any number of workers, on any machines, after any kill.
"""

import hashlib
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from gptjax.config import ConfigError, DataConfig
from gptjax.files import Folder, building, is_url, join, read_file, read_json, remove, write_json
from gptjax.layout import Entry, Layout, Sources, Surveys, lay_out, no_text
from gptjax.message import from_text, to_text
from gptjax.pool import Progress, run_in_pool, run_on_beam
from gptjax.sources import DataError, Fingerprint, Source, find_sources
from gptjax.store import (
    FORMAT,
    ShardInfo,
    ShardWriter,
    Store,
    open_store,
    read_shard_info,
    remove_shards,
    write_manifest,
)
from gptjax.survey import Spool, Survey, is_spooled, survey_source, texts
from gptjax.tokenizer import Tokenizer

NUM_GROUPS = 256  # of sources that are surveyed in one go, at most
STORE_URLS = ("gs", "s3", "file")  # where TensorStore can write and others can read

Accept = Callable[[str, int], None]  # raises if a split of this name and number of tokens is no use

log = logging.getLogger(__name__)


def load_corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    accept: Accept = lambda split, num_tokens: None,
    progress: bool = False,
    beam: Sequence[str] | None = None,
) -> tuple[Store, Store | None]:
    """The stores for training and validation: built on first use in `store_dir`, and found again.

    Args:
      accept: called with the name of each split, train or valid, and its number of tokens; what it
        raises leaves no new store behind.
      progress: show on stderr how text becomes tokens.
      beam: options of an Apache Beam pipeline that is to do the work; None: processes here.
    Returns:
      training, validation; None for the second if `holdout` is 0 and there is no `valid_path`.
    Raises:
      DataError: for a path that is not there, text that cannot be used, or a store that is damaged
        or older than its text.
      ConfigError: for a FILE.py:function that is not there or fails to load.
    """
    sources: Sources = {"train": find_sources(config)}
    if config.valid_path:
        sources["valid"] = find_sources(config, "valid_path")
    names = ["train", "valid"] if config.valid_path or config.holdout else ["train"]
    folder = store_folder(config, tokenizer)
    if not is_built(folder, names):
        if beam is not None and is_url(folder):
            _refuse_functions(sources)
        work = _Work(config, beam, progress)
        _build(folder, names, sources, config, tokenizer, accept, work)
    stores = {name: open_store(join(folder, name), tokenizer) for name in names}
    for name, store in stores.items():
        accept(name, store.num_tokens)
    for name, listed in sources.items():
        _check_source(folder, stores[name].manifest.source, listed)
    return stores["train"], stores.get("valid")


def store_folder(config: DataConfig, tokenizer: Tokenizer) -> Folder:
    """Where the stores of a config lie: one folder for all that decides what they hold.

    Raises:
      ConfigError: for a URL that cannot hold stores.
    """
    if is_url(config.store_dir) and config.store_dir.partition("://")[0] not in STORE_URLS:
        raise ConfigError(
            f"data.store_dir = {config.store_dir!r}: stores are written there and read again by "
            "other processes; give a folder, or a URL that begins with "
            + ", ".join(f"{name}://" for name in STORE_URLS)
        )
    chosen = {
        name: getattr(config, name)
        for name in (
            "path exclude valid_path holdout format text_field tfds_split tfds_dir on_bad_record "
            "filter deduplicate"
        ).split()
    }
    if config.filter:
        code = Path(config.filter.partition(".py:")[0] + ".py")
        chosen["filter_code"] = code.is_file() and hashlib.sha256(code.read_bytes()).hexdigest()
    identity = json.dumps([chosen, tokenizer.fingerprint, FORMAT])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    label = re.sub(r"[^\w.-]+", "-", Path(config.path[0]).name)[-32:].strip("-.") or "text"
    return join(config.store_dir, f"{label}-{digest[:12]}")


def is_built(folder: Folder, names: Sequence[str]) -> bool:
    if not is_url(folder):
        return Path(folder).exists()  # it appears as a whole
    return all(read_file(join(folder, name), "manifest.json") for name in names)


def _check_source(folder: Folder, before: Sequence[Fingerprint], sources: Sequence[Source]) -> None:
    """Refuse a store whose text has changed since.

    Raises:
      DataError: naming the first source that differs.
    """
    old, new = [one.name for one in before], [source.name for source in sources]
    if old != new:
        gone, more = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        what = (
            f"{gone[0]} is gone" if gone else f"{more[0]} is new" if more else "the order differs"
        )
    else:
        changes = (source.same(one) for one, source in zip(before, sources, strict=True))
        what = next((change for change in changes if change), None)
    if what:
        raise DataError(
            f"{folder}: the text has changed since this store was built ({what}); "
            "delete the folder to build it anew, or give another data.store_dir"
        )


def _refuse_functions(sources: Sources) -> None:
    """What a function yields lies on this machine, where those of a pipeline cannot read it."""
    for listed in sources.values():
        for source in listed:
            if source.kind == "function":
                raise ConfigError(
                    f"{source.where}: a function cannot be read by the machines of a pipeline; "
                    "write its documents to files, or leave out --beam"
                )


# --- building ----------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Sources that are surveyed in one go."""

    listing: str  # train or valid: which list of sources
    first: int
    past: int

    @property
    def file(self) -> str:
        """Where it is written what there is in them."""
        return f"survey/{self.listing}-{self.first}.json"

    def spools(self, folder: Path) -> list[Path]:
        """Where each source is written, if it can be read but once."""
        return [folder / f"{self.listing}-{i}" for i in range(self.first, self.past)]


def _build(
    folder: Folder,
    names: Sequence[str],
    sources: Sources,
    config: DataConfig,
    tokenizer: Tokenizer,
    accept: Accept,
    work: "_Work",
) -> None:
    """Build a store below `folder` for each of `names`."""
    with building(folder) as place, _spool_folder(place) as spool:
        if place is None:  # another process has built it meanwhile
            return
        surveys = _survey(place, spool, sources, config, tokenizer, work)
        again = {name: _readable(listed, name, spool) for name, listed in sources.items()}
        layout = lay_out(surveys, again, names, config, tokenizer)
        infos = _write(place, layout, again, config, tokenizer, work)
        _warn(infos)
        try:
            for name in names:
                if all(info.blank for info in infos[name]):
                    raise DataError(no_text(name, layout.num_documents, config))
                accept(name, sum(info.tokens for info in infos[name]))
            for name, listed in surveys.items():
                for one, source in zip(listed, sources[name], strict=True):
                    if change := source.same(one.fingerprint):
                        raise DataError(
                            f"the text has changed while it was read ({change}); "
                            "run again when it is left alone"
                        )
        except Exception:
            remove(place)
            raise
        for name in names:
            listing = name if name in surveys else "train"
            write_manifest(
                join(place, name),
                tokenizer,
                infos[name],
                source=tuple(one.fingerprint for one in surveys[listing]),
                split=layout.split,
                dropped=layout.dropped[listing],
                bad_records=layout.bad[listing],
            )
        for left in ("survey", "spool"):
            remove(join(place, left))
    for name in names:
        documents = sum(info.documents for info in infos[name])
        tokens = sum(info.tokens for info in infos[name])
        work.say(f"{join(folder, name)}: {documents:,} documents, {tokens:,} tokens")


@contextmanager
def _spool_folder(place: Folder | None) -> Iterator[Path]:
    """Where to write what functions yield."""
    if place is not None and not is_url(place):
        yield Path(place, "spool")
        return
    with tempfile.TemporaryDirectory(prefix="gptjax-") as folder:
        yield Path(folder)


class _Work:
    """How many items are worked on, with a progress bar."""

    def __init__(self, config: DataConfig, beam: Sequence[str] | None, progress: bool):
        self._run = partial(run_on_beam, options=beam)
        if beam is None:
            self._run = partial(run_in_pool, workers=config.workers)
        self._quiet = not progress

    def do(
        self,
        function: Callable,
        items: Sequence[Any],
        what: str,
        label: Callable[[Any], str],
        total: int | None = None,
        done: int = 0,
    ) -> None:
        """Call function(item, progress) for every item.

        Args:
          what: is done, for the bar.
          label: what an error calls an item.
          total: bytes of text, `done` of which are done.
        """
        bar = tqdm(
            desc=what, total=total, initial=done, unit="B", unit_scale=True, disable=self._quiet
        )
        with bar:
            self._run(function, items, label=label, progress=bar.update, still=bar.set_postfix_str)

    def say(self, text: str) -> None:
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)


class _Late:
    """A tokenizer, which another process loads when it is first called for: that takes a while, and
    few sources need it.
    """

    def __init__(self, tokenizer: Tokenizer | str):
        """Give it as text to have it loaded."""
        self._tokenizer = tokenizer

    def __reduce__(self) -> tuple:
        return _Late, (to_text(self._tokenizer),)

    def __call__(self) -> Tokenizer:
        if isinstance(self._tokenizer, str):
            self._tokenizer = from_text(self._tokenizer)
        return self._tokenizer


def _survey(
    folder: Folder,
    spool: Path,
    sources: Sources,
    config: DataConfig,
    tokenizer: Tokenizer,
    work: _Work,
) -> Surveys:
    """What there is in every source; what a build before this one has found counts."""
    groups = []
    for name, listed in sources.items():
        step = -(-len(listed) // NUM_GROUPS)
        for first in range(0, len(listed), step):
            groups.append(_Group(name, first, min(first + step, len(listed))))

    def is_known(group: _Group) -> bool:
        before = read_json(folder, group.file)
        listed = sources[group.listing][group.first : group.past]
        if not before or before["sources"] != repr(listed):
            return False
        found = map(Survey.from_json, before["surveys"])
        return all(
            source.same(one.fingerprint) is None
            and (source.kind != "function" or is_spooled(path, one.spooled))
            for source, one, path in zip(listed, found, group.spools(spool), strict=True)
        )

    work.do(
        partial(
            survey_group,
            sources=sources,
            config=config,
            tokenizer=_Late(tokenizer),
            folder=folder,
            spool=spool,
        ),
        [group for group in groups if not is_known(group)],
        "reading text",
        lambda group: sources[group.listing][group.first].where,
    )
    surveys: Surveys = {name: [] for name in sources}
    for group in groups:
        found = read_json(folder, group.file)["surveys"]
        surveys[group.listing] += map(Survey.from_json, found)
    return surveys


def survey_group(
    group: _Group,
    progress: Progress,
    *,
    sources: Sources,
    config: DataConfig,
    tokenizer: _Late,
    folder: Folder,
    spool: Path,
) -> None:
    """Write what there is in some sources."""
    listed = sources[group.listing][group.first : group.past]
    surveys = [
        survey_source(source, number, config, tokenizer, path, progress)
        for number, (source, path) in enumerate(
            zip(listed, group.spools(spool), strict=True), group.first
        )
    ]
    write_json(folder, group.file, {"sources": repr(listed), "surveys": surveys})


def _readable(sources: Sequence[Source], name: str, spool: Path) -> list[Source | Spool]:
    """The sources, with what functions have yielded in their place."""
    paths = _Group(name, 0, len(sources)).spools(spool)
    return [
        Spool(source, str(path)) if source.kind == "function" else source
        for source, path in zip(sources, paths, strict=True)
    ]


def _write(
    folder: Folder,
    layout: Layout,
    sources: Sources,
    config: DataConfig,
    tokenizer: Tokenizer,
    work: _Work,
) -> dict[str, list[ShardInfo]]:
    """Write the shards that are not there yet; what all of them hold."""

    def is_there(entry: Entry) -> bool:
        found = (read_shard_info(join(folder, store), shard) for store, shard, _ in entry.outputs)
        return all(info and info.made_from == entry.made_from for info in found)

    with ThreadPoolExecutor(32) as pool:  # they may be far away
        there = list(pool.map(is_there, layout.entries))
    missing = [entry for entry, is_in in zip(layout.entries, there, strict=True) if not is_in]
    if any(there):
        work.say(f"{sum(there):,} of {len(there):,} shards were finished before")
    for store, count in layout.num_shards.items():
        remove_shards(join(folder, store), count)  # of another layout
    total = sum(entry.size for entry in layout.entries)
    work.do(
        partial(
            write_shards,
            sources=sources,
            tokenizer=tokenizer,
            folder=folder,
        ),
        missing,
        "writing tokens",
        lambda entry: " and ".join(f"shard {one.shard} of {one.store}" for one in entry.outputs),
        total,
        total - sum(entry.size for entry in missing),
    )
    with ThreadPoolExecutor(32) as pool:
        return {
            store: list(pool.map(partial(read_shard_info, join(folder, store)), range(count)))
            for store, count in layout.num_shards.items()
        }


def write_shards(
    entry: Entry,
    progress: Progress,
    *,
    sources: Sources,
    tokenizer: Tokenizer,
    folder: Folder,
) -> None:
    """Write the shards of an entry; a pure function of its arguments and what the sources hold."""
    writers = {
        output.store: ShardWriter(join(folder, output.store), output.shard, tokenizer, progress)
        for output in entry.outputs
    }
    number = entry.first - (not entry.spans[0].begins)
    for span in entry.spans:
        for text in texts(sources[entry.listing][span.source], span):
            writers[entry.store_of(number)].add(text)
            number += 1
    for output in entry.outputs:
        writers[output.store].close(entry.made_from, closes=output.closes)


def _warn(infos: dict[str, list[ShardInfo]]) -> None:
    """Say which documents are not UTF-8."""
    listed = [info for shards in infos.values() for info in shards]
    names = [name for info in listed for name in info.not_utf8]
    if names:
        unique = len({*names})
        count = sum(info.num_not_utf8 for info in listed) - (len(names) - unique)
        more = f" and {count - 1:,} more" if count > 1 else ""
        log.warning("%s%s: not UTF-8; the bytes are taken as they are", names[0], more)
