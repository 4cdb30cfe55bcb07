"""Measure generation against Transformers' `generate`, in turn, on the same weights' shapes.

    python tools/bench_generate.py
    python tools/bench_generate.py --size tiny --batch-size 8 --choose greedy --rounds 3

Each program has a process of its own, with the same cores, and continues the same random prompts by
as many tokens: greedily, or drawn with temperature 0.8, top_k 50 and top_p 0.95. They take turns,
one call at a time, as in tools/bench.py: what counts is the ratio of the peer's seconds to
gptjax's in the same round. Time to the first token is that of a call for one token.

Prints a JSON line for each measurement, and a table of them on the standard error. Of each program:
seconds, the median of the rounds; tokens_per_second, of all rows together; peak_bytes, resident
memory of the process. ratio_median is above 1 where gptjax is faster.
"""

import argparse
import datetime
import functools
import importlib.util
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from bench import Program, commit, hardware, measure, peak_resident_bytes, positive

from gptjax.config import GPT2, GPTConfig

SIZES = {
    "tiny": GPTConfig(
        vocab_size=50257, context_size=256, num_layers=6, width=384, num_heads=6, bias=True
    ),
    "124m": GPT2["small"],
}
DRAW = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


class Workload(NamedTuple):
    """One call: what every program does in a round."""

    size: str
    batch_size: int
    choose: str  # greedy or draw
    prompt_tokens: int
    new_tokens: int


def make_gptjax(work: Workload, started: float) -> Program:
    """`gptjax.generate` with parameters that are prepared once."""
    import jax

    import gptjax

    config = replace(SIZES[work.size], compute_dtype="float32")
    params = gptjax.prepare(
        jax.jit(gptjax.init_params, static_argnums=0)(config, the_key()), config
    )
    chosen = {"temperature": 0.0} if work.choose == "greedy" else DRAW
    sampling = gptjax.Sampling(max_tokens=work.new_tokens, **chosen)
    prompts = prompts_of(work).tolist()

    def step() -> None:
        rows = gptjax.generate(params, prompts, config, sampling, the_key(), end=None)
        assert [len(row) for row in rows] == [work.new_tokens] * work.batch_size

    step()
    return Program(step, functools.partial(facts, f"jax {jax.__version__}"))


def make_transformers(work: Workload, started: float) -> Program:
    """`generate` of a GPT2LMHeadModel of the same shapes, as its users call it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes = SIZES[work.size]
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(
        vocab_size=sizes.vocab_size,
        n_positions=sizes.context_size,
        n_embd=sizes.width,
        n_layer=sizes.num_layers,
        n_head=sizes.num_heads,
        **ends,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.from_numpy(prompts_of(work))
    how = {"do_sample": False} if work.choose == "greedy" else {"do_sample": True} | DRAW
    how |= {"max_new_tokens": work.new_tokens, "pad_token_id": 0}
    mask = torch.ones_like(ids)

    def step() -> None:
        out = model.generate(ids, attention_mask=mask, **how)
        assert out.shape == (work.batch_size, work.prompt_tokens + work.new_tokens)

    step()
    version = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return Program(step, functools.partial(facts, version))


def the_key() -> Any:
    """Of parameters and draws."""
    import jax

    return jax.random.key(0)


def prompts_of(work: Workload) -> np.ndarray:
    """Random ids, the same for every program."""
    shape = (work.batch_size, work.prompt_tokens)
    return np.random.default_rng(0).integers(SIZES[work.size].vocab_size, size=shape)


def facts(version: str) -> dict[str, Any]:
    """What a program reports of itself."""
    return {"version": version, "peak_bytes": peak_resident_bytes()}


PROGRAMS: dict[str, Callable] = {"gptjax": make_gptjax, "transformers": make_transformers}


def line_of(work: Workload, measured: dict[str, dict]) -> dict[str, Any]:
    """A measurement as it is printed."""
    all_seconds = {name: about.pop("seconds") for name, about in measured.items()}
    for name, about in measured.items():
        about["seconds"] = statistics.median(all_seconds[name])
        about["tokens_per_second"] = work.batch_size * work.new_tokens / about["seconds"]
    pairs = zip(all_seconds["transformers"], all_seconds["gptjax"], strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        **work._asdict(),
        "rounds": len(ratios),
        "programs": measured,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def table_of(lines: list[dict]) -> str:
    """The measurements, a row each."""
    rows = ["size  batch  tokens  choose  gptjax/s  peer/s  ratio (least to most)  peak MB, peer's"]
    for line in lines:
        ours, peer = line["programs"]["gptjax"], line["programs"]["transformers"]
        rows.append(
            f"{line['size']:5} {line['batch_size']:5}  {line['new_tokens']:6}  {line['choose']:6}  "
            f"{ours['tokens_per_second']:8.1f}  {peer['tokens_per_second']:6.1f}  "
            f"{line['ratio_median']:5.2f} ({line['ratio_min']:.2f} to {line['ratio_max']:.2f})"
            f"    {ours['peak_bytes'] / 1e6:10.0f}  {peer['peak_bytes'] / 1e6:6.0f}"
        )
    return "\n".join(rows)


def main() -> int:
    """Measure what the arguments say; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=[*SIZES], help="models")
    batches = "rows of a call (%(default)s)"
    parser.add_argument("--batch-size", nargs="+", type=positive, default=[1, 8], help=batches)
    ways = ("greedy", "draw")
    parser.add_argument("--choose", nargs="+", choices=ways, default=ways, help="how tokens are")
    prompt = "of each row (%(default)s)"
    parser.add_argument("--prompt-tokens", type=positive, default=16, help=prompt)
    new = "of each row; 1 is the time to the first token (%(default)s)"
    parser.add_argument("--new-tokens", nargs="+", type=positive, default=[128, 1], help=new)
    rounds = "calls of each that count (%(default)s)"
    parser.add_argument("--rounds", type=positive, default=5, help=rounds)
    given = parser.parse_args()
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"the package {package!r} is missing: pip install {package}")
    lines = []
    every = (given.size, given.batch_size, given.choose, given.new_tokens)
    for size, batch_size, choose, new_tokens in itertools.product(*every):
        work = Workload(size, batch_size, choose, given.prompt_tokens, new_tokens)
        programs = {name: functools.partial(make, work) for name, make in PROGRAMS.items()}
        lines.append(line_of(work, measure(programs, given.rounds)))
        print(json.dumps(lines[-1]), flush=True)
    print(table_of(lines), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
