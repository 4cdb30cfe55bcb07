"""Generation is that of Transformers for the same weights in float32, to the token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.decoding import complete, generate
from gptjax.sampling import Sampling, settings, weights_of

torch = pytest.importorskip("torch", reason="needs the extra parity: torch and transformers")
transformers = pytest.importorskip("transformers", reason="needs the extra parity")

MODEL = GPTConfig(
    vocab_size=101,
    vocab_multiple=8,
    context_size=256,
    num_layers=2,
    width=32,
    num_heads=4,
    compute_dtype="float32",
    attention="xla",
)
KEY = jax.random.key(0)  # nothing is drawn


@pytest.fixture(scope="module")
def theirs():
    """A GPT-2 whose every parameter matters to what it says."""
    torch.set_num_threads(1)  # such small products are only slower on more
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256, "vocab_size": 101}
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.GPT2Config(initializer_range=0.2, **sizes, **ends)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.transformer.wpe.weight.data *= 4  # or it would say one thing again and again
    return model


@pytest.fixture(scope="module")
def params(theirs):
    state = {name.removeprefix("transformer."): x for name, x in theirs.state_dict().items()}
    sizes = MODEL.sizes
    L, D, N, H = (sizes[letter] for letter in "LDNH")

    def stack(name):
        return np.stack([state[f"h.{i}.{name}"].numpy() for i in range(L)])

    def norm(scale, bias):
        return {"scale": scale, "bias": bias}

    weight_LD3NH = stack("attn.c_attn.weight").reshape(L, D, 3, N, H)
    bias_L3NH = stack("attn.c_attn.bias").reshape(L, 3, N, H)
    attention = {
        "out": stack("attn.c_proj.weight").reshape(L, N, H, D),
        "out_bias": stack("attn.c_proj.bias"),
    }
    for i, name in enumerate(("query", "key", "value")):
        attention |= {name: weight_LD3NH[:, :, i], f"{name}_bias": bias_L3NH[:, i]}
    tokens_VD = np.pad(state["wte.weight"].numpy(), ((0, sizes["V"] - 101), (0, 0)))
    tree = {
        "embedding": {"tokens": tokens_VD, "positions": state["wpe.weight"].numpy()},
        "blocks": {
            "attention": attention,
            "attention_norm": norm(stack("ln_1.weight"), stack("ln_1.bias")),
            "ffn_norm": norm(stack("ln_2.weight"), stack("ln_2.bias")),
            "ffn": {
                "up": stack("mlp.c_fc.weight"),
                "up_bias": stack("mlp.c_fc.bias"),
                "down": stack("mlp.c_proj.weight"),
                "down_bias": stack("mlp.c_proj.bias"),
            },
        },
        "head": {"norm": norm(state["ln_f.weight"].numpy(), state["ln_f.bias"].numpy())},
    }
    return jax.tree.map(jnp.asarray, tree)


def prompts_of(number):
    rng = np.random.default_rng(0)
    return [rng.integers(1, 101, size).tolist() for size in rng.integers(1, 40, number)]


def expected(model, prompts, ends=(), **settings):
    """What Transformers makes of the prompts in one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    given = {"attention_mask": torch.from_numpy(mask), "eos_token_id": list(ends) or None}
    out = model.generate(torch.from_numpy(ids), do_sample=False, **given, **settings)
    rows = out[:, longest:].tolist()
    firsts = (min((row.index(end) for end in ends if end in row), default=None) for row in rows)
    return [row[:first] for row, first in zip(rows, firsts, strict=True)]


def ours(params, prompts, ends=(), **settings):
    sampling = Sampling(temperature=0, stop_ids=tuple(ends), **settings)
    return generate(params, prompts, MODEL, sampling, KEY, end=None)


@pytest.fixture(scope="module")
def plain(params):
    """200 greedy tokens of each of 20 prompts."""
    return ours(params, prompts_of(20), max_tokens=200)


def test_200_greedy_tokens_of_20_prompts_of_different_lengths_in_one_batch(theirs, plain):
    assert plain == expected(theirs, prompts_of(20), max_new_tokens=200)
    assert len({token for row in plain for token in row}) > 50  # it says more than one thing


