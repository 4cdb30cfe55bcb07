"""gptjax: a trainer for the GPT family in JAX.

The public names. A file is imported when one of its names is first used, so `import gptjax` is
quick and an experiment can be read without JAX.
"""

import importlib

_FILE_OF = {
    name: file
    for file, names in {
        "config": "Config ConfigError DataConfig GPT2 GPT3 GPTConfig GuardConfig MeshConfig "
        "MixtureConfig OptimizerConfig SampleConfig TaskConfig TuneConfig check from_json "
        "load_experiment to_json",
        "tokenizer": "BPETokenizer ByteTokenizer SentencePieceTokenizer StreamDecoder Tokenizer "
        "load_tokenizer make_tokenizer train_sentencepiece",
        "sources": "DataError",
        "data": "Batch",
        "sharding": "make_mesh",
        "attention": "Mask attend",
        "model": "KVCache abstract_params forward init_params param_letters token_losses",
        "rundir": "BusyError CheckpointError read_run",
        "checkpoint": "Checkpoints",
        "hf": "load_hf save_hf",
        "loading": "load",
        "programs": "load_programs save_programs",
        "sampling": "Sampling",
        "prefill": "prepare",
        "decoding": "Completion Score complete generate next_token_logits score stream stream_text",
        "step": "TrainState abstract_state train_step",
        "stop": "Interrupted",
        "train": "DivergenceError fit",
    }.items()
    for name in names.split()
}

__all__ = sorted(_FILE_OF)


def __getattr__(name: str) -> object:
    if name not in _FILE_OF:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptjax.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_FILE_OF)
