"""Whatever holds text, to records: files of many kinds, URLs, data sets on disk, functions."""

from gptjax.sources.finding import find_sources
from gptjax.sources.opening import Fingerprint
from gptjax.sources.records import PIECE_BYTES, DataError, OnBad, Record, records_of
from gptjax.sources.source import Source

__all__ = [
    "PIECE_BYTES",
    "DataError",
    "Fingerprint",
    "OnBad",
    "Record",
    "Source",
    "find_sources",
    "records_of",
]
