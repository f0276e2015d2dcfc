"""docs/commands.md: every command's purpose, usage, example and options, from its own help."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from typer.models import ArgumentInfo

from ..commands import app
from .examples import EXAMPLES

HEADER = """# Commands

One section a command, written by `python bench/reference.py` from what `--help` prints: its usage,
an example, its options with their defaults. `xspec` is installed with the package; `bench/*.py` run
from a checkout.

Every command says in one line what is wrong with its input and ends with status 2; `--debug` shows
the traceback instead. Interrupted, it ends with status 130, and what was finished is written.
"""
# Every command has them, so the tables do not repeat them.
LEFT_OUT = ("help", "debug")


def commands_markdown(bench: Path) -> str:
    """The page; `bench` is the folder of benchmark scripts."""
    found = dict(commands(bench))
    lines = [HEADER]
    lines += [f"- [`{name}`](#{_anchor(name)})" for name in found]
    for name, command in found.items():
        lines += ["", f"## {name}", ""]
        if isinstance(command, Path):
            tree = ast.parse(command.read_text())
            about, parameters = ast.get_docstring(tree) or "", list(_plain_parameters(tree))
        else:
            about = inspect.cleandoc(command.help or "")
            parameters = list(_parameters(command, bench.parent))
        lines += [about, "", "```", _usage(name, parameters), EXAMPLES[name], "```"]
        if parameters:
            lines += ["", "| option | default | |", "| --- | --- | --- |"]
            lines += [f"| {p.cell} | {p.default} | {p.text} |" for p in parameters]
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument or option as the tables show it."""

    spelled: str
    kind: str
    text: str
    default: str
    argument: bool
    required: bool

    @property
    def cell(self) -> str:
        """How it is given."""
        value = "" if self.argument or self.kind == "flag" else f" {self.kind}"
        return f"`{self.spelled}{value}`"


def _parameters(command: Any, root: Path) -> Iterator[Parameter]:
    for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
        if name in LEFT_OUT:
            continue
        kind, info = get_args(parameter.annotation)[:2]
        argument, default = isinstance(info, ArgumentInfo), parameter.default
        plain = name.replace("_", "-")
        # In an annotation the first spelling stands where a default would.
        given = [info.default] if isinstance(info.default, str) else []
        spelled = [*given, *(info.param_decls or ())] or [plain if argument else f"--{plain}"]
        if kind is bool and default and not given:
            spelled.append(f"--no-{plain}")
        if isinstance(default, Path) and default.is_relative_to(root):
            default = default.relative_to(root)
        required = default is parameter.empty
        yield Parameter(
            " / ".join(spelled),
            _kind(kind),
            _cell(info.help or ""),
            "required" if required else _shown(default),
            argument,
            required,
        )


def _plain_parameters(tree: ast.Module) -> Iterator[Parameter]:
    """What a script adds to an argparse parser."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first = call.args[0] if call.args else None
        if not (isinstance(first, ast.Constant) and str(first.value).startswith("--")):
            continue
        given = {word.arg: word.value for word in call.keywords}
        if first.value.removeprefix("--") in LEFT_OUT:
            continue
        named = ast.unparse(given["type"]) if "type" in given else "str"
        kind = "flag" if "action" in given else _kind({"Path": Path, "int": int}.get(named, str))
        kind = "X" if named == "float" else kind
        default = _literal(given.get("default"))
        text = str(getattr(given.get("help"), "value", "")).replace(" (default: %(default)s)", "")
        yield Parameter(str(first.value), kind, _cell(text), _shown(default), False, False)


def _literal(node: ast.expr | None) -> Any:
    """A default as it is written: a constant, Path("...") or ROOT / "..."."""
    if isinstance(node, ast.Call):
        node = node.args[0]
    if isinstance(node, ast.BinOp):
        node = node.right
    return node.value if isinstance(node, ast.Constant) else None


def _shown(default: Any) -> str:
    return "" if default is None or default is False or default == "" else f"`{default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _kind(kind: Any) -> str:
    """What a value looks like."""
    if get_origin(kind) is list:
        return f"{_kind(get_args(kind)[0])} ..."
    named = {bool: "flag", int: "N", float: "X", str: "TEXT", Path: "PATH"}
    return named.get(next((k for k in (kind, *get_args(kind)) if k in named), str), "TEXT")


def _usage(name: str, parameters: list[Parameter]) -> str:
    words = [name]
    for each in parameters:
        given = each.spelled.upper() if each.argument else f"{each.spelled} {each.kind}"
        if each.argument or each.required:
            words.append(given if each.required else f"[{given}]")
    return " ".join([*words, "[options]"])


def _anchor(name: str) -> str:
    return re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-")


def commands(bench: Path) -> Iterator[tuple[str, Any]]:
    """Name and command of every one, or its script where that has a parser of its own.

    Raises:
        ValueError: a command has no example.
    """
    found = dict(_leaves("xspec", typer.main.get_command(app)))
    for script in sorted(bench.glob("*.py")):
        found[f"python bench/{script.name}"] = _script(script)
    missing = [name for name in found if name not in EXAMPLES]
    if missing:
        raise ValueError(f"reference/examples.py has no example of {', '.join(missing)}")
    yield from found.items()


def parse(name: str, command: Any) -> None:
    """Let a command parse its example, without running it.

    Raises:
        Exception: typer's, where an option is unknown, missing or of the wrong type.
    """
    words = shlex.split(EXAMPLES[name].replace("\\\n", " "))
    command.make_context(name, words[len(name.split()) :])


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inside = getattr(command, "commands", None)
    if inside is None:
        yield name, command
        return
    for word in sorted(inside):
        yield from _leaves(f"{name} {word}", inside[word])


def _script(path: Path) -> Any:
    """A script's command; the script where it has an argparse parser instead."""
    if "argparse" in path.read_text():
        return path
    module = _load(path)
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    # A second name of a command of `xspec`.
    return typer.main.get_command(app).commands[path.stem]


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"reference_{path.stem}", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
