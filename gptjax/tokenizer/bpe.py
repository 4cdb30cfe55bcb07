"""Byte-pair encoding: `tokenizer.json`, and GPT-2's two files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import ConfigError
from gptjax.tokenizer.files import read_json, read_whole
from gptjax.tokenizer.pieces import ASCII_SPACES, LONE_BREAKS, SPACES, WORD_START, PieceTokenizer

END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<|end|>")
NAMED = "gptjax"  # of our own part of a tokenizer.json that is kept: names of special tokens
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<PAD>")

# The texts that these patterns split are split before a lone space, and after a lone line break,
# wherever that is cut. GPT-2's is that of ByteLevel itself; then those of cl100k and Llama 3, of
# Qwen 2.
_KNOWN_SPLITS = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + numbers
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r"\p{N}{1,3}", r"\p{N}")
)
# What these do with a space, and with the printable ASCII beside it, stays between spaces.
_KNOWN_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace")
_KNOWN_NORMALIZERS += ("BertNormalizer",)


class BPETokenizer(PieceTokenizer):
    """Byte-pair encoding as the library `tokenizers` has it, with the ids of its files.

    Byte-level BPE without a normaliser, such as GPT-2's, is exact on every byte string; bytes that
    are not UTF-8 are encoded one at a time. GPT-1's marks where words end. Special tokens that a
    text spells are text; added tokens that are not special are found in it.
    """

    kind = "bpe"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, where: str):
        """
        Args:
          content: of a `tokenizer.json`, without what `read_bpe` leaves out.
          where: it comes from, for messages.
        Raises:
          ConfigError: if that is not a whole tokenizer, or one that cannot be used.
        """
        given = _read_spec(content, where)
        _check_spec(given, where)
        library = bare = given.library
        if given.prefixed:
            parts = ("normalizer", "pre_tokenizer")
            bare = _library(
                given.spec | {part: _without_prefix(given.spec[part]) for part in parts}
            )
        unknown, special = given.model.get("unk_token"), given.special
        normalises = _changes(given)
        alphabet = _byte_alphabet() if given.byte_level else []
        super().__init__(
            content,
            where,
            table=_meanings(given),
            special={token: name for token, name in special.items() if name != unknown},
            end=_first_named((given.named.get("end"), *END_NAMES), special),
            pad=_first_named((given.named.get("pad"), *PAD_NAMES), special),
            begin=_first_named((given.named.get("begin"),), special),
            normalises=normalises,
            byte_ids=np.array([given.vocab[name] for name in alphabet], np.int32),
            apart="",
            cuts=_bpe_cuts(given, bool(normalises)),
            unit=1 << 13,  # the library is slower on long texts, and on short ones
            first=lambda texts: _encode_fast(library, texts),
            rest=lambda texts: _encode_fast(bare, texts),
        )


class _Spec(NamedTuple):
    """What a tokenizer.json says."""

    spec: dict  # all of it
    named: dict[str, str]  # of our own: which special tokens are end, padding and beginning
    library: Any  # the tokenizer that it makes
    names: list[str]  # of every id
    normalizers: list[dict]
    splitters: list[dict]  # of its pre-tokeniser

    @property
    def model(self) -> dict:
        return self.spec["model"]

    @property
    def vocab(self) -> dict[str, int]:
        return self.model["vocab"]

    @property
    def added(self) -> list[dict]:
        return self.spec["added_tokens"]

    @property
    def special(self) -> dict[int, str]:
        """The special tokens, which are no text."""
        return {one["id"]: one["content"] for one in self.added if one["special"]}

    @property
    def byte_level(self) -> bool:
        return any(step["type"] == "ByteLevel" for step in self.splitters)

    @property
    def word_end(self) -> str:
        """What ends the last piece of a word, as in GPT-1; "" for other kinds."""
        words = [step["type"] for step in self.splitters] == ["BertPreTokenizer"]
        return (self.model.get("end_of_word_suffix") or "") if words else ""

    @property
    def prefixed(self) -> bool:
        """Whether something is put before a text."""
        return any(map(_is_prefix, [*self.normalizers, *self.splitters]))


def _read_spec(content: bytes, where: str) -> _Spec:
    try:
        spec = json.loads(content)
        named = spec.pop(NAMED, {})
        library = _library(spec)
        vocab, added = spec["model"]["vocab"], spec["added_tokens"]
        normalizers = list(_steps(spec["normalizer"]))
        splitters = list(_steps(spec["pre_tokenizer"]))
        ids = [*vocab.values()]
        names = {token: name for name, token in vocab.items()}
        names |= {one["id"]: one["content"] for one in added}
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"{where}: not a whole tokenizer ({error!r}); copy it again") from None
    if len({*ids}) != len(ids) or {*names} != {*range(len(names))}:
        raise ConfigError(
            f"{where}: the ids of {len(names):,} tokens are not those from 0 to "
            f"{len(names) - 1:,}, each once; copy it again"
        )
    by_id = [names[token] for token in range(len(names))]
    return _Spec(spec, named, library, by_id, normalizers, splitters)


def _check_spec(given: _Spec, where: str) -> None:
    """Refuse what would not give a text back, or lose parts of it unsaid."""
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        said = given.model.get(name)
        if said and said != given.word_end:
            raise ConfigError(
                f"{where}: {name} {said!r} is not supported; use byte-level BPE, such as GPT-2's, "
                "BPE with '▁' for spaces, or GPT-1's"
            )
    steps = [*given.normalizers, *given.splitters]
    if not (given.byte_level or given.word_end) and not any(
        "Metaspace" in step["type"] or step.get("content") == WORD_START for step in steps
    ):
        kinds = ", ".join(step["type"] for step in given.splitters)
        raise ConfigError(
            f"{where}: takes texts apart by {kinds or 'nothing'}, which is not supported; use "
            "byte-level BPE, such as GPT-2's, or BPE with '▁' for spaces"
        )
    alphabet = _byte_alphabet()
    if given.byte_level and not {*alphabet} <= {*given.vocab}:
        lost = sorted(byte for byte, name in enumerate(alphabet) if name not in given.vocab)
        raise ConfigError(
            f"{where}: has no token for {len(lost)} of the 256 bytes, such as {lost[0]:#04x}, "
            "which it would leave out; train it with all bytes in its alphabet"
        )


def _meanings(given: _Spec) -> list[bytes]:
    """The bytes that each id stands for; none of special ones."""
    special, suffix = given.special, given.word_end
    texts = {one["id"]: one["content"].encode() for one in given.added if not one["special"]}
    bytes_of = {name: byte for byte, name in enumerate(_byte_alphabet())}

    def meaning(token: int, name: str) -> bytes:
        if token in special:
            return b""
        if token in texts:
            return texts[token]
        if given.byte_level and {*name} <= {*bytes_of}:
            return bytes(bytes_of[character] for character in name)
        if given.model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        if suffix:
            return (name.removesuffix(suffix) + " " * name.endswith(suffix)).encode()
        return name.replace(WORD_START, " ").encode()

    return [meaning(token, name) for token, name in enumerate(given.names)]


def _changes(given: _Spec) -> list[str]:
    """In what a text may come back other than it was, in words."""
    found = []
    if others := [step["type"] for step in given.normalizers if not _starts_words(step)]:
        found.append(f"characters are changed by {', '.join(others)}")
    if given.prefixed:
        found.append("a space is put before the text")
    if any(one["lstrip"] or one["rstrip"] for one in given.added if not one["special"]):
        found.append("white space beside some added tokens is left out")
    if unkept := [step["type"] for step in given.splitters if not _keeps_all(step)]:
        found.append(f"some characters may be left out by {', '.join(unkept)}")
    if given.word_end:
        found.append("words are separated by one space each")
    elif not given.byte_level:
        found.append("'▁' becomes a space")
    if not given.byte_level and not given.model.get("byte_fallback"):
        unknown = given.model.get("unk_token")
        becomes = f"become {unknown!r}" if unknown else "are lost"
        found.append(f"characters outside the vocabulary {becomes}")
    if found:
        found.append("bytes that are not UTF-8 become U+FFFD")
    return found


def _library(spec: dict) -> Any:
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(json.dumps(spec))
    library.encode_special_tokens = True
    return library


def _encode_fast(library: Any, texts: list[bytes]) -> list[np.ndarray]:
    found = library.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
    return [np.array(one.ids, np.int32) for one in found]


def _steps(step: dict | None) -> Iterator[dict]:
    """The parts of a normaliser, pre-tokeniser or post-processor that may be a sequence."""
    if step is None:
        return
    if step["type"] == "Sequence":
        names = ("normalizers", "pretokenizers", "processors")
        for one in next((step[name] for name in names if step.get(name)), []):
            yield from _steps(one)
    else:
        yield step


def _starts_words(step: dict) -> bool:
    """Whether all that a normaliser does is put "▁" for spaces, and before the text."""
    space = step.get("pattern") == {"String": " "} and step.get("content") == WORD_START
    return step["type"] == "Prepend" or (step["type"] == "Replace" and space)


def _is_prefix(step: dict) -> bool:
    """Whether a step puts something before the text."""
    return (
        step["type"] == "Prepend"
        or step.get("add_prefix_space", False)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
    )


def _keeps_all(step: dict) -> bool:
    """Whether a pre-tokeniser leaves no character out."""
    if step["type"] in ("Split", "Punctuation"):
        return step["behavior"] != "Removed"
    return step["type"] in ("ByteLevel", "Metaspace", "Digits")


def _without_prefix(step: dict | None) -> dict | None:
    """A normaliser or pre-tokeniser without what puts something before the text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        return step | {name: [one for one in map(_without_prefix, step[name]) if one]}
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    return step | {"add_prefix_space": False} if "add_prefix_space" in step else step


