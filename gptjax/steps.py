"""The folders of a run's checkpoints: which of them are steps, and how one comes and goes.

A step is written as `STEP.saving`; when all of it is on the disk, one rename makes it `STEP`. So
what is named by a plain number is whole, whenever the process was killed. What is found damaged
nevertheless is moved to `quarantine/`, and what a run went back behind to `abandoned/`.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from gptjax.faults import at
from gptjax.integrity import Leaf, Manifest, damage, seal
from gptjax.rundir import sync

QUARANTINE = "quarantine"
ABANDONED = "abandoned"
UNFINISHED = ("saving", "replaced", "deleting")  # endings of what may be under way


class Steps:
    """The steps in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def candidates(self) -> list[int]:
        """What is named as a step and holds anything, whole or not; ascending."""
        return sorted(int(path.name) for path in self._paths() if _is_candidate(path))

    def whole(self) -> list[int]:
        """The steps that have all their files, by name and size; ascending."""
        return [step for step in self.candidates() if not damage(self / step, hashes=False)]

    def foreign(self) -> list[str]:
        """The names of what is no step and was not left by one."""
        return sorted(
            path.name
            for path in self._paths()
            if not _is_candidate(path)
            and not _is_unfinished(path)
            and path.name not in (QUARANTINE, ABANDONED)
        )

    def __truediv__(self, step: int) -> Path:
        return self.folder / str(step)

    def saving(self, step: int) -> Path:
        """Where a step is written."""
        return self.folder / f"{step}.saving"

    def commit(self, step: int, mesh: dict[str, int], leaves: dict[str, Leaf]) -> Manifest:
        """Make what was written a step, once it is certain to stay."""
        at("written")
        new, final = self.saving(step), self / step
        manifest = seal(new, step, mesh, leaves)
        at("sealed")
        replaced = _rename(final, "replaced") if final.exists() else None
        new.rename(final)
        sync(self.folder)
        at("renamed")
        if replaced:
            remove_path(replaced)
        return manifest

    def remove_old(self, keep: Collection[int], keep_last: int, keep_every: int | None) -> None:
        """Remove all whole steps but the last ones, the multiples and some more."""
        for step in self.old(keep, keep_last, keep_every):
            self.remove(step)

    def old(self, keep: Collection[int], keep_last: int, keep_every: int | None) -> list[int]:
        """The steps that `remove_old` removes."""
        steps = self.whole()
        multiples = [step for step in steps if keep_every and step % keep_every == 0]
        return sorted({*steps} - {*keep, *steps[-keep_last:], *multiples})

    def remove(self, step: int) -> None:
        """Remove a step; at no time is there a part of it that looks like one."""
        folder = _rename(self / step, "deleting")
        first, *_ = sorted(folder.iterdir())
        remove_path(first)
        at("deleting")
        remove_path(folder)

    def set_aside(self, step: int, name: str) -> Path:
        """Move a step to a folder of those that do not count."""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        path, times = place / str(step), 1
        while path.exists():
            times += 1
            path = place / f"{step}-{times}"
        (self / step).rename(path)
        sync(place)
        sync(self.folder)
        return path

    def clear(self) -> None:
        """Remove what unfinished saves and removals left, and undo unfinished replacements."""
        for path in self.unfinished():
            name, _, ending = path.name.partition(".")
            if ending == "replaced" and not (self.folder / name).exists():
                path.rename(self.folder / name)
            else:
                remove_path(path)

    def unfinished(self) -> list[Path]:
        """What a save or a removal left, or has not finished yet."""
        return sorted(path for path in self._paths() if _is_unfinished(path))

    def leftovers(self) -> list[Path]:
        """What is in the way of nothing: steps that were set aside, and what is unfinished."""
        aside = [self.folder / name for name in (QUARANTINE, ABANDONED)]
        found = [path for place in aside if place.is_dir() for path in sorted(place.iterdir())]
        return found + self.unfinished()

    def _paths(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []


def num_bytes(path: Path) -> int:
    """Of a file, or of all files below a folder."""
    paths = [path, *path.rglob("*")]
    return sum(each.lstat().st_size for each in paths if each.is_symlink() or each.is_file())


def remove_path(path: Path) -> None:
    """Remove a folder, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _rename(folder: Path, ending: str) -> Path:
    """Rename a step that is to go, for what is half removed must not look like one."""
    return folder.rename(folder.with_name(f"{folder.name}.{ending}"))


def _is_step(name: str) -> bool:
    return name.isdecimal() and name == str(int(name))


def _is_candidate(path: Path) -> bool:
    if not _is_step(path.name) or path.is_symlink():
        return False
    try:
        return any(path.iterdir())
    except OSError:  # no folder, or it has just gone
        return False


def _is_unfinished(path: Path) -> bool:
    name, _, ending = path.name.partition(".")
    return _is_step(name) and ending.partition(".")[0] in UNFINISHED
