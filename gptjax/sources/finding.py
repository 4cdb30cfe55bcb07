"""The sources that paths name: files, folders, globs, URLs, data sets, functions."""

import fnmatch
import glob
import itertools
import json
import os
import re
from pathlib import Path
from typing import Literal

from gptjax.config import DataConfig, did_you_mean
from gptjax.sources.opening import file_system, is_url, packing_of, reaching, said
from gptjax.sources.records import DataError
from gptjax.sources.source import Source
from gptjax.sources.tables import tfds_builder

ENDINGS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
MAGIC = re.compile(r"[*?[]")  # in a glob


def find_sources(config: DataConfig, field: Literal["path", "valid_path"] = "path") -> list[Source]:
    """The sources that a field's paths name: for each in turn, sorted by place below it; each once.

    `data.exclude` has globs whose `*` crosses folders, matched with a source's place below its
    path, with and without a slash before it; so `*/test/*` means every folder of that name.

    Raises:
      DataError: for a path that is not there, or if no source is left.
      ConfigError: for a package that a path needs and that is not installed.
    """
    paths, label = getattr(config, field), f"data.{field}"
    if not paths:
        raise DataError(
            f"{label} is empty: give files, folders, globs, URLs, tfds:NAME or FILE.py:function, "
            "such as --data.path input.txt"
        )
    excluded = re.compile("|".join(map(fnmatch.translate, config.exclude)) or r"(?!)")
    found = [source for given in paths for source in expand(given, label, config)]
    kept = [
        one for one in found if not (excluded.match(one.name) or excluded.match(f"/{one.name}"))
    ]
    if not kept:
        raise DataError(
            f"{label}: data.exclude leaves out all of {len(found):,} files; give fewer globs"
        )
    unique: dict[str, Source] = {}
    for one in kept:
        local = one.kind != "tfds" and not is_url(one.where)
        unique.setdefault(os.path.realpath(one.where) if local else one.where, one)
    return list(unique.values())


def expand(given: str, label: str, config: DataConfig) -> list[Source]:
    """The sources that one path names; `label` is the field that errors name."""
    if given.startswith("tfds:"):
        return [_tfds_source(given, label, config)]
    if is_url(given):
        return _expand_url(given, label, config)
    path = Path(given)
    if ".py:" in given:
        path = Path(given.partition(".py:")[0] + ".py")
        if path.is_file():
            name = f"{path.name}:{given.partition('.py:')[2]}"
            return [Source(name, given, "function")]
    elif path.is_file():
        return [_file_source(path.name, given, config)]
    elif path.is_dir():
        return _expand_folder(path, given, label, config)
    elif MAGIC.search(given):
        path = Path(*itertools.takewhile(lambda part: not MAGIC.search(part), path.parts))
        matches = [Path(match) for match in glob.glob(given, recursive=True)]
        files = [match for match in matches if match.is_file()]
        if files:
            return _sorted(path, files, config)
        if matches:
            raise _only_folders(given, label)
        if path.is_dir():
            names = sorted(os.listdir(path))
            raise _no_match(given, label, str(path.absolute()), names)
    while not path.parent.is_dir():
        path = path.parent
    hint = did_you_mean(path.name, os.listdir(path.parent))
    where = path.parent.absolute()
    raise DataError(f"{label}: {given}: there is no {path.name!r} in {where}.{hint}")


# --- files and folders -------------------------------------------------------------------------


def _expand_folder(path: Path, given: str, label: str, config: DataConfig) -> list[Source]:
    if _is_hf(path):
        return [_hf_source(path, path.name, label, config)]
    files, sources = [], []
    for inside, folders, names in os.walk(path):
        data_sets = [name for name in folders if _is_hf(Path(inside, name))]
        for name in data_sets:
            below = Path(inside, name)
            place = below.relative_to(path).as_posix()
            sources.append(_hf_source(below, place, label, config))
        folders[:] = [
            name for name in folders if not name.startswith(".") and name not in data_sets
        ]
        files += [Path(inside, name) for name in names if not name.startswith(".")]
    if not files and not sources:
        raise DataError(
            f"{label}: {given}: this folder holds no files but hidden ones; give another"
        )
    return sorted(sources + _sorted(path, files, config), key=lambda source: source.name)


def _sorted(root: Path, files: list[Path], config: DataConfig) -> list[Source]:
    places = sorted((file.relative_to(root).as_posix(), file) for file in files if file.is_file())
    return [_file_source(name, str(file), config) for name, file in places]


