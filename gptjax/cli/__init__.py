"""The command line: `gptjax VERB ...`, as VERBS lists them.

The only folder that reads arguments. JAX is imported by a verb, after its arguments have passed the
checks, so `--help` and refusals are quick.
"""

import dataclasses
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from gptjax.cli.arguments import parse
from gptjax.cli.chatting import Chat, chat
from gptjax.cli.checking import Check, check
from gptjax.cli.convert import Convert, Export, convert, export
from gptjax.cli.corpora import Prepare, prepare
from gptjax.cli.evaluating import Evaluate, evaluate, read_task
from gptjax.cli.generating import Generate, Predict, generate, predict
from gptjax.cli.inspecting import Inspect, Prune, inspect, prune
from gptjax.cli.ledger import Data, data
from gptjax.cli.planning import Plan, plan
from gptjax.cli.reports import Report, report
from gptjax.cli.runs import Train, train
from gptjax.cli.tokenizers import (
    EncodeText,
    InspectTokenizer,
    TrainTokenizer,
    encode_text,
    inspect_tokenizer,
    train_tokenizer,
)
from gptjax.config import ConfigError, did_you_mean, load_experiment, refuse
from gptjax.errors import NO_ERRORS, end_process, explain, last_line
from gptjax.faults import arm
from gptjax.shrink import with_any_data

__all__ = ["VERBS", "explain", "main", "parse", "run_verb"]

VERBS = {
    "prepare": (prepare, Prepare),
    "train": (train, Train),
    "check": (check, Check),
    "plan": (plan, Plan),
    "generate": (generate, Generate),
    "predict": (predict, Predict),
    "evaluate": (evaluate, Evaluate),
    "chat": (chat, Chat),
    "inspect": (inspect, Inspect),
    "prune": (prune, Prune),
    "report": (report, Report),
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
    "check": "FILE",
    "plan": "FILE",
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
        print(last_line(code, message), file=sys.stderr)
        if code not in NO_ERRORS and _has_peers():  # which the usual exit would wait for
            end_process(code)
        return code


def _has_peers() -> bool:
    """Whether this is one of several processes."""
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized())


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
    if options in (Check, Plan):  # no text is read
        default = dataclasses.replace(default, config=with_any_data(default.config))
    if target and options in (Evaluate, Predict):
        default = dataclasses.replace(default, task=read_task(target))
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
