"""The command line: `gptjax prepare | train | generate | predict | inspect | data |
convert | export | tokenizer`.

The only folder that reads arguments. JAX is imported by a verb, after its arguments have passed the
checks, so `--help` and refusals are quick.
"""

import dataclasses
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from gptjax.cli.arguments import parse
from gptjax.cli.convert import Convert, Export, convert, export
from gptjax.cli.corpora import Prepare, prepare
from gptjax.cli.ledger import Data, data
from gptjax.cli.runs import (
    Generate,
    Inspect,
    Predict,
    Train,
    generate,
    inspect,
    predict,
    train,
)
from gptjax.cli.tokenizers import (
    EncodeText,
    InspectTokenizer,
    TrainTokenizer,
    encode_text,
    inspect_tokenizer,
    train_tokenizer,
)
from gptjax.config import ConfigError, did_you_mean, load_experiment, refuse
from gptjax.faults import arm

__all__ = ["BUG", "VERBS", "explain", "main", "parse", "run_verb"]

# By name, because their files import JAX, and a bad argument is refused without it.
EXIT_CODES = {
    "ConfigError": 2,
    "DataError": 3,
    "CheckpointError": 4,
    "DivergenceError": 5,
    "OSError": 6,
    "Interrupted": 75,
    "KeyboardInterrupt": 130,
}
BUG = 1
STOPPED = (75, 130)  # these are no errors: the user, or the machine, asked for it

# What to do about a failure of the file system, where the operating system's words do not say it.
REMEDIES = {
    errno.ENOSPC: "free some space, or give another folder",
    errno.EDQUOT: "free some space, or give another folder",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give a folder that you may read and write",
    errno.EPERM: "give a folder that you may read and write",
    errno.EIO: "check the disk",
}

VERBS = {
    "prepare": (prepare, Prepare),
    "train": (train, Train),
    "generate": (generate, Generate),
    "predict": (predict, Predict),
    "inspect": (inspect, Inspect),
    "data": (data, Data),
    "convert": (convert, Convert),
    "export": (export, Export),
    "tokenizer train": (train_tokenizer, TrainTokenizer),
    "tokenizer inspect": (inspect_tokenizer, InspectTokenizer),
    "tokenizer encode": (encode_text, EncodeText),
}
# What a verb's first argument is called, unless that is RUN.
PLACEHOLDERS = {
    "prepare": "FILE",
    "train": "FILE",
    "convert": "HF_FOLDER",
    "tokenizer train": "TEXT",
    "tokenizer inspect": "TOKENIZER",
    "tokenizer encode": "TOKENIZER",
}


def main() -> int:
    """Run the command line; the exit code."""
    arguments = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are processes
    sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    log = logging.getLogger("gptjax")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    arm(os.environ.get("GPTJAX_FAULT", ""))
    try:
        run_verb(arguments)
        return 0
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, message = explain(error)
        word = "stopped" if code in STOPPED else "error"
        print(f"gptjax: {word}[{code}]: {message}", file=sys.stderr)
        return code


def run_verb(arguments: Sequence[str]) -> None:
    """Parse the arguments and do what they say.

    Raises:
      ConfigError: for arguments that are refused; and whatever the verb raises.
      SystemExit: with code 0, after `--help`.
    """
    groups = {verb.partition(" ")[0] for verb in VERBS if " " in verb}
    if {*arguments[:2]} <= {"-h", "--help", *groups} or arguments[0] in ("-h", "--help"):
        print("usage: gptjax VERB ...\n")
        for verb, (_, options) in VERBS.items():
            print(f"  {verb:19}{options.__doc__}")
        print("\n`gptjax VERB --help` lists the options of a verb.")
        return
    verb, *rest = arguments
    if verb in groups and rest:
        verb = f"{verb} {rest.pop(0)}"
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS)
        raise ConfigError(f"{verb!r} is not a verb: give one of {', '.join(VERBS)}.{near}")
    run, options = VERBS[verb]
    target = rest.pop(0) if rest and not rest[0].startswith("-") else None
    default, placeholder = options(), PLACEHOLDERS.get(verb, "RUN")
    if target and hasattr(default, "config"):
        default = dataclasses.replace(default, config=load_experiment(target))
    if options is Prepare and "--beam" in rest:
        place = rest.index("--beam")
        default = dataclasses.replace(default, beam=tuple(rest[place + 1 :]))
        del rest[place:]
    given, problems = parse(default, f"gptjax {verb} {target or placeholder}", rest)
    if target is None:
        raise ConfigError(
            f"{placeholder} is missing: give it first, as in `gptjax {verb} {placeholder}`"
        )
    refuse(problems)
    run(target, given)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what the user reads: what failed, where, what to do."""
    names = (kind.__name__ for kind in type(error).__mro__)
    code = next((EXIT_CODES[name] for name in names if name in EXIT_CODES), BUG)
    if isinstance(error, KeyboardInterrupt):
        return code, "by the keyboard"
    if isinstance(error, OSError):
        where = f" -- {error.filename}" if error.filename else ""
        remedy = REMEDIES.get(error.errno, "check the path")
        return code, f"{error.strerror or error}{where} -- {remedy}"
    if code == BUG:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        where = f"{frame.filename}:{frame.lineno}"
        return code, f"{what} -- {where} -- run again with --debug and report the traceback"
    return code, str(error)
