"""What a config may be, and what is said of one that cannot run."""

import dataclasses
import functools
import json
import math
import random
import string

import jax
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import cli
from gptjax.cli.arguments import _options
from gptjax.config import (
    GPT2,
    GPT3,
    Config,
    ConfigError,
    DataConfig,
    GPTConfig,
    MeshConfig,
    MixtureConfig,
    OptimizerConfig,
    check,
    did_you_mean,
    from_json,
    load_experiment,
    to_json,
    violations,
)
from gptjax.model import init_params

EXPERIMENTS = [
    "tiny.py",
    "shakespeare.py",
    "modern.py",
    "gpt2.py",
    *(f"gpt2.py:{size}" for size in ("small", "medium", "large", "xl")),
    "gpt3.py",
    *(f"gpt3.py:{size}" for size in ("small", "medium", "large", "xl")),
    *(f"gpt3.py:{size}" for size in ("b2_7", "b6_7", "b13", "b175")),
]
RUNS = Config(data=DataConfig(path=("text.txt",)))  # a config without violations
ENGLISH = MixtureConfig(name="english", path=("english.txt",))
CHINESE = MixtureConfig(name="chinese", path=("chinese.txt",), weight=0.5, weights=((100, 2.0),))
MIXED = DataConfig(mixture=(ENGLISH, CHINESE), skip=((3, 5), (6, 6)))
OPTIONS = list(_options(cli.Train))


def experiment(name: str) -> Config:
    return load_experiment(str(REPOSITORY / "experiments" / name))


def changed(**fields: object) -> Config:
    """RUNS with other values; `model__width=3` is of the model."""
    config = RUNS
    for name, value in fields.items():
        section, _, inner = name.rpartition("__")
        if section:
            value = dataclasses.replace(getattr(config, section), **{inner: value})
        config = dataclasses.replace(config, **{section or inner: value})
    return config


def refused(arguments: list[str], config: Config = RUNS) -> list[str]:
    """The violations that `gptjax train` finds in its arguments."""
    return cli.parse(cli.Train(config=config), "gptjax train", arguments)[1]


# --- JSON and presets --------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_run_once_they_have_text(name):
    config = experiment(name)
    assert from_json(to_json(config)) == config
    path = config.data.path or ("text.txt",)
    check(dataclasses.replace(config, data=dataclasses.replace(config.data, path=path)))


def test_json_of_a_mixture():
    config = changed(data=MIXED)
    check(config)
    assert from_json(to_json(config)) == config
    values = json.loads(to_json(config))
    values["data"]["mixture"][1]["wieght"] = values["data"]["mixture"][1].pop("name")
    message = r"(?s)data.mixture\[1\].wieght: .*'weight'.*data.mixture\[1\].name: it has no default"
    with pytest.raises(ConfigError, match=message):
        from_json(json.dumps(values))
    with pytest.raises(ConfigError, match=r"data.mixture\[0\] = 3: must be an object"):
        from_json('{"data": {"mixture": [3]}}')
    with pytest.raises(ConfigError, match=r"data.skip\[0\] = 3: must be \(a whole number"):
        from_json('{"data": {"skip": [3, 4]}}')


@pytest.mark.parametrize("model", [*GPT2.values(), *GPT3.values()])
def test_json_is_exact(model):
    config = changed(model=model, model__norm_epsilon=0.1 + 0.2, seed=2**31 - 1, name="naïve\n")
    assert from_json(to_json(config)) == config


def test_json_with_unknown_names_and_wrong_values():
    values = json.loads(to_json(RUNS))
    values["model"]["widht"] = values["model"].pop("width")
    values["stepz"] = 3
    with pytest.raises(ConfigError, match=r"(?s)model.widht.*'width'.*stepz.*'steps'"):
        from_json(json.dumps(values))
    with pytest.raises(ConfigError, match="steps = 'many': must be a whole number"):
        from_json('{"steps": "many"}')
    with pytest.raises(ConfigError, match="model = 3: must be an object"):
        from_json('{"model": 3}')
    with pytest.raises(ConfigError, match="not JSON"):
        from_json("{")
    assert from_json("{}") == Config()


