"""The size of GPT-2 small with what came later: RoPE, RMSNorm, SwiGLU, grouped-query attention.

    gptjax train experiments/modern.py --data.path 'text/*.txt.gz' --accumulate 5

No biases, and an unembedding of its own. Batches and schedule as in gpt2.py, so losses compare.

The tokenizer is GPT-2's, from a folder `gpt2` that holds its encoder.json and vocab.bpe, or its
vocab.json and merges.txt; --data.tokenizer names another.
"""

from gptjax import Config, DataConfig, GPTConfig, OptimizerConfig


def config() -> Config:
    """Returns the run."""
    return Config(
        name="modern",
        model=GPTConfig(
            vocab_size=50257,
            context_size=1024,
            num_layers=12,
            width=768,
            num_heads=12,
            num_kv_heads=4,
            positions="rope",
            norm="rmsnorm",
            activation="swiglu",
            bias=False,
            tied_embedding=False,
        ),
        data=DataConfig(tokenizer="gpt2"),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000),
        steps=600_000,
        batch_size=480,
        accumulate=40,
        eval_every=2000,
        eval_batches=20,
        save_every=2000,
    )
