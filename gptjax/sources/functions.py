"""Records of what a Python function yields."""

import itertools
from collections.abc import Iterator

from gptjax.config import load_function
from gptjax.sources.records import SKIP, DataError, OnBad, Record, check_several, records_of


def read_function(where: str, cursor: int, on_bad: OnBad | None) -> Iterator[Record]:
    texts = itertools.islice(_yielded(where), cursor, None)
    yield from records_of(texts, where, cursor, on_bad, SKIP)


def _yielded(where: str) -> Iterator[str | bytes]:
    """What a function yields; when it fails, that is said of it."""
    function = load_function(where)
    try:
        texts = function()
        check_several(texts, where)
        yield from texts
    except DataError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise DataError(f"{where}: failed with {kind}: {error}") from error