def _file_source(name: str, where: str, config: DataConfig) -> Source:
    bare = name.removesuffix(packing_of(name))
    kind = ENDINGS.get(Path(bare).suffix.lower(), "text")
    if config.format != "auto":
        kind = config.format
    if kind == "parquet" and packing_of(name):
        raise DataError(f"{where}: Parquet packed as a whole cannot be read; unpack it")
    return Source(name, where, kind, config.text_field)


# --- URLs --------------------------------------------------------------------------------------


def _expand_url(given: str, label: str, config: DataConfig) -> list[Source]:
    system, path = file_system(given)
    with reaching(given):
        system.invalidate_cache()  # what was listed before may have changed
        if system.isfile(path):
            name = given.partition("?")[0].rpartition("/")[2]
            where = given if "::" in given else system.unstrip_protocol(path)
            return [_file_source(name, where, config)]
        root = "/".join(itertools.takewhile(lambda part: not MAGIC.search(part), path.split("/")))
        if root != path:
            found = system.glob(path, detail=True)
            files = [match for match, info in found.items() if info["type"] == "file"]
            if found and not files:
                raise _only_folders(given, label)
        else:
            files = system.find(path) if system.isdir(path) else []
        if "/." not in path:  # not of hidden files
            files = [file for file in files if "/." not in file.removeprefix(root)]
        if not files:
            folder = root if root != path else system._parent(path)
            names = []
            if system.isdir(folder):
                names = [name.rpartition("/")[2] for name in system.ls(folder, detail=False)]
            raise _no_match(given, label, system.unstrip_protocol(folder), sorted(names))
        places = sorted((file.removeprefix(root).lstrip("/"), file) for file in files)
        return [_file_source(name, system.unstrip_protocol(file), config) for name, file in places]


def _only_folders(given: str, label: str) -> DataError:
    deeper = f"{given.rstrip('/')}/**"
    return DataError(
        f"{label}: {given}: matches only folders; give {deeper} for the files below them"
    )


def _no_match(given: str, label: str, folder: str, names: list[str]) -> DataError:
    listing = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    holds = f"{folder} holds {listing or 'nothing'}"
    hint = did_you_mean(given.rstrip("/").rpartition("/")[2], names)
    return DataError(f"{label}: {given}: matches nothing; {holds}.{hint}")


# --- data sets ---------------------------------------------------------------------------------


def _is_hf(folder: Path) -> bool:
    """Whether `datasets` has saved a data set, or a dictionary of them, in a folder."""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


def _hf_source(folder: Path, name: str, label: str, config: DataConfig) -> Source:
    """Of a dictionary of data sets the one that `tfds_split` names."""
    listing = folder / "dataset_dict.json"
    if listing.is_file():
        with reaching(str(listing)):
            splits = json.loads(listing.read_text())["splits"]
        split = config.tfds_split
        if split not in splits:
            raise DataError(
                f"{label}: {folder}: there is no split {split!r} but "
                f"{', '.join(map(repr, splits))}; give one with --data.tfds-split, or as "
                f"{folder}/SPLIT.{did_you_mean(split, splits)}"
            )
        folder, name = folder / split, f"{name}/{split}"
    return Source(name, str(folder), "hf", config.text_field)


def _tfds_source(given: str, label: str, config: DataConfig) -> Source:
    """A split of a TFDS data set, prepared now if `tfds_prepare` consents to that."""
    name, _, split = given.removeprefix("tfds:").partition("@")
    split = split or config.tfds_split
    builder, _ = tfds_builder(given, config.tfds_dir)
    if not builder.is_prepared():
        folder = builder.data_path
        if not config.tfds_prepare:
            raise DataError(
                f"{label}: {given}: this data set is not prepared in {folder}; prepare it with "
                f"tfds.builder({name!r}, data_dir=...).download_and_prepare(file_format="
                "'array_record'), or consent to that being done now with --data.tfds-prepare"
            )
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:
            raise DataError(f"{label}: {given}: TFDS cannot prepare it ({said(error)})") from error
    formats = sorted(form.value for form in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise DataError(
            f"{label}: {given}: prepared as {', '.join(formats)}, which cannot be read without "
            "TensorFlow; prepare it anew with --data.tfds-dir FOLDER --data.tfds-prepare"
        )
    try:
        builder.info.splits[split]
    except (ValueError, KeyError):
        splits = list(builder.info.splits)
        raise DataError(
            f"{label}: {given}: there is no split {split!r} but {', '.join(map(repr, splits))}; "
            f"give one with --data.tfds-split, or as tfds:NAME@SPLIT.{did_you_mean(split, splits)}"
        ) from None
    version = "" if ":" in name else f":{builder.version}"
    where = f"tfds:{name}{version}@{split}"
    return Source(where, where, "tfds", config.text_field, config.tfds_dir)
