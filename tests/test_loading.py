"""The library's face: what `gptjax.load` gives is a model in other JAX code, a run, programs."""

import contextlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from small import PLAIN, fresh

import gptjax
from gptjax import cli
from gptjax.config import Config, ConfigError, DataConfig, GPTConfig, OptimizerConfig, SampleConfig
from gptjax.data import batch_at
from gptjax.hf import save_hf
from gptjax.hf.tokenizers import write_tokenizer
from gptjax.hf.weights import by_path
from gptjax.loading import check_origin, load
from gptjax.model import forward
from gptjax.programs import load_programs
from gptjax.rows import load_rows
from gptjax.rundir import CheckpointError, read_run
from gptjax.store import build_store
from gptjax.tasks.pairs import encode_request
from gptjax.tokenizer import ByteTokenizer, make_tokenizer
from gptjax.train import fit

BYTES = replace(PLAIN, vocab_size=258, vocab_multiple=64)
run = jax.jit(forward, static_argnames="config")


@pytest.fixture(scope="module")
def params():
    return fresh(BYTES, jax.random.key(0))


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    """A model and its tokenizer, as Transformers would write them."""
    folder = tmp_path_factory.mktemp("loading") / "hf"
    save_hf(folder, BYTES, params, ByteTokenizer())
    return folder


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, arguments)])
    return cli.main()


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("loading") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, "convert", folder, run_dir) == 0
    return run_dir


def test_a_folder_and_the_run_that_it_becomes_are_one_model(folder, converted, params):
    for where in (folder, converted):
        config, loaded, tokenizer = load(where)
        assert (config.vocab_size, config.sizes["F"]) == (258, 128)
        for path, leaf in by_path(loaded).items():
            known = slice(258)  # rows of padding are zeros
            np.testing.assert_array_equal(leaf[known], by_path(params)[path][known], err_msg=path)
        assert tokenizer.encode("hé").tolist() == ByteTokenizer().encode("hé").tolist()
        assert (tokenizer.end, tokenizer.pad) == (256, 257)


def test_a_converted_run_is_like_any(converted, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "generate", converted, "--prompt", "ab", "--max-tokens", "3") == 0
    assert command(monkeypatch, "inspect", converted) == 0
    assert "blocks/attention/query" in capsys.readouterr().out
    assert command(monkeypatch, "export", converted, tmp_path / "out") == 0
    assert "a GPT2LMHeadModel, read again and compared" in capsys.readouterr().out
    config, _, tokenizer = load(tmp_path / "out")
    assert (config, tokenizer.fingerprint) == (
        read_run(converted)[0].model,
        read_run(converted)[1].fingerprint,
    )
    assert command(monkeypatch, "convert", tmp_path / "out", converted) == 4
    assert "is there already" in capsys.readouterr().err
    assert command(monkeypatch, "convert", tmp_path / "out") == 2
    assert "RUN is missing" in capsys.readouterr().err


