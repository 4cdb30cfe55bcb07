"""German, English and Chinese in one model, with one vocabulary and a loss for each language.

    gptjax tokenizer train 'german/*.txt.gz' 'english/*.txt.gz' 'chinese/*.json.gz' \\
        --data.text-field paragraphs --vocab-size 12000 --out multilingual.model
    gptjax train experiments/multilingual.py

German and English are novels, a file each; Chinese are poems of the Tang dynasty, as in poetry.py.
Rows come in equal shares until step 750, and then more of them are Chinese, of which there is
least. metrics.jsonl has eval/german/bits_per_byte and so on.

Result, in bits per byte: German 2.178, English 2.211, Chinese 2.932, together 2.412, after a
million tokens (57 English and 8 German novels, 22,013 poems; 2 cores of an Intel Xeon, 5 minutes
with other work running; 2026-11-24).
"""

from gptjax import (
    Config,
    DataConfig,
    GPTConfig,
    MixtureConfig,
    OptimizerConfig,
    SampleConfig,
)


def config() -> Config:
    """Returns the run."""
    return Config(
        name="multilingual",
        model=GPTConfig(context_size=128, num_layers=4, width=192, num_heads=4, positions="rope"),
        data=DataConfig(
            mixture=(
                MixtureConfig(name="german", path=("german/*.txt.gz",), holdout=0.15),
                MixtureConfig(name="english", path=("english/*.txt.gz",), holdout=0.05),
                MixtureConfig(
                    name="chinese", path=("chinese/*.json.gz",), weights=((750, 2.0),), holdout=0.05
                ),
            ),
            text_field="paragraphs",
            tokenizer="multilingual.model",
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        sample=SampleConfig(prompt="Es war einmal", max_tokens=64),
        steps=1000,
        batch_size=8,
        log_every=50,
        eval_every=500,
        eval_batches=50,
    )