def _bpe_cuts(given: _Spec, normalised: bool) -> list[bytes]:
    """The patterns of places that a text may be cut at, as `PieceTokenizer` takes them."""
    splitters, types = given.splitters, [step["type"] for step in given.splitters]
    found = [one for one in given.added if not one["special"]]
    if any(re.search(r"\n|(?<!^)\s", one["content"]) or one["rstrip"] for one in found):
        return []
    # What is put before the text is put before what follows an added token, too.
    if found and given.prefixed:
        return []
    if any(step["type"] not in _KNOWN_NORMALIZERS for step in given.normalizers):
        return []
    if any(step["type"] == "Replace" and not _starts_words(step) for step in given.normalizers):
        return []
    if types in ([], ["Metaspace"]):
        inside = any(WORD_START in name.lstrip(WORD_START) for name in given.vocab)
        return [] if inside else [ASCII_SPACES]
    if types == ["BertPreTokenizer"]:  # which splits at every space, whatever is there
        return [ASCII_SPACES]
    patterns = [step["pattern"].get("Regex") for step in splitters if step["type"] == "Split"]
    gpt2 = types == ["ByteLevel"] and splitters[0].get("use_regex", True)
    known = types == ["Split", "ByteLevel"] and (
        patterns[0] in _KNOWN_SPLITS
        and splitters[0]["behavior"] == "Isolated"
        and not splitters[0].get("invert")
        and not splitters[1].get("use_regex", True)
    )
    if not (gpt2 or known):
        return []
    return [ASCII_SPACES] if normalised else [SPACES, LONE_BREAKS]


