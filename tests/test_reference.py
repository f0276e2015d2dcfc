"""The reference pages are those of the present code, and the code is documented."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from running import bench_script, invoke
from xspec_runtime.reference import api, public
from xspec_runtime.reference.commands import commands, commands_markdown, parse
from xspec_runtime.reference.examples import EXAMPLES

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = dict(commands(ROOT / "bench"))
STALE = "run python bench/reference.py"


def test_the_page_of_the_api_is_up_to_date():
    assert (ROOT / "docs" / "api.md").read_text() == api.api_markdown(), STALE


def test_the_page_of_the_commands_is_up_to_date():
    assert (ROOT / "docs" / "commands.md").read_text() == commands_markdown(ROOT / "bench"), STALE


@pytest.mark.parametrize("module", [module for _, module in public.GROUPS])
def test_what_is_public_has_docstrings_and_types(module):
    entries = [entry for entry in public.entries(module) if entry.is_code]
    assert entries and not [fault for entry in entries for fault in api.faults(entry)]


def test_every_command_has_an_example_and_every_example_a_command():
    assert EXAMPLES.keys() == COMMANDS.keys()


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if not isinstance(COMMANDS[name], Path)]
)
def test_examples_are_accepted(name):
    assert EXAMPLES[name].startswith(name)
    parse(name, COMMANDS[name])
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name} {parameter.name} has no help"


def undocumented(x, y: int = 3, *, z=()) -> None:
    pass


@dataclass
class Undocumented:
    x: int = 0


def test_what_is_missing_is_named():
    entry = public.Entry("here", "undocumented", undocumented)
    assert api.faults(entry) == [
        "here.undocumented: no docstring",
        "here.undocumented: no type of x",
        "here.undocumented: no type of z",
    ]
    found = api.faults(public.Entry("here", "Undocumented", Undocumented))
    assert found == ["here.Undocumented: no docstring"]
    with pytest.raises(ValueError, match="must say in __all__ what is public"):
        public.entries("math")


def test_sections_become_lists():
    doc = "What it does with <x>.\n\nArgs:\n    x, y: ``[B]``, one\n        or two.\n\nIt ends."
    assert list(api.markdown_of(doc)) == [
        "What it does with &lt;x>.", "", "**Args:**", "- `x, y`: `[B]`, one", "  or two.", "",
        "It ends.",
    ]  # fmt: skip


def test_a_page_that_was_edited_is_noticed_and_mended(tmp_path, monkeypatch):
    bench = bench_script("reference")
    monkeypatch.setattr(bench, "api_markdown", lambda: "api\n")
    monkeypatch.setattr(bench, "commands_markdown", lambda bench: "commands\n")
    run = partial(invoke, bench.app, "--folder", tmp_path)

    assert run().exit_code == 0 and run("--check").exit_code == 0
    (tmp_path / "api.md").write_text("API\n")
    result = run("--check")
    assert result.exit_code == 2 and "api.md is not up to date" in result.stderr
    assert run().exit_code == 0 and (tmp_path / "api.md").read_text() == "api\n"
