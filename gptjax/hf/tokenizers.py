"""Our tokenizers in the files of Transformers."""

import json
from pathlib import Path
from typing import Any

from gptjax.config import GPTConfig
from gptjax.rundir import CheckpointError
from gptjax.tokenizer import BPETokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.tokenizer.bpe import END_NAMES, NAMED, PAD_NAMES, added_token, raw_byte_spec
from gptjax.tokenizer.pieces import WORD_START
from gptjax.tokenizer.sentencepiece import read_pieces

# Texts whose ids must be the same before a tokenizer is written: cases, digits, spaces, line
# breaks, several scripts, combining and rare characters.
SAMPLES = (
    "",
    "a",
    " a",
    "Hello, world! It's 3.14159 o'clock; don't  wait\n\n\tfor   me.\n",
    "ÄÖÜ äöü ß, œuvre, ñandú, Ελληνικά, Кириллица, עברית, العربية, हिन्दी",
    "中文字符,日本語、한국어 e\u0301 \ufb01 \U0001f600\U0001f468\u200d\U0001f469 \x00\x7f\xa0",
    "def f(x):\n    return x ** 2  # 0x1F\n" * 3,
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, config: GPTConfig) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads, with our ids.

    Raises:
      CheckpointError: if the library `tokenizers` cannot do what the tokenizer does.
    """
    spec = _spec(tokenizer)
    names = {one["id"]: one["content"] for one in spec["added_tokens"]}
    taken = {*names.values(), *_vocabulary(spec)}
    for token, choices in ((tokenizer.end, END_NAMES), (tokenizer.pad, PAD_NAMES)):
        if token not in names and token < config.vocab_size:
            names[token] = next(name for name in choices if name not in taken)
            spec["added_tokens"].append(added_token(token, names[token]))
    spec["added_tokens"].sort(key=lambda one: one["id"])
    if tokenizer.begin != tokenizer.end:
        spec["post_processor"] = _begins_with(names[tokenizer.begin], tokenizer.begin)
    content = json.dumps(spec, ensure_ascii=False)
    _check(content, tokenizer)
    (folder / "tokenizer.json").write_text(content)
    begin, end, pad = map(names.get, (tokenizer.begin, tokenizer.end, tokenizer.pad))
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context_size,
        "clean_up_tokenization_spaces": False,
        "bos_token": begin,
        "eos_token": end,
        "pad_token": pad,
        "unk_token": _unknown(spec["model"]),
    }
    special = {name: text for name, text in options.items() if name.endswith("_token") and text}
    options = {name: value for name, value in options.items() if value is not None}
    _write(folder / "tokenizer_config.json", options)
    _write(folder / "special_tokens_map.json", special)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as the content of a tokenizer.json."""
    if isinstance(tokenizer, BPETokenizer):
        spec = json.loads(tokenizer.content)
        spec.pop(NAMED, None)
        return spec
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece_spec(tokenizer)
    return raw_byte_spec()


def _begins_with(name: str, token: int) -> dict[str, Any]:
    """The post-processor that puts a special token before a text, and before the first of two."""
    one, two = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, one],
        "pair": [special, one, two],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _vocabulary(spec: dict[str, Any]) -> list[str]:
    vocab = spec["model"]["vocab"]
    return [*vocab] if isinstance(vocab, dict) else [piece for piece, _ in vocab]


def _unknown(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _check(content: str, tokenizer: Tokenizer) -> None:
    from tokenizers import Tokenizer as Library

    library = Library.from_str(content)
    for text in SAMPLES:
        theirs = library.encode(text, add_special_tokens=False).ids
        if theirs != tokenizer.encode(text).tolist():
            raise CheckpointError(
                f"the tokenizer cannot be written for Transformers: {text!a} would have other ids. "
                "Write the model without it, and keep the tokenizer's own file"
            )


# --- SentencePiece -------------------------------------------------------------------------------


def _sentencepiece_spec(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """A SentencePiece model as the library `tokenizers` has it: Unigram, or BPE whose merges are
    all the ways to make a piece of two, in the order of the pieces' scores.
    """
    model = read_pieces(tokenizer.content)
    if model.rule or model.one_space or model.user_defined:
        raise CheckpointError(
            "the tokenizer cannot be written for Transformers: it changes characters or spaces, or "
            "has pieces of the user's. Write the model without it, and keep the tokenizer's file"
        )
    space = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    prefix = [{"type": "Prepend", "prepend": WORD_START}] if model.dummy_prefix else []
    scores = dict(zip(model.pieces, model.scores, strict=True))
    unknown = model.pieces[model.unknown]
    if model.is_bpe:
        library = {
            "type": "BPE",
            "vocab": {piece: token for token, piece in enumerate(model.pieces)},
            "merges": _merges(scores),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
        }
    else:
        library = {
            "type": "Unigram",
            "unk_id": model.unknown,
            "vocab": [*map(list, scores.items())],
            "byte_fallback": model.byte_fallback,
        }
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(token, model.pieces[token])
            for token in sorted({*model.controls, model.unknown})
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": library,
    }


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """The pairs of pieces that make a piece, the best first."""
    pairs = [
        (-scores[piece], len(piece[:cut]), [piece[:cut], piece[cut:]])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [pair for _, _, pair in sorted(pairs, key=lambda one: one[:2])]
