"""Tags of words and the entities they stand for: IOB1, IOB2, BIOES and IO."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Scheme = Literal["iob1", "iob2", "bioes", "io"]
# Letters of BILOU and BMES, as BIOES has them.
SAME_LETTER = {"L": "E", "U": "S", "M": "I"}


class Entity(NamedTuple):
    """A name in a sentence."""

    kind: str
    start: int  # its first word
    stop: int  # one after its last


def plain_tag(tag: str, scheme: Scheme) -> str | None:
    """A tag with the letters B, I, O, E and S; None if it is none of the scheme.

    >>> plain_tag("U-PER", "bioes"), plain_tag("PER", "io"), plain_tag("PER", "iob2")
    ('S-PER', 'I-PER', None)
    """
    if tag == "O":
        return tag
    if scheme == "io":
        return f"I-{tag.removeprefix('I-')}" if tag else None
    match = re.fullmatch(r"([A-Z])[-_](.+)", tag)
    if not match:
        return None
    letter = SAME_LETTER.get(match[1], match[1]) if scheme == "bioes" else match[1]
    return f"{letter}-{match[2]}" if letter in ("BIES" if scheme == "bioes" else "BI") else None


class HeadTags(NamedTuple):
    """The tags that the outputs of a head stand for."""

    scheme: Scheme
    tags: tuple[str, ...]  # of each output, with the letters B, I, O, E and S

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(tag[2:] for tag in self.tags if tag != "O"))

    def numbers(self, tags: Sequence[str]) -> list[int]:
        """The outputs that stand for tags of any well-formed scheme, whose kinds a head knows."""
        written = write_tags(entities(tags), len(tags), self.scheme)
        known = {tag: number for number, tag in reversed([*enumerate(self.tags)])}
        # A head of IOB1 need not have a B of every kind, nor one of names of a word an I.
        near = {tag[2:]: number for tag, number in reversed(known.items())}
        return [known.get(tag, near.get(tag[2:], 0)) for tag in written]


@functools.lru_cache(maxsize=16)
def head_tags(labels: tuple[str, ...]) -> HeadTags:
    """What the labels of a head stand for, whichever scheme they are of: without letters of one,
    each is a kind.

    >>> head_tags(("O", "PER", "LOC")).tags
    ('O', 'I-PER', 'I-LOC')
    """
    for scheme in ("iob2", "bioes"):
        tags = tuple(plain_tag(label, scheme) for label in labels)
        if None not in tags and any(tag != "O" for tag in tags):
            return HeadTags(scheme, tags)
    return HeadTags("io", tuple(plain_tag(label, "io") or "O" for label in labels))


def split_tag(tag: str) -> tuple[str, str]:
    """The letter of a tag, and its kind, which is "_" where there is none."""
    return tag[:1], tag[1:].split("-", 1)[-1] or "_"


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of any tags, well formed or not, as conlleval and seqeval read them: one goes on
    where B or I comes before I or E of the same kind, and nowhere else.

    >>> entities(["B-PER", "I-PER", "O", "I-LOC"])
    [Entity(kind='PER', start=0, stop=2), Entity(kind='LOC', start=3, stop=4)]
    """
    found: list[Entity] = []
    before = ("O", "_")
    for place, tag in enumerate(tags):
        letter, kind = split_tag(tag)
        if letter not in ("O", "."):
            if letter in "IE" and before[0] in "BI" and before[1] == kind:
                found[-1] = found[-1]._replace(stop=place + 1)
            else:
                found.append(Entity(kind, place, place + 1))
        before = (letter, kind)
    return found


def strict_entities(tags: Sequence[str], scheme: Scheme) -> list[Entity]:
    """Only those entities that are spelled as a scheme demands, as seqeval's strict mode has it.

    IOB2: B, then I of the same kind. BIOES: S, or B, any I, and E of the same kind. IOB1: as
    seqeval reads it, which does not take a B after a tag of another kind or after O.
    """
    split = [*map(split_tag, tags), ("O", "_")]
    found, place, before = [], 0, ("O", "_")
    while place < len(tags):
        letter, kind = split[place]
        if not _starts(scheme, before, (letter, kind)):
            before = split[place]
            place += 1
            continue
        stop = place + 1
        while _goes_on(scheme, split[stop - 1], split[stop]):
            stop += 1
        if _ends(scheme, split[stop - 1], split[stop]):
            found.append(Entity(kind, place, stop))
        before, place = split[stop - 1], stop
    return found


def _starts(scheme: Scheme, before: tuple[str, str], tag: tuple[str, str]) -> bool:
    if scheme == "iob1":
        same = before[1] == tag[1]
        if tag[0] == "B":
            return before[0] in "BI" and same
        return tag[0] == "I" and (before[0] in "OB" or not same)
    return tag[0] in ("BS" if scheme == "bioes" else "B")


def _goes_on(scheme: Scheme, before: tuple[str, str], tag: tuple[str, str]) -> bool:
    inside = "IE" if scheme == "bioes" else "I"
    return before[0] in "BI" and tag[0] in inside and before[1] == tag[1]


def _ends(scheme: Scheme, last: tuple[str, str], after: tuple[str, str]) -> bool:
    if scheme == "bioes":
        return last[0] in "ES"
    # IOB1 as seqeval has it: an entity that begins with B does not end before a B of another kind.
    return not (scheme == "iob1" and last[0] == "B" and after[0] == "B" and last[1] != after[1])


def write_tags(found: Iterable[Entity], length: int, scheme: Scheme) -> list[str]:
    """The tags of so many words that stand for these entities.

    >>> write_tags([Entity("PER", 1, 3)], 4, "bioes")
    ['O', 'B-PER', 'E-PER', 'O']
    """
    tags, last = ["O"] * length, None
    for kind, start, stop in sorted(found, key=lambda one: one.start):
        tags[start:stop] = [f"I-{kind}"] * (stop - start)
        touches = last is not None and (last.kind, last.stop) == (kind, start)
        if scheme in ("iob2", "bioes") or (scheme == "iob1" and touches):
            tags[start] = f"B-{kind}"
        if scheme == "bioes":
            tags[stop - 1] = f"{'S' if stop - start == 1 else 'E'}-{kind}"
        last = Entity(kind, start, stop)
    return tags


def first_broken(tags: Sequence[str], scheme: Scheme) -> int | None:
    """The first word whose tag does not follow from the scheme; None if all do."""
    right = write_tags(entities(tags), len(tags), scheme)
    return next(
        (i for i, pair in enumerate(zip(tags, right, strict=True)) if len({*pair}) > 1), None
    )
