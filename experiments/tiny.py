"""A GPT of 2M parameters on the source code of Python's standard library, which every Python has.

    gptjax train experiments/tiny.py

Takes about two minutes on two CPU cores, and ends with a sample that looks like Python.
"""

import glob
import sysconfig

from gptjax import Config, DataConfig, GPTConfig, OptimizerConfig

# Tests and demonstrations, other people's packages, and what differs between machines.
LEFT_OUT = (
    "*/test/*",
    "*/tests/*",
    "*/idle_test/*",
    "*/idlelib/*",
    "*/lib2to3/*",
    "*/turtledemo/*",
    "*/site-packages/*",
    "*/dist-packages/*",
    "*/__pycache__/*",
    "*/encodings/*",  # tables
    "*/pydoc_data/*",
    "*/config-*/*",
    "*/_sysconfigdata*",
    "*/sitecustomize.py",
)


def config() -> Config:
    """Returns the run."""
    library = glob.escape(sysconfig.get_path("stdlib"))
    return Config(
        name="tiny",
        model=GPTConfig(context_size=256, num_layers=4, width=192, num_heads=6),
        data=DataConfig(path=(f"{library}/**/*.py",), exclude=LEFT_OUT),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=40),
        steps=400,
        batch_size=16,
        eval_every=100,
        eval_batches=20,
    )
