"""The eight sizes of GPT-3 (Brown et al. 2020, table 2.1 and appendix B): 300 billion tokens each.

    gptjax train experiments/gpt3.py:b2_7 --data.path 'text/*.txt.gz' --mesh.fsdp 8 --accumulate 8

The paper's warm-up is 375 million tokens, its cosine ends at a tenth of the rate after 260 billion,
and the rate stays there. Its batches grow to their size over the first 4 to 12 billion tokens; here
they have it from the start. 3.2 million tokens are 1,536 rows here, which more meshes divide.

`small_h100`, `b175_v5p` and their like are laid out for hardware, which TOPOLOGIES names:

    gptjax plan experiments/gpt3.py:b175_v5p --topology v5p:512

What their docstrings say is an estimate, by formula (`gptjax plan ... --no-compile`) or by the
compiler; none has been run. The first of two figures is for a step in which nothing overlaps, the
second for one in which everything does. MFU counts all keys, also those that no causal query sees,
so it can pass 100 %.

The tokenizer is GPT-2's, from a folder `gpt2` that holds its encoder.json and vocab.bpe, or its
vocab.json and merges.txt; --data.tokenizer names another.
"""

from dataclasses import replace
from typing import Any

from gptjax import GPT3, Config, DataConfig, MeshConfig, OptimizerConfig

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


TOPOLOGIES = {
    "small_h100": "h100:1",
    "small_h200": "h200:1",
    "small_v5e": "v5e:8",
    "xl_v5e": "v5e:32",
    "xl_v4": "v4:32",
    "xl_h100": "h100:8",
    "b6_7_v5e": "v5e:256",
    "b6_7_v4": "v4:128",
    "b6_7_v6e": "v6e:64",
    "b6_7_h100": "h100:64",
    "b13_v5p": "v5p:128",
    "b13_v6e": "v6e:128",
    "b13_tpu7x": "tpu7x:64",
    "b13_h100": "h100:128",
    "b175_v5p": "v5p:512",
    "b175_v4": "v4:1024",
    "b175_v6e": "v6e:256",
    "b175_tpu7x": "tpu7x:256",
    "b175_h100": "h100:512",
}


def small_h100() -> Config:
    """125M on h100:1.

    By formula, 2026-11-25: 28.7 GiB a device of 79.1; MFU at most 32% to 46%; 6.7 to 9.6 days,
    160 to 231 chip hours, at least. Compiled: 31.1 GiB, MFU at most 31% to 45%.
    """
    return _laid(small(), remat="dots", accumulate=4)


def small_h200() -> Config:
    """125M on h200:1.

    By formula, 2026-11-25: 55.0 GiB a device of 139.7; MFU at most 40% to 66%; 4.6 to 7.6 days,
    111 to 183 chip hours, at least.
    """
    return _laid(small(), remat="dots", accumulate=2)


def small_v5e() -> Config:
    """125M on v5e:8.

    By formula, 2026-11-25: 8.4 GiB a device of 15.8; MFU at most 31% to 48%; 4.0 to 6.1 days, 759
    to 1,176 chip hours, at least.
    """
    return _laid(small(), remat="dots", accumulate=2, fsdp=8)


def xl_v5e() -> Config:
    """1.3B on v5e:32.

    By formula, 2026-11-25: 8.5 GiB a device of 15.8; MFU at most 51% to 97%; 4.8 to 9.3 days,
    3,711 to 7,126 chip hours, at least.
    """
    return _laid(xl(), remat="dots", accumulate=4, fsdp=32)


def xl_v4() -> Config:
    """1.3B on v4:32.

    By formula, 2026-11-25: 15.6 GiB a device of 30.8; MFU at most 60% to 97%; 3.5 to 5.6 days,
    2,658 to 4,329 chip hours, at least.
    """
    return _laid(xl(), remat="dots", accumulate=2, fsdp=32)


def xl_h100() -> Config:
    """1.3B on h100:8.

    By formula, 2026-11-25: 35.2 GiB a device of 79.1; MFU at most 57% to 101%; 3.7 to 6.6 days,
    710 to 1,272 chip hours, at least. Compiled: 35.9 GiB, MFU at most 53% to 101%.
    """
    return _laid(xl(), remat="dots", accumulate=4, fsdp=8)


def b6_7_v5e() -> Config:
    """6.7B on v5e:256.

    By formula, 2026-11-25: 11.5 GiB a device of 15.8; MFU at most 56% to 99%; 2.9 to 5.1 days,
    17,896 to 31,619 chip hours, at least. Compiled: 11.5 GiB, MFU at most 55% to 99%.
    """
    return _laid(b6_7(), remat="dots", accumulate=2, fsdp=256)


