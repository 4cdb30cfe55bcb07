"""Labelled tasks: the one that a config names, its examples, and batches of them."""

from gptjax.config import TaskConfig
from gptjax.tasks.choices import Choices
from gptjax.tasks.classification import Classification
from gptjax.tasks.dialogue import Dialogues
from gptjax.tasks.entities import Entities
from gptjax.tasks.packing import ExampleRows, encode_examples
from gptjax.tasks.pairs import Pairs
from gptjax.tasks.problems import Problems
from gptjax.tasks.questions import Questions
from gptjax.tasks.task import Encoded, Prediction, Request, Task

__all__ = [
    "Encoded",
    "ExampleRows",
    "Prediction",
    "Problems",
    "Request",
    "Task",
    "encode_examples",
    "make_task",
]


def make_task(config: TaskConfig) -> Task:
    """The task of a config's kind, with the labels that the config gives, or none yet."""
    match config.kind:
        case "classify":
            return Classification(config=config, labels=config.labels)
        case "entities":
            return Entities(config=config, labels=config.labels)
        case "questions":
            return Questions(config=config)
        case "pairs":
            return Pairs(config=config)
        case "dialogue":
            return Dialogues(config=config)
        case "choices":
            return Choices(config=config)
    raise AssertionError("task.kind is None")
