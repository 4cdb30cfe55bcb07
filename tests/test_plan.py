"""A plan says what training then does: bytes of the state, FLOPs, collectives; and refuses well."""

import json
import math
import runpy
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from conftest import REPOSITORY
from jax import lax
from small import MODERN, PLAIN

from gptjax.cli import run_verb
from gptjax.cli.planning import WRITTEN, Plan, _file_problems
from gptjax.compiled import compile_step, configured, kept_in
from gptjax.config import (
    GPT3,
    Config,
    ConfigError,
    DataConfig,
    GPTConfig,
    MeshConfig,
    TuneConfig,
    load_experiment,
    violations,
)
from gptjax.metrics import flops_per_token
from gptjax.plan import plan
from gptjax.plan.compiled import _used
from gptjax.plan.explain import explain
from gptjax.plan.flops import count_flops, executed_flops
from gptjax.plan.hlo import Program, _group
from gptjax.plan.liveness import kept
from gptjax.plan.memory import STATE, memory
from gptjax.plan.network import arrange, bandwidth, group_along, mesh_axes, seconds
from gptjax.plan.report import head, unexpected
from gptjax.plan.roofline import formula_flops
from gptjax.plan.search import (
    as_experiment,
    describe,
    layout_options,
    parse_budget,
    remedies,
    search,
    try_all,
    within,
)
from gptjax.plan.topologies import (
    CHIPS,
    compiler_options,
    find_devices,
    missing,
    names,
    parse_topology,
)
from gptjax.sharding import make_mesh
from gptjax.step import abstract_state, trace_train_step

TEXT = DataConfig(path=("any text",))
RUN = Config(data=TEXT, model=PLAIN, batch_size=8)
MESHES = {
    "one": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


def axes_of(mesh: MeshConfig) -> dict[str, int]:
    return mesh_axes(mesh, 8 if mesh != MeshConfig() else 1)


def state_bytes(config: Config, num_devices: int) -> int:
    """Bytes of one device's part of the state that training allocates."""
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract_state(config, mesh))
    )


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tune", "mesh"),
    [
        (TuneConfig(), MESHES["one"]),
        (TuneConfig(), MESHES["all"]),
        (TuneConfig(layers=1), MESHES["all"]),
        (TuneConfig(layers=0), MESHES["fsdp"]),
        (TuneConfig(lora_rank=2), MESHES["all"]),
    ],
    ids=["one", "all", "last", "head", "lora"],
)
def test_state_is_what_training_allocates(tune, mesh):
    config = replace(RUN, model=MODERN, mesh=mesh, tune=tune)
    axes = axes_of(mesh)
    kinds = memory(config, axes).kinds()
    planned = sum(kinds[kind] for kind in STATE if kind in kinds)
    assert planned == state_bytes(config, math.prod(axes.values()))


def test_what_remat_keeps():
    def letters(remat: str, attention: str) -> list[str]:
        model = replace(PLAIN, remat=remat, attention=attention, compute_dtype="bfloat16")
        return sorted(tensor.letters for tensor in kept(model).saved)

    assert letters("full", "xla") == ["BTD"]
    assert letters("dots", "xla") == sorted("BTD BTD BTF BTNH BTNH BTNH BTNH".split())
    # The name by which the attention's result is kept is not in a fused kernel.
    assert letters("dots", "splash") == sorted("BTD BTD BTF BTNH BTNH BTNH".split())
    assert "BNTT" in letters("none", "xla")


def test_each_way_to_save_memory_saves_it():
    model = replace(GPT3["xl"], remat="dots", compute_dtype="bfloat16", attention="splash")
    config = Config(data=TEXT, model=model, batch_size=64, accumulate=2)
    axes = mesh_axes(MeshConfig(data=2, fsdp=4), 8)
    least = memory(config, axes)
    assert least.total > memory(replace(config, accumulate=4), axes).total
    assert least.total > memory(replace(config, model=replace(model, remat="full")), axes).total
    assert least.total > memory(config, mesh_axes(MeshConfig(fsdp=8), 8)).total
    # Rows are as many, each with half of the heads.
    assert least.total > memory(config, mesh_axes(MeshConfig(data=2, fsdp=4, tensor=2), 16)).total


