"""Whatever holds text, to records: files of many kinds, URLs, data sets on disk, functions."""

from gptjax.sources.finding import expand, find_sources, refuse_unreadable
from gptjax.sources.opening import Fingerprint, needed, open_bytes, packing_of
from gptjax.sources.records import PIECE_BYTES, DataError, OnBad, Record, records_of
from gptjax.sources.source import Source

__all__ = [
    "PIECE_BYTES",
    "DataError",
    "Fingerprint",
    "OnBad",
    "Record",
    "Source",
    "expand",
    "find_sources",
    "needed",
    "open_bytes",
    "packing_of",
    "records_of",
    "refuse_unreadable",
]
