"""Dialogue: messages with roles, of which the model learns to write the assistant's."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from gptjax.config import TaskConfig
from gptjax.tasks.cells import Flaw, Record, cell, kind_of_value, sound
from gptjax.tasks.metrics import text_figures
from gptjax.tasks.problems import Problems
from gptjax.tasks.records import read_examples
from gptjax.tasks.task import (
    Encoded,
    Prediction,
    Request,
    going_on,
    joined,
    next_tokens,
    tell_too_long,
    windows,
)
from gptjax.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


USERS = ("user", "human", "prompter")  # what sets call the user


class Message(NamedTuple):
    role: Role
    content: str


@dataclass(frozen=True)
class Dialogue:
    """What was said, in order."""

    where: str
    messages: tuple[Message, ...]
    waits: bool = False  # for a reply to the last message; else the assistant's last is asked for


@dataclass(frozen=True, kw_only=True)
class Dialogues:
    """What an assistant says. A message is `config.turn` and an end-of-text, so to a model that was
    trained on text it is a document among others; the loss is on what the assistant says and on
    its end-of-text.
    """

    config: TaskConfig

    name = "dialogue"
    head: Literal["lm"] = "lm"
    labels = ()
    several = False

    @property
    def stops(self) -> tuple[str, ...]:
        """What comes after a message, and so ends a reply, if it is more than blanks."""
        ending = self.config.turn.partition("{content}")[2].strip()
        return (ending,) if ending else ()

    def reply(self, text: str) -> str:
        """What was said in a text that one of `stops`, or the end-of-text, has ended."""
        after = self.config.turn.partition("{content}")[2]
        return text.removesuffix(after[: len(after) - len(after.lstrip())])

    def read(
        self, paths: Iterable[str], problems: Problems, *, labelled: bool = True
    ) -> Iterator[Dialogue]:
        """Of records with a list of messages, or that are such a list. A message is an object with
        `config.role_key` and `config.content_key`, or a text; then user and assistant take turns.
        """
        make = functools.partial(self._example, problems=problems, labelled=labelled)
        return read_examples(self.config, paths, problems, make)

    def _example(self, record: Record, problems: Problems, labelled: bool) -> Dialogue:
        messages = self._messages(record.value)
        known = {*self.config.assistant, *self.config.system, *USERS}
        for role in dict.fromkeys(self._roles(record.value)):
            if role not in known:
                why = f"{role!r} is taken for the user; else give --task.assistant or --task.system"
                problems.note("role of its own", record.where, why, "kept")
        if labelled and not any(one.role == "assistant" for one in messages):
            roles = ", ".join(map(repr, self.config.assistant))
            there = ", ".join(dict.fromkeys(map(repr, self._roles(record.value)))) or "none"
            raise Flaw(
                "no label",
                f"none of the messages is of {roles}, but of {there}; give --task.assistant",
            )
        return Dialogue(
            record.where, messages, waits=not labelled and messages[-1].role != "assistant"
        )

    def _roles(self, value: Any) -> list:
        """The roles of a record's messages, as they are written: strings, or null."""
        given = value if isinstance(value, list) else cell(value, self.config.messages_column)
        key = self.config.role_key
        found = [one[key] for one in given if isinstance(one, dict) and key in one]
        return [role for role in found if role is None or isinstance(role, str)]

    def _messages(self, value: Any) -> tuple[Message, ...]:
        given = value if isinstance(value, list) else cell(value, self.config.messages_column)
        if not isinstance(given, list):
            raise Flaw("no messages", f"messages are {kind_of_value(given)}, not a list")
        messages = [self._message(one, number) for number, one in enumerate(given)]
        messages = [one for one in messages if one is not None]
        if not messages:
            raise Flaw("empty text", "there are no messages")
        return tuple(messages)

    def _message(self, value: Any, number: int) -> Message | None:
        """None for an empty one of the system, which many sets have where no scene is set."""
        config, in_turn = self.config, "user" if number % 2 == 0 else "assistant"
        what = f"message {number + 1}"
        if isinstance(value, str):
            return Message(in_turn, sound(value, what))
        content = cell(value, config.content_key)
        if isinstance(content, list) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        ):  # parts, as a message has that may have pictures too
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Flaw("no text", f"{what} is {kind_of_value(content)}, not a string")
        role = in_turn if config.role_key is None else cell(value, config.role_key)
        if role in config.system and not content.strip():
            return None
        sound(content, what)
        if config.role_key is None:
            return Message(in_turn, content)
        if role in config.assistant:
            return Message("assistant", content)
        return Message("system" if role in config.system else "user", content)

    def fitted(self, examples: Sequence[Dialogue]) -> Self:
        return self

    def turn_ids(self, message: Message, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a message before its content, and those of the content with the end-of-text
        after it. A reply is asked for by those before the content of an assistant's message.
        """
        before, after = self.config.turn.split("{content}")
        said = going_on(message.content + after, tokenizer)
        opening = tokenizer.encode(before.replace("{role}", message.role))
        return opening, joined([said, np.int32([tokenizer.end])])

    def fitting_ids(
        self, messages: Sequence[Message], tokenizer: Tokenizer, most: int
    ) -> tuple[np.ndarray, int]:
        """The ids after which the assistant replies, without as many of the first messages as do
        not fit, and how many these are; those of the system stay, and so does the last.
        """
        turns = [joined(self.turn_ids(one, tokenizer)) for one in messages]
        opening, _ = self.turn_ids(Message("assistant", ""), tokenizer)
        length, dropped = 1 + sum(map(len, turns)) + len(opening), set()
        for number, one in enumerate(messages[:-1]):
            if length <= most:
                break
            if one.role != "system":
                length -= len(turns[number])
                dropped.add(number)
        kept = [turn for number, turn in enumerate(turns) if number not in dropped]
        return joined([np.int32([tokenizer.begin]), *kept, opening]), len(dropped)

    def encode(
        self, example: Dialogue, tokenizer: Tokenizer, size: int, problems: Problems
    ) -> list[Encoded]:
        """The beginning and the messages. A dialogue that is too long becomes several; in each, the
        messages that were shown before are shown again without a loss, as far as `overlap` goes.
        """
        turns = [self.turn_ids(one, tokenizer) for one in example.messages]
        sizes = np.array([len(before) + len(said) for before, said in turns])
        found = windows(sizes, size, self.config.overlap)
        if found is None or (len(found) > 1 and self.config.too_long != "window"):
            tell_too_long(self.config, example.where, int(sizes.sum()), size, problems)
            return []
        encoded = []
        for start, counted, stop in found:
            ids, counts = [np.int32([tokenizer.begin])], [np.zeros(1)]
            for number in range(start, stop):
                learnt = number >= counted and example.messages[number].role == "assistant"
                before, said = turns[number]
                ids += [before, said]
                counts += [np.zeros(len(before)), np.full(len(said), float(learnt))]
            encoded.append(next_tokens(joined(ids), np.concatenate(counts)))
        return encoded

    def decode(
        self, example: Dialogue, windows: Sequence[Encoded], outputs: Sequence[np.ndarray]
    ) -> Prediction:
        raise AssertionError("texts are written, not read from a head")

    def prompt(self, example: Dialogue) -> str:
        """All before the reply that is asked for, as text without ends."""
        shown = [
            self.config.turn.replace("{role}", role).replace("{content}", content)
            for role, content in self.before(example)
        ]
        opening = self.config.turn.partition("{content}")[0].replace("{role}", "assistant")
        return "\n".join([*shown, opening])

    def before(self, example: Dialogue) -> tuple[Message, ...]:
        """The messages before the reply that is asked for."""
        return example.messages[: self._place(example)]

    def _place(self, example: Dialogue) -> int:
        """Of the reply that is asked for; after all messages if it is not there."""
        places = [i for i, one in enumerate(example.messages) if one.role == "assistant"]
        return places[-1] if places and not example.waits else len(example.messages)

    def target(self, example: Dialogue) -> str:
        said = example.messages[self._place(example) :]
        return said[0].content if said else ""

    def requests(self, example: Dialogue) -> list[Request]:
        return []

    def from_scores(self, example: Dialogue, scores: np.ndarray) -> Prediction:
        raise AssertionError("replies are written, not chosen")

    def from_text(self, example: Dialogue, text: str) -> Prediction:
        return {"text": self.reply(text).strip()}

    def metrics(
        self, examples: Sequence[Dialogue], predictions: Sequence[Prediction]
    ) -> dict[str, float]:
        """BLEU and chrF of the assistant's last message."""
        references = [[self.target(one)] for one in examples]
        texts = [one["text"] for one in predictions]
        return text_figures(references, texts, self.config.bleu_tokens)

    def measure(
        self, examples: Sequence[Dialogue], predictions: Sequence[Prediction]
    ) -> tuple[str, np.ndarray | None]:
        return "chrf", None
