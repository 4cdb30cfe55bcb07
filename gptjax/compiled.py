"""Programs that are compiled once: kept in the run directory, and a step's in a file for others.

Both are JAX's own persistent cache. It finds a compiled program by a key: a hash of the program, of
the compiler's version and flags, and of the devices. So what is found was compiled from the very
same program, or nothing is found and the program is compiled.

An executable file has an entry of that cache with its key, after a line of JSON that says what it
was compiled for, so that a refusal can be in words. To use it is to put the entry into the cache.
`jax.experimental.serialize_executable` is not used: it pickles other objects with the executable,
and unpickling can do anything, even for a file that is refused in the end. An entry of the cache
goes to the device's runtime as it is. It is machine code all the same: take it only from those
whose programs you would run.
"""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from gptjax.config import Config, ConfigError
from gptjax.model import resolve
from gptjax.rundir import sync
from gptjax.step import trace_train_step

FORMAT = "gptjax executable 1"
STEP, SUFFIX = "jit_step-", "-cache"  # of the names that JAX gives to entries
# What of a config a step is compiled from: some sections, and fields.
SECTIONS = ("model", "tune", "optimizer")
FIELDS = (
    "seed",
    "steps",
    "batch_size",
    "accumulate",
    "mesh.rounds",
    "mesh.microbatches",
    "task.lm_weight",
    "task.label_smoothing",
    "guard.spike_window",
    "guard.spike_loss",
    "guard.spike_grad_norm",
    "guard.max_spikes",
    "guard.rollback_after",
)


@contextmanager
def kept_in(folder: Path, *, always: bool = False) -> Iterator[None]:
    """What is compiled is kept in a folder, unless JAX has been told of another. What takes less
    than a second to compile is not: that is JAX's own rule.

    Entries are only as good as their bytes, and a process may be killed while it writes one: those
    that are not as `seal` has seen them are forgotten.

    Args:
      always: also where JAX has been told of another folder.
    """
    if jax.config.jax_compilation_cache_dir is not None and not always:
        yield
        return
    if jax.process_index() == 0:
        with suppress(OSError):
            _forget_damaged(folder)
    with _cache(folder):
        try:
            yield
        finally:
            seal(folder)


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """JAX's persistent cache is in a folder, and nothing else of XLA's: where that lies would be a
    part of every key.
    """
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    with configured(settings):
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            compilation_cache.reset_cache()


@contextmanager
def configured(settings: dict[str, Any]) -> Iterator[None]:
    """JAX's configuration has other values."""
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def seal(folder: Path) -> None:
    """Write down what the bytes of each entry are, once they are there."""
    if jax.process_index() > 0:
        return
    with suppress(OSError):
        for entry in folder.glob(f"*{SUFFIX}"):
            digest = _digest_of(entry)
            if not digest.exists():
                _write(digest, _digest(entry.read_bytes()).encode())


def _forget_damaged(folder: Path) -> None:
    """Remove entries that are not sealed, or no longer what they were."""
    for entry in folder.glob(f"*{SUFFIX}"):
        digest = _digest_of(entry)
        if not (digest.exists() and digest.read_text() == _digest(entry.read_bytes())):
            entry.unlink()
            digest.unlink(missing_ok=True)


def _digest_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.sha256")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Compiled(NamedTuple):
    """A step, and whether it was found compiled."""

    step: Callable
    found: bool


def compile_step(config: Config, mesh: Mesh) -> Compiled:
    """The step of a run, which is compiled if it is not kept."""
    lowered = trace_train_step(config, mesh).lower()
    found, here = [], threading.get_ident()

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == here:
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        step = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return Compiled(step, bool(found))


# --- an executable file --------------------------------------------------------------------------


def save_executable(path: Path, config: Config, mesh: Mesh) -> None:
    """Compile the step of a run, and save it.

    Raises:
      ConfigError: if JAX cannot keep what it compiles for these devices.
      OSError: if the file cannot be written.
    """
    everything = {"jax_persistent_cache_min_compile_time_secs": 0}
    with tempfile.TemporaryDirectory() as folder, _cache(Path(folder)), configured(everything):
        compile_step(config, mesh)
        entries = list(Path(folder).glob(f"{STEP}*{SUFFIX}"))
        if len(entries) != 1:
            raise ConfigError(
                f"the step cannot be saved: JAX keeps nothing that it compiles for "
                f"{mesh.devices.flat[0].device_kind}"
            )
        (entry,) = entries
        name, content = entry.name, entry.read_bytes()
    header = {
        "format": FORMAT,
        "compiled_for": fingerprint(config, mesh),
        "name": name,
        "sha256": _digest(content),
    }
    _write(path, json.dumps(header).encode() + b"\n" + content)


def take_executable(path: Path, config: Config, mesh: Mesh) -> str:
    """Put a saved step where `compile_step` finds it, if it is one of this run.

    Returns:
      why it is not; "" if it is, as far as can be told before it is looked for.
    """
    folder = jax.config.jax_compilation_cache_dir
    if not (folder and jax.config.jax_enable_compilation_cache):
        return "JAX takes no compiled programs here, as always for several processes on CPUs"
    try:
        with path.open("rb") as file:
            header, content = json.loads(file.readline()), file.read()
        if header["format"] != FORMAT:
            return f"its format is {header['format']!r}, and not {FORMAT!r}"
        compiled_for, name, digest = (header[key] for key in ("compiled_for", "name", "sha256"))
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return "it is not an executable that gptjax saved"
    if _digest(content) != digest:
        return "it is damaged: its bytes are not those that were saved"
    ours = fingerprint(config, mesh)
    if found := _differences(compiled_for, ours):
        return f"it was compiled for another run: {'; '.join(found)}"
    if not re.fullmatch(rf"{STEP}[0-9a-f]+{SUFFIX}", name):
        return "it is not an executable that gptjax saved"
    _write(Path(folder) / name, content)
    return ""


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The first three, in words."""
    names = [name for name in here | there if here.get(name) != there.get(name)]
    more = [f"and {len(names) - 3} more"] if len(names) > 3 else []
    return [f"{name} was {there.get(name)}, and is {here.get(name)}" for name in names[:3]] + more


def fingerprint(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What tells in words whether a saved step may be that of a run; its key tells for certain."""
    device = mesh.devices.flat[0]
    model, _ = resolve(config.model, device.platform)
    values = {
        "gptjax": version("gptjax"),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "platform": device.client.platform_version,
        "device": device.device_kind,
        "devices": " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "processes": len({device.process_index for device in mesh.devices.flat}),
    }
    values |= {name: attrgetter(name)(config) for name in FIELDS}
    for section in SECTIONS:
        fields = dataclasses.asdict(model if section == "model" else getattr(config, section))
        values |= {f"{section}.{name}": value for name, value in fields.items()}
    return json.loads(json.dumps(values))  # tuples are lists, as they are read


def _write(path: Path, content: bytes) -> None:
    """All of a file, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")  # processes may write the same
    new.write_bytes(content)
    sync(new)
    new.rename(path)
