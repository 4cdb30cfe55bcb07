"""The verb of what is trained on: `gptjax prepare`."""

import dataclasses
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gptjax.config import Config, DataConfig, load_experiment

if TYPE_CHECKING:
    from gptjax.store import Store


@dataclass(frozen=True)
class Prepare:
    """Turn the text of FILE.py or FILE.py:function into token stores, as `train` does at first."""

    # do the work in an Apache Beam pipeline; all that follows is for the pipeline
    beam: tuple[str, ...] | None = None
    debug: bool = False  # show the traceback of an error
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


class Interrupted(RuntimeError):
    """What was asked to stop has kept what is finished."""


def prepare(experiment: str, given: Prepare) -> None:
    """Build the stores that an experiment needs and that are not there; say what they hold."""
    from gptjax.corpus import is_built, load_corpus, store_folder
    from gptjax.data import check_rows
    from gptjax.tokenizer import make_tokenizer

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def accept(split: str, num_tokens: int) -> None:
        if not given.config.data.mixture:
            size = given.config.model.context_size
            check_rows(num_tokens, size, given.config.batch_size, split)

    signal.signal(signal.SIGTERM, stop)
    tokenizer = make_tokenizer(given.config.data)
    for data in _members(given.config.data):
        names = ["train", "valid"] if data.valid_path or data.holdout else ["train"]
        known = bool(data.path) and is_built(store_folder(data, tokenizer), names)
        began = time.perf_counter()
        try:
            stores = load_corpus(data, tokenizer, accept=accept, progress=True, beam=given.beam)
        except KeyboardInterrupt:
            raise Interrupted("the same command goes on with what is finished") from None
        seconds = time.perf_counter() - began
        for store in filter(None, stores):
            print(_store_table(store))
        size = sum(store.manifest.num_bytes for store in filter(None, stores))
        rate = f"{seconds:,.1f} s, {size / seconds / 1e6:,.1f} MB/s"
        print(f"time       {'built before' if known else rate}\n")
    same = given.config == load_experiment(experiment)
    print(f"next       gptjax train {experiment}{'' if same else ' and the same options'}")


def _members(data: "DataConfig") -> list["DataConfig"]:
    """The data of each store of a mixture; the data itself if it is none."""
    members = [
        {name: getattr(one, name) for name in ("path", "exclude", "valid_path", "holdout")}
        for one in data.mixture
    ]
    return [dataclasses.replace(data, mixture=(), **fields) for fields in members or [{}]]


def _store_table(store: "Store") -> str:
    """What a store holds, in a few lines."""
    manifest = store.manifest
    of_text = store.num_tokens - store.num_documents - 1
    per_token = f"{manifest.num_bytes / of_text:.3f} per token"
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in manifest.dropped.items())
    lines = {
        "store": store.folder,
        "documents": f"{store.num_documents:,}",
        "tokens": f"{store.num_tokens:,}",
        "bytes": f"{manifest.num_bytes:,}, {per_token}",
        "left out": left_out or "nothing",
    }
    return "\n".join(f"{name:10} {value}" for name, value in lines.items())
