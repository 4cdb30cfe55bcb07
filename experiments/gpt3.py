"""The eight sizes of GPT-3 (Brown et al. 2020, table 2.1 and appendix B): 300 billion tokens each.

    gptjax train experiments/gpt3.py:b2_7 --data.path 'text/*.txt.gz' --mesh.fsdp 8 --accumulate 8

The paper's warm-up is 375 million tokens, its cosine ends at a tenth of the rate after 260 billion,
and the rate stays there. Its batches grow to their size over the first 4 to 12 billion tokens; here
they have it from the start. 3.2 million tokens are 1,536 rows here, which more meshes divide.

The tokenizer is GPT-2's, from a folder `gpt2` that holds its encoder.json and vocab.bpe, or its
vocab.json and merges.txt; --data.tokenizer names another.
"""

from gptjax import GPT3, Config, DataConfig, OptimizerConfig

TOKENS = 300e9
WARMUP_TOKENS = 375e6
DECAY_TOKENS = 260e9


def small() -> Config:
    """125M parameters; batches of 0.5M tokens."""
    return _config("small", 6e-4, batch_size=256)


def medium() -> Config:
    """350M parameters; batches of 0.5M tokens."""
    return _config("medium", 3e-4, batch_size=256)


def large() -> Config:
    """760M parameters; batches of 0.5M tokens."""
    return _config("large", 2.5e-4, batch_size=256)


def xl() -> Config:
    """1.3B parameters; batches of 1M tokens."""
    return _config("xl", 2e-4, batch_size=512)


def b2_7() -> Config:
    """2.7B parameters; batches of 1M tokens."""
    return _config("2.7b", 1.6e-4, batch_size=512)


def b6_7() -> Config:
    """6.7B parameters; batches of 2M tokens."""
    return _config("6.7b", 1.2e-4, batch_size=1024)


def b13() -> Config:
    """13B parameters; batches of 2M tokens."""
    return _config("13b", 1e-4, batch_size=1024)


def b175() -> Config:
    """175B parameters; batches of 3.1M tokens."""
    return _config("175b", 6e-5, batch_size=1536)


config = small


def _config(size: str, learning_rate: float, batch_size: int) -> Config:
    tokens = batch_size * GPT3[size].context_size
    steps, warmup_steps = round(TOKENS / tokens), round(WARMUP_TOKENS / tokens)
    decay_end = round(DECAY_TOKENS / tokens)
    return Config(
        name=f"gpt3-{size}",
        model=GPT3[size],
        data=DataConfig(tokenizer="gpt2"),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=decay_end - warmup_steps,
            final_steps=steps - decay_end,
        ),
        steps=steps,
        batch_size=batch_size,
        eval_every=2000,
        eval_batches=20,
        save_every=2000,
    )