def _first_named(names: tuple[str, ...], special: dict[int, str]) -> int | None:
    """The id of the special token that has the first of these names."""
    ids = {name: token for token, name in special.items()}
    return next((ids[name] for name in names if name in ids), None)


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE: its own in Latin-1 if that can be
    seen, and else the next from U+0100 on.
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 0x100 + hidden.index(byte)) for byte in range(256)]


def read_bpe(path: Path) -> bytes:
    """The content of a `tokenizer.json`, less what has no part in text becoming ids.

    That is truncation, padding, the special tokens that a post-processor adds, but for the name of
    one that begins a text, and dropout.

    Raises:
      ConfigError: if it is not one, or not of BPE.
    """
    spec = read_json(path)
    model = spec.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise ConfigError(
            f"{path}: is no tokenizer.json, it has no model with a vocabulary; for vocab.json and "
            "merges.txt, or encoder.json and vocab.bpe, give their folder"
        )
    if model.get("type", "BPE") != "BPE":
        raise ConfigError(
            f"{path}: a model of type {model['type']}; give one of type BPE, or the SentencePiece "
            ".model that it was made from"
        )
    fixed = {"truncation": None, "padding": None, "post_processor": None}
    parts = {"normalizer": None, "pre_tokenizer": None, "added_tokens": []}
    begin = _begin_name(spec)
    spec = parts | spec | fixed | {"model": model | {"dropout": None}}
    return _canonical(spec | _named(path.parent, spec["added_tokens"], begin))


def _begin_name(spec: dict) -> str | None:
    """The special token that a post-processor puts before a text."""
    templates = [
        one for one in _steps(spec.get("post_processor")) if one["type"] == "TemplateProcessing"
    ]
    first = next((one["single"][0] for one in templates if one.get("single")), {})
    return first.get("SpecialToken", {}).get("id")


def _named(folder: Path, added: list[dict], begin: str | None) -> dict[str, dict[str, str]]:
    """What the tokenizer_config.json beside a tokenizer.json names end and padding, where the names
    that we know would be others; and what begins a text, where that is not the end.
    """
    given = read_options(folder)
    special = {one["id"]: one["content"] for one in added if one["special"]}
    named, end = {}, None
    for name, option, known in (("end", "eos_token", END_NAMES), ("pad", "pad_token", PAD_NAMES)):
        token = given.get(option)
        token = token["content"] if isinstance(token, dict) else token
        ours = special.get(_first_named(known, special))
        # Padding that is also the end would hide where texts end.
        if token in special.values() and token not in (ours, end):
            named[name] = token
        end = end or named.get(name, ours)
    if begin in special.values() and begin != end:
        named["begin"] = begin
    return {NAMED: named} if named else {}


