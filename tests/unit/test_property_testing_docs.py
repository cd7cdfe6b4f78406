"""Every Python block of docs/property-testing.md is run, in order; what it says fails does fail."""

import inspect
import linecache
import re
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, settings

from cgmq_fx.testing import TRAITS, Case, LawError, check_pass
from source_tree import ROOT

PAGE = ROOT / "docs" / "property-testing.md"
BLOCK = re.compile(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
VARIABLE = re.compile(r"'[^']*'|\d[\d.e+-]*")


@dataclass(frozen=True)
class Snippet:
    language: str
    kind: str
    text: str


def snippets():
    return [Snippet(*match.groups()) for match in BLOCK.finditer(PAGE.read_text())]


def without_names(message):
    """Return law and first fault; names in it and numbers differ from case to case."""
    head, *faults = message.strip().splitlines()[:2]
    return head, [VARIABLE.sub("…", fault) for fault in faults]


def execute(text, names):
    file = f"<snippet {hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), names)


@pytest.fixture
def few_examples():
    """Draw the same cases at every run, and spend no time on shrinking them."""
    before = settings.get_current_profile_name()
    profile = settings.get_profile(before)
    settings.register_profile(
        "page",
        max_examples=60,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("page")
    yield
    settings.register_profile(before, profile)  # the page registers one of that name
    settings.load_profile(before)


# torch warns of itself where the graph of an exported program is copied.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_every_snippet_runs(tmp_path, monkeypatch, few_examples):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "snippet"}
    error, failures, cases = None, 0, 0
    for snippet in snippets():
        if snippet.kind == "fails":
            with pytest.raises((LawError, AttributeError)) as caught:
                execute(snippet.text, names)
            error, failures = caught.value, failures + 1
        elif snippet.language == "text":
            law = isinstance(error, LawError)
            message = str(error) if law else f"{type(error).__name__}: {error}"
            assert without_names(snippet.text) == without_names(message)
        elif snippet.kind == "case":
            cases += 1
            with pytest.raises(LawError) as caught:
                check_pass(names["merge_linears"], Case(snippet.text))
            assert caught.value.law == error.law
        else:
            execute(snippet.text, names)
    assert (failures, cases) == (5, 1)
    assert (tmp_path / "tied.py").exists()
    names["test_dead_code"]()
    names["test_it_stays_fixed"]()


def test_every_trait_and_law_that_the_page_names_exists():
    page = PAGE.read_text()
    named = {name for text in re.findall(r"(?:require|exclude)=\{(.*?)\}", page)
             for name in re.findall(r'"(\w+)"', text)}  # fmt: skip
    assert named <= set(TRAITS)
    source = inspect.getsource(inspect.getmodule(check_pass))
    rows = page.partition("## The laws")[2].partition("\n## ")[0]
    laws = {
        name
        for row in re.findall(r"^\| (`.*?) \|", rows, re.M)
        for name in re.findall(r"`(.*?)`", row)
    }
    assert laws == set(re.findall(r'require\("([\w -]+)"', source)) - {"contract"}