def num_params(config: GPTConfig) -> int:
    """Without padding of the vocabulary."""
    config = dataclasses.replace(config, vocab_multiple=1)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("size", "count"),
    [  # of the released weights
        ("small", 124_439_808),
        ("medium", 354_823_168),
        ("large", 774_030_080),
        ("xl", 1_557_611_200),
    ],
)
def test_gpt2_has_as_many_parameters_as_the_released(size, count):
    assert num_params(GPT2[size]) == count


@pytest.mark.parametrize(
    ("size", "count"),
    [  # of the paper's table 2.1
        ("small", 125e6),
        ("medium", 350e6),
        ("large", 760e6),
        ("xl", 1.3e9),
        ("2.7b", 2.7e9),
        ("6.7b", 6.7e9),
        ("13b", 13e9),
        ("175b", 175e9),
    ],
)
def test_gpt3_has_as_many_parameters_as_the_paper_says(size, count):
    assert num_params(GPT3[size]) == pytest.approx(count, rel=0.02)


def test_heads_are_of_the_size_that_the_papers_say():
    assert [model.sizes["H"] for model in GPT2.values()] == [64] * 4
    assert [model.sizes["H"] for model in GPT3.values()] == [64, 64, 96, 128, 80, 128, 128, 128]


# --- rules -------------------------------------------------------------------------------------