def test_activations_kept_grow_with_layers_and_rows():
    config = replace(RUN, model=replace(PLAIN, remat="full"))

    def activations(config: Config) -> int:
        return memory(config, axes_of(MeshConfig())).kinds()["activations kept"]

    # x_BTD, float32, of each layer.
    assert activations(config) == 2 * 8 * 32 * 32 * 4
    assert activations(replace(config, model=replace(config.model, num_layers=4))) == 2 * (
        activations(config)
    )
    assert activations(replace(config, accumulate=4)) == activations(config) // 4


def test_compiled_for_a_cpu():
    found = plan(replace(RUN, mesh=MESHES["all"]), parse_topology("cpu:8"))
    assert found.compiled.arguments == sum(found.memory.kinds()[kind] for kind in (*STATE, "batch"))
    assert found.compiled.peak > found.compiled.arguments and found.compiled.padding == 0
    axes = {axis for one in found.compiled.collectives for axis in one.axis.split("+")}
    assert axes == {"data", "fsdp", "tensor"}
    lines = {one.line.partition(":")[0] for one in found.compiled.collectives}
    assert {"layers.py", "losses.py"} <= lines
    assert found.time.source == "compiler"
    assert found.time.least <= found.time.most
    assert 0 < found.mfu(found.time.most) <= found.mfu(found.time.least)


def test_a_plan_names_lines_of_the_source_as_it_is(tmp_path):
    """What was kept of an older source is found again by its mathematics, and has its old lines: a
    plan looks for its own lines too, so it does not find even what training kept just now.
    """
    everything = {"jax_persistent_cache_min_compile_time_secs": 0}
    topology = parse_topology("cpu:1")
    with kept_in(tmp_path, always=True), configured(everything):
        compile_step(RUN, make_mesh(RUN.mesh, find_devices(topology)))
        assert len(list(tmp_path.glob("jit_step-*-cache"))) == 1
        for _ in range(2):
            plan(RUN, topology)
            assert len(list(tmp_path.glob("jit_step-*-cache"))) == 2