def read_gpt2(vocab_path: Path, merges_path: Path) -> bytes:
    """The same of GPT-2's two files, or of GPT-1's, whose pieces say where a word ends.

    Added tokens are those of `tokenizer_config.json` or `added_tokens.json` beside them.

    Raises:
      ConfigError: if one is not whole, or they are not of one tokenizer.
    """
    given = read_options(vocab_path.parent)
    name = str(given.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if name not in TWO_FILES:
        raise ConfigError(
            f"{vocab_path.parent}: a {name}, which does not take texts apart as GPT-2's does: give "
            f"its tokenizer.json; two files are read of {', '.join(TWO_FILES)}"
        )
    vocab = read_json(vocab_path)
    merges = _read_merges(merges_path)
    words = any(name.endswith(WORD_END) for name in vocab)
    made = {"".join(pair) for pair in merges} | ({*()} if words else {*_byte_alphabet()})
    special = [name for name in vocab if name not in made]
    if words:
        special = [UNKNOWN] if UNKNOWN in vocab else []
    unmade = [name for name in special if not re.fullmatch("<.+>", name)]
    if unmade or not made <= {*vocab}:
        what = f"{vocab_path.name} has {len(unmade):,} pieces that no merge makes"
        if not unmade:
            lost = sorted(made - {*vocab})
            what = f"{vocab_path.name} lacks {len(lost):,} pieces, such as {lost[0]!r}"
        raise ConfigError(f"{merges_path}: {what}; copy both files again, from the same tokenizer")
    added = {vocab[name]: added_token(vocab[name], name) for name in special}
    added |= _read_added(vocab_path.parent)
    extra = [added[token] for token in sorted(added)]
    if words:
        return _canonical(word_end_spec(vocab, merges, extra))
    prefix = bool(given.get("add_prefix_space"))
    return _canonical(byte_level_spec(vocab, merges, extra, add_prefix_space=prefix))


def read_options(folder: Path) -> dict[str, Any]:
    """What the tokenizer_config.json of a folder says, if there is one."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


WORD_END = "</w>"  # of pieces of GPT-1
UNKNOWN = "<unk>"
# The classes of Transformers whose vocab.json and merges.txt are used as GPT-2's, or as GPT-1's.
TWO_FILES = ("GPT2Tokenizer", "OpenAIGPTTokenizer", "CodeGenTokenizer", "RobertaTokenizer")
TWO_FILES += ("BartTokenizer",)


def _read_merges(path: Path) -> list[list[str]]:
    lines = read_whole(path).decode(errors="replace").replace("\r\n", "\n").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        if len(pair := line.split(" ")) != 2:
            raise ConfigError(
                f"{path}: line {number} is {line!r}, but a merge is two pieces with a space "
                "between them; copy the file again"
            )
        merges.append(pair)
    return merges


def _read_added(folder: Path) -> dict[int, dict]:
    """The tokens that were added to two files, by their ids."""
    added_path = folder / "added_tokens.json"
    if given := read_options(folder).get("added_tokens_decoder"):
        return {int(token): added_token(int(token), **one) for token, one in given.items()}
    if not added_path.is_file():
        return {}
    names = folder / "special_tokens_map.json"
    special = str(read_json(names)) if names.is_file() else ""
    return {
        token: added_token(token, name, special=repr(name) in special)
        for name, token in read_json(added_path).items()
    }


def added_token(token: int, content: str, special: bool = True, **flags: bool) -> dict:
    """A token that is added to a vocabulary, as a tokenizer.json has it."""
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **off, **flags, "special": special}


def byte_level_spec(
    vocab: dict[str, int],
    merges: list[list[str]],
    added: list[dict],
    *,
    add_prefix_space: bool = False,
) -> dict:
    """A tokenizer.json of byte-level BPE, as GPT-2's."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }
    parts = {"normalizer": None, "pre_tokenizer": byte_level, "decoder": byte_level}
    return _spec(vocab, merges, added, unk_token=None, end_of_word_suffix=None, **parts)


def word_end_spec(vocab: dict[str, int], merges: list[list[str]], added: list[dict]) -> dict:
    """A tokenizer.json of BPE as GPT-1's, of words in lower case."""
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    parts = {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "BPEDecoder", "suffix": WORD_END},
    }
    unknown = UNKNOWN if UNKNOWN in vocab else None
    return _spec(vocab, merges, added, unk_token=unknown, end_of_word_suffix=WORD_END, **parts)


def _spec(vocab, merges, added, *, unk_token, end_of_word_suffix, **parts: dict | None) -> dict:
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": end_of_word_suffix,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    rest = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    return rest | {"added_tokens": added, **parts, "model": model}


def raw_byte_spec() -> dict:
    """A tokenizer.json whose ids are the bytes of a text."""
    return byte_level_spec({name: byte for byte, name in enumerate(_byte_alphabet())}, [], [])


def _canonical(spec: dict) -> bytes:
    return json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()
