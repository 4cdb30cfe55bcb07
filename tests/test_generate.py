"""What sampling draws from, and what it refuses. That it goes as the plain model does is in
test_laws.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import PLAIN, fresh

from gptjax.config import ConfigError
from gptjax.decoding import generate, next_token_logits, stream
from gptjax.model import forward
from gptjax.sampling import Sampling, choose_token

LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.3, 0.15]))


def drawn(sampling, draws=3000):
    """The share of each id among many draws."""
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = choose_token(jnp.tile(LOGITS, (draws, 1)), keys, sampling)
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
    ],
)
def test_what_cannot_be_drawn_is_refused(params, prompts, sampling, message):
    with pytest.raises(ConfigError, match=message):
        generate(params, prompts, PLAIN, Sampling(**sampling), jax.random.key(0), end=None)
