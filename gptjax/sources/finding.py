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
    ".jsonlines": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
MAGIC = re.compile(r"[*?[]")  # in a glob
# Files that hold no text as it is, by their endings, and what to do about them.
UNREADABLE = {
    "an archive: unpack it": "7z rar tar tbz2 tgz txz zip",
    "packed in a way that is not read: unpack it, or pack it anew as .gz, .bz2, .xz or .zst": (
        "br lz4 lzma lzo snappy sz z"
    ),
    "a table: save it as Parquet, CSV or JSONL": (
        "arrow avro db feather h5 hdf5 mat orc sqlite sqlite3 xls xlsx"
    ),
    "records of TensorFlow: give tfds:NAME with --data.tfds-dir": "array_record riegeli tfrecord",
    "a document with its layout: save its text as .txt": (
        "doc docx epub mobi odt pdf ppt pptx ps rtf"
    ),
    "pictures, sound or film: give a function, FILE.py:function, that makes texts of it": (
        "avi bmp flac gif jpeg jpg m4a mkv mov mp3 mp4 ogg png tif tiff wav webm webp"
    ),
    "arrays: give a function, FILE.py:function, that makes texts of them": (
        "bin ckpt gguf idx npy npz pickle pkl pt pth safetensors"
    ),
}
ADVICE = {f".{one}": why for why, endings in UNREADABLE.items() for one in endings.split()}
AS_IT_IS = "take its bytes with --data.format text, or leave it out with --data.exclude"


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
        refuse_unreadable(one, label, AS_IT_IS if config.format == "auto" else None)
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
        files = [match for match in matches if _is_file(match)]
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


def refuse_unreadable(source: Source, label: str, instead: str | None) -> None:
    """Raises DataError for a file that is not there, or by its ending none of text.

    Args:
      label: of the field that named it.
      instead: what takes it as it is, or leaves it out; None if that is given, whatever its ending.
    """
    if os.path.islink(source.where) and not os.path.exists(source.where):
        there = os.readlink(source.where)
        raise DataError(f"{label}: {source.where}: a link to {there}, which is not there; mend it")
    bare = source.name.removesuffix(packing_of(source.name))
    why = ADVICE.get(Path(bare).suffix.lower()) if source.kind == "text" else None
    if why and instead:
        raise DataError(f"{label}: {source.where}: {why}; or {instead}")


# --- files and folders -------------------------------------------------------------------------


def _expand_folder(path: Path, given: str, label: str, config: DataConfig) -> list[Source]:
    if _is_hf(path):
        return [_hf_source(path, path.name, label, config)]
    files, sources = [], []

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{label}: {error.filename}: cannot be read ({error.strerror}); make it readable, or "
            "give what lies beside it"
        )

    for inside, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        data_sets = [name for name in folders if _is_hf(Path(inside, name))]
        for name in data_sets:
            below = Path(inside, name)
            place = below.relative_to(path).as_posix()
            sources.append(_hf_source(below, place, label, config))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name not in data_sets and not _circular(inside, name)
        ]
        files += [Path(inside, name) for name in names if not name.startswith(".")]
    if not files and not sources:
        raise DataError(
            f"{label}: {given}: this folder holds no files but hidden ones; give another"
        )
    return sorted(sources + _sorted(path, files, config), key=lambda source: source.name)


def _circular(inside: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in."""
    above = os.path.realpath(os.path.join(inside, name))
    return os.path.commonpath([above, os.path.realpath(inside)]) == above


def _is_file(path: Path) -> bool:
    """Whether there is a file, or a link to nothing, which must not be passed over."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _sorted(root: Path, files: list[Path], config: DataConfig) -> list[Source]:
    places = sorted((file.relative_to(root).as_posix(), file) for file in files if _is_file(file))
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
