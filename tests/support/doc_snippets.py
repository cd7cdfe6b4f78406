"""The snippets of a page of documentation, and what runs those of them that are commands."""

import doctest
import re
import shlex
from dataclasses import dataclass

from cgmq_fx.cli import main

BLOCK = re.compile(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    language: str
    file: str
    note: str
    text: str


def snippets(page):
    """Yield the snippets of a file in order."""
    for match in BLOCK.finditer(page.read_text()):
        file, _, note = match[2].partition(" ")
        yield Snippet(match[1], file, note, match[3])


def run_commands(text, folder, capsys):
    """Run the lines that begin with a dollar sign; what stands below is what they print."""
    for command, expected in re.findall(r"^\$ cgmq-fx (.*)\n((?:(?!\$).*\n)*)", text, re.MULTILINE):
        command, _, target = command.partition(" > ")
        main(shlex.split(command))
        captured = capsys.readouterr()
        found = captured.out + captured.err
        if target:
            (folder / target).write_text(captured.out)
            assert captured.err == ""
            found = ""
        checker = doctest.OutputChecker()
        assert checker.check_output(expected, found, doctest.ELLIPSIS), f"{command}:\n{found}"
        assert "Traceback" not in found
