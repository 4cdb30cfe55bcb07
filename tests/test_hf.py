"""Models of Transformers in and out: the same numbers, and every refusal."""

import json
import resource
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MODERN, PLAIN, fresh

from gptjax.cli import run_verb
from gptjax.config import GPTConfig, MeshConfig
from gptjax.hf import load_hf, read_hf_labels, save_hf
from gptjax.hf.tensors import HEADER_BYTES, find_tensors, read_header
from gptjax.hf.tokenizers import write_tokenizer
from gptjax.loading import task_of
from gptjax.model import forward
from gptjax.rundir import CheckpointError
from gptjax.sharding import make_mesh
from gptjax.tokenizer import ByteTokenizer

GPT2 = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
NEO = {"max_position_embeddings": 32, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
NEO |= {"window_size": 5, "attention_types": [[["global", "local"], 1]]}
LLAMA = {"max_position_embeddings": 32, "hidden_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CLASSES = "GPT2ForSequenceClassification"
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}

# Class of Transformers, and its options.
QUICK = {
    "gpt2": ("GPT2", GPT2 | {"vocab_size": 61}),
    "gpt2 with other options": (
        "GPT2",
        GPT2
        | {"vocab_size": 67, "n_inner": 40, "activation_function": "gelu", "n_layer": 1}
        | {"scale_attn_weights": False, "tie_word_embeddings": False},
    ),
    "gpt1": ("OpenAIGPT", GPT2 | {"vocab_size": 61}),
    "gpt_neo": ("GPTNeo", NEO | {"vocab_size": 61}),
    "llama": ("Llama", LLAMA | {"vocab_size": 61}),
    "llama 3.1": (
        "Llama",
        LLAMA | {"vocab_size": 64, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", LLAMA | {"vocab_size": 61, "sliding_window": 7}),
}
MORE = {
    f"gpt2 {layers}": (
        "GPT2",
        GPT2
        | {"vocab_size": vocabulary, "n_layer": layers, "n_head": heads, "n_embd": width}
        | {"activation_function": activation},
    )
    for layers, vocabulary, heads, width, activation in [
        (1, 1, 1, 8, "relu"),
        (3, 257, 3, 24, "silu"),
        (4, 129, 2, 48, "gelu_pytorch_tanh"),
    ]
}
MORE |= {
    f"gpt1 {layers}": (
        "OpenAIGPT",
        GPT2
        | {"vocab_size": vocabulary, "n_layer": layers, "n_head": heads, "n_embd": width}
        | {"afn": activation},
    )
    for layers, vocabulary, heads, width, activation in [
        (1, 63, 1, 8, "relu"),
        (3, 257, 3, 24, "silu"),
        (4, 129, 2, 48, "gelu"),
    ]
}
MORE |= {
    f"gpt_neo {layers} {turn}": (
        "GPTNeo",
        NEO
        | {"vocab_size": vocabulary, "num_layers": layers, "hidden_size": width}
        | {"attention_types": [[turn, layers // len(turn)]], "window_size": window},
    )
    for layers, vocabulary, width, turn, window in [
        (1, 63, 16, ["global"], 5),
        (3, 257, 32, ["local"], 1),
        (4, 129, 64, ["global", "local"], 31),
        (4, 65, 32, ["global", "global", "global", "local"], 8),
    ]
}
MORE |= {
    f"llama {layers}": (
        "Llama",
        LLAMA
        | {"vocab_size": vocabulary, "num_hidden_layers": layers, "num_key_value_heads": kv_heads}
        | {"head_dim": head_size, "attention_bias": bias, "mlp_bias": bias},
    )
    for layers, vocabulary, kv_heads, head_size, bias in [
        (1, 63, 1, 8, False),
        (3, 257, 4, 16, True),
        (4, 129, 2, 6, False),
    ]
}
MORE |= {
    f"mistral {layers}": (
        "Mistral",
        LLAMA | {"vocab_size": 63, "num_hidden_layers": layers, "sliding_window": window},
    )
    for layers, window in [(1, None), (3, 1), (4, 16)]
}
MORE["gpt_neo exact"] = (
    "GPTNeo",
    NEO | {"vocab_size": 99, "activation_function": "gelu", "intermediate_size": 20},
)
EVERY = [pytest.param(*given, id=name) for name, given in QUICK.items()]
EVERY += [pytest.param(*given, id=name, marks=pytest.mark.slow) for name, given in MORE.items()]


def test_there_are_24_models():
    assert len(QUICK) + len(MORE) >= 24


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    library = pytest.importorskip(
        "transformers", reason="needs transformers: pip install -e '.[parity]'"
    )
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def random_model(library, name, options):
    """A model whose parameters are all random, biases and scales too."""
    import torch

    torch.manual_seed(0)
    config = getattr(library, f"{name}Config")(**options, bos_token_id=0, eos_token_id=0)
    model = library.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


run = jax.jit(forward, static_argnames="config")


def some_tokens(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, config.context_size))


def contents(folder):
    return {name: one.open() for name, one in find_tensors(folder).items()}


def assert_same_tensors(folder, other):
    a, b = contents(folder), contents(other)
    assert {*a} == {*b}
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("name, options", EVERY)
def test_what_comes_in_predicts_the_same_and_goes_out_as_it_was(
    transformers, tmp_path, name, options
):
    theirs = random_model(transformers, name, options)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    tokens = some_tokens(config)
    expected = their_logits(theirs, tokens)
    assert abs(run(params, tokens, config)[0] - expected).max() < 1e-4
    save_hf(tmp_path / "ours", config, params)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    if config.window or name not in ("GPTNeo", "Mistral"):  # without a band they are others
        assert type(opened) is type(theirs)
        assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
        jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "ours")[1], params)
    np.testing.assert_allclose(their_logits(opened, tokens), expected, atol=1e-5)


OURS = {
    "plain": (PLAIN, "GPT2LMHeadModel"),
    "without biases": (replace(PLAIN, bias=False), "GPT2LMHeadModel"),
    "after": (replace(PLAIN, norm_place="after"), "OpenAIGPTLMHeadModel"),
    "banded": (replace(PLAIN, query_bias=False, window=5, window_every=2), "GPTNeoForCausalLM"),
    "modern": (replace(MODERN, window=None, window_every=1), "LlamaForCausalLM"),
    "modern, banded": (replace(MODERN, window_every=1), "MistralForCausalLM"),
}


def ours(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32),
        jax.device_get(fresh(config, jax.random.key(0))),
    )


@pytest.mark.parametrize("config, name", OURS.values(), ids=OURS)
def test_what_goes_out_is_opened_there_as_it_is(transformers, tmp_path, config, name):
    params, tokens = jax.device_put(ours(config)), some_tokens(config)
    assert save_hf(tmp_path / "out", config, params) == name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == name and theirs.config.vocab_size == config.vocab_size
    difference = abs(their_logits(theirs, tokens) - run(params, tokens, config)[0])
    assert difference.max() < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture(scope="module")
def folder(transformers, tmp_path_factory):
    """A model of GPT-2 that Transformers wrote."""
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    random_model(transformers, *QUICK["gpt2"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_become_the_numbers_that_they_are(transformers, folder, tmp_path, dtype):
    import torch

    half = transformers.AutoModelForCausalLM.from_pretrained(folder).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path)
    weight = half.transformer.h[1].mlp.c_fc.weight.detach().float().numpy()
    _, params = load_hf(tmp_path)
    np.testing.assert_array_equal(params["blocks"]["ffn"]["up"][1], weight)
    assert load_hf(tmp_path, dtype="bfloat16")[1]["head"]["norm"]["scale"].dtype == jnp.bfloat16


def test_shards_and_prefixes_make_no_difference(transformers, folder, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    theirs.transformer.save_pretrained(tmp_path / "bare")
    config, params = load_hf(folder)
    for other in ("shards", "bare"):
        other_config, other_params = load_hf(tmp_path / other)
        assert other_config == config
        jax.tree.map(np.testing.assert_array_equal, other_params, params)
    save_hf(tmp_path / "ours", config, params, shard_bytes=20_000)
    assert len([*(tmp_path / "ours").glob("*.safetensors")]) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = some_tokens(config)
    np.testing.assert_array_equal(their_logits(again, tokens), their_logits(theirs, tokens))


def test_a_mesh_holds_what_one_device_does(folder, tmp_path):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    (config, params), (_, spread) = load_hf(folder), load_hf(folder, mesh)
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    halves = make_mesh(MeshConfig(data=4, tensor=2))  # the second holds nothing but padding
    padded = load_hf(folder, halves, vocab_multiple=128)[1]["embedding"]["tokens"]
    np.testing.assert_array_equal(padded[:64], params["embedding"]["tokens"])
    assert not np.asarray(padded)[61:].any()
    up = spread["blocks"]["ffn"]["up"]
    assert up.addressable_shards[0].data.size == up.size // 8
    save_hf(tmp_path / "out", config, spread)
    assert_same_tensors(folder, tmp_path / "out")


def test_bfloat16_goes_out_rounded(tmp_path):
    params = jax.device_put(ours(PLAIN))
    save_hf(tmp_path / "out", PLAIN, params, dtype="bfloat16")
    assert {one.dtype for one in find_tensors(tmp_path / "out").values()} == {"BF16"}
    _, back = load_hf(tmp_path / "out", vocab_multiple=PLAIN.vocab_multiple)
    known = slice(PLAIN.vocab_size)
    rounded = params["embedding"]["tokens"].astype(jnp.bfloat16)[known]
    np.testing.assert_array_equal(back["embedding"]["tokens"][known], rounded)


# --- heads of tasks ------------------------------------------------------------------------------

# Class of Transformers, its options, and what the head is for.
WITH_HEADS = {
    "classes": ("SequenceClassification", {"num_labels": 3}, "classify"),
    "more classes than width": ("SequenceClassification", {"num_labels": 40}, "classify"),
    "several classes": (
        "SequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        "classify",
    ),
    "tags": ("TokenClassification", {"id2label": {0: "O", 1: "B-X", 2: "I-X"}}, "entities"),
    "passages": ("QuestionAnswering", {}, "questions"),
}


def head_model(library, name, options):
    """As `random_model`, with a head."""
    import torch

    torch.manual_seed(0)
    options = GPT2 | {"vocab_size": 61, "pad_token_id": 60} | options
    config = library.GPT2Config(**options, bos_token_id=0, eos_token_id=0)
    model = getattr(library, f"GPT2For{name}")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model


def head_logits(model, tokens):
    """Logits at each position, or for each row."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor(tokens))
    if hasattr(out, "logits"):
        return out.logits.numpy()
    return np.stack([out.start_logits.numpy(), out.end_logits.numpy()], axis=-1)


def ragged_tokens():
    """Rows whose last tokens are padding, and how many are not."""
    tokens = np.random.default_rng(1).integers(0, 60, (4, 32))
    lengths = np.array([32, 1, 7, 20])
    tokens[np.arange(32) >= lengths[:, None]] = 60
    return tokens, lengths


def our_logits(params, tokens, lengths, config, task):
    logits = np.asarray(run(params, tokens, config)[0])
    return logits[np.arange(4), lengths - 1] if task == "classify" else logits


@pytest.mark.parametrize("name, options, task", WITH_HEADS.values(), ids=WITH_HEADS)
def test_heads_say_the_same_and_go_out_as_they_came(transformers, tmp_path, name, options, task):
    theirs = head_model(transformers, name, options)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    kind, labels = read_hf_labels(tmp_path / "theirs")
    assert kind == task and len(labels) == (config.num_labels or 0)
    tokens, lengths = ragged_tokens()
    expected = head_logits(theirs, tokens)
    assert abs(our_logits(params, tokens, lengths, config, task) - expected).max() < 1e-4
    save_hf(tmp_path / "ours", config, params, task=task, labels=labels)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    opened = type(theirs).from_pretrained(tmp_path / "ours", pad_token_id=60)
    assert opened.config.id2label == theirs.config.id2label or task == "questions"
    assert ("problem_type" in options) == (config.head == "labels")
    np.testing.assert_allclose(head_logits(opened, tokens), expected, atol=1e-5)


@pytest.mark.parametrize("head", ["label", "labels"])
def test_a_bias_of_classes_goes_out_in_that_of_the_last_norm(transformers, tmp_path, head):
    task = "classify"
    config = replace(PLAIN, head=head, num_labels=5)
    params, (tokens, lengths) = jax.device_put(ours(config)), ragged_tokens()
    assert np.asarray(params["head"]["label_bias"]).any()
    names = ("bad", "good", "x y", "ö", "5")
    name = save_hf(tmp_path / "out", config, params, task=task, labels=names)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "out", pad_token_id=60
    )
    assert name == type(theirs).__name__ and read_hf_labels(tmp_path / "out") == (task, names)
    assert theirs.config.label2id == {one: number for number, one in enumerate(names)}
    difference = head_logits(theirs, tokens) - our_logits(params, tokens, lengths, config, task)
    assert abs(difference).max() < 1e-4


def test_heads_that_no_architecture_holds(tmp_path):
    def refused(task=None, **change):
        config = replace(PLAIN, **change)
        with pytest.raises(CheckpointError) as found:
            save_hf(tmp_path / "out", config, jax.device_put(ours(config)), task=task)
        return str(found.value)

    both = {"head": "label", "num_labels": 3, "bidirectional": True}
    words = "GPT2ForTokenClassification: model.bidirectional = True"
    assert words in refused("entities", **both)
    words = "GPT2ForQuestionAnswering: model.positions = 'rope'"
    assert words in refused(head="span", positions="rope")
    words = "GPT2ForSequenceClassification: model.pool = 'mean'"
    assert words in refused("classify", head="label", num_labels=3, pool="mean")
    assert "as model.width = 32" in refused(head="label", num_labels=40)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["classify", "entities"])
def test_predictions_are_what_transformers_says_of_the_same_texts(transformers, tmp_path, kind):
    """From their folder to lines of JSON; also where tags are of no scheme."""
    names = {0: "O", 1: "PER", 2: "LOC", 3: "THING"}
    what = {"classify": "SequenceClassification", "entities": "TokenClassification"}[kind]
    options = {"id2label": names, "vocab_size": 258, "pad_token_id": 257}
    theirs = head_model(transformers, what, options)
    theirs.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs", ByteTokenizer(), GPTConfig(vocab_size=258))
    run_verb(["convert", str(tmp_path / "theirs"), str(tmp_path / "run")])
    sentences = [["Ann", "sings"], ["in", "the", "old", "bar"], ["so", "it", "goes"]]
    given, out = tmp_path / "given.jsonl", tmp_path / "out.jsonl"
    lines = [{"words": words, "text": " ".join(words)} for words in sentences]
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_verb(["predict", str(tmp_path / "run"), str(given), "--out", str(out)])
    for words, line in zip(sentences, map(json.loads, out.open()), strict=True):
        text = " ".join(words).encode()
        logits = head_logits(theirs, np.array([[*text]]))[0]
        if kind == "classify":
            shares = np.exp(logits - np.logaddexp.reduce(logits))
            expected = dict(zip(names.values(), shares.tolist(), strict=True))
            assert line["probabilities"] == pytest.approx(expected, abs=1e-4)
            continue
        ends = np.cumsum([len(word) + 1 for word in words]) - 2
        said = [names[int(number)] for number in logits[ends].argmax(-1)]
        assert [tag.split("-")[-1] for tag in line["tags"]] == said


def test_a_head_of_one_label_is_no_class(transformers, tmp_path):
    """Transformers takes it for regression, unless it says otherwise."""
    head_model(transformers, "SequenceClassification", {"num_labels": 1}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="one label and no problem_type, which is regression"):
        load_hf(tmp_path)


@pytest.mark.parametrize("delimit", [False, True])
def test_how_examples_were_shown_goes_out_with_a_head(tmp_path, delimit):
    config = replace(PLAIN, head="span")
    params = jax.device_put(ours(config))
    save_hf(tmp_path / "out", config, params, task="questions", delimit=delimit)
    assert task_of(tmp_path / "out") == ("questions", (), delimit)
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    del values["task_specific_params"]
    path.write_text(json.dumps(values))
    assert not task_of(tmp_path / "out").delimit  # of others: as Transformers shows them


def test_names_of_labels_that_are_no_list_are_refused(transformers, tmp_path):
    model = head_model(transformers, "SequenceClassification", {"num_labels": 2})
    model.save_pretrained(tmp_path / "it")
    assert read_hf_labels(tmp_path / "it") == ("classify", ("LABEL_0", "LABEL_1"))
    for names in ({"0": "a", "2": "b"}, {"0": 1}, {}, ["a"]):
        other = rewrite(tmp_path / "it", tmp_path / "other", {"id2label": names})
        with pytest.raises(CheckpointError, match="does not name every label from 0 on"):
            load_hf(other)
        shutil.rmtree(other)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"window": 4}, ["GPTNeoForCausalLM: model.query_bias = True\n"]),
        ({"positions": "rope"}, ["LlamaForCausalLM: model.norm = 'layernorm', model.activation"]),
        ({"num_kv_heads": 2}, ["GPT2LMHeadModel: model.num_kv_heads = 2\n"]),
    ],
    ids=str,
)
def test_a_model_that_no_architecture_holds(tmp_path, change, words):
    config = replace(PLAIN, **change)
    with pytest.raises(CheckpointError) as refused:
        save_hf(tmp_path / "out", config, {})
    assert all(word in str(refused.value) for word in words), refused.value
    assert not [*tmp_path.iterdir()]


def test_what_is_written_wrong_is_not_kept(tmp_path, monkeypatch):
    from gptjax.hf import architectures

    places = dict(architectures.GPT2.places)
    names = [f"blocks/{norm}/scale" for norm in ("attention_norm", "ffn_norm")]
    places |= zip(names, [places[name] for name in reversed(names)], strict=True)
    wrong = architectures.GPT2._replace(places=places)
    monkeypatch.setattr("gptjax.hf.closest", lambda config, task: wrong)
    with pytest.raises(CheckpointError, match="logits that differ by up to"):
        save_hf(tmp_path / "out", PLAIN, jax.device_put(ours(PLAIN)))
    assert not [*tmp_path.iterdir()]


def rewrite(folder, to, change):
    """A copy of a folder with other options in its config.json."""
    shutil.copytree(folder, to)
    options = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(options | change))
    return to


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"architectures": [CLASSES], "problem_type": "regression"}, "problem_type = 'regression'"),
        ({"model_type": "bloom"}, "model_type = 'bloom': give a model of gpt2, openai-gpt"),
        ({"activation_function": "mish"}, "the activation 'mish'"),
        ({"n_layer": "2"}, "model.num_layers = '2': must be a whole number"),
        ({"n_head": 5}, "model.width = 32 is not a multiple of model.num_heads = 5"),
        ({"n_inner": 50}, "mlp.c_fc.weight: F32[32, 128], wanted [32, 50]"),
        ({"n_layer": 1}, "not known: transformer.h.1.ln_1.weight [32]"),
        ({"n_layer": 3}, "missing: transformer.h.2.mlp.c_proj.weight [128, 32]"),
    ],
    ids=str,
)
def test_options_that_are_not_those_of_the_tensors(folder, tmp_path, change, words):
    with pytest.raises(CheckpointError) as refused:
        load_hf(rewrite(folder, tmp_path / "other", change))
    assert words in str(refused.value)
    assert str(tmp_path / "other") in str(refused.value)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_not_run(folder, tmp_path):
    import pickle

    other, canary = rewrite(folder, tmp_path / "other", {}), tmp_path / "canary"
    single, code = other / "model.safetensors", pickle.dumps(Canary(canary))
    single.write_bytes(code)
    with pytest.raises(CheckpointError, match="a pickle, which may run code"):
        load_hf(other)
    with zipfile.ZipFile(single, "w") as file:
        file.writestr("archive/data.pkl", code)
    with pytest.raises(CheckpointError, match="a zip file, as of PyTorch, which may run code"):
        load_hf(other)
    single.rename(other / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin but no.*save_pretrained"):
        load_hf(other)
    assert not canary.exists()


def one(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HOSTILE = {
    "empty": (b"", "ends after 0 bytes"),
    "huge header": (file_of({}, length=10**12), "1,000,000,000,000 bytes"),
    "large header": (file_of(b" " * (HEADER_BYTES + 1)), "at most"),
    "truncated header": (file_of({}, length=99), "only 2 are there"),
    "no JSON": (file_of(b"\xff{}"), "codec"),
    "deep": (file_of(b"[" * 100_000), "not a sound"),
    "no object": (file_of([]), "not a JSON object"),
    "a name twice": (file_of(b'{"a": 1, "a": 2}'), "a name is there twice"),
    "overlap": (file_of({"a": one(0, 8), "b": one(4, 12)}, bytes(12)), "'b' overlaps"),
    "all in one place": (file_of({"a": one(0, 8), "b": one(0, 8)}, bytes(8)), "overlaps"),
    "hole": (file_of({"a": one(0, 8), "b": one(12, 20)}, bytes(20)), "'b' comes after a hole"),
    "end missing": (file_of({"a": one(0, 8)}, bytes(4)), "but it has"),
    "end too many": (file_of({"a": one(0, 8)}, bytes(12)), "but it has"),
    "wrong size": (file_of({"a": one(0, 12)}, bytes(12)), "8 bytes, but has 12"),
    "wrong dtype": (file_of({"a": one(0, 8, dtype="O")}, bytes(8)), "the dtype 'O'"),
    "negative": (file_of({"a": one(0, 8, (-1, -2))}, bytes(8)), "the shape"),
    "huge shape": (file_of({"a": one(0, 8, [2**61] * 9)}, bytes(8)), "bytes, but has 8"),
    "no offsets": (file_of({"a": {"dtype": "F32"}}), "lacks dtype"),
    "true for one": (file_of({"a": one(0, 4, (True,))}, bytes(4)), "the shape"),
}


@pytest.mark.parametrize("content, words", HOSTILE.values(), ids=HOSTILE)
def test_files_that_lie_are_refused_with_little_memory(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as refused:
        read_header(path)
    assert words in str(refused.value) and str(path) in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_the_largest_header_takes_little_memory(tmp_path):
    many = b",".join(b'"%x":0' % number for number in range(HEADER_BYTES // 9))
    (tmp_path / "model.safetensors").write_bytes(file_of(b"{" + many[: HEADER_BYTES - 2] + b"}"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "model.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_an_index_names_files_of_its_folder_only(folder, tmp_path):
    other = rewrite(folder, tmp_path / "other", {})
    index = {"weight_map": {"transformer.wte.weight": "../other/model.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is not a file of"):
        load_hf(other)


def test_numbers_that_are_not_finite_are_refused(folder, tmp_path):
    other = rewrite(folder, tmp_path / "other", {})
    place = find_tensors(other)["transformer.h.1.ln_2.bias"]
    with place.path.open("r+b") as file:
        file.seek(place.start)
        file.write(np.float32("nan").tobytes())
    with pytest.raises(CheckpointError, match=r"h\.1\.ln_2\.bias holds numbers that are"):
        load_hf(other)


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(CheckpointError, match="is there already"):
        save_hf(tmp_path, PLAIN, {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_hf(tmp_path / "none")


def test_half_a_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 61}')
    with pytest.raises(CheckpointError, match=r"config\.json: lacks 'n_layer'"):
        load_hf(tmp_path)
