"""Records of labelled files, one after the other, and the examples that are made of them."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config import DataConfig, TaskConfig
from gptjax.sources import DataError, Source, expand, packing_of, refuse_unreadable
from gptjax.sources.tables import rows_of_hf, rows_of_tfds
from gptjax.tasks.cells import Flaw, Record
from gptjax.tasks.formats import (
    conll_records,
    folder_records,
    jsonl_records,
    numbered_rows,
    parallel_records,
    parquet_records,
    table_records,
    whole_records,
)
from gptjax.tasks.problems import Problems


def read_records(
    config: TaskConfig, paths: Iterable[str], problems: Problems, *, labelled: bool = True
) -> Iterator[Record]:
    """The records of all files, in order. A file is read as it goes, but for JSON and YAML.

    Args:
      labelled: False: of parallel text the given texts may be alone.
    Raises:
      DataError: for a path that is not there, or a file that cannot be read at all.
    """
    files = list(find_files(config, paths, problems.split))
    if config.file_format == "parallel":
        yield from parallel_records([source for source, *_ in files], problems, labelled=labelled)
        return
    roots = {_root(source) for source, *_ in files if "/" in source.name}
    for source, kind, key in files:
        match kind:
            case "folders":
                records = folder_records(source, problems, below=_root(source) in roots)
            case "tsv" | "csv":
                records = table_records(source.where, config, problems, tabs=kind == "tsv")
            case "jsonl":
                records = jsonl_records(source.where, problems)
            case "json" | "yaml":
                records = whole_records(source.where, kind, key, problems)
            case "parquet":
                records = parquet_records(source.where, problems)
            case "conll":
                records = conll_records(source.where, config, problems)
            case "hf":
                records = numbered_rows(source.where, rows_of_hf(source.where), problems)
            case "tfds":
                rows = rows_of_tfds(source.where, source.tfds_dir)
                records = numbered_rows(source.where, rows, problems)
            case _:
                raise DataError(
                    f"{problems.split}: {source.where}: labelled records are not read of a "
                    f"{kind}: give a file of JSONL, or another format of --task.file-format"
                )
        yield from records


def _root(source: Source) -> str:
    """The folder that a source's name begins below."""
    return source.where.removesuffix(source.name)


def read_examples(
    config: TaskConfig,
    paths: Iterable[str],
    problems: Problems,
    make: Callable[[Record], Any],
    *,
    labelled: bool = True,
) -> Iterator[Any]:
    """What `make` makes of each record; one in which it finds a flaw is told of, and left out.
    For `labelled` see `read_records`.

    Raises:
      DataError: as `read_records` does.
    """
    for record in read_records(config, paths, problems, labelled=labelled):
        try:
            example = make(record)
        except Flaw as flaw:
            problems.bad(flaw.kind, record.where, str(flaw))
        else:
            yield example


def find_files(
    config: TaskConfig, paths: Iterable[str], label: str
) -> Iterator[tuple[Source, str, str]]:
    """The files that paths name, their formats, and the keys after an `@`."""
    paths = tuple(paths)
    if not paths:
        raise DataError(f"{label} is empty: give files of labelled examples")
    for given in paths:
        path, _, key = given.rpartition("@")
        if not path or os.path.exists(given) or given.startswith("tfds:"):
            path, key = given, ""
        instead = "say what it is with --task.file-format" if config.file_format == "auto" else None
        sources = expand(path, label, DataConfig())
        below = os.path.isdir(path) and any("/" in source.name for source in sources)
        below = below or (len(paths) > 1 and all(map(os.path.isdir, paths)))
        for source in sources:
            refuse_unreadable(source, label, instead)
            yield source, _format(config, source, below), key


def _format(config: TaskConfig, source: Source, below: bool) -> str:
    """Args:
    below: whether there are folders below the given one, or several are given.
    """
    if config.file_format != "auto":
        return config.file_format
    bare = source.name.removesuffix(packing_of(source.name))
    if Path(bare).suffix.lower() in (".yml", ".yaml"):
        return "yaml"
    # A word and its tag in each line are a table by name alone.
    if source.kind == "tsv" and config.kind == "entities" and config.header != "yes":
        return "conll"
    if source.kind != "text":
        return source.kind
    columns = ("text_column", "second_column", "label_column", "label_columns")
    if config.kind == "classify" and below and not any(getattr(config, one) for one in columns):
        return "folders"
    return {"entities": "conll", "questions": "json"}.get(config.kind, "tsv")