@pytest.mark.parametrize(
    "ours_say, they_say",
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"min_tokens": 15}, {"min_new_tokens": 15}),
    ],
    ids=str,
)
def test_penalties_and_minimum_length_in_one_batch(theirs, params, plain, ours_say, they_say):
    prompts, ends = prompts_of(8), {plain[0][3], plain[1][5]}
    rows = ours(params, prompts, ends, max_tokens=30, **ours_say)
    assert rows == expected(theirs, prompts, ends, max_new_tokens=30, **they_say)


# Transformers counts padding as text here, so each prompt goes to it alone.
@pytest.mark.parametrize(
    "ours_say, they_say",
    [
        ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
        ({"no_repeat_ngram": 4}, {"no_repeat_ngram_size": 4}),
        ({"min_length": 30}, {"min_length": 30}),
        ({"max_tokens": None, "max_length": 45}, {"max_new_tokens": None, "max_length": 45}),
    ],
    ids=str,
)
def test_settings_that_count_the_text_in_one_batch(theirs, params, plain, ours_say, they_say):
    prompts, ends = prompts_of(6), {plain[0][3]}
    rows = ours(params, prompts, ends, **{"max_tokens": 30} | ours_say)
    alone = [
        expected(theirs, [prompt], ends, **{"max_new_tokens": 30} | they_say)[0]
        for prompt in prompts
    ]
    assert rows == alone


def test_4_beams_of_20_prompts_in_one_batch(theirs, params):
    rows = ours(params, prompts_of(20), max_tokens=40, beams=4)
    assert rows == expected(theirs, prompts_of(20), max_new_tokens=40, num_beams=4)


@pytest.mark.parametrize(
    "early_stopping, length_penalty",
    [(False, 1.0), (False, -1.0), (True, 2.0), (True, 0.0), ("never", 0.0), ("never", 2.0)],
)
def test_beams_that_end(theirs, params, plain, early_stopping, length_penalty):
    prompts, ends = prompts_of(8), (plain[0][3], plain[1][5])
    how = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    rows = ours(params, prompts, ends, max_tokens=30, beams=4, **how)
    assert rows == expected(theirs, prompts, ends, max_new_tokens=30, num_beams=4, **how)


def test_several_beams_with_penalties_and_their_scores(theirs, params, plain):
    end, prompt = plain[0][3], prompts_of(1)[0]
    both = {"repetition_penalty": 1.2, "length_penalty": 0.7}
    sampling = Sampling(
        temperature=0,
        max_tokens=30,
        beams=3,
        num_samples=2,
        no_repeat_ngram=2,
        min_tokens=5,
        **both,
    )
    found = complete(params, [prompt], MODEL, sampling, KEY, end=end)
    they_say = {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2} | both
    scored = {"return_dict_in_generate": True, "output_scores": True}
    out = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=30,
        min_new_tokens=5,
        eos_token_id=end,
        **they_say,
        **scored,
    )
    rows = [row[len(prompt) :] for row in out.sequences.tolist()]
    rows = [row[: row.index(end)] if end in row else row for row in rows]
    assert [one.tokens for one in found] == rows
    np.testing.assert_allclose([one.score for one in found], out.sequences_scores, atol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"top_p": 1.0},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 60, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_what_is_drawn_from_is_what_their_warpers_leave(given):
    from transformers.generation import logits_process

    logits = np.random.default_rng(0).normal(0, 3, (5, 300)).astype(np.float32)
    logits[:, 17] = -np.inf
    scores = torch.from_numpy(logits)
    warpers = {
        "temperature": logits_process.TemperatureLogitsWarper,
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    for name, warper in warpers.items():
        if name in given and given[name] != 1.0:
            scores = warper(given[name])(None, scores)
    rules, values = settings(Sampling(**given), [1], ())
    weights = np.asarray(jax.jit(weights_of, static_argnums=2)(logits, values, rules))
    weights = weights.reshape(5, -1)[:, :300]
    probabilities = weights / weights.sum(1, keepdims=True)
    wanted = scores.softmax(-1).numpy()
    np.testing.assert_array_equal(probabilities > 0, wanted > 0)
    np.testing.assert_allclose(probabilities, wanted, atol=1e-6)