# --- work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remat", "attention"),
    [
        ("none", "xla"),
        ("dots", "xla"),
        ("full", "xla"),
        ("dots", "blockwise"),
        ("full", "blockwise"),
    ],
)
def test_counted_flops_are_those_of_the_formula(remat, attention):
    model = replace(PLAIN, remat=remat, attention=attention, num_layers=3)
    config = replace(RUN, model=model, accumulate=2)
    traced = trace_train_step(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    counted = sum(count_flops(traced.jaxpr.jaxpr).values())
    tokens = config.batch_size * model.context_size
    assert counted == executed_flops(model) * tokens
    if (remat, attention) == ("none", "xla"):
        assert counted == flops_per_token(model) * tokens


def test_a_pipeline_counts_its_bubble():
    mesh = MeshConfig(data=2, pipe=2, microbatches=2)
    config = replace(RUN, model=replace(PLAIN, num_layers=4), mesh=mesh)
    found = plan(config, parse_topology("cpu:4"), compiling=False)
    traced = trace_train_step(config, make_mesh(mesh, jax.devices()[:4]))
    assert sum(count_flops(traced.jaxpr.jaxpr).values()) == formula_flops(found.config, found.axes)
    whole = plan(replace(config, mesh=MeshConfig(data=4)), parse_topology("cpu:4"), compiling=False)
    assert formula_flops(found.config, found.axes) > formula_flops(whole.config, whole.axes)
    assert "bubble 33%" in "\n".join(head(found))
    state = sum(num_bytes for kind, num_bytes in found.memory.kinds().items() if kind in STATE)
    assert state == state_bytes(config, 4)


def test_collectives_of_a_program():
    axes = {"fsdp": 4, "tensor": 2}
    mesh = jax.make_mesh((4, 2), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def each(x):  # [16 / 4, 32]
        x, _ = lax.scan(lambda x, _: (lax.psum(x, "tensor") / 2, None), x, None, length=5)
        y = lax.all_gather(x, "fsdp", axis=0, tiled=True)
        z = lax.ppermute(jnp.sin(x), "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return y.sum(0) + z

    step = jax.shard_map(each, mesh=mesh, in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp"),
                         check_vma=False)  # fmt: skip
    compiled = jax.jit(step).lower(jax.ShapeDtypeStruct((16, 32), jnp.float32)).compile()
    found = {one.kind: one for one in Program(compiled.as_text()).collectives(axes)}
    assert {kind: (one.axis, one.num_bytes, one.count) for kind, one in found.items()} == {
        "all-reduce": ("tensor", 4 * 32 * 4, 5),
        "all-gather": ("fsdp", 16 * 32 * 4, 1),
        "collective-permute": ("fsdp", 4 * 32 * 4, 1),
    }


@pytest.mark.parametrize(
    ("words", "group"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("[4,2]<=[8]", (0, 1)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([8]<=[2,4]T(1,0)) {'b'}", (0, 4)),
    ],
)
def test_groups_of_devices(words, group):
    assert _group(f", channel_id=9, replica_groups={words}, dimensions={{0}}", 8) == group


def test_bytes_of_a_program():
    def step(x):  # two kernels: a sum along rows, and what needs all of it
        return lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) * 2, x)

    compiled = jax.jit(step).lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile()
    moved = Program(compiled.as_text()).bytes_moved()
    assert 3 * 8000 <= moved <= 3 * 8000 + 2 * 8000 + 100  # and perhaps a copy


SLICES = """HloModule slices

%fused (a: f32[1000], b: s32[]) -> f32[10] {
  %a = f32[1000]{0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %part = f32[10]{0} dynamic-slice(%a, %b), dynamic_slice_sizes={10}
}

ENTRY %main (x: f32[1000], i: s32[]) -> (f32[1000], f32[10]) {
  %x = f32[1000]{0} parameter(0)
  %i = s32[] parameter(1)
  %slice = f32[10]{0} dynamic-slice(%x, %i), dynamic_slice_sizes={10}
  %f = f32[10]{0} fusion(%x, %i), kind=kLoop, calls=%fused
  %new = f32[1000]{0} dynamic-update-slice(%x, %slice, %i)
  ROOT %both = (f32[1000]{0}, f32[10]{0}) tuple(%new, %f)
}
"""


def test_of_what_is_sliced_only_the_slices_move():
    alone, fused, update = 2 * 40, 40 + 4 + 40, 2 * 40  # the fused one reads its index, too
    assert Program(SLICES).bytes_moved() == alone + fused + update


def test_network():
    pod, hosts = parse_topology("v5p:8x8x8"), parse_topology("h100:64")
    mesh = MeshConfig(fsdp=64, tensor=8)
    grid, axes = arrange(pod, mesh), mesh_axes(mesh, 512)
    link = CHIPS["v5p"].link
    # A ring both ways along one dimension of the torus, and along two.
    assert bandwidth(group_along(grid, ["tensor"], axes), pod) == 2 * link
    assert bandwidth(group_along(grid, ["fsdp"], axes), pod) == 4 * link
    # GPUs of one host; of eight hosts, with their own part of the network each.
    mesh = MeshConfig(fsdp=8, tensor=8)
    grid, axes = arrange(hosts, mesh), mesh_axes(mesh, 64)
    inside, across = (group_along(grid, [axis], axes) for axis in ("tensor", "fsdp"))
    assert bandwidth(inside, hosts) == CHIPS["h100"].link
    assert bandwidth(across, hosts) == pytest.approx(CHIPS["h100"].outside)
    assert seconds("all-gather", 8e9, inside, hosts) == pytest.approx(7e9 / CHIPS["h100"].link)
    assert seconds("all-reduce", 8e9, inside, hosts) == pytest.approx(14e9 / CHIPS["h100"].link)
    # Two of each host, which share what comes in for both.
    mesh = MeshConfig(fsdp=16, tensor=4)
    two = group_along(arrange(hosts, mesh), ["fsdp"], mesh_axes(mesh, 64))
    assert bandwidth(two, hosts) == pytest.approx(2 * CHIPS["h100"].outside * (15 / 16) / (7 / 8))
    # Two slices: only what crosses between them is slow.
    two = parse_topology("v5e:4x4", 2)
    grid = arrange(two, MeshConfig(data=2, fsdp=16, slices=2))
    axes = mesh_axes(MeshConfig(fsdp=16), 32)
    assert bandwidth(group_along(grid, ["data"], axes), two) == CHIPS["v5e"].outside
    assert bandwidth(group_along(grid, ["fsdp"], axes), two) > CHIPS["v5e"].link


def test_explained():
    config = replace(RUN, mesh=MeshConfig(fsdp=4, tensor=2))
    rows = {row[0]: row for row in explain(plan(config, parse_topology("cpu:8"), compiling=False))}
    _, letters, lies, megabytes, whole = rows["blocks/ffn/up, stored"]
    assert (letters, lies) == ("LDF", "D fsdp 4, F tensor 2")
    assert megabytes == f"{2 * 32 * 128 * 4 / 8 / 1e6:.3f}"
    assert whole == "L: pipe is 1"
    assert rows["blocks/ffn/up, in use"][2] == "F tensor 2"


# --- topologies ----------------------------------------------------------------------------------


def test_every_offered_name_is_one():
    for name in names():
        assert parse_topology(name).num_devices > 0
    assert str(parse_topology("v5e:256")) == "v5e:16x16"
    assert parse_topology("h100:64").shape == (8, 8)
    assert parse_topology("tpu7x:2x2x1").num_devices == 8


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("v5l:16x16", "v5e:16x16,"),
        ("h100s:8", "h100:8,"),
        ("v5e:16x16x16", "v5e:16x16,"),
        ("v5p-512", "v5p:8x8x8,"),
        ("v4:7", "v4:2x2x2,"),
    ],
)
def test_unknown_topology(given, near):
    words = f"{given!r}: there is none of this name. Nearest: {near}"
    with pytest.raises(ConfigError, match=words):
        parse_topology(given)


