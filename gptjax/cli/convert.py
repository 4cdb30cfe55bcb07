"""The verbs between runs and Hugging Face's Transformers: `gptjax convert | export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptjax.config import Config, ConfigError, Count, DataConfig, TaskConfig, Whole


@dataclass(frozen=True)
class Convert:
    """Make the model and tokenizer of HF_FOLDER, which Transformers wrote, the new run RUN."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
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
    tokenizer: bool = True  # write the tokenizer's files, too
    batch_size: Count = 1  # rows of the programs of stablehlo
    debug: bool = False  # show the traceback of an error


AS_WE_SHOW = "and rows as gptjax has them: end-of-text before them, and after all but tagged ones"


def convert(hf_folder: str, given: Convert) -> None:
    """Write a run at step 0, whose optimizer has seen nothing."""
    import jax

    from gptjax.checkpoint import Checkpoints
    from gptjax.loading import load, task_of, with_end
    from gptjax.rundir import CheckpointError, save_run
    from gptjax.sharding import make_mesh
    from gptjax.step import jit_init_state, with_params

    if not given.run:
        raise ConfigError("RUN is missing: give it second, as in `gptjax convert HF_FOLDER RUN`")
    run_dir = Path(given.run)
    if (run_dir / "config.json").exists():
        raise CheckpointError(f"{run_dir}: is there already; give another run directory")
    model, params, tokenizer = load(hf_folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{hf_folder} has no tokenizer: put its tokenizer.json, vocab.json and merges.txt, or "
            ".model there"
        )
    grown, params = with_end(model, params, tokenizer)
    data = DataConfig(tokenizer=str(run_dir / "tokenizer"))
    kind, labels = task_of(Path(hf_folder))
    task = TaskConfig(kind=kind, labels=labels, several=model.head == "labels")
    config = Config(name=run_dir.name, model=grown, data=data, task=task)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
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
    config, params, tokenizer = load(run_dir, step=given.step)
    tokenizer = tokenizer if given.tokenizer else None
    folder = Path(given.folder)
    if given.format == "stablehlo":
        save_programs(folder, config, params, batch_size=given.batch_size, dtype=given.dtype)
        print(f"programs   {folder}: prefill.bin, decode.bin, model.safetensors, programs.json")
        return
    task, labels = (None, ()) if config.head == "lm" else task_of(Path(run_dir))
    name = save_hf(folder, config, params, tokenizer, given.dtype, task=task, labels=labels)
    print(f"folder     {folder}: a {name}, read again and compared")
    if config.head == "lm":
        print(
            'next       python -c "from transformers import pipeline; '
            f"print(pipeline('text-generation', '{folder}')('TEXT'))\""
        )
    else:
        print(f"next       transformers.{name}.from_pretrained('{folder}'), {AS_WE_SHOW}")
