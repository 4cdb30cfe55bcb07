"""Adapters in the format of PEFT: the same numbers there and here, and every refusal."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from small import PLAIN
from test_hf import (
    QUICK,
    head_logits,
    head_model,
    our_logits,
    ragged_tokens,
    random_model,
    some_tokens,
    their_logits,
)

from gptjax.config import Config, MeshConfig, TuneConfig
from gptjax.hf import read_adapters, save_adapters, save_hf
from gptjax.hf.weights import by_path
from gptjax.loading import about_origin, begin_with, load_apart, load_params, read_model, task_of
from gptjax.model import forward
from gptjax.rundir import CheckpointError
from gptjax.sharding import make_mesh
from gptjax.tuning import init_all, merged, with_room

run = jax.jit(forward, static_argnames="config")
ALL = ("query", "key", "value", "out", "up", "down")


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    library = pytest.importorskip("transformers", reason="needs transformers: the extra parity")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


@pytest.fixture(scope="module")
def peft(transformers):
    return pytest.importorskip("peft", reason="needs peft: pip install -e '.[parity]'")


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def drawn(model):
    """A model of PEFT all of whose adapters, and head, are random."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.copy_(0.3 * torch.randn_like(weight))
    return model.eval()


def written(library, peft, base, folder, options, model):
    """A folder of adapters for a base, and the model that they make of it."""
    base_folder = folder / "base"
    base.save_pretrained(base_folder)
    theirs = drawn(peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, **options)))
    theirs.peft_config["default"].base_model_name_or_path = str(base_folder)
    theirs.save_pretrained(folder / "adapters")
    return theirs


PATTERNS = {"rank_pattern": {"c_attn": 4, r"h\.1\.mlp\.c_fc": 2}, "alpha_pattern": {"c_fc": 9}}
OPTIONS = {
    "queries, keys and values": ("gpt2", {"target_modules": ["c_attn"]}),
    "every weight": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]} | PATTERNS),
    "one layer": ("gpt2", {"target_modules": ["mlp.c_fc"], "layers_to_transform": [1]}),
    "by the root": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "neo": ("gpt_neo", {"target_modules": ["q_proj", "out_proj"]}),
}


@pytest.mark.parametrize("name, options", OPTIONS.values(), ids=OPTIONS)
def test_adapters_say_the_same_here_and_again_there(transformers, peft, tmp_path, name, options):
    base = random_model(transformers, *QUICK[name])
    options = options | {"task_type": "CAUSAL_LM", "fan_in_fan_out": name == "gpt2"}
    theirs = written(transformers, peft, base, tmp_path, options, name)
    folder = tmp_path / "adapters"
    config, _ = read_model(folder)
    tokens = some_tokens(config)
    expected = their_logits(theirs, tokens)
    params, tune = load_apart(folder, config, one_device())
    logits = run(merged(params, Config(model=config, tune=tune)), tokens, config)[0]
    assert abs(logits - expected).max() < 1e-4
    assert (
        abs(run(load_params(folder, config, one_device()), tokens, config)[0] - logits).max() == 0
    )
    bare = {path: leaf for path, leaf in params.items() if path != "lora"}
    assert abs(run(bare, tokens, config)[0] - expected).max() > 0.1
    save_adapters(tmp_path / "out", config, tune, params, tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "out")
    assert abs(their_logits(again, tokens) - expected).max() < 1e-4


HEADS = {
    "classes": ("SequenceClassification", "SEQ_CLS", {"num_labels": 3}),
    "tags": ("TokenClassification", "TOKEN_CLS", {"num_labels": 5}),
    "passages": ("QuestionAnswering", "QUESTION_ANS", {}),
}


@pytest.mark.parametrize("name, kind, options", HEADS.values(), ids=HEADS)
def test_heads_come_with_their_adapters(transformers, peft, tmp_path, name, kind, options):
    base = head_model(transformers, name, options)
    given = {"task_type": kind, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    theirs = written(transformers, peft, base, tmp_path, given, name)
    folder = tmp_path / "adapters"
    task, labels, delimit = task_of(folder)
    assert not delimit  # they have learnt what Transformers shows
    config, _ = read_model(folder)
    assert len(labels) == (config.num_labels or 0) == options.get("num_labels", 0)
    tokens, lengths = ragged_tokens()
    params = load_params(folder, config, one_device())
    difference = our_logits(params, tokens, lengths, config, task) - head_logits(theirs, tokens)
    assert abs(difference).max() < 1e-4


def test_names_and_kind_of_a_head_are_those_of_its_base(transformers, peft, tmp_path):
    """PEFT keeps neither."""
    options = {"id2label": {0: "good", 1: "bad"}, "problem_type": "multi_label_classification"}
    base = head_model(transformers, "SequenceClassification", options)
    given = {"task_type": "SEQ_CLS", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    written(transformers, peft, base, tmp_path, given, "SequenceClassification")
    assert task_of(tmp_path / "adapters").labels == ("good", "bad")
    assert read_model(tmp_path / "adapters")[0].head == "labels"


def ours(model, tune):
    """Parameters of a run with adapters, all of them random."""
    rng, config = np.random.default_rng(0), Config(model=model, tune=tune)
    return jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32),
        jax.device_get(jax.jit(lambda: init_all(config, jax.random.key(0)))()),
    )


def base_folder(folder, model, params):
    """The trunk of such a run, as a language model of Transformers."""
    lm = replace(model, head="lm", num_labels=None, bidirectional=False)
    head = {"norm": params["head"]["norm"]}
    trunk = {"embedding": params["embedding"], "blocks": params["blocks"], "head": head}
    save_hf(folder, lm, jax.device_put(trunk))
    return folder