def b6_7_v4() -> Config:
    """6.7B on v4:128.

    By formula, 2026-11-25: 21.0 GiB a device of 30.8; MFU at most 67% to 99%; 4.2 to 6.2 days,
    12,820 to 18,972 chip hours, at least.
    """
    return _laid(b6_7(), remat="dots", accumulate=2, fsdp=128)


def b6_7_v6e() -> Config:
    """6.7B on v6e:64.

    By formula, 2026-11-25: 16.8 GiB a device of 31.2; MFU at most 48% to 82%; 3.0 to 5.1 days,
    4,620 to 7,845 chip hours, at least.
    """
    return _laid(b6_7(), remat="full", fsdp=64)


def b6_7_h100() -> Config:
    """6.7B on h100:64.

    By formula, 2026-11-25: 44.4 GiB a device of 79.1; MFU at most 65% to 101%; 2.3 to 3.5 days,
    3,487 to 5,378 chip hours, at least. Compiled: 44.1 GiB, MFU at most 63% to 101%.
    """
    return _laid(b6_7(), remat="dots", accumulate=2, fsdp=64)


def b13_v5p() -> Config:
    """13B on v5p:128.

    By formula, 2026-11-25: 61.9 GiB a device of 95.7; MFU at most 80% to 99%; 4.8 to 5.9 days,
    14,673 to 18,126 chip hours, at least.
    """
    return _laid(b13(), remat="dots", fsdp=128)


def b13_v6e() -> Config:
    """13B on v6e:128.

    By formula, 2026-11-25: 13.2 GiB a device of 31.2; MFU at most 48% to 82%; 2.9 to 4.9 days,
    8,859 to 14,950 chip hours, at least.
    """
    return _laid(b13(), remat="full", fsdp=128)


def b13_tpu7x() -> Config:
    """13B on tpu7x:64.

    By formula, 2026-11-25: 61.9 GiB a device of 94.8; MFU at most 63% to 99%; 1.9 to 3.0 days,
    2,919 to 4,609 chip hours, at least.
    """
    return _laid(b13(), remat="dots", fsdp=128)


def b13_h100() -> Config:
    """13B on h100:128.

    By formula, 2026-11-25: 35.7 GiB a device of 79.1; MFU at most 59% to 101%; 2.2 to 3.7 days,
    6,688 to 11,336 chip hours, at least. Compiled: 34.5 GiB, MFU at most 59% to 101%.
    """
    return _laid(b13(), remat="dots", accumulate=2, fsdp=128)


def b175_v5p() -> Config:
    """175B on v5p:512.

    By formula, 2026-11-25: 74.0 GiB a device of 95.7; MFU at most 69% to 99%; 15.8 to 22.9 days,
    194,104 to 281,079 chip hours, at least. Compiled: 72.5 GiB, MFU at most 72% to 99%.
    """
    return _laid(b175(), remat="dots", accumulate=2, split_residual=True, fsdp=256, tensor=2)


def b175_v4() -> Config:
    """175B on v4:1024.

    By formula, 2026-11-25: 20.5 GiB a device of 30.8; MFU at most 50% to 99%; 13.2 to 26.4 days,
    323,977 to 648,043 chip hours, at least.
    """
    return _laid(b175(), remat="dots", accumulate=4, split_residual=True, fsdp=128, tensor=8)


def b175_v6e() -> Config:
    """175B on v6e:256.

    By formula, 2026-11-25: 24.9 GiB a device of 31.2; MFU at most 37% to 82%; 19.2 to 42.0 days,
    118,106 to 258,048 chip hours, at least.
    """
    return _laid(b175(), remat="full", accumulate=4, split_residual=True, fsdp=64, tensor=4)


def b175_tpu7x() -> Config:
    """175B on tpu7x:256.

    By formula, 2026-11-25: 27.8 GiB a device of 94.8; MFU at most 49% to 82%; 7.6 to 12.7 days,
    46,997 to 78,128 chip hours, at least.
    """
    return _laid(b175(), remat="full", split_residual=True, fsdp=256, tensor=2)


def b175_h100() -> Config:
    """175B on h100:512.

    By formula, 2026-11-25: 37.0 GiB a device of 79.1; MFU at most 54% to 82%; 8.9 to 13.6 days,
    108,896 to 167,273 chip hours, at least. Compiled: 35.3 GiB, MFU at most 52% to 82%.
    """
    return _laid(b175(), remat="full", split_residual=True, fsdp=128, tensor=2)


config = small


def _laid(
    config: Config, *, remat: str, accumulate: int = 1, split_residual: bool = False, **mesh: Any
) -> Config:
    model = replace(config.model, remat=remat, split_residual=split_residual)
    return replace(config, model=model, accumulate=accumulate, mesh=MeshConfig(**mesh))


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
