"""How long a model of Transformers takes to become parameters, beside reading its file.

    python tools/bench_import.py                 # GPT-2 small, random weights, 5 rounds
    python tools/bench_import.py FOLDER --rounds 9

One round reads the file with the library safetensors, into NumPy arrays, and then with
`gptjax.load_hf`, onto one CPU device, from the cache of the operating system. Printed are the
median of a round's ratio with the least and the most, the seconds, and the most memory that each
added, as a ratio to the parameters in float32.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Run(NamedTuple):
    """What one reading took."""

    seconds: float
    added_bytes: int


def measure(read: Callable[[], object]) -> Run:
    gc.collect()  # which is when JAX gives back what it was given
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    kept = read()
    seconds = time.perf_counter() - start
    added = memory("VmHWM") - before
    del kept
    return Run(seconds, added)


def memory(name: str) -> int:
    """A figure of this process in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", help="a model of Transformers; GPT-2 small, random")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    import jax

    jax.config.update("jax_platforms", "cpu")
    from safetensors.numpy import load_file

    from gptjax.config import GPT2
    from gptjax.hf import load_hf, save_hf
    from gptjax.model import init_params

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.folder or Path(scratch, "model"))
        if given.folder is None:
            config = GPT2["small"]
            save_hf(
                folder, config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
            )
        files = sorted(folder.glob("*.safetensors"))

        def read_params() -> object:
            return jax.block_until_ready(load_hf(folder)[1])

        size = 4 * sum(leaf.size for leaf in jax.tree.leaves(read_params()))
        rounds = [
            (measure(lambda: [load_file(path) for path in files]), measure(read_params))
            for _ in range(given.rounds)
        ]
    ratios = sorted(ours.seconds / library.seconds for library, ours in rounds)
    median = statistics.median(ratios)
    print(
        f"import / read   {median:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {len(ratios)} rounds"
    )
    for name, runs in zip(("safetensors", "gptjax"), zip(*rounds, strict=True), strict=True):
        seconds = statistics.median(run.seconds for run in runs)
        most = max(run.added_bytes for run in runs)
        print(
            f"{name:15} {seconds:.3f} s, {most / size:.2f} times the {size:,} bytes of parameters"
        )


if __name__ == "__main__":
    main()