@pytest.mark.parametrize("targets", [("query", "value"), ("key",), ALL], ids=" ".join)
@pytest.mark.parametrize("head", ["lm", "label", "span"])
def test_ours_go_out_and_come_back_as_they_are(transformers, peft, tmp_path, targets, head):
    model = replace(PLAIN, head=head, num_labels=4 if head == "label" else None)
    tune = TuneConfig(lora_rank=3, lora_alpha=7.0, lora_targets=targets)
    params, task = ours(model, tune), {"label": "classify", "span": "questions"}.get(head)
    base = base_folder(tmp_path / "base", model, params)
    labels = ("a", "b", "c", "ö") if head == "label" else ()
    out = tmp_path / "out"
    name, ranks = save_adapters(out, model, tune, params, base, task=task, labels=labels)
    fused = sum(one in targets for one in ("query", "key", "value"))
    assert ranks["attn.c_attn"] == 3 * fused
    kind = getattr(transformers, name)
    options = {"pad_token_id": 60} | ({"num_labels": 4} if head == "label" else {})
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base, **options), out).eval()
    tokens, lengths = ragged_tokens()
    whole = merged(params, Config(model=model, tune=tune))
    expected = our_logits(whole, tokens, lengths, model, task)
    assert abs(head_logits(theirs, tokens) - expected).max() < 1e-4
    assert task_of(out) == (task, labels, True)
    back, again = load_apart(out, model, one_device())
    assert (again.lora_rank, again.lora_alpha) == (3, 7.0) and {*again.lora_targets} == {*targets}
    jax.tree.map(np.testing.assert_array_equal, back["lora"], params["lora"])
    found = our_logits(load_params(out, model, one_device()), tokens, lengths, model, task)
    assert abs(found - expected).max() < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters of ours, with their base."""
    folder = tmp_path_factory.mktemp("adapters")
    tune = TuneConfig(lora_rank=2, lora_targets=("query", "down"))
    params = ours(PLAIN, tune)
    base_folder(folder / "base", PLAIN, params)
    save_adapters(folder / "it", PLAIN, tune, params, folder / "base")
    return folder / "it"


def rewrite(folder, to, change):
    """A copy of a folder with other options."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    path = to / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return to


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3': only LORA"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type = 'SEQ_2_SEQ_LM': only CAUSAL_LM"),
        ({"use_dora": True, "bias": "all"}, "bias = 'all'"),
        ({"use_dora": True}, "use_dora = True: it adds more than LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': it changes the model"),
        ({"r": 0}, "r = 0: it must be a number above 0"),
        ({"task_type": "SEQ_CLS"}, "the head score.weight is missing"),
        ({"base_model_name_or_path": "gone"}, "'gone': there is no such folder: set it to"),
    ],
    ids=str,
)
def test_what_is_not_lora_is_refused(folder, tmp_path, change, words):
    with pytest.raises(CheckpointError) as refused:
        read_model(rewrite(folder, tmp_path / "other", change))
    assert words in str(refused.value) and str(tmp_path / "other") in str(refused.value)


def test_adapters_of_another_model_are_refused(folder, tmp_path):
    for change, words in (
        ({"width": 64}, "lora_A.weight: F32[2, 32], wanted [any, 64]"),
        ({"num_layers": 1}, "not known: h.1.attn.c_attn.lora_A.weight"),
        ({"num_kv_heads": 2}, "GPT2LMHeadModel: model.num_kv_heads = 2"),
    ):
        with pytest.raises(CheckpointError) as refused:
            read_adapters(folder, replace(PLAIN, **change))
        assert words in str(refused.value)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "adapter_config.json").write_bytes(
        (folder / "adapter_config.json").read_bytes()
    )
    with pytest.raises(CheckpointError, match="no adapter_model"):
        read_adapters(tmp_path / "none", PLAIN)


def test_adapters_go_on_where_a_run_trains_the_same_and_are_merged_elsewhere(folder):
    mesh, model = one_device(), read_model(folder)[0]
    apart, _ = load_apart(folder, model, mesh)
    same = TuneConfig(lora_rank=2, lora_targets=("down", "query"))
    config = Config(model=model, tune=same)
    assert about_origin(folder, config) == ", whose adapters go on"
    own = init_all(config, jax.random.key(0))
    begun = begin_with(folder, config, mesh, own)()
    jax.tree.map(np.testing.assert_array_equal, begun, apart)
    other = replace(same, lora_rank=3)
    config = replace(config, tune=other)
    told = "--tune.lora-rank 2 --tune.lora-alpha 16 --tune.lora-targets query down"
    assert told in about_origin(folder, config)
    own = init_all(config, jax.random.key(0))
    begun = begin_with(folder, config, mesh, own)()
    jax.tree.map(np.testing.assert_array_equal, begun["lora"], own["lora"])
    whole = by_path(load_params(folder, model, mesh))
    for path, leaf in by_path(begun).items():
        assert path.startswith("lora/") or np.array_equal(leaf, whole[path]), path


def test_a_block_without_an_adapter_gets_one_that_can_be_learnt(folder):
    """In what PEFT made of one layer alone, the others must not stay 0 for ever."""
    mesh, model = one_device(), read_model(folder)[0]
    tune = TuneConfig(lora_rank=2, lora_targets=("query", "down"))
    params, _ = load_apart(folder, model, mesh)
    fresh = init_all(Config(model=model, tune=tune), jax.random.key(0))["lora"]
    bare = jax.tree.map(lambda leaf: leaf.at[1].set(0), params["lora"])
    found = with_room(bare, fresh)
    for name in bare:
        np.testing.assert_array_equal(found[name]["down"][0], bare[name]["down"][0])
        np.testing.assert_array_equal(found[name]["down"][1], fresh[name]["down"][1])
        assert not np.asarray(found[name]["up"][1]).any()