@pytest.mark.parametrize(("name", "extra"), [("v5e:8", "tpu"), ("h100:8", "plan-gpu")])
def test_compiler_that_is_not_installed(name, extra):
    topology = parse_topology(name)
    if not missing(topology):
        pytest.skip(f"the compiler of {name} is installed")
    with pytest.raises(ConfigError, match=rf"pip install 'gptjax\[{extra}\]', or give --no-comp"):
        plan(replace(RUN, mesh=MeshConfig(fsdp=8)), topology)


def test_mesh_that_does_not_divide():
    with pytest.raises(ConfigError, match="axes whose product is"):
        plan(replace(RUN, mesh=MeshConfig(fsdp=3)), parse_topology("cpu:8"))


# --- search --------------------------------------------------------------------------------------


def test_every_layout_that_is_tried_can_run():
    mesh = MeshConfig(pipe=2, microbatches=4)
    config = Config(data=TEXT, model=GPT3["small"], batch_size=64, mesh=mesh)
    topology = parse_topology("h100:4")
    tried = [one.config for one in try_all(config, topology)]
    assert tried and not any(any(violations(one, topology.num_devices)) for one in tried)


def test_search_is_no_slower_than_layouts_written_by_hand():
    topology = parse_topology("h100:4")
    model = replace(GPT3["medium"], window=None, window_every=1)
    config = Config(data=TEXT, model=model, batch_size=8, steps=100)
    result = search(config, topology, compiling=False)
    best = result.best
    assert best.margin >= 0
    hand = [
        (MeshConfig(fsdp=4), "full", 1),
        (MeshConfig(data=4), "dots", 2),
        (MeshConfig(data=2, fsdp=2), "dots", 2),
        (MeshConfig(fsdp=2, tensor=2), "full", 1),
    ]
    for mesh, remat, parts in hand:
        model = replace(config.model, remat=remat)
        one = replace(config, mesh=mesh, model=model, accumulate=parts)
        other = plan(one, topology, compiling=False)
        assert best.time.least + best.time.most <= other.time.least + other.time.most
    sizes = [one.memory.total for one in result.front]
    times = [one.seconds for one in result.front]
    assert sizes == sorted(sizes, reverse=True) and times == sorted(times)


def test_layout_is_an_experiment(tmp_path):
    experiment, layout = tmp_path / "run.py", tmp_path / "layout.py"
    experiment.write_text(
        "from gptjax import GPT3, Config\n"
        "def config():\n    return Config(name='mine', model=GPT3['small'], batch_size=8)\n"
    )
    before = load_experiment(str(experiment))
    found = search(replace(before, data=TEXT), parse_topology("h100:4"), compiling=False).best
    layout.write_text(as_experiment(str(experiment), before, found, "Found."))
    after = load_experiment(str(layout))
    assert after.mesh == found.config.mesh and after.accumulate == found.config.accumulate
    assert after.model.remat == found.config.model.remat
    assert not {"data.path", "model.width"} & layout_options(before, after).keys()
    assert describe(after) == describe(found.config)


