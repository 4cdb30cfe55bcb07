"""Records of Parquet files, and of data sets of Hugging Face and TFDS."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from gptjax.config import did_you_mean
from gptjax.sources.opening import needed, open_bytes, reaching, said
from gptjax.sources.records import SKIP, DataError, OnBad, Record, no_field, records_of


def _check_field(where: str, field: str, names: Iterable[str]) -> None:
    if field not in names:
        raise DataError(f"{where}: {no_field(field, names)}")


def _said_of(where: str, values: Iterable[Any]) -> Iterator[Any]:
    """The same values; when reading one fails, that is said of the source."""
    with reaching(where):
        yield from values


@contextmanager
def open_parquet(where: str) -> Iterator[Any]:
    """A Parquet file, of which nothing but its last lines is read yet.

    Raises:
      DataError: if it is not whole.
    """
    parquet = needed("pyarrow.parquet", "parquet", where)
    with open_bytes(where) as file:
        try:
            table = parquet.ParquetFile(file)
        except (ValueError, OSError) as error:
            raise DataError(
                f"{where}: not a whole Parquet file ({error}); copy it again"
            ) from error
        yield table


def read_parquet(where: str, field: str, cursor: int, on_bad: OnBad | None) -> Iterator[Record]:
    with open_parquet(where) as table:
        _check_field(where, field, table.schema_arrow.names)

        values = _parquet_values(table, field, cursor)
        yield from records_of(_said_of(where, values), where, cursor, on_bad, SKIP)


def _parquet_values(table: Any, field: str, start: int) -> Iterator[str | bytes | None]:
    """The values of a column from number `start` on, read by row groups."""
    first = 0
    for group in range(table.num_row_groups):
        past = first + table.metadata.row_group(group).num_rows
        if past > start:
            batches = table.iter_batches(1024, row_groups=[group], columns=[field])
            values = (value.as_py() for batch in batches for value in batch.column(0))
            yield from itertools.islice(values, max(start - first, 0), None)
        first = past


def read_hf(where: str, field: str, cursor: int, on_bad: OnBad | None) -> Iterator[Record]:
    datasets = needed("datasets", "hf", where)
    with reaching(where):
        data = datasets.load_from_disk(where)
    _check_field(where, field, data.column_names)
    table = data.select_columns([field]).with_format("arrow")
    values = (
        value.as_py()
        for first in range(cursor, len(data), 1024)
        for value in table[first : first + 1024].column(0)
    )
    yield from records_of(_said_of(where, values), where, cursor, on_bad, SKIP)


def read_tfds(
    where: str, folder: str | None, field: str, cursor: int, on_bad: OnBad | None
) -> Iterator[Record]:
    builder, split = tfds_builder(where, folder)
    _check_field(where, field, builder.info.features)
    with reaching(where):
        data = builder.as_data_source(split=split)
    values = (data[i][field] for i in range(cursor, len(data)))
    yield from records_of(_said_of(where, values), where, cursor, on_bad, SKIP)


def rows_of_hf(where: str) -> Iterator[dict[str, Any]]:
    """The rows of a Hugging Face data set; of a label that has a name, the name."""
    datasets = needed("datasets", "hf", where)
    with reaching(where):
        data = datasets.load_from_disk(where)
    for row in _said_of(where, iter(data)):
        yield {name: _named(value, data.features[name]) for name, value in row.items()}


def rows_of_tfds(where: str, folder: str | None) -> Iterator[dict[str, Any]]:
    """The same of a TFDS data set; text is decoded."""
    builder, split = tfds_builder(where, folder)
    with reaching(where):
        data = builder.as_data_source(split=split)
    features = builder.info.features
    for row in _said_of(where, (data[i] for i in range(len(data)))):
        yield {name: _named(_plain(value), features[name]) for name, value in row.items()}


def _named(value: Any, feature: Any) -> Any:
    """A value in which the numbers of labels are their names."""
    inner = feature.feature if hasattr(feature, "feature") else feature
    if not hasattr(inner, "int2str"):
        return value
    if isinstance(value, list):
        return [_named(one, inner) for one in value]
    return None if value is None or value < 0 else inner.int2str(value)


def _plain(value: Any) -> Any:
    """A value of NumPy, or several, as JSON has them; bytes that are no text cannot be encoded."""
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def tfds_builder(where: str, folder: str | None) -> tuple[Any, str]:
    """The builder of a TFDS data set, and the split."""
    for module in ("importlib_resources", "array_record"):  # TFDS needs them without saying so
        needed(module, "tfds", where)
    tfds = needed("tensorflow_datasets", "tfds", where)
    name, _, split = where.removeprefix("tfds:").partition("@")
    try:
        return tfds.builder(name, data_dir=folder), split
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        place = folder or tfds.core.constants.DATA_DIR
        raise DataError(
            f"{where}: TFDS knows no such data set, and {place} holds none."
            f"{did_you_mean(name.partition('/')[0], known)}"
        ) from None
    except Exception as error:
        raise DataError(f"{where}: TFDS cannot read this data set ({said(error)})") from error


def tfds_files(where: str, folder: str | None) -> list[str]:
    builder, split = tfds_builder(where, folder)
    return sorted({str(path) for path in builder.info.splits[split].filepaths})
