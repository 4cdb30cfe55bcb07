"""Measure how fast text becomes tokens on disk, and how fast these are read.

    python tools/bench_data.py --text novels/ --tokenizer gpt2/
    python tools/bench_data.py --text input.txt --only reading opening

Prints one JSON line, with one entry for each part; --only chooses among them.

reading: windows of context-size + 1 tokens a second, at random places of a store of many shards, by
one process: `read` asks the store alone; `batches` makes whole batches of it, `mixture` of ten
stores that together have as many shards. The shards are links to a few real ones, so the operating
system has their files in memory, as after a first epoch; `first_read` is of a window of each shard,
which opens them. ratio: mixture to batches of the same round.

tokenising: bytes of text a second: of `store`, from files to a finished store, with all that it
takes: starting the workers, reading the text twice, checksums, writing. Of `library`, the
tokenizer's alone, on as many cores, which is given the documents in memory, and whose ids go
nowhere; of `library_cut` too, but its texts are cut as suits it best. ratio: its seconds to those
of the store in the same round. For bytes, which need no library, the store alone.

opening: seconds to open a store of 100,000,000,000 tokens and to read windows of its first shard.

memory: the peak of resident bytes of a process that tokenises a large text, made of the first given
one over and over, without workers; and the same of 1 MiB.

What is compared takes turns, so a machine that drifts slows both alike. Rates are medians.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench import commit, hardware, positive

from gptjax.config import ConfigError, DataConfig
from gptjax.corpus import load_corpus
from gptjax.data import Member, Rows, batch_at
from gptjax.sources import DataError, find_sources
from gptjax.store import ShardInfo, ShardWriter, Store, Text, open_store, write_manifest
from gptjax.tokenizer import ByteTokenizer, Tokenizer, make_tokenizer

REAL_SHARDS = 8  # that the others of a store are links to
NUM_STORES = 10  # of the mixture
SPARSE = (6_000, 17_000_000)  # shards and tokens of each: more than 100,000,000,000
PIECE_BYTES = 1 << 13  # of text, for the library: it is slower on shorter ones and on longer ones
SMALL_BYTES = 1 << 20  # of the text that the memory for a large one is compared with

# What a process of its own does to have its peak measured. What Linux counts for getrusage begins
# with the parent's memory.
TOKENISE = """
import resource, sys
from pathlib import Path
from gptjax.config import DataConfig
from gptjax.corpus import load_corpus
from gptjax.tokenizer import make_tokenizer
path, stores, tokenizer = sys.argv[1:]
config = DataConfig(path=(path,), store_dir=stores, tokenizer=tokenizer, workers=1, format="text")
load_corpus(config, make_tokenizer(config))
status = Path("/proc/self/status")
if status.exists():
    print(int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def seconds_of(function: Callable[[], Any]) -> float:
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


# --- reading -------------------------------------------------------------------------------------


def linked_store(folder: Path, num_shards: int, shard_tokens: int) -> Store:
    """A store of random bytes, of whose shards all but a few are links."""
    tokenizer, rng = ByteTokenizer(), np.random.default_rng(0)
    size, infos = shard_tokens - 1, []
    for number in range(min(REAL_SHARDS, num_shards)):
        content = rng.bytes(size)
        writer = ShardWriter(folder, number, tokenizer)
        writer.add(Text("random", 0, 0, size, lambda content=content: iter([content])))
        infos.append(writer.close(closes=False))
    for number in range(REAL_SHARDS, num_shards):
        real = number % REAL_SHARDS
        os.symlink(f"{real:05}", folder / "shards" / f"{number:05}")
        infos.append(infos[real])
    write_manifest(folder, tokenizer, infos, (), "links")
    return open_store(folder, tokenizer)


def read(store: Store, count: int, batch_size: int, length: int, seed: int) -> None:
    """Windows at random places, so many times."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        store.read(rng.integers(0, store.num_tokens - length, batch_size), length, pad=0)


def make_batches(rows: Rows, count: int, number: int) -> None:
    """The batches of a round."""
    for step in range(number * count, (number + 1) * count):
        batch_at(step, rows, which=slice(0, rows.batch_size))


def measure_reading(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    tokenizer, length = ByteTokenizer(), given.context_size + 1
    each = max(1, given.shards // NUM_STORES)
    one = linked_store(folder / "one", given.shards, given.shard_tokens)
    ten = [linked_store(folder / str(i), each, given.shard_tokens) for i in range(NUM_STORES)]
    starts, found = np.arange(given.shards) * given.shard_tokens, {}
    first_read = given.shards / seconds_of(lambda: one.read(starts, length, tokenizer.pad))
    for store in ten:
        store.read(starts[:each], length, tokenizer.pad)
    for batch_size in given.batch_sizes:
        count = max(1, given.windows // batch_size)

        def rows_of(*stores: Store, batch_size: int = batch_size) -> Rows:
            members = tuple(Member(store=store, name=str(i)) for i, store in enumerate(stores))
            # Another seed for each size, or the rows would be those that were just read.
            order = {"context_size": given.context_size, "batch_size": batch_size}
            order |= {"seed": batch_size}
            ids = {"pad": tokenizer.pad, "end": tokenizer.end}
            return Rows(members=members, shuffle=True, **order, **ids)

        alone, mixed = rows_of(one), rows_of(*ten)
        programs = {
            "read": partial(read, one, count, batch_size, length),
            "batches": partial(make_batches, alone, count),
            "mixture": partial(make_batches, mixed, count),
        }
        rounds = []
        for i in range(given.rounds + 1):
            took = {name: seconds_of(partial(run, i)) for name, run in programs.items()}
            rounds.append({name: count * batch_size / value for name, value in took.items()})
        rounds = rounds[1:]
        facts = {name: statistics.median(rates[name] for rates in rounds) for name in programs}
        facts["ratio"] = statistics.median(rates["mixture"] / rates["batches"] for rates in rounds)
        found[str(batch_size)] = facts
    return {
        "shards": given.shards,
        "tokens": one.num_tokens,
        "first_read": first_read,
        "windows_per_second": found,
    }


# --- tokenising ----------------------------------------------------------------------------------


def measure_tokenising(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = data_config(given)
    tokenizer = make_tokenizer(config)
    texts = [
        b"".join(record.pieces()) for source in find_sources(config) for record in source.records()
    ]
    num_bytes, encode, rounds = sum(map(len, texts)), library_of(tokenizer, folder), []
    whole = [text.decode(errors="replace") for text in texts]
    pieces = [piece.decode(errors="replace") for text in texts for piece in cut(text)]
    programs = {"library": partial(encode, whole), "library_cut": partial(encode, pieces)}
    for i in range(given.rounds + 1):
        fresh = data_config(given, store_dir=str(folder / f"stores-{i}"))
        took = {"store": seconds_of(partial(load_corpus, fresh, tokenizer))}
        if tokenizer.kind != "bytes":
            took |= {name: seconds_of(run) for name, run in programs.items()}
        rounds.append(took)
    facts: dict[str, Any] = {"tokenizer": tokenizer.kind, "bytes": num_bytes}
    for name in rounds[0]:
        rates = [num_bytes / took[name] for took in rounds[1:]]
        facts[name] = {"bytes_per_second": statistics.median(rates)}
        if name != "store":
            ratios = [took[name] / took["store"] for took in rounds[1:]]
            facts[name] |= {"ratio": statistics.median(ratios)}
            facts[name] |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    return facts


def library_of(tokenizer: Tokenizer, folder: Path) -> Callable[[list[str]], Any]:
    """What encodes texts with the tokenizer's library alone, on all cores that it may use."""
    if tokenizer.kind == "bpe":
        import tokenizers

        tokenizer.save(folder / "tokenizer")
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        return partial(library.encode_batch_fast, add_special_tokens=False)
    if tokenizer.kind == "sentencepiece":
        from sentencepiece import SentencePieceProcessor

        tokenizer.save(folder / "tokenizer")
        (model,) = (folder / "tokenizer").glob("*.model")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else -1
        return partial(SentencePieceProcessor(model_file=str(model)).encode, num_threads=cores)
    return list  # bytes need no library


def cut(text: bytes) -> Iterator[bytes]:
    """The text in pieces that end with a line or before a space."""
    yield from re.findall(rb"(?s).{%d}.*?(?=\n| |\Z)|.+\Z" % PIECE_BYTES, text)


def data_config(given: argparse.Namespace, **fields: Any) -> DataConfig:
    chosen = {"path": tuple(given.text), "tokenizer": given.tokenizer, "workers": given.workers}
    return DataConfig(**chosen | fields)


# --- opening and memory --------------------------------------------------------------------------


def measure_opening(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    tokenizer, (num_shards, size) = ByteTokenizer(), SPARSE
    content = np.random.default_rng(0).bytes(size - 1)
    writer = ShardWriter(folder, 0, tokenizer)
    writer.add(Text("random", 0, 0, size - 1, lambda: iter([content])))
    info: ShardInfo = writer.close(closes=False)
    write_manifest(folder, tokenizer, [info] * num_shards, (), "sparse")
    opened = []
    open_seconds = seconds_of(lambda: opened.append(open_store(folder, tokenizer)))
    (store,) = opened
    starts = np.random.default_rng(1).integers(0, size - given.context_size, 64)
    read_seconds = seconds_of(lambda: store.read(starts, given.context_size, tokenizer.pad))
    return {
        "tokens": store.num_tokens,
        "open_seconds": open_seconds,
        "first_64_windows_seconds": read_seconds,
    }


def measure_memory(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    text = next(find_sources(data_config(given))[0].records())
    sample = b"".join(text.pieces(0, SMALL_BYTES))
    found: dict[str, Any] = {}
    for name, size in (("small", SMALL_BYTES), ("large", given.memory_bytes)):
        path = folder / f"{name}.txt"
        with path.open("wb") as file:
            for _ in range(max(1, size // len(sample))):
                file.write(sample)
        command = [sys.executable, "-c", TOKENISE, str(path), str(folder / "stores")]
        ran = subprocess.run([*command, given.tokenizer], stdout=subprocess.PIPE, check=True)
        found[name] = {"bytes": path.stat().st_size, "peak_bytes": int(ran.stdout)}
        path.unlink()
    return found


# --- the command line ----------------------------------------------------------------------------

PARTS = {
    "reading": measure_reading,
    "tokenising": measure_tokenising,
    "opening": measure_opening,
    "memory": measure_memory,
}


def main() -> int:
    """Measure what the arguments say; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parts = "parts to measure (all)"
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help=parts)
    text = "what to tokenise, as in --data.path"
    parser.add_argument("--text", nargs="+", default=[], help=text)
    tokenizer = "as in --data.tokenizer (%(default)s)"
    parser.add_argument("--tokenizer", default="bytes", help=tokenizer)
    parser.add_argument("--workers", type=positive, help="that tokenise (as many as cores)")
    rounds = "that count (%(default)s); one before them warms"
    parser.add_argument("--rounds", type=positive, default=5, help=rounds)
    shards = "of the store that is read (%(default)s)"
    parser.add_argument("--shards", type=positive, default=6400, help=shards)
    size = "tokens of a shard (%(default)s)"
    parser.add_argument("--shard-tokens", type=positive, default=1 << 20, help=size)
    context = "tokens of a row (%(default)s)"
    parser.add_argument("--context-size", type=positive, default=1024, help=context)
    batch = "rows of a batch (64 512)"
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=[64, 512], help=batch)
    windows = "read in a round (%(default)s)"
    parser.add_argument("--windows", type=positive, default=16384, help=windows)
    memory = "of the large text (%(default)s)"
    parser.add_argument("--memory-bytes", type=positive, default=200_000_000, help=memory)
    parser.add_argument("--folder", help="where to write what is measured (a temporary folder)")
    given = parser.parse_args()
    if not given.text and {"tokenising", "memory"} & {*given.only}:
        parser.error("give a --text to tokenise, or --only reading opening")
    found = {}
    try:
        for name in given.only:
            with tempfile.TemporaryDirectory(prefix="bench-data-", dir=given.folder) as folder:
                found[name] = PARTS[name](given, Path(folder))
    except (ConfigError, DataError) as error:
        print(f"bench_data: {error}", file=sys.stderr)
        return 2
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"date": when, "commit": commit(), "hardware": hardware(), "rounds": given.rounds}
    print(json.dumps(about | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