def test_what_would_make_it_fit():
    model = replace(GPT3["2.7b"], remat="none")
    config = Config(data=TEXT, model=model, batch_size=64, mesh=MeshConfig(data=8))
    found = plan(config, parse_topology("v5e:8"), compiling=False)
    assert found.margin < 0
    fitting = remedies(found)
    assert len(fitting) == 3
    for one in fitting:
        assert one.margin >= 0 and one.config.model.width == model.width


def test_budget():
    topology = parse_topology("h100:8")
    config = Config(data=TEXT, model=GPT3["small"], batch_size=64, mesh=MeshConfig(data=8))
    found = plan(config, topology, compiling=False, price=2.0)
    slow, fast = within(found, parse_budget("10days", None, topology))
    assert slow < fast == pytest.approx(10 * 86400 / found.time.least * found.step_tokens, rel=1e-3)
    _, money = within(found, parse_budget("1000", 2.0, topology))
    hours = 1000 / 2 / 8
    assert money == pytest.approx(hours * 3600 / found.time.least * found.step_tokens, rel=1e-3)
    wrong = [("ten", None, "h100:8"), ("5", None, "h100:8"), ("5MWh", 1, "v5e:8")]
    for text, price, name in [*wrong, ("1.5.2days", None, "h100:8"), (".", 1, "h100:8")]:
        with pytest.raises(ConfigError, match="budget"):
            parse_budget(text, price, parse_topology(name))


