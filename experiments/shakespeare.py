"""Tiny Shakespeare by bytes, with the settings of nanoGPT's recipe for a CPU.

    gptjax train experiments/shakespeare.py --data.path input.txt

The text is Karpathy's, 1,115,394 characters, all ASCII, so nats per byte are nats per character.
The loss is the mean over the whole validation split, the last tenth of the text.

Result: validation loss 1.796, where nanoGPT's README gives 1.88 (2 cores of an AMD EPYC with
AVX-512, 2:36 minutes, 12,600 tokens per second; 2026-11-24). All settings are nanoGPT's but the
learning rate, which is twice as high; with nanoGPT's own 1e-3 to 1e-4 the loss is 1.888.
"""

from gptjax import Config, DataConfig, GPTConfig, OptimizerConfig, SampleConfig


def config() -> Config:
    """Returns the run."""
    return Config(
        name="shakespeare",
        model=GPTConfig(context_size=64, num_layers=4, width=128, num_heads=4, bias=False),
        data=DataConfig(path=("input.txt",), holdout=0.1),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            final_learning_rate=2e-4,
            warmup_steps=100,
            beta2=0.99,
        ),
        sample=SampleConfig(max_tokens=500),
        steps=2000,
        batch_size=12,
    )