CONFLICTS = [  # what is changed, and words that the violation must have
    ({"name": ""}, "names a folder"),
    ({"name": "a/b"}, "names a folder"),
    ({"name": ".."}, "names a folder"),
    ({"model__width": 100}, "= 100 is not a multiple of model.num_heads = 12 (remainder 4)"),
    ({"model__width": 100}, "give model.width 96 or 108, or model.head_size"),
    ({"model__width": 5}, "give model.width 12, or model.head_size"),
    ({"model__num_heads": 8, "model__num_kv_heads": 3}, "give model.num_heads 6 or 9"),
    ({"model__positions": "rope", "model__width": 36}, "so it must be even: give model.head_size"),
    ({"model__window_every": 2}, "give model.window, or model.window_every 1"),
    ({"model__window": 8, "model__window_every": 5}, "give model.num_layers 10 or 15"),
    (
        {"model__rope_scaling": (8.0, 1.0, 4.0, 64)},
        "give model.positions rope, or model.rope_scaling None",
    ),
    (
        {"model__positions": "rope", "model__rope_scaling": (8.0, 4.0, 4.0, 64)},
        "must be below that of high ones, 4, as in 8 1 4 8192",
    ),
    ({"optimizer__final_learning_rate": 1.0}, "is above optimizer.learning_rate = 0.0006"),
    ({"optimizer__warmup_steps": 1001}, "= 1001, but steps = 1000: give fewer of them"),
    ({"optimizer__warmup_steps": 600, "optimizer__decay_steps": 401}, "= 1001, but steps = 1000"),
    ({"optimizer__final_steps": 2000}, "or steps 2000"),
    ({"data__path": ()}, "data.path is empty"),
    ({"data__holdout": 0.0}, "nothing to evaluate on"),
    (
        {"data__mixture": (ENGLISH,)},
        "data.path = ('text.txt',) and data.mixture exclude each other",
    ),
    (
        {"data__skip": ((5, 3),)},
        "data.skip[0] = (5, 3): its first batch comes after its last: give",
    ),
    ({"data__skip": ((3, 5), (5, 6))}, "data.skip[1] = (5, 6) begins before data.skip[0] = (3, 5)"),
    (
        {"mesh__context": 3},
        "model.context_size = 1024 is not a multiple of mesh.context = 3 (remainder 1): give "
        "model.context_size 1023 or 1026, or mesh.context 2 or 4",
    ),
    (
        {"mesh__context": 6, "model__context_size": 1026, "model__context_attention": "ring"},
        "is not a multiple of 2 x mesh.context = 12 (remainder 6): give model.context_size 1020 or "
        "1032, or mesh.context 3 or 9, or model.context_attention all_gather",
    ),
    (
        {"mesh__context": 32, "mesh__tensor": 64, "model__split_residual": True},
        "not a multiple of mesh.context 32 x mesh.tensor 64 = 2048",
    ),
    (
        {"mesh__pipe": 5},
        "model.num_layers = 12 is not a multiple of mesh.pipe = 5 (remainder 2): give "
        "model.num_layers 10 or 15, or mesh.pipe 4 or 6",
    ),
    (
        {
            "mesh__pipe": 4,
            "mesh__rounds": 2,
            "model__window": 8,
            "model__window_every": 2,
        },
        "is not a multiple of mesh.pipe 4 x mesh.rounds 2 x model.window_every 2 = 16 (remainder "
        "12): give model.num_layers 16, or mesh.pipe 3",
    ),
    (
        {"mesh__pipe": 3, "mesh__rounds": 3},
        "model.num_layers 9 or 18, or mesh.pipe 2 or 4, or mesh.rounds 2 or 4",
    ),
    ({"mesh__rounds": 2}, "mesh.rounds = 2, but mesh.pipe = 1: give mesh.pipe, or mesh.rounds 1"),
    ({"mesh__microbatches": 2}, "mesh.microbatches = 2, but mesh.pipe = 1: give mesh.pipe, or"),
    ({"mesh__pipe": 3, "tune__layers": 4}, "tune.layers = 4 is not a multiple of mesh.pipe = 3"),
    (
        {"mesh__pipe": 2, "mesh__microbatches": 3, "mesh__data": 2},
        "batch_size = 8 is not a multiple of mesh.data 2 x mesh.fsdp 1 x accumulate 1 x "
        "mesh.microbatches 3 = 6 (remainder 2): give batch_size 6 or 12, or mesh.microbatches 2 or",
    ),
    ({"mesh__fsdp": 5}, "model.width = 768 is not a multiple of mesh.fsdp = 5"),
    ({"mesh__tensor": 5}, "model.num_heads = 12 is not a multiple of mesh.tensor = 5"),
    ({"mesh__tensor": 128}, "give model.vocab_multiple 128, or another mesh.tensor"),
    ({"mesh__tensor": 2, "model__num_kv_heads": 3}, "model.num_kv_heads = 3 is not a multiple"),
    ({"mesh__tensor": 2, "model__ffn_size": 3}, "model.ffn_size = 3 is not a multiple"),
    ({"batch_size": 9, "accumulate": 2}, "give batch_size 8 or 10, or another accumulate"),
    ({"batch_size": 6, "mesh__data": 2, "mesh__fsdp": 2, "accumulate": 2}, "= 8 (remainder 6)"),
    ({"mesh__data": 4, "mesh__slices": 3}, "mesh.data = 4 is not a multiple of mesh.slices = 3"),
    ({"mesh__slices": 2, "mesh__across": "fsdp"}, "mesh.fsdp = 1 is not a multiple"),
]


@pytest.mark.parametrize(
    ("fields", "words"),
    [  # changes of the first store, and words that the violation must have
        ({"name": "a/b"}, "data.mixture[0].name = 'a/b': it is a part of the names of metrics"),
        ({"name": "chinese"}, "data.mixture[1].name = 'chinese' is that of data.mixture[0] too"),
        ({"path": ()}, "data.mixture[0].path is empty"),
        ({"weight": -1.0}, "data.mixture[0].weight = -1.0: must be a number from 0"),
        ({"path": "text"}, "data.mixture[0].path = 'text': must be a tuple of strings"),
        ({"weights": ((0, 1.0),)}, "data.mixture[0].weights[0] = (0, 1.0): must be (a whole"),
        ({"weights": ((5, 1.0), (5, 2.0))}, "data.mixture[0].weights: step 5 comes after step 5"),
        ({"weight": 1e-6}, "at step 1 its weight 1e-06 of 0.500001 is less than one row of 65,536"),
    ],
)
def test_mixtures_that_are_refused(fields, words):
    mixture = (dataclasses.replace(ENGLISH, **fields), CHINESE)
    (problem,) = violations(changed(data=dataclasses.replace(MIXED, mixture=mixture)))
    assert words in problem


