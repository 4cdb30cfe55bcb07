"""What a compiled program does, by its text: the collectives, and the bytes that it moves."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing: names for what is there, or what others do.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
    "optimization-barrier", "async-done", "copy-done",
}  # fmt: skip


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes; of a constant its value, of a parameter its number


class Collective(NamedTuple):
    """Devices that exchange something, so many times in a step."""

    kind: str
    axis: str  # of the mesh; several are joined by +
    dtype: str  # of the largest tensor
    shape: str  # as it is whole: gathered, or before it is scattered
    num_bytes: int  # of a device's whole tensors, each time
    count: int  # times in a step
    size: int  # devices that take part
    group: tuple[int, ...]  # one group of them, by their place in the mesh
    line: str  # of the source: file:line
    op: str  # what JAX calls it


class Program:
    """The text of a compiled program, taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._lines = _source_lines(text)
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if current is None:
                if match := _HEADER.match(line):
                    current = self.computations[match[2]] = []
                    if match[1]:
                        self.entry = match[2]
            elif line == "}":
                current = None
            elif instruction := _instruction(line):
                current.append(instruction)
        self.times = self._times()

    def _times(self) -> dict[str, int]:
        """How often each computation runs in a step."""
        callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for name, instructions in self.computations.items():
            for one in instructions:
                turns = self._turns(one) if one.opcode == "while" else 1
                for called in _CALLED.findall(one.rest):
                    callers[called].append((name, turns))
                for branches in _BRANCHES.findall(one.rest):
                    for called in re.findall(r"%?([\w.\-]+)", branches):
                        callers[called].append((name, 1))
        times = {self.entry: 1}

        def of(name: str) -> int:
            if name not in times:
                times[name] = sum(of(caller) * turns for caller, turns in callers[name])
            return times[name]

        for name in self.computations:
            of(name)
        return times

    def _turns(self, loop: Instruction) -> int:
        """The trip count of a loop, as the compiler says, or else by its condition."""
        if match := re.search(r'"?known_trip_count"?:\{"n":"(\d+)"\}', loop.rest):
            return int(match[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
        inner = [condition] + [
            self.computations[called] for one in condition for called in _CALLED.findall(one.rest)
        ]
        limits = [
            int(one.rest)
            for instructions in inner
            for one in instructions
            if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.rest)
        ]
        return max(limits, default=1)

    def source(self, instruction: Instruction) -> tuple[str, str]:
        """The line of gptjax that an instruction comes from, and JAX's name of it."""
        op = re.search(r'op_name="([^"]*)"', instruction.rest)
        frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        line = self._lines.get(int(frame[1]), "") if frame else ""
        if not line and (
            match := re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.rest)
        ):
            line = f"{match[1].rpartition('/')[2]}:{match[2]}"
        return line, op[1] if op else ""

    # --- collectives -----------------------------------------------------------------------------

    def collectives(self, axes: Mapping[str, int]) -> list[Collective]:
        """Every collective, largest first.

        Args:
          axes: the mesh's axes and their sizes, in its order.
        """
        found: dict[tuple, Collective] = {}
        for name, instructions in self.computations.items():
            if not self.times[name]:
                continue
            for number, one in enumerate(instructions):
                kind = one.opcode.removesuffix("-start")
                if kind not in KINDS:
                    continue
                # What runs beside other work stands in the text where it begins, in between, and
                # where it ends.
                channel = re.search(r"channel_id=(\d+)", one.rest)
                made = self._collective(kind, name, one, axes)
                key = (channel and channel[1], made.kind, made.shape, made.op)
                key = key if channel else (name, number)
                if key not in found or found[key].count < made.count:
                    found[key] = made
        together = [one for one in found.values() if one.size > 1]
        return sorted(together, key=lambda one: -one.num_bytes * one.count)

    def _collective(
        self, kind: str, computation: str, one: Instruction, axes: Mapping[str, int]
    ) -> Collective:
        group = _group(one.rest, math.prod(axes.values()))
        shapes = _arrays(one.shape)
        half = len(shapes) // 2
        if one.opcode == "all-gather-start":  # its shape: the operands, and then the results
            shapes = shapes[half:]
        elif one.opcode == "collective-permute-start":  # ... and then signals
            shapes = shapes[:1]
        elif one.opcode == "reduce-scatter-start":
            shapes = shapes[:half]
        elif "all-reduce-scatter" in computation:
            kind = "reduce-scatter"  # as a TPU has it: fused, and written as the sum of the whole
        elif kind == "reduce-scatter":
            shapes = [(dtype, (shape[0] * len(group), *shape[1:])) for dtype, shape in shapes]
        num_bytes = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in shapes)
        dtype, shape = max(shapes, key=lambda one: BYTES[one[0]] * math.prod(one[1]))
        line, op = self.source(one)
        return Collective(
            kind,
            _axis(group, axes),
            dtype,
            "x".join(map(str, shape)),
            num_bytes,
            self.times[computation],
            len(group),
            group,
            line,
            op,
        )

    # --- bytes -----------------------------------------------------------------------------------

    def argument_bytes(self) -> int:
        """Bytes of what the program is given, without what fills up the tiles of a layout."""
        given = [one for one in self.computations[self.entry] if one.opcode == "parameter"]
        return sum(_size(one.shape) for one in given)

    def bytes_moved(self) -> int:
        """Bytes that are read from memory and written to it in a step, where each kernel reads its
        arguments once and writes its results once.
        """
        fused = {
            called
            for instructions in self.computations.values()
            for one in instructions
            if one.opcode != "while" and one.opcode != "conditional" and one.opcode != "call"
            for called in _CALLED.findall(one.rest)
        }
        return sum(
            self.times[name] * self._moved_in(instructions)
            for name, instructions in self.computations.items()
            if name not in fused
        )

    def _moved_in(self, instructions: list[Instruction]) -> int:
        shapes = _shapes(instructions)
        return sum(self._moved(one, shapes) for one in instructions)

    def _moved(self, one: Instruction, shapes: Mapping[str, str]) -> int:
        if one.opcode in FREE or one.opcode.endswith("-done"):
            return 0
        if one.opcode in ("dynamic-slice", "slice"):
            return 2 * _size(one.shape)
        if one.opcode == "dynamic-update-slice":
            return 2 * _size(shapes.get(one.operands[1], ""))
        if one.opcode == "fusion" and (called := _CALLED.findall(one.rest)):
            return self._fusion(one, self.computations[called[0]])
        reads = sum(_size(shapes.get(operand, "")) for operand in one.operands)
        return reads + _size(one.shape)

    def _fusion(self, one: Instruction, inner: list[Instruction]) -> int:
        """Of a parameter that is only sliced the slices are read, and where a slice is replaced
        the rest stays.
        """
        own = _shapes(inner)
        read = sum(self._read(each, inner) for each in inner if each.opcode == "parameter")
        written = _size(one.shape)
        for each in inner:
            if each.opcode == "dynamic-update-slice":
                written -= _size(each.shape) - _size(own.get(each.operands[1], ""))
        return read + max(written, 0)

    def _read(self, source: Instruction, inner: list[Instruction]) -> int:
        """Bytes that a fusion reads of one of its parameters, or of another name for it."""
        total, whole = 0, _size(source.shape)
        for user in inner:
            if source.name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice"):
                total += _size(user.shape)
            elif user.opcode in ("bitcast", "reshape", "get-tuple-element"):
                total += self._read(user, inner)
            elif user.opcode == "fusion" and (called := _CALLED.findall(user.rest)):
                deeper = self.computations[called[0]]
                numbers = {
                    number for number, name in enumerate(user.operands) if name == source.name
                }
                total += sum(
                    self._read(each, deeper)
                    for each in deeper
                    if each.opcode == "parameter" and int(each.rest) in numbers
                )
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != source.name:
                total += whole
        return min(total, whole)


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if not match:
        return None
    shape, rest = _split_shape(match[2])
    opcode, _, rest = rest.partition("(")
    inside, rest = _split_parenthesis(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if opcode in ("constant", "parameter"):
        rest = inside
    return Instruction(match[1], shape, opcode.strip(), operands, rest)


def _shapes(instructions: list[Instruction]) -> dict[str, str]:
    return {one.name: one.shape for one in instructions}


def _split_shape(text: str) -> tuple[str, str]:
    """The shape that a line's right side begins with, and what follows it."""
    if text.startswith("("):
        inside, rest = _split_parenthesis(text[1:])
        return f"({inside})", rest.strip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _split_parenthesis(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and after it."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return text[: match.start()], text[match.end() :]
    return text, ""


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a shape."""
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", shape))
        if dtype in BYTES
    ]


def _size(shape: str) -> int:
    """Bytes in the main memory: what TPUs keep on the chip is marked S(1)."""
    if "S(" in shape:
        parts = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", shape)
        shape = " ".join(part for part in parts if "S(" not in part)
    return sum(BYTES[dtype] * math.prod(sizes) for dtype, sizes in _arrays(shape))


def _group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """A group of devices that exchange something among them; of a permutation its ring."""
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes):
        following = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])}
        return max((_ring(first, following) for first in following), key=len)
    if match := _MESH_GROUPS.search(attributes):
        return _mesh_group(match)
    match = re.search(r"replica_groups=(\S.*?)(?:, \w+=|$)", attributes)
    text = match[1] if match else "{}"
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes, source = (tuple(map(int, part.split(","))) for part in match.groups()[:2])
        order = np.arange(math.prod(source)).reshape(source)
        if match[3]:
            order = order.transpose([int(axis) for axis in match[3].split(",")])
        return tuple(order.reshape(sizes)[0].tolist())
    if match := re.match(r"\{\{([\d,]+)\}", text):
        return tuple(map(int, match[1].split(",")))
    return tuple(range(num_devices))


def _ring(first: int, following: Mapping[int, int]) -> tuple[int, ...]:
    """The devices that something reaches that is passed on from the first one."""
    ring = [first]
    while (place := following.get(ring[-1])) is not None and place not in ring:
        ring.append(place)
    return tuple(ring)


def _mesh_group(match: re.Match) -> tuple[int, ...]:
    """The first group along the chosen axes of a mesh, whose devices may have another order."""
    sizes, shape, source, turned, chosen = match.groups()
    names = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    grid = np.arange(math.prod(map(int, names.values())))
    if shape:
        grid = grid.reshape([int(size) for size in (source or shape).split(",")])
    if turned:
        grid = grid.transpose([int(axis) for axis in turned.split(",")])
    grid = grid.reshape([int(size) for size in names.values()])
    along = re.findall(r"'(\w+)'", chosen)
    index = tuple(slice(None) if name in along else 0 for name in names)
    return tuple(grid[index].reshape(-1).tolist())


def _axis(group: tuple[int, ...], axes: Mapping[str, int]) -> str:
    """The axes of the mesh along which the devices of a group differ."""
    places = np.array(np.unravel_index(np.array(group), tuple(axes.values())))
    differ = [name for name, row in zip(axes, places, strict=True) if len({*row.tolist()}) > 1]
    return "+".join(differ) or "none"


def _source_lines(text: str) -> dict[int, str]:
    """The innermost line of gptjax of each stack, by the tables that a text begins with."""
    files = dict(_table(text, "FileNames", r'(\d+) "([^"]*)"'))
    places = dict(
        (number, (file, line))
        for number, file, line in _table(
            text, "FileLocations", r"(\d+) \{file_name_id=(\d+) .*?line=(\d+)"
        )
    )
    frames = dict(
        (number, (place, parent))
        for number, place, parent in _table(
            text, "StackFrames", r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
        )
    )
    lines = {}
    for number in frames:
        # A frame that is its own parent is the outermost: they count from 1, and parents too.
        seen, frame = set(), number
        while frame in frames and frame not in seen:
            seen.add(frame)
            place, parent = frames[frame]
            file, line = places.get(place, ("", ""))
            path = files.get(file, "")
            if "/gptjax/" in path:
                lines[int(number)] = f"{path.rpartition('/gptjax/')[2]}:{line}"
                break
            frame = str(int(parent) - 1) if parent else ""
    return lines


def _table(text: str, name: str, pattern: str) -> Iterator[tuple[str, ...]]:
    start = text.find(f"\n{name}\n")
    end = text.find("\n\n", start)
    return re.findall(pattern, text[start:end]) if start >= 0 else []
