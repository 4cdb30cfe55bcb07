"""What golden/run was trained with."""

from gptjax import Config, DataConfig, GPTConfig, OptimizerConfig, SampleConfig


def config():
    return Config(
        model=GPTConfig(context_size=16, num_layers=2, width=8, num_heads=2),
        data=DataConfig(path=("text.txt",)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        sample=SampleConfig(max_tokens=0),
        steps=4,
        batch_size=2,
        log_every=1,
        eval_every=None,
        save_every=4,
        tensorboard=False,
    )
