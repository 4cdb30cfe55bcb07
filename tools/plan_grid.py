"""Compare plans by formula with what compilers say of the very step, over sizes, meshes and remat.

    pip install -e '.[tpu,plan-gpu]' && python tools/plan_grid.py --out grid.jsonl --jobs 2

Each case is `gptjax plan` of one of GPT-3's sizes on a slice of TPUs or hosts of GPUs, which need
not be there. A JSON line is added to --out for each; those that are in it are not done again. In
the end it prints a table, and what holds of all: how far the memory by formula is from the
compiler's peak, whether both say alike that it fits, whether the bytes of the state are those of
the program's arguments, and whether FLOPs by formula are those counted in what JAX traced. Splash
attention passes over blocks of keys that are not seen: the count has them, the formula has not.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench import commit, hardware, positive
from tqdm import tqdm

from gptjax.config import GPT3

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
COMMAND = "import sys; from gptjax.cli import main; sys.exit(main())"
STATE = ("parameters", "optimizer", "counters", "batch")  # kinds of memory that are arguments
CLOSE = 0.1  # the part of the peak by which the formula may miss it


class Case(NamedTuple):
    """A plan."""

    topology: str
    size: str  # a key of GPT3
    options: str

    def __str__(self) -> str:
        return f"{self.topology} {self.size} {self.options}"


CASES = [
    Case(topology, size, " ".join(f"--{option}" for option in options.split(", ")))
    for topology, size, options in [
        ("v5e:8", "small", "mesh.data 8, batch-size 64"),
        ("v5e:8", "small", "mesh.fsdp 8, batch-size 32, model.remat none"),
        ("v5e:16", "xl", "mesh.fsdp 16, batch-size 32"),
        ("v5e:16", "xl", "mesh.fsdp 16, batch-size 64, model.remat full"),
        ("v5e:32", "xl", "mesh.fsdp 8, mesh.tensor 4, batch-size 64"),
        ("v5e:64", "6.7b", "mesh.fsdp 64, batch-size 64, model.remat full"),
        ("v5e:256", "6.7b", "mesh.fsdp 256, batch-size 256"),
        ("v5e:256", "6.7b", "mesh.fsdp 64, mesh.tensor 4, batch-size 256, model.remat full"),
        ("v5p:8", "xl", "mesh.data 8, batch-size 64, model.remat full"),
        ("v5p:8", "xl", "mesh.fsdp 8, batch-size 32"),
        ("v5p:32", "6.7b", "mesh.fsdp 16, mesh.tensor 2, batch-size 32, model.remat none"),
        ("v5p:64", "6.7b", "mesh.fsdp 64, batch-size 128"),
        ("v5p:64", "13b", "mesh.fsdp 64, batch-size 256, model.remat full"),
        ("v5p:128", "13b", "mesh.fsdp 32, mesh.tensor 4, batch-size 256"),
        ("v5p:512", "175b", "mesh.fsdp 64, mesh.tensor 8, batch-size 1536, accumulate 4"),
        ("v5p:512", "175b", "mesh.fsdp 512, batch-size 1536, model.remat full"),
        ("h100:8", "small", "mesh.data 8, batch-size 256"),
        ("h100:8", "xl", "mesh.fsdp 8, batch-size 64"),
        ("h100:8", "xl", "mesh.fsdp 8, batch-size 128, model.remat full"),
        ("h100:16", "xl", "mesh.data 2, mesh.fsdp 8, batch-size 64, model.remat none"),
        ("h100:32", "6.7b", "mesh.fsdp 32, batch-size 128, model.remat full"),
        ("h100:64", "6.7b", "mesh.fsdp 32, mesh.tensor 2, batch-size 128"),
        ("h100:128", "13b", "mesh.fsdp 128, batch-size 256"),
        ("h100:512", "175b", "mesh.fsdp 128, mesh.tensor 4, batch-size 1536, model.remat full"),
    ]
]


def measure(case: Case) -> dict[str, Any]:
    """What the command says of a case."""
    name = case.size.replace(".", "_")
    function = name if name.isidentifier() else f"b{name.removesuffix('b')}"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-c", COMMAND, "plan", f"{EXPERIMENTS / 'gpt3.py'}:{function}"]
        command += ["--topology", case.topology, "--json", str(path), *case.options.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        found = json.loads(path.read_text()) if path.exists() else None
    line = case._asdict() | {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "seconds": round(time.monotonic() - began, 1),
    }
    if found is None:
        return line | {"error": done.stderr.strip().splitlines()[-1:]}
    memory, flops = found["memory"], found["flops"]
    arguments = memory["compiler_arguments"]  # 0: it did not fit, and more is not said
    return line | {
        "sum": memory["sum"],
        "peak": memory["compiler_peak"],
        "device": memory["device"],
        "state_off": sum(memory["kinds"][kind] for kind in STATE) - arguments
        if arguments
        else None,
        "flops_ratio": flops["formula"] / flops["jaxpr"],
        "attention": found["attention"],
    }


def read(path: Path) -> dict[Case, dict[str, Any]]:
    """Lines of cases that are done."""
    lines = [json.loads(line) for line in path.open()] if path.exists() else []
    return {Case(*(line[name] for name in Case._fields)): line for line in lines}


def table_of(lines: list[dict[str, Any]]) -> str:
    """A row for each case, and what holds of all."""
    rows = [f"{'GiB: formula':>12} {'peak':>9}  {'ratio':>5} {'FLOPs':>6}  {'seconds':>7}"]
    good = [line for line in lines if "error" not in line]
    for line in lines:
        name = " ".join(line[part] for part in Case._fields)
        if line not in good:
            rows.append(f"{line['error']}  {name}")
            continue
        rows.append(
            f"{line['sum'] / 2**30:12.2f} {line['peak'] / 2**30:9.2f}  "
            f"{line['sum'] / line['peak']:5.2f} {line['flops_ratio']:6.3f}  "
            f"{line['seconds']:7.0f}  {name}"
        )
    if good:
        off = [abs(line["sum"] / line["peak"] - 1) for line in good]
        alike = [
            (line["sum"] <= line["device"]) == (line["peak"] <= line["device"]) for line in good
        ]
        exact = [line["state_off"] == 0 for line in good if line["state_off"] is not None]
        rows += [
            f"within {CLOSE:.0%} of the peak: {sum(one <= CLOSE for one in off)} of {len(good)}, "
            f"the median {statistics.median(off):.1%} off, the worst {max(off):.1%}",
            f"fits or does not, said alike: {sum(alike)} of {len(good)}",
            f"bytes of the state exact: {sum(exact)} of {len(exact)}",
        ]
    return "\n".join(rows)


def main() -> int:
    """Do what is not done; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, added to")
    parser.add_argument("--only", default="", help="cases whose name begins so, such as h100")
    parser.add_argument("--jobs", type=positive, default=1, help="cases at once (%(default)s)")
    given = parser.parse_args()
    assert {case.size for case in CASES} <= GPT3.keys()
    cases, done = [case for case in CASES if str(case).startswith(given.only)], read(given.out)
    left = [case for case in cases if case not in done]
    with ThreadPoolExecutor(given.jobs) as pool, given.out.open("a") as out:
        for line in tqdm(pool.map(measure, left), total=len(left), unit="plan"):
            print(json.dumps(line), file=out, flush=True)
    lines = [line for case, line in read(given.out).items() if case in cases]
    print(table_of(lines))
    return int(any("error" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
