"""What a source is: a value that can be sent to another process.

Reading it gives its records in one order, and reading can begin at any record again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptjax.sources.functions import read_function
from gptjax.sources.lines import read_csv, read_json, read_jsonl, read_text
from gptjax.sources.opening import Fingerprint, packing_of, sha256_of, stat_of
from gptjax.sources.records import OnBad, Record
from gptjax.sources.tables import read_hf, read_parquet, read_tfds, tfds_files


@dataclass(frozen=True)
class Source:
    """A file, a split of a TFDS data set, a folder of a Hugging Face data set, or a function."""

    name: str  # the same on every machine: its place below the path that was given
    where: str  # path, URL, tfds:NAME@SPLIT, or FILE.py:function
    kind: Literal["text", "json", "jsonl", "csv", "tsv", "parquet", "tfds", "hf", "function"]
    text_field: str = "text"
    tfds_dir: str | None = None

    @property
    def seekable(self) -> bool:
        """Whether `records(cursor)` begins there without reading what lies before."""
        if self.kind in ("tfds", "hf"):
            return True
        return self.kind not in ("json", "function") and not packing_of(self.where)

    def records(
        self, cursor: int = 0, on_bad: OnBad | None = None, position: int | None = None
    ) -> Iterator[Record]:
        """Every record that has text, in order; empty ones are left out.

        Args:
          cursor: of the record to begin with; 0 begins with the first.
          on_bad: told of each bad record, which is then passed over.
          position: of the record at `cursor`, if known. Without it the lines before the cursor are
            counted, which is fast but reads them.
        Raises:
          DataError: for a bad record without `on_bad`; for a source that cannot be read at all.
          ConfigError: for a package that is not installed, or a function that is not there.
        """
        where, field = self.where, self.text_field
        match self.kind:
            case "text":
                return read_text(where, cursor, on_bad)
            case "json":
                return read_json(where, field, cursor, on_bad)
            case "jsonl":
                return read_jsonl(where, field, cursor, on_bad, position)
            case "csv" | "tsv":
                return read_csv(where, field, self.kind == "tsv", cursor, on_bad, position)
            case "parquet":
                return read_parquet(where, field, cursor, on_bad)
            case "tfds":
                return read_tfds(where, self.tfds_dir, field, cursor, on_bad)
            case "hf":
                return read_hf(where, field, cursor, on_bad)
            case "function":
                return read_function(where, cursor, on_bad)

    def fingerprint(self) -> Fingerprint:
        """What this source is now; reads local files whole."""
        stats = [stat_of(file) for file in self._files()]
        tags = [stat.sha256 or sha256_of(stat.name) for stat in stats]
        return self._joined(stats, tags)

    def same(self, before: Fingerprint) -> str | None:
        """What differs from before, in words; None if nothing does. Cheap where nothing does."""
        stats = [stat_of(file) for file in self._files()]
        size = sum(stat.size for stat in stats)
        if size != before.size:
            return f"{self.where} has {size:,} bytes, but had {before.size:,}"
        local = not any(stat.sha256 for stat in stats)
        if local and max(stat.modified for stat in stats) == before.modified:
            return None
        if self.fingerprint().sha256 != before.sha256:
            return f"the content of {self.where} differs"
        return None

    def _joined(self, stats: list[Fingerprint], tags: list[str]) -> Fingerprint:
        """One fingerprint of all files."""
        tag = tags[0]
        if len(tags) > 1:
            names = [os.path.basename(stat.name) for stat in stats]
            listing = json.dumps(list(zip(names, tags, strict=True)))
            tag = hashlib.sha256(listing.encode()).hexdigest()
        size, modified = sum(s.size for s in stats), max(s.modified for s in stats)
        return Fingerprint(self.name, size, tag, modified)

    def _files(self) -> list[str]:
        """The paths or URLs that hold its content."""
        if self.kind == "tfds":
            return tfds_files(self.where, self.tfds_dir)
        if self.kind == "hf":
            return [str(file) for file in sorted(Path(self.where).iterdir()) if file.is_file()]
        return [self.where.partition(".py:")[0] + ".py" if self.kind == "function" else self.where]