def test_a_mixture_has_text_at_every_step_and_some_to_evaluate_on():
    mixture = (
        dataclasses.replace(ENGLISH, weights=((50, 0.0),), holdout=0.0),
        dataclasses.replace(CHINESE, weights=((50, 0.0), (60, 1.0)), holdout=0.0),
    )
    problems = violations(changed(data=dataclasses.replace(MIXED, mixture=mixture)))
    assert [problem.split(":")[0] for problem in problems] == [
        "in every store of data.mixture holdout = 0 and valid_path is empty, so there is nothing "
        "to evaluate on",
        "data.mixture",
    ]
    assert "at step 50 the weight of every store is 0" in problems[1]


def test_the_least_weight_that_is_said_is_taken():
    def refusal(weight):
        mixture = (
            dataclasses.replace(ENGLISH, weight=weight),
            dataclasses.replace(CHINESE, weights=()),
        )
        return violations(changed(data=dataclasses.replace(MIXED, mixture=mixture)))

    (problem,) = refusal(1e-7)
    assert refusal(float(problem.partition("give at least ")[2].split(",")[0])) == []


@pytest.mark.parametrize(("fields", "words"), CONFLICTS)
def test_conflicts_are_refused(fields, words):
    assert any(words in problem for problem in violations(changed(**fields)))


@pytest.mark.parametrize(
    ("mesh", "num_devices", "words"),
    [
        (MeshConfig(data=3), 8, "data 3 x fsdp 1 x tensor 1 x context 1 x pipe 1 = 3, but there"),
        (MeshConfig(data=2, fsdp=2), 8, "= 4, but there are 8 devices: give axes whose product is"),
        (MeshConfig(fsdp=3), 8, "= 3, but there are 8 devices: give axes whose product is one of"),
        (MeshConfig(fsdp=16), 8, "product is one of [1, 2, 4, 8]"),
        (MeshConfig(), 16, "batch_size = 8 is not a multiple of mesh.data 16 x"),
    ],
)
def test_meshes_that_the_devices_do_not_make(mesh, num_devices, words):
    with pytest.raises(ConfigError) as refusal:
        check(changed(mesh=mesh), num_devices)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(),
        MeshConfig(fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(pipe=2, rounds=3, microbatches=2),
    ],
)
def test_meshes_that_they_make(mesh):
    assert violations(changed(mesh=mesh), 8) == []