def tuned(folder: Path, **fields) -> Config:
    (folder / "text.txt").write_text("what is written is read again. " * 300)
    data = DataConfig(path=(str(folder / "text.txt"),), store_dir=str(folder / "stores"))
    quiet = {"tensorboard": False, "sample": SampleConfig(max_tokens=0)}
    return Config(data=data, steps=2, batch_size=8, eval_every=None, **quiet, **fields)


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_another_and_goes_on_without_it(
    folder, converted, tmp_path
):
    model, first, tokenizer = load(converted)
    config = tuned(tmp_path, model=model, init_from=str(folder))
    tokenizer.save(tmp_path / "tokenizer")
    still = OptimizerConfig(learning_rate=0.0)
    data = replace(config.data, tokenizer=str(tmp_path / "tokenizer"))
    config = replace(config, optimizer=still, data=data)
    state = fit(config, tmp_path / "a")
    known = slice(model.vocab_size)
    a, b = (by_path(tree) for tree in (state.params, first))
    for path in a:
        np.testing.assert_array_equal(a[path][known], b[path][known], err_msg=path)
    missing = replace(config, init_from=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        fit(missing, tmp_path / "b")
    assert fit(replace(missing, steps=3), tmp_path / "a").step == 3
    # The converted run itself goes on from its step 0, with the text that it is given.
    own = shutil.copytree(converted, tmp_path / "own")
    assert fit(replace(config, init_from=None), own).step == 2


def test_what_does_not_fit_its_origin(folder):
    origin, _, tokenizer = load(folder)
    given = replace(origin, dropout=0.5)
    assert check_origin(folder, replace(given, vocab_size=None), tokenizer) == given
    other = replace(origin, num_layers=3, activation="relu")
    with pytest.raises(CheckpointError) as refused:
        check_origin(folder, other, ByteTokenizer())
    for words in ("num_layers is 2 there and 3 here", "activation", "of kind 'bytes'"):
        assert words in str(refused.value)


@pytest.mark.slow
def test_transformers_has_the_validation_loss_of_a_run(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    model = replace(PLAIN, vocab_size=None, initial_scale=0.02)
    config = replace(tuned(tmp_path, model=model), eval_every=2)
    fit(config, tmp_path / "run")
    config, params, tokenizer = load(tmp_path / "run")
    save_hf(tmp_path / "out", config, params, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _, valid = load_rows(read_run(tmp_path / "run")[0], tokenizer)
    total = count = 0
    for step in range(valid[""].num_batches):
        batch = batch_at(step, valid[""], which=slice(0, 8))
        with torch.no_grad():
            logits = theirs(torch.tensor(batch.tokens_BT).long()).logits
        targets = torch.tensor(batch.targets_BT).long()
        losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").numpy()
        total += (losses * batch.weights_BT).sum()
        count += batch.weights_BT.sum()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    expected = [json.loads(line) for line in lines if "eval/loss" in line][-1]["eval/loss"]
    assert total / count == pytest.approx(expected, abs=1e-4)


# --- tokenizers ----------------------------------------------------------------------------------

TEXTS = (
    "The cat sat on the mat; it didn't like it!  3.14 is\n\npi.",
    "Ünïcödé ÀÉÎ ß ŒUVRE 中文 字符 🙂 tab\tnew\r\nline \u00a0nbsp e\u0301",
    "",
    "  lower UPPER MiXeD  ",
)


@pytest.fixture(scope="module")
def gpt1_files(tmp_path_factory):
    """vocab.json and merges.txt as of GPT-1: pieces that say where a word ends."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    )
    library.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=180, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    library.train_from_iterator([TEXTS[0], TEXTS[3], "the mats that cats like " * 3], trainer)
    folder = tmp_path_factory.mktemp("gpt1")
    library.model.save(str(folder))
    return folder


def test_gpt1s_ids_are_those_of_transformers(gpt1_files, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    theirs = transformers.OpenAIGPTTokenizer.from_pretrained(gpt1_files)
    theirs.save_pretrained(tmp_path)
    ours = make_tokenizer(DataConfig(tokenizer=str(gpt1_files)))
    as_json = make_tokenizer(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    long = " ".join([*TEXTS, "The cat sat. It did."]) * 200
    for text in [*TEXTS, long]:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == as_json.encode(text).tolist() == expected
    assert ours.decode(ours.encode("The cats")) == "the cats "
    assert ours.end == len(theirs) and ours.cut(long.encode(), 0)  # so in several units


def test_gpt1_gets_a_row_for_the_end(gpt1_files, tmp_path, monkeypatch, capsys):
    size = make_tokenizer(DataConfig(tokenizer=str(gpt1_files))).end
    model = replace(PLAIN, norm_place="after", vocab_size=size, context_size=16)
    save_hf(tmp_path / "hf", model, fresh(model, jax.random.key(0)))
    for path in gpt1_files.iterdir():
        shutil.copy(path, tmp_path / "hf")
    assert command(monkeypatch, "convert", tmp_path / "hf", tmp_path / "run") == 0
    assert f"end        {size} is a new row" in capsys.readouterr().out
    config, params, _ = load(tmp_path / "run")
    rows = np.asarray(params["embedding"]["tokens"])
    assert config.vocab_size == size + 1
    np.testing.assert_allclose(rows[size], rows[:size].mean(axis=0), atol=1e-6)


def test_every_kind_of_tokenizer_is_opened_by_transformers(gpt1_files, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    words = "some words that are learnt from, and Some More of them\n"
    gpt1 = make_tokenizer(DataConfig(tokenizer=str(gpt1_files)))
    kinds = {"bytes": ByteTokenizer(), "gpt1": gpt1}
    for kind in ("unigram", "bpe"):
        path, text = tmp_path / f"{kind}.model", [words * 5, "".join(TEXTS)]
        kinds[kind] = gptjax.train_sentencepiece(text, path, vocab_size=320, kind=kind).tokenizer
    rng = np.random.default_rng(0)
    drawn = ["".join(map(chr, rng.integers(1, 0x2000, 40))) for _ in range(20)]
    for name, ours in kinds.items():
        write_tokenizer(tmp_path, ours, GPTConfig(vocab_size=ours.vocab_size))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.end, ours.pad), name
        for text in [*TEXTS, words, *drawn]:
            got = theirs.encode(text, add_special_tokens=False)
            assert got == ours.encode(text).tolist(), (name, text)
        exact = not ours.normalises
        assert not exact or theirs.decode(ours.encode(words)) == words


def test_ends_that_only_the_config_of_a_tokenizer_names(folder, tmp_path):
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token, name in zip(spec["added_tokens"], ("<|im_end|>", "<|fill|>"), strict=True):
        token["content"] = name
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert make_tokenizer(DataConfig(tokenizer=str(tmp_path))).end == 258
    options = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|fill|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    ours = make_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    assert (ours.end, ours.pad, ours.vocab_size) == (256, 257, 258)
    ours.save(tmp_path / "kept")
    assert gptjax.load_tokenizer(tmp_path / "kept").end == 256
    options["pad_token"] = "<|im_end|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    assert make_tokenizer(DataConfig(tokenizer=str(tmp_path))).pad == 258


@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_token_that_begins_texts_does_so_wherever_one_is_shown(folder, tmp_path, in_sequence):
    """As in the files of Llama; there, back, and kept by a run."""
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 258, "content": "<s>"})
    begins = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [258], "tokens": ["<s>"]}},
    }
    several = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, begins]}
    spec["post_processor"] = several if in_sequence else begins
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours = make_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    assert (ours.begin, ours.end, ours.vocab_size) == (258, 256, 259)

    ours.save(tmp_path / "kept")
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "hf", ours, GPTConfig(vocab_size=259))
    for back in ("kept", "hf"):
        again = make_tokenizer(DataConfig(tokenizer=str(tmp_path / back)))
        assert (again.begin, again.end) == (258, 256)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode("ab") == [258, 97, 98]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (258, 256)

    store = build_store(["ab", "c"], ours, tmp_path / "store")
    tokens = store.read(np.array([0]), store.num_tokens, ours.pad)[0].tolist()
    assert tokens == [256, 258, 97, 98, 256, 258, 99, 256]
    assert encode_request("a", "b", ours).tokens.tolist() == [258, 97, 98]


def test_two_files_are_read_as_their_class_reads_them(folder, tmp_path):
    """With a space before a text where that is asked for; not at all as another kind."""
    alphabet = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(alphabet | {"<|endoftext|>": 256}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = tmp_path / "tokenizer_config.json"
    for prefix in (False, True):
        options = {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": prefix}
        config.write_text(json.dumps(options))
        ours = make_tokenizer(DataConfig(tokenizer=str(tmp_path)))
        assert ours.encode("ab").tolist() == [*ours.encode(" ").tolist()[:prefix], *b"ab"]
        assert bool(ours.normalises) is prefix
    config.write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(ConfigError, match=r"a Qwen2Tokenizer, which .* give its tokenizer.json"):
        make_tokenizer(DataConfig(tokenizer=str(tmp_path)))


def test_tokens_that_were_added_to_two_files_are_kept(tmp_path):
    alphabet = json.loads((write_bytes(tmp_path) / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(alphabet | {"<|endoftext|>": 256}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 257, "<thing>": 258}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    ours = make_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    assert (ours.end, ours.pad, ours.vocab_size) == (256, 257, 259)
    assert ours.encode("a<thing>").tolist() == [97, 258]
    assert ours.decode([97, 258]) == "a<thing>"


def write_bytes(folder):
    write_tokenizer(folder, ByteTokenizer(), GPTConfig(vocab_size=258))
    return folder


# --- programs ------------------------------------------------------------------------------------


def test_programs_are_loaded_back_and_equal(converted, tmp_path, monkeypatch):
    export = ("export", converted, tmp_path / "out", "--format", "stablehlo", "--batch-size", 2)
    assert command(monkeypatch, *export) == 0
    assert command(monkeypatch, *export) == 4
    names = ["decode.bin", "model.safetensors", "prefill.bin", "programs.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    prefill, decode, loaded = load_programs(tmp_path / "out")
    config, params, _ = load(converted)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tokens = np.random.default_rng(0).integers(0, 258, (2, 12), np.int32)
    padded = np.pad(tokens[:, :10], ((0, 0), (0, config.context_size - 10)))
    place = np.arange(config.context_size, dtype=np.int32)
    positions = np.tile(np.where(place < 10, place, -1), (2, 1))
    logits, cache = prefill(loaded, padded, positions, np.int32(10))
    expected, _ = run(params, tokens, config)
    np.testing.assert_allclose(logits, expected[:, 9], atol=1e-4)
    for place in (10, 11):
        logits, cache = decode(loaded, cache, tokens[:, place])
        np.testing.assert_allclose(logits, expected[:, place], atol=1e-4)


# --- README --------------------------------------------------------------------------------------


def examples():
    """The blocks of Python in the README that load a model."""
    text = (REPOSITORY / "README.md").read_text()
    return [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load(" in code]


@pytest.mark.parametrize("code", examples(), ids=lambda code: code.split("\n")[0][:40])
def test_the_examples_of_the_readme_run(code, converted, monkeypatch):
    monkeypatch.chdir(converted.parent)
    with contextlib.suppress(FileExistsError):
        Path("runs").mkdir()
        Path("runs/play").symlink_to(converted)
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_has_an_example_of_each_transformation():
    code = "\n".join(examples())
    for word in ("jax.jit", "jax.vmap", "jax.grad", "jax.shard_map", "gptjax.generate"):
        assert word in code, word
