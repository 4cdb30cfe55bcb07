"""Text to ids and back loses nothing, and a saved tokenizer is the one that comes back."""

import gzip
import json
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from gptjax.config import ConfigError, DataConfig
from gptjax.message import from_text, to_text
from gptjax.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    train_sentencepiece,
)
from gptjax.tokenizer import bpe as bpe_file
from gptjax.tokenizer import pieces as pieces_file
from gptjax.tokenizer import sentencepiece as sentencepiece_file

SYLLABLES = (
    "the old sai lor told a long ta le it had no end did they mind mañ ana 床前 明月 12 x".split()
)


def some_text() -> str:
    """Sentences of words that share parts."""
    draw, text = np.random.default_rng(0), ""
    for _ in range(400):
        lengths = draw.integers(1, 5, draw.integers(1, 9))
        words = ("".join(draw.choice(SYLLABLES, length)) for length in lengths)
        ending = draw.choice([". ", "! ", ".\n", ",  ", "。\n", "\n\n", "\xa0\n\n"])
        text += " ".join(words).capitalize() + ending
    return text


TEXT = some_text()
EXACT = ("bytes", "unigram", "bpe", "byte-level", "split")
NORMALISING = ("nmt_nfkc", "spaces", "dummy", "metaspace", "prefix")

# Text around places where it may be cut, and what is like them.
PARTS = [
    *"dlt4x.!? \n\t'",
    "d. ",
    "t! ",
    "4?\n",
    "l.\n",
    "。\n",
    "光。",
    "é",
    "\xa0",
    "\u3000",
    "▁",
]
PARTS += [
    "</s>",
    "<pad>",
    "<|endoftext|>",
    "\r\n",
    "\0",
    "🙂",
    "e\u0301",
    "the",
    "'s",
    " 12",
    "<b>",
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=30).map("".join)
BYTES = st.lists(st.one_of(TEXTS.map(str.encode), st.binary(max_size=3))).map(b"".join)
several = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def byte_level() -> Library:
    """A small tokenizer like GPT-2's."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    train(library, ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet())
    return library


def metaspace() -> Library:
    """A small tokenizer like Llama 2's."""
    library = Library(models.BPE(byte_fallback=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    train(library, ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))], [])
    spec = json.loads(library.to_str()) | {"pre_tokenizer": None}
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are none
    return Library.from_str(json.dumps(spec))