GPT3_FILE = f"{REPOSITORY}/experiments/gpt3.py"
LAYOUTS = runpy.run_path(GPT3_FILE)["TOPOLOGIES"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_gpt3_fit(name):
    config = load_experiment(f"{GPT3_FILE}:{name}")
    found = plan(replace(config, data=TEXT), parse_topology(LAYOUTS[name]), compiling=False)
    assert 1.1 * found.needed < found.topology.chip.memory


# --- the command ---------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    files = [tmp_path / "plan.json", tmp_path / "plan.html"]
    run_verb(
        f"plan {GPT3_FILE}:b175 --topology v5p:512 --no-compile --explain "
        "--mesh.fsdp 64 --mesh.tensor 8 --accumulate 8 --model.remat full --price 4 "
        f"--json {files[0]} --html {files[1]}".split()
    )
    said = capsys.readouterr().out
    for words in ("an estimate, nothing was measured", "fits: ", "all overlaps", "assumed:"):
        assert words in said
    figures = json.loads(files[0].read_text())
    assert figures["memory"]["sum"] == sum(figures["memory"]["kinds"].values())
    assert figures["memory"]["fits"] and figures["bounds"]["best"]["money"] > 0
    page = files[1].read_text()
    assert "v5p:8x8x8" in page and "<script" not in page and "://" not in page


def test_command_says_what_would_fit(capsys):
    run_verb(
        f"plan {GPT3_FILE}:b2_7 --topology v5e:16 --no-compile "
        "--mesh.data 16 --model.remat none".split()
    )
    said = capsys.readouterr().out
    assert "DOES NOT FIT: " in said and "it would fit with" in said


def test_command_without_a_topology():
    with pytest.raises(ConfigError, match="--topology is missing"):
        run_verb(["plan", GPT3_FILE])


def test_command_refuses_files_before_it_plans(tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text("mine = 1\n")
    with pytest.raises(ConfigError) as error:
        run_verb(
            f"plan {GPT3_FILE}:b175 --topology v5p:512 --search --json {tmp_path} "
            f"--html {tmp_path}/none/plan.html --out {own}".split()
        )
    said = str(error.value)
    assert f"--json {tmp_path} is a folder" in said and "there is no folder" in said
    assert f"--out {own} is there, and no earlier search wrote it" in said
    assert own.read_text() == "mine = 1\n" and not capsys.readouterr().out
    given = Plan(topology="v5p:512", search=True, out=str(own))
    assert [*_file_problems(given)]
    own.write_text(f'"""mine laid out for v5p.\n\n{WRITTEN} run.py --search.\n"""\n')
    assert not [*_file_problems(given)]  # an earlier layout is replaced


# --- with the compilers --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:4", "h100:4"])
def test_compiled_for_hardware_that_is_not_here(name):
    topology = parse_topology(name)
    if why := missing(topology):
        pytest.skip(why)
    model = replace(
        GPT3["small"], num_layers=2, vocab_size=8192, context_size=1024, window=None, window_every=1
    )
    config = Config(data=TEXT, model=model, batch_size=8, mesh=MeshConfig(fsdp=2, tensor=2))
    found = plan(config, topology)
    state = sum(found.memory.kinds()[kind] for kind in (*STATE, "batch"))
    assert found.compiled.arguments == state
    assert 0 <= found.compiled.padding < 0.1 * state
    done = formula_flops(found.config, found.axes)  # without the blocks that a kernel passes over
    assert done <= found.compiled.flops <= 1.2 * done
    assert 0.5 < found.memory.total / found.compiled.peak < 2  # large steps are within 10 %
    gathered = [
        one for one in found.compiled.collectives
        if one.kind == "all-gather" and one.num_bytes > 2**20
    ]  # fmt: skip
    expected = [one for one in gathered if not unexpected(one, found)]
    assert {one.dtype for one in expected} == {"bf16"} and len(expected) > len(gathered) / 2


@pytest.fixture(scope="module")
def tpu_program():
    """A function that compiles the step of a small model for eight TPUs."""
    topology = parse_topology("v5e:8")
    if why := missing(topology):
        pytest.skip(why)

    def of(mesh, context_size):
        # Heads of less than 128 are padded, and then added up whole.
        model = GPTConfig(
            vocab_size=8192, num_layers=3, width=1024, num_heads=8, context_size=context_size
        )
        config = Config(data=TEXT, model=model, batch_size=16, mesh=mesh)
        traced = trace_train_step(config, make_mesh(mesh, find_devices(topology)))
        compiled = traced.lower().compile(compiler_options=compiler_options(topology))
        return config.model, Program(compiled.as_text())

    return of


@pytest.mark.slow
def test_tpus_scatter_the_gradients_of_layers(tpu_program):
    mesh = MeshConfig(data=2, fsdp=4)
    model, program = tpu_program(mesh, 1024)
    known = program.collectives(mesh_axes(mesh, 8))
    large = [one for one in known if one.count >= model.num_layers and one.num_bytes > 2**20]
    assert {(one.kind, one.axis) for one in large} == {
        ("all-gather", "fsdp"),
        ("reduce-scatter", "fsdp"),
        ("all-reduce", "data"),
    }
    assert {one.dtype for one in large if one.kind == "all-gather"} == {"bf16"}


@pytest.mark.slow
def test_tpus_scatter_the_gradients_of_layers_on_a_mesh_of_one_axis(tpu_program):
    """There the product that makes a gradient and its sum over devices are done in turns, with
    permutations in between; no device has the whole sum.
    """
    mesh = MeshConfig(fsdp=8)
    model, program = tpu_program(mesh, 1024)
    known = program.collectives(mesh_axes(mesh, 8))
    of_layers = [one for one in known if one.count >= model.num_layers and one.num_bytes >= 2**18]
    assert {one.kind for one in of_layers} == {"all-gather", "collective-permute"}
    sent = [one for one in of_layers if one.kind == "collective-permute"]
    backward = [one for one in sent if one.op.endswith("dot_general")]
    assert len(backward) > 6 and {one.dtype for one in of_layers} == {"bf16"}


@pytest.mark.slow
def test_tpus_compute_while_a_ring_sends(tpu_program):
    model, program = tpu_program(MeshConfig(fsdp=2, context=4), 4096)
    passed = 0
    for name, instructions in program.computations.items():
        if program.times[name] < model.num_layers:
            continue
        begun = {}
        for place, one in enumerate(instructions):
            if one.opcode == "collective-permute-start":
                begun[one.name] = place
            elif one.opcode == "collective-permute-done":
                between = instructions[begun[one.operands[0]] + 1 : place]
                assert any(other.opcode in ("fusion", "custom-call") for other in between)
                passed += 1
            assert one.opcode != "collective-permute"  # which would be waited for
    assert passed >= 4  # keys and values, and their gradients


@pytest.mark.parametrize(
    "message, used",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 100.50G of 95.74G hbm",
            100.5,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (2.99T) exceeds available HBM (95.74G).",
            2.99 * 1024,
        ),
        ("INTERNAL: Used 100.50G of 95.74G hbm", None),
    ],
)
def test_what_a_program_needs_is_read_from_the_refusal(message, used):
    found = _used(message)
    assert found == (used and pytest.approx(used * 2**30))
