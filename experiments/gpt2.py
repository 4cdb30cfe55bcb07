"""The four sizes of GPT-2 (Radford et al. 2019), trained with nanoGPT's settings.

    gptjax train experiments/gpt2.py:medium --data.path 'text/*.txt.gz' --accumulate 5

A batch is 480 rows of 1,024 tokens, about half a million. It is computed in 40 parts, of 12 rows on
one device: give fewer parts for more devices. Learning rates are those of GPT-3's models of like
size (Brown et al. 2020, table 2.1), since GPT-2's were not published.

The tokenizer is GPT-2's, from a folder `gpt2` that holds its encoder.json and vocab.bpe, or its
vocab.json and merges.txt; --data.tokenizer names another.
"""

from gptjax import GPT2, Config, DataConfig, OptimizerConfig


def small() -> Config:
    """124M parameters."""
    return _config("small", 6e-4)


def medium() -> Config:
    """355M parameters."""
    return _config("medium", 3e-4)


def large() -> Config:
    """774M parameters."""
    return _config("large", 2.5e-4)


def xl() -> Config:
    """1,558M parameters."""
    return _config("xl", 2e-4)


config = small


def _config(size: str, learning_rate: float) -> Config:
    return Config(
        name=f"gpt2-{size}",
        model=GPT2[size],
        data=DataConfig(tokenizer="gpt2"),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=2000),
        steps=600_000,
        batch_size=480,
        accumulate=40,
        eval_every=2000,
        eval_batches=20,
        save_every=2000,
    )
