"""Find the lines of a TOML or JSON text on which its keys stand, for messages.

The text has been read before by a real parser, so it is known to be sound; what these scanners do
not understand they leave out, and the message then names the line of the enclosing key.
"""

import contextlib
import json
import re
from collections.abc import Mapping

Path = tuple[str | int, ...]

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+|\n')
_TOML_TOKEN = re.compile(
    r"""\#[^\n]*
      | \"\"\"(?:[^\\]|\\.)*?\"{3,5}
      | '''.*?'{3,5}
      | "(?:[^"\\\n]|\\.)*"
      | '[^'\n]*'
      | [{}\[\],=.\n]
      | [^\s{}\[\],=.\#"']+""",
    re.VERBOSE | re.DOTALL,
)

_BREAKS = frozenset("{}[],=\n")


def line_of(lines: Mapping[Path, int], path: Path) -> int | None:
    """Return the line of the deepest known key on the way to `path`."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


def json_lines(text: str) -> dict[Path, int]:
    """Return the line of every key and list item of a sound JSON text."""
    lines: dict[Path, int] = {}
    stack: list[
        str | int | None
    ] = []  # per open container: index, or key (None before one is read)
    line, awaiting_key = 1, False
    for match in _JSON_TOKEN.finditer(text):
        token = match.group()
        if token == "\n":
            line += 1
        elif token in "{[":
            _mark(lines, stack, line)
            stack.append(None if token == "{" else 0)
            awaiting_key = token == "{"
        elif token in "}]":
            stack.pop()
            awaiting_key = False
        elif token == ",":
            top = stack[-1]
            stack[-1] = top + 1 if isinstance(top, int) else None
            awaiting_key = stack[-1] is None
        elif token == ":":
            awaiting_key = False
        elif awaiting_key:
            stack[-1] = json.loads(token)
            _mark(lines, stack, line)
        else:
            _mark(lines, stack, line)
    return lines


def _mark(lines: dict[Path, int], stack: list[str | int | None], line: int) -> None:
    path = tuple(key for key in stack if key is not None)
    if path and len(path) == len(stack):
        lines.setdefault(path, line)


def deepest_dotted_key(text: str) -> int:
    """Return how many parts the longest dotted key of a TOML text has, sound or not."""
    deepest = run = 1
    for match in _TOML_TOKEN.finditer(text):
        token = match.group()
        if token == ".":
            run += 1
            deepest = max(deepest, run)
        elif token in _BREAKS or token[0] == "#":
            run = 1
    return deepest


def toml_lines(text: str) -> dict[Path, int]:
    """Return the line of every key and list item of a sound TOML text."""
    return _TomlLines(text).lines


class _TomlLines:
    """One walk over the tokens of a TOML text."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Path, int] = {}
        self.counts: dict[Path, int] = {}
        self.tokens: list[tuple[str, int]] = []
        line = 1
        for match in _TOML_TOKEN.finditer(text):
            token = match.group()
            if not token.startswith("#"):
                self.tokens.append((token, line))
            line += token.count("\n")
        self.tokens.append(("\n", line))
        self.position = 0
        with contextlib.suppress(IndexError):  # an odd spelling: keep the lines found so far
            self._statements()

    def _next(self) -> str:
        token = self.tokens[self.position][0]
        self.position += 1
        return token

    def _peek(self) -> str:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else "\n"

    def _skip_newlines(self) -> None:
        while self.position < len(self.tokens) and self._peek() == "\n":
            self.position += 1

    def _mark(self, path: Path) -> None:
        line = self.tokens[min(self.position, len(self.tokens) - 1)][1]
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def _statements(self) -> None:
        prefix: Path = ()
        while True:
            self._skip_newlines()
            if self.position >= len(self.tokens):
                return
            if self._peek() == "[":
                prefix = self._header()
            else:
                self._pair(prefix)

    def _header(self) -> Path:
        self._next()
        is_list = self._peek() == "["
        if is_list:
            self._next()
        path: Path = ()
        start = self.position
        for key in self._keys("]"):
            path = (*path, key)
            if path in self.counts:
                path = (*path, self.counts[path] - 1)
        if is_list:
            base = path[:-1] if isinstance(path[-1], int) else path
            self.counts[base] = self.counts.get(base, 0) + 1
            path = (*base, self.counts[base] - 1)
        end, self.position = self.position, start
        self._mark(path)
        self.position = end + (2 if is_list else 1)
        return path

    def _keys(self, closing: str) -> list[str]:
        keys: list[str] = []
        while self._peek() not in (closing, "\n"):
            token = self._next()
            if token != ".":
                keys.append(token.strip("\"'"))
        return keys

    def _pair(self, prefix: Path) -> None:
        start = self.position
        path = (*prefix, *self._keys("="))
        end, self.position = self.position, start
        self._mark(path)
        self.position = end + 1
        self._value(path)

    def _value(self, path: Path) -> None:
        """Walk one value; nested lists and tables by an explicit stack of their paths."""
        token = self._next()
        if token == "[":
            index = 0
            while self._after_newlines() != "]":
                self._mark((*path, index))
                self._value((*path, index))
                index += 1
                if self._after_newlines() == ",":
                    self._next()
            self._next()
        elif token == "{":
            while self._after_newlines() != "}":
                self._pair(path)
                if self._after_newlines() == ",":
                    self._next()
            self._next()
        else:
            while self._peek() not in (",", "]", "}", "\n"):  # 1.5 and dates come in pieces
                self._next()

    def _after_newlines(self) -> str:
        self._skip_newlines()
        if self.position >= len(self.tokens):
            raise IndexError("the text ends inside a value")
        return self._peek()