WRONG = [
    ("steps", 0),
    ("steps", -1),
    ("steps", 2**31),
    ("steps", 1.0),
    ("steps", True),
    ("steps", None),
    ("batch_size", "8"),
    ("model__dropout", 1.0),
    ("model__dropout", math.nan),
    ("model__bias", 1),
    ("model__remat", "some"),
    ("optimizer__learning_rate", math.inf),
    ("optimizer__beta2", 1),
    ("optimizer__clip_norm", 0.0),
    ("data__path", "text.txt"),
    ("data__path", ["text.txt"]),
    ("data__holdout", 1.0),
    ("sample__top_p", 0.0),
    ("model", None),
    ("model", MeshConfig()),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_values_that_are_not_of_their_kind(name, value):
    path = name.replace("__", ".")
    assert any(p.startswith(f"{path} = ") for p in violations(changed(**{name: value})))


def test_whatever_is_wrong_is_said_at_once():
    config = changed(
        steps=0, batch_size=3, accumulate=2, model__width=100, model__remat="ful", mesh__rounds=2
    )
    found = violations(config)
    starts = (
        "steps = 0",
        "batch_size = 3",
        "model.width = 100",
        "model.remat = 'ful'",
        "mesh.rounds",
    )
    assert len(found) == len(starts)
    for start in starts:
        assert any(problem.startswith(start) for problem in found)
    assert any("Did you mean 'full'?" in problem for problem in found)
    with pytest.raises(ConfigError, match=r"^5 problems\n  - "):
        check(config)


def test_a_rule_is_silent_where_a_field_of_it_is_wrong():
    assert len(violations(changed(model__num_heads=0, batch_size=-1))) == 2


def test_the_default_config_needs_text_alone():
    assert [problem.split()[0] for problem in violations(Config())] == ["data.path"]
    check(RUNS)
    check(changed(optimizer=OptimizerConfig(warmup_steps=1000)))


# --- the command line --------------------------------------------------------------------------


def edit(option: str, random: random.Random) -> str:
    """The option with a letter left out, put in, replaced or swapped with the next."""
    at = random.choice([i for i, letter in enumerate(option) if letter.isalpha()])
    other = random.choice(string.ascii_lowercase)
    swapped = option[:at] + option[at : at + 2][::-1] + option[at + 2 :]
    edits = [
        option[:at] + option[at + 1 :],
        option[:at] + other + option[at:],
        option[:at] + other + option[at + 1 :],
        *([swapped] if option[at + 1 : at + 2].isalpha() else []),
    ]
    return random.choice(edits)


def one_edit_apart(one: str, other: str) -> bool:
    """Whether one letter left out, put in or replaced turns one into the other."""
    if len(one) > len(other):
        one, other = other, one
    same = next((i for i, letter in enumerate(one) if letter != other[i]), len(one))
    return one[same + (len(one) == len(other)) :] == other[same + 1 :]


@settings(max_examples=4, deadline=None)  # of all options
@given(st.randoms(use_true_random=False))
def test_typos_in_options_get_the_right_suggestion(random):
    typos = {}
    for option in OPTIONS:
        typo = edit(option, random)
        if not any(
            one_edit_apart(typo, known) or typo == known for known in OPTIONS if known != option
        ):
            typos[typo] = option
    typos = {typo: option for typo, option in typos.items() if typo != option}
    problems = refused([word for typo in typos for word in (typo, "1")])
    for (typo, option), problem in zip(typos.items(), problems, strict=True):
        assert problem == f"{typo}: there is no such option. Did you mean {option!r}?"


@pytest.mark.parametrize("typo, name", [("to_pk", "top_k"), ("topk_", "top_k"), ("bet1a", "beta1")])
def test_letters_that_changed_places_are_one_mistake(typo, name):
    assert did_you_mean(typo, ["beta1", "beta2", "top_k", "top_p"]) == f" Did you mean {name!r}?"


def test_an_option_without_its_section_gets_the_whole_name():
    names = {option: f"--{option.partition('.')[2]}" for option in OPTIONS if "." in option}
    whole = {name: option for option, name in names.items() if name not in OPTIONS}
    for name, problem in zip(whole, refused([*whole]), strict=True):
        assert problem == f"{name}: there is no such option. Did you mean {whole[name]!r}?"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps"], "steps = (): must be a whole number"),
        (["--steps", "ten"], "steps = 'ten': must be a whole number from 1 to"),
        (["--steps", "1.5"], "steps = '1.5'"),
        (["--steps", "-5"], "steps = -5"),
        (["--steps=0"], "steps = 0"),
        (["--steps", "5", "6"], "steps = ('5', '6')"),
        (["--steps", "9" * 5000], "steps = '999"),
        (["--steps", "None"], "steps = 'None'"),
        (["--optimizer.learning-rate", "nan"], "optimizer.learning_rate = nan"),
        (["--optimizer.learning-rate", "1e400"], "optimizer.learning_rate = inf"),
        (["--optimizer.learning-rate", "1e-3x"], "optimizer.learning_rate = '1e-3x'"),
        (["--model.attention", "cudn"], "Did you mean 'cudnn'?"),
        (["--model.compute-dtype", "bfloat61"], "Did you mean 'bfloat16'?"),
        (["--tensorboard", "yes"], "'yes': one argument too many"),
        (["--steps", "True"], "steps = 'True'"),
        (["--tensorboard", "True", "False"], "'False': one argument too many"),
        (["--no-tensorboard", "False"], "'False': one argument too many"),
        (["text.txt"], "'text.txt': one argument too many"),
        (["--num-processes", "2"], "give all three of them, or none"),
        (["--num-processes", "two"], "num_processes = 'two'"),
    ],
)
def test_values_on_the_command_line_that_are_refused(arguments, words):
    (problem,) = refused(arguments)
    assert words in problem


