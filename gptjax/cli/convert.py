"""The verbs between runs and Hugging Face's Transformers: `gptjax convert | export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptjax.config import (
    Config,
    ConfigError,
    Count,
    DataConfig,
    MeshConfig,
    TaskConfig,
    TuneConfig,
    Whole,
)


@dataclass(frozen=True)
class Convert:
    """Make the model and tokenizer of HF_FOLDER, which Transformers wrote, the new run RUN; of a
    folder of adapters, which PEFT wrote, those that they change, and them.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    adapters: bool = False  # keep adapters apart, to train them on; otherwise they are merged
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class Export:
    """Write the model and tokenizer of the run directory RUN to HF_FOLDER, for Transformers; of a
    task that its head has learnt, with that head and the names of its labels.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="HF_FOLDER")] = ""
    step: Whole | None = None  # of the checkpoint; None: the best of a task, or the newest
    # safetensors: with config and tokenizer, for Transformers; stablehlo: two programs, prefill and
    # decode, that any XLA runs, with the parameters as their arguments
    format: Literal["safetensors", "stablehlo"] = "safetensors"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the parameters
    # of a run with --tune.lora-rank: its adapters alone, and the head of a task, for PEFT, which
    # adds them to the model that the run began with
    adapters: bool = False
    tokenizer: bool = True  # write the tokenizer's files, too
    batch_size: Count = 1  # rows of the programs of stablehlo
    debug: bool = False  # show the traceback of an error


# By `task.delimit`.
AS_WE_SHOW = {
    True: "and rows as gptjax has them: end-of-text before them, and after all but tagged ones",
    False: "and texts as they are",
}


def convert(hf_folder: str, given: Convert) -> None:
    """Write a run at step 0, whose optimizer has seen nothing."""
    import jax

    from gptjax.checkpoint import Checkpoints
    from gptjax.hf import base_of, is_peft
    from gptjax.loading import load_apart, read_model, task_of, with_end
    from gptjax.rundir import CheckpointError, save_run
    from gptjax.sharding import make_mesh
    from gptjax.step import jit_init_state, with_params
    from gptjax.tuning import merged

    if not given.run:
        raise ConfigError("RUN is missing: give it second, as in `gptjax convert HF_FOLDER RUN`")
    run_dir = Path(given.run)
    if (run_dir / "config.json").exists():
        raise CheckpointError(f"{run_dir}: is there already; give another run directory")
    folder, mesh = Path(hf_folder), make_mesh(MeshConfig(), jax.devices()[:1])
    if given.adapters and not is_peft(folder):
        raise ConfigError(f"--adapters: {folder} has no adapters of PEFT: leave it out")
    model, tokenizer = read_model(folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{hf_folder} has no tokenizer: put its tokenizer.json, vocab.json and merges.txt, or "
            ".model there"
        )
    params, tune = load_apart(folder, model, mesh)
    if not given.adapters:
        params, tune = merged(params, Config(model=model, tune=tune)), TuneConfig()
    grown, params = with_end(model, params, tokenizer)
    data = DataConfig(tokenizer=str(run_dir / "tokenizer"))
    kind, labels, delimit = task_of(folder)
    several = model.head == "labels"
    task = TaskConfig(kind=kind, labels=labels, several=several, delimit=delimit)
    base = str(base_of(folder)) if given.adapters else None
    config = Config(name=run_dir.name, model=grown, data=data, task=task, tune=tune, init_from=base)
    state = jit_init_state(config, mesh)(jax.random.key(0))
    state = with_params(state, lambda: params)
    with Checkpoints(run_dir) as checkpoints:
        checkpoints.save(0, state)
    save_run(run_dir, config, tokenizer)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"run        {run_dir}: {count:,} parameters, tokenizer of {tokenizer.vocab_size:,} ids")
    if grown != model:
        print(f"end        {tokenizer.end} is a new row of the embedding, the mean of all")
    verb = "generate {} --prompt TEXT" if kind is None else "predict {} FILE --out FILE"
    print(f"next       gptjax {verb.format(run_dir)}")


def export(run_dir: str, given: Export) -> None:
    """Write a model for Transformers, or as programs."""
    from gptjax.hf import save_hf
    from gptjax.loading import load, task_of
    from gptjax.programs import save_programs

    if not given.folder:
        raise ConfigError("HF_FOLDER is missing: give it second, as in `gptjax export RUN FOLDER`")
    if given.adapters:
        _export_adapters(Path(run_dir), given)
        return
    config, params, tokenizer = load(run_dir, step=given.step)
    tokenizer = tokenizer if given.tokenizer else None
    folder = Path(given.folder)
    if given.format == "stablehlo":
        save_programs(folder, config, params, batch_size=given.batch_size, dtype=given.dtype)
        print(f"programs   {folder}: prefill.bin, decode.bin, model.safetensors, programs.json")
        return
    task, labels, delimit = task_of(Path(run_dir))
    if config.head == "lm":
        task, labels = None, ()
    given = (folder, config, params, tokenizer, given.dtype)
    name = save_hf(*given, task=task, labels=labels, delimit=delimit)
    print(f"folder     {folder}: a {name}, read again and compared")
    if config.head == "lm":
        print(
            'next       python -c "from transformers import pipeline; '
            f"print(pipeline('text-generation', '{folder}')('TEXT'))\""
        )
    else:
        print(f"next       transformers.{name}.from_pretrained('{folder}'), {AS_WE_SHOW[delimit]}")


def _export_adapters(run_dir: Path, given: Export) -> None:
    """Write the adapters of a run for PEFT."""
    import jax

    from gptjax.hf import base_of, is_hf, is_peft, save_adapters
    from gptjax.loading import load_apart, same_base
    from gptjax.rundir import CheckpointError, read_run
    from gptjax.sharding import make_mesh

    config, _ = read_run(run_dir)
    if config.tune.lora_rank is None:
        raise ConfigError(
            f"--adapters: {run_dir} has none, it was trained without --tune.lora-rank: leave it out"
        )
    if given.format != "safetensors":
        raise ConfigError(f"--adapters and --format {given.format} exclude each other")
    if config.init_from is None:
        raise CheckpointError(
            f"{run_dir} began with random parameters, which are nowhere else: export it whole, "
            "without --adapters"
        )
    origin, folder = Path(config.init_from), Path(given.folder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params, tune = load_apart(run_dir, config.model, mesh, given.step)
    bases = [base_of(origin), origin] if is_peft(origin) else [origin]
    same = (one for one in bases if not one.exists() or same_base(one, config.model, params, mesh))
    base = next(same, None)
    if base is None:
        raise CheckpointError(
            f"{origin} has other parameters now than {run_dir} began with, so its adapters would "
            "change another model: export it whole, without --adapters"
        )
    head = config.model.head != "lm"
    task, labels = (config.task.kind, config.task.labels) if head else (None, ())
    delimit = config.task.delimit
    name, ranks = save_adapters(
        *(folder, config.model, tune, params, base, given.dtype),
        task=task,
        labels=labels,
        delimit=delimit,
    )
    words = ", ".join(f"{module} of rank {rank}" for module, rank in ranks.items())
    print(f"folder     {folder}: adapters of a {name}: {words}")
    if not base.exists():
        print(f"base       {base} is not there: it was not compared")
    elif is_peft(base):
        print(f"base       gptjax convert {base} RUN; gptjax export RUN BASE")
    elif not is_hf(base):
        print(f"base       gptjax export {base} BASE")
    options = f", num_labels={config.model.num_labels}" if config.model.num_labels else ""
    print(
        f"next       peft.PeftModel.from_pretrained(transformers.{name}.from_pretrained('BASE'"
        f"{options}), '{folder}')"
    )
