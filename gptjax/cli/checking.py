"""The verb of a mesh's numbers: `gptjax check`."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Annotated, TextIO

import tyro

from gptjax.config import Config, ConfigError, Count, Range, from_json, to_json
from gptjax.errors import EXIT_CODES, end_process, explain
from gptjax.shrink import changes, num_devices, shrink

MOST_SECONDS = 900  # that the processes may take together
PEER = "from gptjax.cli.checking import peer; peer()"


@dataclass(frozen=True)
class Check:
    """Show here that the mesh of FILE.py or FILE.py:function gives the numbers of one device."""

    processes: Count = 1  # show it with so many processes of this machine too
    # devices along context and pipe, where the mesh needs more than 16: 4 shows more of a ring, and
    # of stages
    longest: Annotated[int, Range(2, 4)] = 2
    debug: bool = False  # show the traceback of an error
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def check(experiment: str, given: Check) -> None:
    """Shrink an experiment, and compare its mesh with one device, on virtual ones of this CPU."""
    small = shrink(given.config, given.longest)
    count = num_devices(small.mesh)
    if count % given.processes:
        raise ConfigError(
            f"processes = {given.processes}, but the mesh of the small copy has {count} devices: "
            "give a number that divides them"
        )
    _say("small copy " + "\n           ".join(changes(given.config, small)))
    os.environ |= _environment(count)
    from gptjax.proof import compare

    _say(f"mesh       {count} virtual devices of this CPU, in one process")
    compare(small, _say)
    if given.processes > 1:
        each = count // given.processes
        _say(f"mesh       {given.processes} processes of {each} devices")
        _in_processes(small, given.processes, _environment(each))
    _say("result     the numbers of one device")


def _say(line: str) -> None:
    print(line, flush=True)


def _environment(num_devices: int) -> dict[str, str]:
    """Of a process with so many devices, which reads it when it imports JAX."""
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={num_devices}",
        # This scheduler starts collectives in another order on each device: on few cores they wait
        # for each other for ever.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        # Small models compile for longer than they run: half as long with these.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags).strip(),
        "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA warns of programs that it weighs and does not take
    }


def _in_processes(small: Config, count: int, environment: dict[str, str]) -> None:
    """The same in several processes, of which the first says what it finds.

    Raises:
      DifferenceError: with what they found.
      RuntimeError: if one of them failed otherwise, or they do not end.
    """
    from gptjax.proof import DifferenceError

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with ExitStack() as opened:
        peers = []
        for number in range(count):
            errors = opened.enter_context(TemporaryFile("w+"))
            command = [sys.executable, "-c", PEER, address, str(count), str(number)]
            pipe, environ = subprocess.PIPE, os.environ | environment
            peer = subprocess.Popen(command, env=environ, stdin=pipe, stderr=errors, text=True)
            opened.callback(peer.wait)
            opened.callback(peer.kill)
            peers.append((peer, errors))
        for peer, _ in peers:
            peer.stdin.write(to_json(small))
            peer.stdin.close()
        failed = _first_to_fail(peers)
        if failed is None:
            return
        number, code = failed
        errors = peers[number][1]
        errors.seek(0)
        said = errors.read().strip().rpartition("\n")[2]
    if code == EXIT_CODES["DifferenceError"]:
        raise DifferenceError(said)
    raise RuntimeError(f"process {number} of {count} ended with code {code}: {said}")


def _first_to_fail(peers: list[tuple[subprocess.Popen, TextIO]]) -> tuple[int, int] | None:
    """The first process that ends with another code than 0, and the code; None if none does."""
    until = time.monotonic() + MOST_SECONDS
    while time.monotonic() < until:
        codes = [peer.poll() for peer, _ in peers]
        for number, code in enumerate(codes):
            if code:
                return number, code
        if None not in codes:
            return None
        time.sleep(0.1)
    raise RuntimeError(f"{len(peers)} processes have not ended after {MOST_SECONDS} seconds")


def peer() -> None:
    """One of the processes: as its arguments say, with the small copy on its standard input."""
    address, count, number = sys.argv[1:]
    try:
        from gptjax.proof import compare
        from gptjax.watchdog import join_processes

        join_processes(address, int(count), int(number))
        compare(from_json(sys.stdin.read()), _say)
    except Exception as error:
        code, message = explain(error)
        print(message, file=sys.stderr)
        end_process(code)  # the usual end would wait for the others