def test_rules_of_a_model_wait_for_that_which_is_taken_over():
    task = "--task.kind classify --task.train a.tsv --task.valid b.tsv --tune.layers 13".split()
    (problem,) = refused(task)
    assert "tune.layers = 13, but model.num_layers = 12" in problem
    assert refused([*task, "--init-from", "runs/base"]) == []


def test_steps_and_epochs_are_not_given_together():
    task = "--task.kind classify --task.train a.tsv --task.valid b.tsv --steps 5".split()
    (problem,) = refused([*task, "--task.epochs", "2"])
    assert problem.startswith("--steps 5, but task.epochs = 2.0: give --task.epochs None with")
    assert refused(task) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "--model.bias False --tensorboard False --data.tfds-prepare True --steps 7",
        "--model.bias=False --no-tensorboard --data.tfds_prepare=True --steps=7",
        "--model.no-bias --tensorboard=False --data.tfds-prepare --steps 7",
    ],
)
def test_switches_may_be_given_as_values(arguments):
    given, problems = cli.parse(cli.Train(config=RUNS), "gptjax train", arguments.split())
    assert problems == []
    config = given.config
    assert (config.model.bias, config.tensorboard, config.steps) == (False, False, 7)
    assert config.data.tfds_prepare is True


def test_where_the_other_processes_are():
    arguments = ["--num-processes", "2", "--process-id", "2", "--coordinator", "here"]
    assert [p.split(" =")[0] for p in refused(arguments)] == ["process_id", "coordinator"]
    arguments[3], arguments[5] = "1", "localhost:1234"
    assert refused(arguments) == []


def test_every_field_can_be_given():
    arguments = (
        "--name run --steps 7 --model.num_layers=2 --model.no-bias --no-tensorboard --eval-every "
        "None --data.path a b --data.holdout 0.5 --optimizer.learning-rate 1e-3 --model.window 4"
    ).split()
    given, problems = cli.parse(cli.Train(config=RUNS), "gptjax train", arguments)
    assert problems == []
    assert given.config == changed(
        name="run",
        steps=7,
        model__num_layers=2,
        model__bias=False,
        model__window=4,
        tensorboard=False,
        eval_every=None,
        data__path=("a", "b"),
        data__holdout=0.5,
        optimizer__learning_rate=1e-3,
    )


def test_batches_that_are_passed_over_are_given_as_pairs_one_after_the_other():
    arguments = ["--data.skip", "100", "120", "300", "310"]
    given, problems = cli.parse(cli.Train(config=RUNS), "gptjax train", arguments)
    assert problems == []
    assert given.config.data.skip == ((100, 120), (300, 310))
    starts = [problem.split(":")[0] for problem in refused([*arguments, "7", "--steps", "0"])]
    assert sorted(starts) == ["data.skip[2] = (7,)", "steps = 0"]
    assert refused(["--data.skip", "1", "b"])[0].startswith("data.skip[0] = (1, 'b'): must be (a")


def test_the_command_line_leaves_a_mixture_as_its_file_has_it(capsys):
    config = changed(data=MIXED)
    given, problems = cli.parse(cli.Train(config=config), "gptjax train", ["--steps", "7"])
    assert (given.config.data, problems) == (MIXED, [])
    assert refused(["--data.mixture", "german"]) == [
        "data.mixture[0] = 'german': must be a gptjax.MixtureConfig"
    ]
    with pytest.raises(SystemExit):
        refused(["--help"], config)
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "not on the command line (default: english chinese)" in text


def test_help_names_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit) as done:
        refused(["--help"])
    assert not done.value.code
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    for option in OPTIONS:
        assert option in text
    for name in ("steps", "model.width", "data.path", "optimizer.clip_norm", "mesh.across"):
        assert f"--{name.replace('_', '-')}" in text
    assert "updates of the parameters" in text
    assert "share of embeddings, attention outputs and feed-forward outputs set to zero" in text