def train(library: Library, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([TEXT], trainer)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """One of each kind, trained on a little text."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made: dict[str, Tokenizer] = {"bytes": ByteTokenizer()}
    for kind in ("unigram", "bpe"):
        path = folder / f"{kind}.model"
        train_sentencepiece([TEXT], path, vocab_size=310, kind=kind)
        made[kind] = make_tokenizer(DataConfig(tokenizer=str(path)))
    made |= {name: sentencepiece(folder, name) for name in ("nmt_nfkc", "spaces", "dummy")}
    prefix = byte_level()
    prefix.normalizer = normalizers.NFC()
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    added = byte_level()
    added.add_tokens([AddedToken("<b>", normalized=False)])
    split = byte_level()
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(bpe_file._KNOWN_SPLITS[0]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for name, library in [
        ("byte-level", added),
        ("split", split),
        ("metaspace", metaspace()),
        ("prefix", prefix),
    ]:
        path = folder / f"{name}.json"
        library.save(str(path))
        made[name] = make_tokenizer(DataConfig(tokenizer=str(path)))
    return made


def sentencepiece(folder: Path, name: str) -> Tokenizer:
    """A model that someone else might have trained, which changes texts."""
    from sentencepiece import SentencePieceTrainer

    options = {
        "nmt_nfkc": {"byte_fallback": True, "vocab_size": 310},
        "spaces": {"normalization_rule_name": "identity", "add_dummy_prefix": False},
        "dummy": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "phrases": {"split_by_whitespace": False},
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(folder / name),
        **{"vocab_size": 120, "minloglevel": 2} | options[name],
    )
    return make_tokenizer(DataConfig(tokenizer=str(folder / f"{name}.model")))


@pytest.fixture(params=EXACT)
def exact(request, tokenizers) -> Tokenizer:
    return tokenizers[request.param]


@pytest.fixture(params=EXACT + NORMALISING)
def each(request, tokenizers) -> Tokenizer:
    return tokenizers[request.param]


def pieces_of(text: bytes, bounds: list[int]) -> list[bytes]:
    places = [0, *sorted(min(bound, len(text)) for bound in bounds), len(text)]
    return [text[start:stop] for start, stop in pairwise(places)]


def joined(parts) -> list[int]:
    return [token for part in parts for token in part.tolist()]


# --- laws --------------------------------------------------------------------------------------


@several
@given(BYTES)
@example(bytes(range(256)) * 2)
def test_bytes_come_back(exact, content):
    ids = exact.encode(content)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert exact.decode_bytes(ids) == content
    assert exact.bytes_per_token[ids].sum() == len(content)
    assert {exact.end, exact.pad}.isdisjoint(ids.tolist())
    assert not exact.normalises


@several
@given(st.text(max_size=100))
@example("▁ ▁▁\0\ufeff\r\n\u2585\u2047<0x41>")
def test_text_comes_back(exact, text):
    assert exact.decode(exact.encode(text)) == text


@several
@given(BYTES, st.integers(0, 60))
@example("x\xa0\ny".encode(), 1)  # the white space before it is one piece if nothing follows
def test_a_cut_changes_no_id(each, text, after):
    place = each.cut(text, after)
    if place is not None:
        assert max(after, 1) <= place < len(text)
        parts = [each.encode(text[:place]), *each.encode_pieces([text[place:]], begins=False)]
        assert joined(parts) == each.encode(text).tolist()


def test_there_are_places_to_cut(each):
    text = b"They told it. They did. " * 3 + b"end"
    assert each.cut(text, 14) == (14 if each.kind == "bytes" else 23)
    assert each.cut(text, len(text) - 1) == (len(text) - 1 if each.kind == "bytes" else None)


def test_what_leaves_no_place_to_cut(tokenizers, tmp_path):
    """Pieces and added tokens that go on after a space, and rules that are not known."""
    text = b"They told it. They did."
    assert tokenizers["byte-level"].cut(text, 1) == 13
    made = {name: byte_level() for name in ("stripped", "long", "prefix", "unknown")}
    made["stripped"].add_tokens([AddedToken("it.", rstrip=True)])
    made["long"].add_tokens([AddedToken("it. They")])
    made["prefix"].add_tokens([AddedToken("<b>")])
    made["prefix"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made["unknown"].pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("T"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    for name, library in made.items():
        path = tmp_path / f"{name}.json"
        library.save(str(path))
        assert make_tokenizer(DataConfig(tokenizer=str(path))).cut(text, 1) is None, name
    assert sentencepiece(tmp_path, "phrases").cut(text, 1) is None


@several
@given(BYTES, st.lists(st.integers(0, 200), max_size=5), st.booleans())
@example(b"xxxxxxxxd. " + b"told" * 10, [20], True)  # the place is known by what was cut off
def test_the_pieces_of_a_text_do_not_matter(each, text, bounds, short):
    with pytest.MonkeyPatch.context() as patch:
        if short:  # so that there are units without a place to cut at
            patch.setattr(pieces_file, "LONGEST_UNIT", 9)
            patch.setattr(pieces_file, "PIECE_BYTES", 5)
        assert joined(each.encode_pieces(pieces_of(text, bounds))) == each.encode(text).tolist()


def test_units_are_bounded(tokenizers, monkeypatch):
    monkeypatch.setattr(pieces_file, "LONGEST_UNIT", 10)
    tokenizer, text = tokenizers["unigram"], ("é" * 40).encode()
    units, stop = tokenizer._units(text, 0, last=True)
    assert b"".join(units) == text and stop == len(text)
    assert [len(unit) for unit in units] == [10] * 8
    assert all(unit.decode() for unit in units)


@several
@given(st.lists(BYTES, max_size=4))
@example([b"\xc2", b"\x80"])  # halves of one character
def test_a_batch_is_each_text(each, texts):
    batch = each.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [each.encode(text).tolist() for text in texts]
    assert all(ids.dtype == np.int32 for ids in batch)


@several
@given(TEXTS)
def test_ids_are_the_librarys(tokenizers, text):
    """Each library's own for the whole text; "▁" and special tokens are told below."""
    from sentencepiece import SentencePieceProcessor

    for name in ("unigram", "bpe", "nmt_nfkc", "spaces", "dummy"):
        if "▁" in text and not tokenizers[name].normalises:
            continue
        library = SentencePieceProcessor(model_proto=tokenizers[name].content)
        assert tokenizers[name].encode(text).tolist() == library.encode(text)
    for name in ("byte-level", "split", "metaspace", "prefix"):
        library = Library.from_str(tokenizers[name].content.decode())
        library.encode_special_tokens = True
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizers[name].encode(text).tolist() == ids


@several
@given(st.data())
def test_a_stream_is_the_whole(each, data):
    some = st.lists(st.integers(0, each.vocab_size - 1), max_size=40)
    ids = data.draw(st.one_of(some, TEXTS.map(each.encode)))
    stream = StreamDecoder(each)
    streamed = "".join([stream.push(token) for token in ids] + [stream.flush()])
    assert streamed == each.decode(ids)


def test_a_stream_never_splits_a_character(exact):
    stream = StreamDecoder(exact)
    pushed = "".join(stream.push(token) for token in exact.encode("aé中🙂"))
    assert (pushed, stream.flush()) == ("aé中🙂", "")


def test_special_ids_stand_for_no_text(each):
    assert each.end != each.pad
    assert each.decode([each.end, *each.encode("le"), each.pad]).strip() == "le"
    assert each.bytes_per_token[[each.end, each.pad]].tolist() == [0, 0]
    assert len(each.bytes_per_token) == each.vocab_size


def test_ids_outside_are_refused(each):
    for token in (-1, each.vocab_size):
        with pytest.raises(ValueError, match=f"id {token}: ids of {each.kind} go from 0 to"):
            each.decode([5, token])


def test_what_is_spelled_like_a_special_token_is_text(tokenizers):
    for name, spelling in [("unigram", "</s>"), ("byte-level", "<|endoftext|>"), ("bpe", "<pad>")]:
        tokenizer = tokenizers[name]
        ids = tokenizer.encode(f"a{spelling}b")
        assert {tokenizer.end, tokenizer.pad}.isdisjoint(ids.tolist())
        assert tokenizer.decode(ids) == f"a{spelling}b"
    added = tokenizers["byte-level"].encode("a<b>c")
    assert len(added) == 3  # an added token that is not special is one


def test_as_text_and_back_it_is_the_same(each):
    again = from_text(to_text(each))
    assert (again.fingerprint, again.vocab_size) == (each.fingerprint, each.vocab_size)
    assert again.encode(TEXT).tolist() == each.encode(TEXT).tolist()


def test_what_is_normalised_is_told(tokenizers):
    said = {name: "; ".join(tokenizers[name].normalises) for name in EXACT + NORMALISING}
    assert [said[name] for name in EXACT] == [""] * len(EXACT)
    assert "the rule 'nmt_nfkc'" in said["nmt_nfkc"]
    assert "tried: '\\ufb01' comes back as ' fi'" in said["nmt_nfkc"]
    assert "tried: 'a ' comes back as 'a'" in said["spaces"]
    assert "outside the vocabulary become ' ⁇ '" in said["spaces"]
    assert "a space is put before the text" in said["metaspace"]
    assert "changed by NFC" in said["prefix"]


# --- GPT-2 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    return make_tokenizer(DataConfig(tokenizer=str(shared_data / "gpt2-bpe")))


def test_gpt2(gpt2):
    assert (gpt2.vocab_size, gpt2.end, gpt2.pad) == (50258, 50256, 50257)
    # Published by OpenAI as "Hello world", and what every implementation gives.
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.decode_bytes(gpt2.encode(bytes(range(256)))) == bytes(range(256))


def test_both_namings_of_gpt2s_files_are_one(gpt2, shared_data, tmp_path):
    (tmp_path / "vocab.json").write_bytes((shared_data / "gpt2-bpe/encoder.json").read_bytes())
    with pytest.raises(ConfigError, match=r"holds vocab.json but no merges.txt; give a folder"):
        make_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    merges = (shared_data / "gpt2-bpe/vocab.bpe").read_text()
    (tmp_path / "merges.txt").write_text(merges.partition("\n")[2])
    again = make_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    assert again.fingerprint == gpt2.fingerprint
    (tmp_path / "merges.txt").write_text(merges[: len(merges) // 2].rpartition("\n")[0])
    with pytest.raises(
        ConfigError, match=r"merges.txt: vocab.json has 2.,... pieces that no merge"
    ):
        make_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    (tmp_path / "merges.txt").write_text(merges[: len(merges) // 2].rpartition(" ")[0])
    with pytest.raises(ConfigError, match=r"merges.txt: line \d+ is '.+', but a merge is two"):
        make_tokenizer(DataConfig(tokenizer=str(tmp_path)))


def test_gpt2_is_that_of_transformers(gpt2, shared_data):
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "gpt2-bpe"
    other = transformers.GPT2TokenizerFast(
        vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe")
    )
    texts = [gzip.decompress((shared_data / "wikitext-2/valid.txt.gz").read_bytes()).decode()]
    with zipfile.ZipFile(shared_data / "udhr2" / "udhr2.zip") as languages:
        names = [name for name in languages.namelist() if name.endswith(".txt")]
        texts += [languages.read(name).decode() for name in names[::10]]
    draw = np.random.default_rng(0)
    for _ in range(1000):
        numbers = draw.integers(0, 0x110000 >> draw.integers(0, 14, 40))
        texts.append("".join(chr(n) for n in numbers if not 0xD800 <= n < 0xE000))
    ids = other(texts, add_special_tokens=False)["input_ids"]
    assert [one.tolist() for one in gpt2.encode_batch([text.encode() for text in texts])] == ids


# --- training ----------------------------------------------------------------------------------


def test_training_is_a_function_of_the_text(tmp_path):
    for name, texts in [("a", [TEXT]), ("b", [TEXT.encode()]), ("c", TEXT.splitlines(True))]:
        train_sentencepiece(texts, tmp_path / f"{name}.model", vocab_size=310)
    models = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(models) == 1 and len(list(tmp_path.iterdir())) == 3
    tokenizer = make_tokenizer(DataConfig(tokenizer=str(tmp_path / "a.model")))
    assert len(tokenizer.encode(TEXT)) < 0.75 * len(TEXT.encode())


def test_training_on_strange_text(tmp_path):
    """Without a space in it, and with what the trainer keeps for itself."""
    strange = [
        "床前\0明月▁光▅疑⁇是\t地上霜" * 20,
        b"\xff\xfe" * 50 + "霜是地".encode() * 9,
        "\ud7ff\r",
    ]
    done = train_sentencepiece(strange, tmp_path / "strange.model", vocab_size=275)
    assert done.tokenizer.decode(done.tokenizer.encode(" 霜▁ ▅\0 ")) == " 霜▁ ▅\0 "
    assert len(done.tokenizer.encode("床前")) <= 2


def test_digits_apart(tmp_path):
    for split in (False, True):
        path = tmp_path / f"{split}.model"
        done = train_sentencepiece([TEXT], path, vocab_size=340, split_digits=split)
        pieces = [done.tokenizer.decode([token]) for token in range(340)]
        assert any("12" in piece for piece in pieces) != split


def test_more_text_than_is_learnt_from(tmp_path):
    lines = [f"{'The old sailor told a long tale'[: 20 + i % 10]} {i}\n" for i in range(4000)]
    size = sum(map(len, lines))
    done = train_sentencepiece(lines, tmp_path / "a.model", vocab_size=300, max_bytes=size // 3)
    assert done.num_bytes == size - len(lines) and done.num_sentences == len(lines)
    assert size / 8 < done.used_bytes <= size // 3
    taken = [int(line.split()[-1]) for line in sentencepiece_file._sample(lines, size // 3)[0]]
    assert len(taken) == done.used_sentences
    assert np.histogram(taken, 4, (0, 4000))[0].min() > len(taken) / 5  # from all over the text


def test_training_that_cannot_be(tmp_path):
    path = tmp_path / "a.model"
    for texts, size, words in [
        ([TEXT], 100, "vocab_size = 100: .*Vocabulary size is smaller than required_chars"),
        ([TEXT], 90_000, "vocab_size = 90,000: .*set it to a value <= [0-9]+.*; give another size"),
        ([" \n", ""], 300, "nothing but white space to train on"),
    ]:
        with pytest.raises(ConfigError, match=words):
            train_sentencepiece(texts, path, vocab_size=size)
        assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        train_sentencepiece([TEXT], path, vocab_size=300)
    assert path.read_text() == "mine"
    with pytest.raises(ConfigError, match="there is no folder"):
        train_sentencepiece([TEXT], tmp_path / "b" / "a.model", vocab_size=300)


# --- files -------------------------------------------------------------------------------------


def test_saved_comes_back(each, tmp_path):
    each.save(tmp_path / "tokenizer")
    each.save(tmp_path / "tokenizer")  # a run that goes on saves it again
    again = load_tokenizer(tmp_path / "tokenizer")
    assert type(again) is type(each)
    assert (again.fingerprint, again.end, again.pad) == (each.fingerprint, each.end, each.pad)
    assert again.encode(TEXT).tolist() == each.encode(TEXT).tolist()
    named = make_tokenizer(DataConfig(tokenizer=str(tmp_path / "tokenizer")))
    assert named.fingerprint == each.fingerprint


def test_another_tokenizer_is_refused(tokenizers, tmp_path):
    one, other = tokenizers["unigram"], tokenizers["byte-level"]
    one.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=f"(?s){one.fingerprint}.*{other.fingerprint}"):
        other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / one.file_name).write_bytes(tokenizers["bpe"].content)
    with pytest.raises(
        ConfigError, match=f"(?s){tokenizers['bpe'].fingerprint}, but was {one.fingerprint}"
    ):
        load_tokenizer(tmp_path)


def test_what_is_saved_of_bytes_is_compared(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(tmp_path)
    ByteTokenizer().save(tmp_path)
    path = tmp_path / "gptjax_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "f" * 64}))
    with pytest.raises(ConfigError, match=f"(?s)ffff.*{ByteTokenizer.fingerprint}"):
        load_tokenizer(tmp_path)
    for content in ("{", "[]", '{"kind": ["bpe"]}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match=f"{path}: "):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["unigram", "byte-level"])
def test_damage_is_found(tokenizers, tmp_path, name):
    tokenizers[name].save(tmp_path)
    path = tmp_path / tokenizers[name].file_name
    content = path.read_bytes()
    draw = np.random.default_rng(0)
    for place in draw.integers(0, len(content), 20):
        path.write_bytes(content[:place])
        with pytest.raises(ConfigError, match=f"(?s){path}: .*{tokenizers[name].fingerprint}"):
            load_tokenizer(tmp_path)
        flipped = bytes([content[place] ^ 1 << draw.integers(0, 8)])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
        with pytest.raises(ConfigError, match=f"(?s){path}: .*{tokenizers[name].fingerprint}"):
            load_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=f"{path}: No such file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["unigram", "nmt_nfkc", "byte-level", "metaspace"])
def test_half_a_file_is_no_tokenizer(tokenizers, tmp_path, name):
    suffix = Path(tokenizers[name].file_name).suffix
    path, content = tmp_path / f"half{suffix}", tokenizers[name].content
    for place in [*np.linspace(0, len(content) - 1, 40, dtype=int), len(content) - 2]:
        path.write_bytes(content[:place])
        with pytest.raises(ConfigError, match=f"{path}: .*"):
            make_tokenizer(DataConfig(tokenizer=str(path)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("byte", "there is no 'byte' in .*; give bytes, or a file or folder. Did you mean 'bytes'"),
        (
            "folder/engl.model",
            "there is no 'engl.model' in .*folder.* Did you mean 'english.model'",
        ),
        ("foldr/english.model", "there is no 'foldr' in .* Did you mean 'folder'"),
        ("folder/notes.txt", "notes.txt: give bytes, a SentencePiece .model, a tokenizer.json, or"),
        (
            "folder",
            "folder holds english.model, german.model, list.json, notes.txt, .*; give a",
        ),
        ("folder/english.model", "english.model: not a whole SentencePiece model"),
        (
            "folder/table.json",
            "table.json: is no tokenizer.json, it has no model with a vocab.* give",
        ),
        ("folder/words.json", "words.json: a model of type WordPiece; give one of type BPE"),
        ("folder/list.json", "list.json: not a JSON object"),
        ("tiktoken.model", "a file of tiktoken, as Llama 3's, not of SentencePiece"),
    ],
)
def test_names_that_are_no_tokenizer(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in ("english.model", "german.model", "notes.txt"):
        (folder / file).write_text("text")
    (folder / "table.json").write_text('{"a": 0}')
    (folder / "words.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
    (folder / "list.json").write_text("[1]")
    Path("tiktoken.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ConfigError, match=words):
        make_tokenizer(DataConfig(tokenizer=name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"vocab": {"a": 0}}}, "no token for 255 of the 256 bytes, such as 0x00"),
        ({"model": {"vocab": {"a": 0, "b": 0}}}, "the ids of 1 tokens are not those from 0 to 0"),
        ({"model": {"vocab": {"a": 0, "b": 7}}}, "the ids of 2 tokens are not those from 0 to 1"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix '</w>' is not supported"),
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            "takes texts apart by Whitespace, which is not",
        ),
        ({"pre_tokenizer": {"type": "Nothing"}}, "not a whole tokenizer"),
    ],
)
def test_what_is_not_supported_of_a_tokenizer_json(tmp_path, change, words):
    spec = json.loads(byte_level().to_str()) | {"added_tokens": []}
    change = {name: spec[name] | {"merges": []} | part for name, part in change.items()}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec | change))
    with pytest.raises(ConfigError, match=words):
        make_tokenizer(DataConfig(tokenizer=str(path)))


def test_what_would_change_a_text_is_left_out(tmp_path):
    """Truncation, padding, special tokens around the text, and dropout, of a tokenizer.json."""
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=50)
    library.model.dropout = 0.9
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    library = byte_level()
    assert tokenizer.encode(TEXT).tolist() == library.encode(TEXT).ids
    assert isinstance(tokenizer, BPETokenizer)


def test_spaces_at_the_ends_of_pieces_are_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(tmp_path / "a"),
        vocab_size=120,
        treat_whitespace_as_suffix=True,
        minloglevel=2,
    )
    with pytest.raises(ConfigError, match="treat_whitespace_as_suffix"):
        SentencePieceTokenizer((tmp_path / "a.model").read_bytes(), "a.model")
