"""Lines for the person at the console, and the types of options; without torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from zipfile import BadZipFile

from data.files import printable

MAX_REASON = 600  # characters
# What files, options, libraries and machines may do to a command, which is told in a line.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError, ImportError, EOFError, BadZipFile)


def format_error(error: BaseException) -> str:
    """Says what went wrong in one line; some errors come without words, or with a page of them."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; close other programs"
    text = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + " …"


class WrongOption(ValueError):
    """An option cannot be followed; the message begins with its name."""


@contextmanager
def blame(option: str) -> Iterator[None]:
    """Lets what goes wrong within the block be the mistake of an option: `run_command` ends with status 2 then."""
    try:
        yield
    except FAILURES as error:
        raise error if isinstance(error, WrongOption) else WrongOption(f"{option}: {format_error(error)}") from error


def run_command(name: str, run: Callable[[], int], kept: str = "nothing was written") -> int:
    """Runs a command; its exit status is 1 after a failure, told in a line, 2 for a wrong option, 130 after Ctrl-C.

    Args:
        name: Of the command, for that line.
        run: Gives the exit status.
        kept: What Ctrl-C leaves.
    """
    try:
        return run()
    except WrongOption as error:
        print_error(f"{name}: error: {error}")
        return 2
    except FAILURES as error:
        print_error(f"{name}: {format_error(error)}")
        return 1
    except KeyboardInterrupt:
        print_error(f"{name}: interrupted; {kept}")
        return 130


def print_line(text: str) -> None:
    """Prints a line of results."""
    _print(text, sys.stdout)


def print_error(text: str) -> None:
    """Prints a line about what went wrong."""
    _print(text, sys.stderr)


def text_option(text: str) -> str:
    """Reads the value of an option that must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a text, got an empty one")
    return text


def number_option(text: str) -> int:
    """Reads a number of things, 1 or more."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def path_option(text: str) -> Path:
    """Reads the path that an option names; an empty one would be the current folder."""
    return Path(text_option(text))


def _print(text: str, stream: TextIO) -> None:
    """Prints a line, with escapes for what breaks it or the stream cannot show: file names may hold any bytes."""
    encoding = stream.encoding or "utf-8"
    text = printable(text)
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        if "tqdm" in sys.modules and sys.stderr.isatty():
            sys.modules["tqdm"].tqdm.write(text, file=stream)  # above the bar
        else:
            print(text, file=stream)
        stream.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; the faces are written nevertheless
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
