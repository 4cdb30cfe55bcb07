"""Text to ids and back loses nothing, and a saved tokenizer is the one that comes back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import ConfigError, DataConfig
from gptjax.tokenizer import ByteTokenizer, StreamDecoder, load_tokenizer, make_tokenizer

TOKENIZER = ByteTokenizer()
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_bytes_come_back(content, cut):
    ids = TOKENIZER.encode(content)
    assert ids.dtype == np.int32 and ids.shape == (len(content),)
    assert TOKENIZER.decode_bytes(ids) == content
    pieces = list(TOKENIZER.encode_pieces([content[:cut], content[cut:]]))
    np.testing.assert_array_equal(np.concatenate(pieces), ids)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=100))
def test_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.bytes_per_token[ids].sum() == len(text.encode())


def test_no_text_becomes_a_special_id():
    ids = TOKENIZER.encode(bytes(range(256)))
    assert {TOKENIZER.end, TOKENIZER.pad}.isdisjoint(ids.tolist())
    assert TOKENIZER.decode([TOKENIZER.end, 65, TOKENIZER.pad, 66, TOKENIZER.end]) == "AB"
    assert TOKENIZER.bytes_per_token[[TOKENIZER.end, TOKENIZER.pad]].tolist() == [0, 0]
    assert len(TOKENIZER.bytes_per_token) == TOKENIZER.vocab_size


@pytest.mark.parametrize("token", [-1, TOKENIZER.vocab_size])
def test_ids_outside_are_refused(token):
    with pytest.raises(ValueError, match=f"id {token}: ids of bytes go from 0 to 257"):
        TOKENIZER.decode([65, token])


@settings(max_examples=200, deadline=None)
@given(st.one_of(IDS, st.text(max_size=20).map(TOKENIZER.encode)))
def test_a_stream_is_the_whole(ids):
    stream = StreamDecoder(TOKENIZER)
    assert "".join([stream.push(token) for token in ids] + [stream.flush()]) == TOKENIZER.decode(
        ids
    )


def test_a_stream_never_splits_a_character():
    stream = StreamDecoder(TOKENIZER)
    pushed = [stream.push(token) for token in TOKENIZER.encode("aé中🙂")]
    assert [text for text in pushed if text] == ["a", "é", "中", "🙂"]
    assert stream.flush() == ""


def test_saved_comes_back(tmp_path):
    make_tokenizer(DataConfig(tokenizer="bytes")).save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").fingerprint == TOKENIZER.fingerprint


def test_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(tmp_path)
    TOKENIZER.save(tmp_path)
    path = tmp_path / "gptjax_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "f" * 64}))
    with pytest.raises(ConfigError, match=f"(?s)ffff.*{TOKENIZER.fingerprint}"):
        load_tokenizer(tmp_path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_tokenizer(tmp_path)
