"""What sampling draws from, and what it refuses. That it goes as the plain model does is in
test_laws.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MODERN, PLAIN, fresh

from gptjax import decoding, prefill
from gptjax.config import ConfigError, MeshConfig
from gptjax.decoding import complete, generate, next_token_logits, score, stream, stream_text
from gptjax.model import abstract_params, forward
from gptjax.prefill import prepare
from gptjax.sampling import Sampling, choose_token, settings
from gptjax.sharding import make_mesh
from gptjax.tokenizer import ByteTokenizer

KEY = jax.random.key(0)
LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.3, 0.15]))


def drawn(sampling, draws=3000):
    """The share of each id among many draws."""
    keys = jax.random.split(jax.random.key(0), draws)
    rules, values = settings(sampling, [1], ())
    tokens = jax.jit(choose_token, static_argnums=3)(
        jnp.tile(LOGITS, (draws, 1)), keys, values, rules
    )
    return np.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(temperature=1.0), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(temperature=0.5), np.square([0.05, 0.4, 0.1, 0.3, 0.15]) / 0.285),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=99), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(top_p=0.6), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.75), [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(top_p=1.0), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (Sampling(min_p=0.3), [0, 8 / 17, 0, 6 / 17, 3 / 17]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities(sampling, expected):
    np.testing.assert_allclose(drawn(sampling), expected, atol=0.03)
    assert not drawn(sampling)[np.array(expected) == 0].any()


@pytest.fixture(scope="module")
def params():
    return fresh(PLAIN, jax.random.key(0))


def test_a_row_stops_before_its_end_token_and_the_others_go_on(params):
    greedy, key = Sampling(max_tokens=20, temperature=0), jax.random.key(0)
    prompts = [[1, 2], [5, 6, 7]]
    free = generate(params, prompts, PLAIN, greedy, key, end=None)
    end = free[0][4]
    first = free[0].index(end)
    stopped = generate(params, prompts, PLAIN, greedy, key, end=end)
    assert stopped[0] == free[0][:first]
    assert stopped[1] == (free[1][: free[1].index(end)] if end in free[1] else free[1])
    assert list(stream(params, prompts[0], PLAIN, greedy, key, end=end)) == stopped[0]


def test_the_same_key_draws_the_same_and_another_does_not(params):
    sampling = Sampling(max_tokens=20, temperature=1.0)
    a, b, c = (
        generate(params, [[1]], PLAIN, sampling, jax.random.key(seed), end=None)
        for seed in (0, 0, 1)
    )
    assert a == b != c


def test_no_tokens_are_none(params):
    nothing = Sampling(max_tokens=0)
    assert generate(params, [[1], [2]], PLAIN, nothing, jax.random.key(0), end=None) == [[], []]


def test_next_token_logits_are_those_of_the_last_position(params):
    prompt = list(range(PLAIN.context_size + 5))
    window = np.array(prompt[-PLAIN.context_size :])[None]
    expected = forward(params, window, PLAIN)[0][0, -1]
    np.testing.assert_allclose(next_token_logits(params, prompt, PLAIN), expected, atol=1e-4)


@pytest.mark.parametrize(
    "prompts, sampling, message",
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[61]], {}, "ids from 61 to 61: the vocabulary has 0 to 60"),
        ([[-1]], {}, "ids from -1"),
        ([[1]], {"temperature": -1.0}, "temperature = -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature = nan"),
        ([[1]], {"top_k": 0}, "top_k = 0"),
        ([[1]], {"top_p": 1.5}, "top_p = 1.5"),
        ([[1]], {"max_tokens": -2}, "max_tokens = -2"),
        ([[1]], {"min_p": 0.0}, "min_p = 0.0"),
        ([[1]], {"stride": 32}, "stride = 32: give 1 to 31"),
        ([[1]], {"stop": ("x",)}, "strings need a tokenizer"),
        ([[1]], {"stop_ids": (61,)}, "stop_ids = .61,.: give ids from 0 to 60"),
        ([[1]], {"beams": 2}, "beams = 2 with temperature = 1.0"),
        ([[1]], {"beams": 2, "temperature": 0, "max_tokens": 40}, "must fit the context of 32"),
    ],
)
def test_what_cannot_be_drawn_is_refused(params, prompts, sampling, message):
    with pytest.raises(ConfigError, match=message):
        generate(params, prompts, PLAIN, Sampling(**sampling), KEY, end=None)


def test_all_that_is_wrong_is_said_at_once(params):
    wrong = Sampling(top_k=0, min_tokens=-1, num_samples=0)
    with pytest.raises(ConfigError, match=r"end = 99.*prompt 0.*min_tokens.*top_k.*num_samples"):
        generate(params, [[]], PLAIN, wrong, KEY, end=99)


# --- each row as if alone ------------------------------------------------------------------------

EVERYTHING = {
    "max_tokens": 12,
    "temperature": 1.3,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "no_repeat_ngram": 2,
    "min_tokens": 4,
    "num_samples": 2,
}


def test_samples_with_penalties_do_not_depend_on_the_other_rows(params):
    sampling = Sampling(**EVERYTHING)
    prompts = [[1, 2, 3], [4, 5] * 8, [6]]
    texts = generate(params, prompts, PLAIN, sampling, KEY, end=7)
    assert len(texts) == 6 and len({*map(tuple, texts)}) == 6
    others = [[9] * 30, prompts[1], [8, 7, 3, 2, 1]]
    assert generate(params, others, PLAIN, sampling, KEY, end=7)[2:4] == texts[2:4]
    assert generate(params, prompts[:1], PLAIN, sampling, KEY, end=7) == texts[:2]


def test_penalties_are_what_they_say(params):
    """Presence and frequency, by hand: of the text alone, not of the prompt."""
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.4}
    sampling = Sampling(max_tokens=12, temperature=0, **penalties)
    text, counts = [3, 3, 8], np.zeros(61)
    for token in generate(params, [text], PLAIN, sampling, KEY, end=None)[0]:
        logits = next_token_logits(params, text, PLAIN) - 0.5 * (counts > 0) - 0.4 * counts
        assert token == logits.argmax()
        counts[token] += 1
        text = [*text, token]
    assert counts.max() > 1


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(MeshConfig(data=8), marks=pytest.mark.slow), MeshConfig(fsdp=4, tensor=2)],
    ids=str,
)
def test_eight_devices_choose_the_tokens_of_one(params, mesh):
    like = abstract_params(PLAIN, make_mesh(mesh))
    sharded = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, like)
    prompts = [[1, 2, 3], [4, 5] * 8, [6], [7, 8]]
    for sampling in (Sampling(**EVERYTHING), Sampling(max_tokens=8, temperature=0, beams=2)):
        one = generate(params, prompts, PLAIN, sampling, KEY, end=7)
        assert generate(sharded, prompts, PLAIN, sampling, KEY, end=7) == one


def test_nothing_is_compiled_for_a_prompt_or_a_value(params):
    def sizes():
        compiled = (prefill._prefill, prefill._fit, decoding._first, decoding._decode)
        return [function._cache_size() for function in compiled]

    ready = prepare(params, PLAIN)
    generate(ready, [[1, 2], [3]], PLAIN, Sampling(**EVERYTHING), KEY, end=7)
    before = sizes()
    values = {"temperature": 0.4, "top_k": 3, "top_p": 0.5, "repetition_penalty": 2.0}
    values |= {"max_tokens": 9, "min_tokens": 2, "presence_penalty": 1.0}
    another = Sampling(**EVERYTHING | values)
    generate(ready, [[4, 5, 6, 7], [8] * 3], PLAIN, another, jax.random.key(5), end=9)
    assert sizes() == before


# --- beyond the context --------------------------------------------------------------------------

RINGED = dataclasses.replace(
    MODERN, num_layers=3, window=7, window_every=1, vocab_size=61, context_size=16
)


def test_a_ring_of_a_window_is_as_no_cache_at_all():
    params = fresh(RINGED, jax.random.key(0))
    run = jax.jit(lambda tokens: forward(params, tokens, RINGED)[0][0])
    prompts, greedy = [[1, 2, 3], list(range(40))], Sampling(max_tokens=90, temperature=0)
    assert prefill.num_slots(RINGED, 500) == 64  # so both rows go round
    for prompt, new in zip(
        prompts, generate(params, prompts, RINGED, greedy, KEY, end=None), strict=True
    ):
        text = [*prompt, *new]
        assert len(text) > 64 + 16
        logits = run(np.pad(text, (0, 130 - len(text)))[None])
        assert new == logits[len(prompt) - 1 : len(text) - 1].argmax(-1).tolist()
        assert list(stream(params, prompt, RINGED, greedy, KEY, end=None)) == new


def test_a_window_slides_by_its_stride(params):
    """By the definition: read the window again for every token."""
    greedy = Sampling(max_tokens=60, temperature=0, stride=5)
    prompt, context = [1, 2, 3], PLAIN.context_size
    (new,) = generate(params, [prompt], PLAIN, greedy, KEY, end=None)
    text, start = list(prompt), 0
    for token in new:
        if len(text) - start > context:
            start = len(text) - (context - 5)
        assert next_token_logits(params, text[start:], PLAIN).argmax() == token
        text.append(token)


# --- where a text ends ---------------------------------------------------------------------------

BYTES = ByteTokenizer()
TALKER = dataclasses.replace(PLAIN, vocab_size=BYTES.vocab_size, context_size=64)


@pytest.fixture(scope="module")
def talker():
    """The parameters of a model of bytes, and what it says: any string of it can be a stop."""
    params = prepare(fresh(TALKER, jax.random.key(3)), TALKER)
    sampling = Sampling(max_tokens=40, temperature=0.9)
    prompt = BYTES.encode("begin").tolist()
    (said,) = complete(params, [prompt], TALKER, sampling, KEY, end=None, tokenizer=BYTES)
    return params, prompt, sampling, said


def test_a_stop_string_ends_a_text_before_it_also_across_tokens(talker):
    params, prompt, sampling, said = talker
    for first, last in ((2, 3), (10, 13), (20, 26)):
        stop = said.text[first:last]
        stopping = dataclasses.replace(sampling, stop=("never said", stop))
        rows = [prompt, [1, 2, 3]]
        one, other = complete(params, rows, TALKER, stopping, KEY, end=None, tokenizer=BYTES)
        assert one.reason == "stop"
        assert one.text == said.text[: said.text.index(stop)]
        assert one.tokens == said.tokens[: len(one.tokens)]
        assert BYTES.decode(one.tokens).endswith(stop)
        assert other.reason in ("stop", "length")
        pieces = [*stream_text(params, prompt, TALKER, stopping, KEY, end=None, tokenizer=BYTES)]
        assert "".join(pieces) == one.text


def test_a_text_is_whole_where_a_stop_string_only_begins(talker):
    params, prompt, sampling, said = talker
    stopping = dataclasses.replace(sampling, stop=(said.text[-2:] + "?",))
    pieces = stream_text(params, prompt, TALKER, stopping, KEY, end=None, tokenizer=BYTES)
    assert "".join(pieces) == said.text


def test_a_stop_id_ends_a_text_before_it(talker):
    params, prompt, sampling, said = talker
    end = said.tokens[9]
    stopping = dataclasses.replace(sampling, stop_ids=(end,))
    (one,) = complete(params, [prompt], TALKER, stopping, KEY, end=None)
    assert (one.reason, one.text) == ("end", None)
    assert one.tokens == said.tokens[: said.tokens.index(end)]


def test_a_stream_that_is_closed_stops(talker):
    params, prompt, sampling, said = talker
    tokens = stream(params, prompt, TALKER, sampling, KEY, end=None)
    assert [next(tokens), next(tokens)] == said.tokens[:2]
    tokens.close()
    assert list(tokens) == []


@pytest.mark.parametrize("sampling", [Sampling(temperature=2.0), Sampling(beams=3, temperature=0)])
def test_ids_that_a_tokenizer_does_not_have_never_come(sampling):
    """Of a vocabulary that was padded; without a tokenizer they come as all others."""
    padded = dataclasses.replace(TALKER, vocab_size=512)
    params = prepare(fresh(padded, jax.random.key(3)), padded)
    sampling = dataclasses.replace(sampling, max_tokens=40)
    prompts = [BYTES.encode(text).tolist() for text in ("begin", "and so", "it", "goes")]
    given = (params, prompts, padded, sampling, KEY)
    free = generate(*given, end=None)
    kept = complete(*given, end=None, tokenizer=BYTES)
    assert max(map(max, free)) >= BYTES.vocab_size > max(max(one.tokens) for one in kept)
    assert all(one.text == BYTES.decode(one.tokens) for one in kept)
    if sampling.beams == 1:
        pieces = stream_text(params, prompts[0], *given[2:], end=None, tokenizer=BYTES)
        assert "".join(pieces) == kept[0].text


def test_the_samples_of_a_stream_are_those_of_a_batch(talker):
    params, prompt, sampling, _ = talker
    three = dataclasses.replace(sampling, num_samples=3)
    whole = complete(params, [prompt], TALKER, three, KEY, end=None, tokenizer=BYTES)
    for sample, one in enumerate(whole):
        given = (params, prompt, TALKER, sampling, KEY)
        pieces = stream_text(*given, end=None, tokenizer=BYTES, sample=sample)
        assert "".join(pieces) == one.text
    assert len({one.text for one in whole}) == 3


# --- log-probabilities ---------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model_and_scores_agree(params):
    prompts = [[1, 2, 3], [4, 5] * 8]
    sampling = Sampling(max_tokens=10, temperature=0.5, top_k=5, logprobs=3)
    found = complete(params, prompts, PLAIN, sampling, KEY, end=None)
    scores = score(params, prompts, [one.tokens for one in found], PLAIN)
    for prompt, one, given in zip(prompts, found, scores, strict=True):
        text = np.array([*prompt, *one.tokens])[None]
        table = jax.nn.log_softmax(forward(params, text, PLAIN)[0][0])[len(prompt) - 1 : -1]
        chosen = np.take_along_axis(np.asarray(table), text[0, len(prompt) :, None], 1)[:, 0]
        np.testing.assert_allclose(one.logprobs, chosen, atol=1e-4)
        np.testing.assert_allclose(given.logprobs, chosen, atol=1e-4)
        assert given.total == pytest.approx(chosen.sum(), abs=1e-3)
        for row, top in zip(np.asarray(table), one.top, strict=True):
            assert [token for token, _ in top] == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose([value for _, value in top], np.sort(row)[:-4:-1], atol=1e-4)


def test_what_cannot_be_scored_is_refused(params):
    with pytest.raises(ConfigError, match=r"1 prompts, but 2 continuations.*continuation 1 holds"):
        score(params, [[1]], [[2], [61]], PLAIN)
    with pytest.raises(ConfigError, match="continuation 0 has 33 ids, and the context 32"):
        score(params, [[1]], [[2] * 33], PLAIN)
