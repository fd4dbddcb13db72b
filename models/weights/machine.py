"""Carries out a pickle's instructions on inert values, in place of Python's `pickle`, which would run code.

Names of classes and functions stay names; calls become what `Calls` makes of them. Only instructions that files of
weights need are known. Nothing is hashed but texts and small integers, nothing is allocated by a size that the file
claims, and nothing recurses, so that memory and time follow from the number of instructions.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

from models.weights.calls import Calls
from models.weights.records import Global, Persistent, Record

MAX_NAME = 256  # characters of a module's or a class's name
MAX_KEY = 2**31  # larger integers can be made to collide in a dictionary
_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
_CODES = {name: code for code, name in _NAMES.items()}
_INSTRUCTIONS: dict[int, Callable[[PickleMachine], None]] = {}


def _instruction(*names: str) -> Callable[[Callable[[PickleMachine], None]], Callable[[PickleMachine], None]]:
    """Enters a function as what an opcode, by its name in `pickletools`, does."""

    def enter(function: Callable[[PickleMachine], None]) -> Callable[[PickleMachine], None]:
        _INSTRUCTIONS.update({_CODES[name]: function for name in names})
        return function

    return enter


class PickleMachine:
    """The state of a pickle that is being read.

    Args:
        data: The file's bytes.
        calls: Knows what names are allowed and what calls give.
        start: Where in `data` the pickle starts.
        persistent: Gives the value of a persistent id, None if the pickle must not have any.
    """

    def __init__(
        self,
        data: memoryview,
        calls: Calls,
        start: int = 0,
        persistent: Persistent | None = None,
    ) -> None:
        self.data = data
        self.position = start
        self.calls = calls
        self.persistent = persistent
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        """Carries out the instructions.

        Returns:
            The pickle's value, and where in the data it ends.

        Raises:
            ValueError: If there is an instruction or a name that files of weights do not need, the pickle is damaged,
                or costs more than allowed.
        """
        while (code := self.byte()) != ord("."):
            self.calls.allowance.step()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise ValueError(f"the instruction {_NAMES.get(code, hex(code))} is not allowed")
            instruction(self)
        return self.pop(), self.position

    def take(self, size: int) -> memoryview:
        """Takes the next bytes of the file, without a copy."""
        end = self.position + size
        if end > len(self.data):
            raise ValueError("it ends too early")
        self.position, start = end, self.position
        return self.data[start:end]

    def byte(self) -> int:
        """Takes the next byte."""
        if self.position >= len(self.data):
            raise ValueError("it ends too early")
        self.position += 1
        return self.data[self.position - 1]

    def number(self, kind: str) -> Any:
        """Takes a number of the `struct` type."""
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self, size: int) -> str:
        """Takes text of a number of bytes."""
        return str(self.take(size), "utf-8", "surrogatepass")

    def line(self) -> str:
        """Takes a line of text."""
        start = bytes(self.data[self.position : self.position + MAX_NAME])
        end = start.find(b"\n")
        if end < 0:
            raise ValueError(f"a name is longer than {MAX_NAME} characters")
        return str(self.take(end + 1)[:end], "utf-8")

    def pop(self) -> Any:
        """Takes a value from the stack."""
        if not self.stack:
            raise ValueError("an instruction lacks its values")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """Looks at the stack's last value, which must be of a type."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"an instruction lacks its {kind.__name__}")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        """Takes the values after the last mark."""
        if not self.outer:
            raise ValueError("an instruction lacks its mark")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def remember(self, index: int) -> None:
        """Keeps the stack's last value under a number."""
        self.memo[index] = self.stack[-1] if self.stack else self.pop()

    def recall(self, index: int) -> None:
        """Puts a value that was kept on the stack."""
        if index not in self.memo:
            raise ValueError(f"the value {index} is missing")
        self.stack.append(self.memo[index])

    def put_global(self, module: Any, name: Any) -> None:
        """Puts the name of a class or function on the stack, if it is short enough to be one."""
        if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
            raise ValueError("a class or function has no proper name")
        what = Global(module, name)
        self.calls.check(what)
        self.stack.append(what)

    def call(self) -> None:
        """Replaces a function and its arguments on the stack by the result."""
        args, function = self.pop(), self.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise ValueError("something is called that is no function")
        self.stack.append(self.calls.call(function, args))

    def set_items(self, pairs: list[Any]) -> None:
        """Sets items of the dictionary on the stack from keys, each followed by its value."""
        target = self.top(dict)
        if len(pairs) % 2:
            raise ValueError("a key lacks its value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not (type(key) is str or (type(key) is int and abs(key) < MAX_KEY)):
                raise ValueError(f"a key is neither text nor a small integer but {type(key).__name__}")
            target[key] = value


@_instruction("PROTO")
def _proto(machine: PickleMachine) -> None:
    if (version := machine.byte()) not in (2, 3, 4, 5):
        raise ValueError(f"the pickle's protocol is {version}, not one of 2 to 5")


@_instruction("FRAME")
def _frame(machine: PickleMachine) -> None:
    machine.take(8)  # frames help only those who read ahead


@_instruction("MARK")
def _mark(machine: PickleMachine) -> None:
    machine.outer.append(machine.stack)
    machine.stack = []


@_instruction("POP")
def _pop(machine: PickleMachine) -> None:
    machine.pop()


@_instruction("POP_MARK")
def _pop_mark(machine: PickleMachine) -> None:
    machine.pop_to_mark()


_VALUES: dict[str, Callable[[PickleMachine], Any]] = {
    "NONE": lambda machine: None,
    "NEWTRUE": lambda machine: True,
    "NEWFALSE": lambda machine: False,
    "BININT": lambda machine: machine.number("<i"),
    "BININT1": lambda machine: machine.byte(),
    "BININT2": lambda machine: machine.number("<H"),
    "LONG1": lambda machine: int.from_bytes(machine.take(machine.byte()), "little", signed=True),
    "BINFLOAT": lambda machine: machine.number(">d"),
    "SHORT_BINUNICODE": lambda machine: machine.text(machine.byte()),
    "BINUNICODE": lambda machine: machine.text(machine.number("<I")),
    "BINUNICODE8": lambda machine: machine.text(machine.number("<Q")),
    "SHORT_BINBYTES": lambda machine: machine.take(machine.byte()),
    "BINBYTES": lambda machine: machine.take(machine.number("<I")),
    "BINBYTES8": lambda machine: machine.take(machine.number("<Q")),
    "EMPTY_TUPLE": lambda machine: (),
    "EMPTY_LIST": lambda machine: [],
    "EMPTY_SET": lambda machine: [],  # a set needs no hashes as a list
    "EMPTY_DICT": lambda machine: {},
}


def _push(read: Callable[[PickleMachine], Any]) -> Callable[[PickleMachine], None]:
    return lambda machine: machine.stack.append(read(machine))


_INSTRUCTIONS.update({_CODES[name]: _push(read) for name, read in _VALUES.items()})


@_instruction("TUPLE1")
def _tuple1(machine: PickleMachine) -> None:
    machine.stack.append((machine.pop(),))


@_instruction("TUPLE2")
def _tuple2(machine: PickleMachine) -> None:
    second, first = machine.pop(), machine.pop()
    machine.stack.append((first, second))


@_instruction("TUPLE3")
def _tuple3(machine: PickleMachine) -> None:
    third, second, first = machine.pop(), machine.pop(), machine.pop()
    machine.stack.append((first, second, third))


@_instruction("TUPLE")
def _tuple(machine: PickleMachine) -> None:
    values = tuple(machine.pop_to_mark())
    machine.stack.append(values)


@_instruction("APPEND")
def _append(machine: PickleMachine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


@_instruction("APPENDS", "ADDITEMS")
def _appends(machine: PickleMachine) -> None:
    values = machine.pop_to_mark()
    machine.top(list).extend(values)


@_instruction("SETITEM")
def _set_item(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


@_instruction("SETITEMS")
def _set_items(machine: PickleMachine) -> None:
    machine.set_items(machine.pop_to_mark())


@_instruction("BINPUT")
def _put(machine: PickleMachine) -> None:
    machine.remember(machine.byte())


@_instruction("LONG_BINPUT")
def _long_put(machine: PickleMachine) -> None:
    machine.remember(machine.number("<I"))


@_instruction("MEMOIZE")
def _memoize(machine: PickleMachine) -> None:
    machine.remember(len(machine.memo))


@_instruction("BINGET")
def _get(machine: PickleMachine) -> None:
    machine.recall(machine.byte())


@_instruction("LONG_BINGET")
def _long_get(machine: PickleMachine) -> None:
    machine.recall(machine.number("<I"))


@_instruction("GLOBAL")
def _global(machine: PickleMachine) -> None:
    module, name = machine.line(), machine.line()
    machine.put_global(module, name)


@_instruction("STACK_GLOBAL")
def _stack_global(machine: PickleMachine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.put_global(module, name)


@_instruction("REDUCE", "NEWOBJ")
def _call(machine: PickleMachine) -> None:
    machine.call()


@_instruction("BUILD")
def _build(machine: PickleMachine) -> None:
    state = machine.pop()
    target = machine.stack[-1] if machine.stack else machine.pop()
    if type(target) is Record:
        target.state = state
    elif type(target) is not dict:  # attributes of dictionaries, such as the versions in a state dict, are dropped
        raise ValueError(f"attributes are set on {type(target).__name__}")


@_instruction("BINPERSID")
def _persistent(machine: PickleMachine) -> None:
    if machine.persistent is None:
        raise ValueError("the instruction BINPERSID is not allowed here")
    machine.stack.append(machine.persistent(machine.pop()))
