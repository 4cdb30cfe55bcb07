"""Damage to the files of a checkpoint, at random: what a disk, a copy or a person can do to it."""

import os
import random
import shutil
from pathlib import Path

KINDS = ("flip", "set", "truncate", "empty", "append", "delete")


def mutate(folder: Path, draw: random.Random) -> str:
    """Damage one file of a step; what was done to which, for a message."""
    # An empty file has no bytes to change; it can be deleted, or get some.
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    size = path.stat().st_size
    kind = draw.choice(KINDS if size else ("append", "delete"))
    what = f"{kind} {path.relative_to(folder)}"
    if kind == "delete":
        path.unlink()
    elif kind == "append":
        with path.open("ab") as file:
            file.write(draw.randbytes(draw.choice([1, 1000])))
    elif kind in ("truncate", "empty"):
        os.truncate(path, 0 if kind == "empty" else draw.randrange(size))
    else:
        place, content = draw.randrange(size), bytearray(path.read_bytes())
        old = content[place]
        content[place] = old ^ 1 << draw.randrange(8) if kind == "flip" else draw.randrange(256)
        if content[place] == old:
            content[place] ^= 255
        path.write_bytes(content)
        what += f" at byte {place}"
    return what


def damaged_copy(run_dir: Path, copy: Path, step: int, draw: random.Random) -> str:
    """Make `copy` the same run, with one file of a step damaged; what was done."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_dir, copy)
    return mutate(copy / "checkpoints" / str(step), draw)
