"""Tiny Shakespeare by bytes, with the settings of nanoGPT's recipe for a CPU.

    gptjax train experiments/shakespeare.py --data.path input.txt

The text is Karpathy's, 1,115,394 characters, all ASCII, so nats per byte are nats per character.
nanoGPT's README gives a validation loss of 1.88 for these settings.
"""

from gptjax import Config, DataConfig, GPTConfig, OptimizerConfig, SampleConfig


def config() -> Config:
    """Returns the run."""
    return Config(
        name="shakespeare",
        model=GPTConfig(context_size=64, num_layers=4, width=128, num_heads=4, bias=False),
        data=DataConfig(path=("input.txt",), holdout=0.1),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            final_learning_rate=1e-4,
            warmup_steps=100,
            beta2=0.99,
        ),
        sample=SampleConfig(max_tokens=500),
        steps=2000,
        batch_size=12,
    )
