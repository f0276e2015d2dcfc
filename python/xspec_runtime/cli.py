"""The `xspec` command, and what every command line here does with an error."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import update_wrapper
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress
from typer.core import TyperCommand, TyperGroup

from .errors import explain

if TYPE_CHECKING:
    from threading import Event

    from torch import Tensor

# Ancestor of what typer raises about arguments; it has no public name in every version.
_UsageError = typer.BadParameter.__base__


class _OneLine:
    """A command that says in one line what is wrong with its arguments."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run; exits with status 2 for wrong arguments."""
        try:
            status = super().main(*args, standalone_mode=False, **extra)
        except _UsageError as error:
            message = error.format_message()
            if not standalone_mode:
                raise
            # Without arguments the help page is the message, or has been shown already.
            if message and "\n" not in message:
                _fail(f"{message.rstrip('.')} (--help lists the options)")
            if message:
                error.show()
            sys.exit(2)
        if standalone_mode:
            sys.exit(status if isinstance(status, int) else 0)
        return status


class Command(_OneLine, TyperCommand):
    """For `app.command(cls=Command)`."""


class Group(_OneLine, TyperGroup):
    """For `Typer(cls=Group)`."""


app = typer.Typer(
    cls=Group, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True
)


def run_cli(work: Callable[[], object], debug: bool = False, less_memory: str = "") -> None:
    """Run `work`; an error becomes one line and exit status 2, Ctrl-C exit status 130.

    Args:
        debug: let errors through, with their tracebacks.
        less_memory: which options to change where memory runs out, as an order.
    """
    try:
        work()
    except KeyboardInterrupt as stop:
        _say(f"interrupted{f': {stop}' if str(stop) else ''}")
        sys.exit(130)
    except BrokenPipeError:
        # As rich does: whoever read the output has gone, and nothing may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        _fail(explain(error, less_memory))


def command(group: typer.Typer, less_memory: str = "") -> Callable[[Callable], Callable]:
    """Decorator: a command of `group` under the function's name, with a --debug of its own.

    Args:
        less_memory: see `run_cli`.
    """
    option = Annotated[bool, typer.Option(help="Show tracebacks.")]
    last = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=option)

    def add(work: Callable) -> Callable:
        def run(debug: bool, **values: Any) -> None:
            run_cli(lambda: work(**values), debug, less_memory)

        options = [*signature(work, eval_str=True).parameters.values(), last]
        update_wrapper(run, work)
        run.__signature__ = signature(run).replace(parameters=options)
        run.__annotations__ = {each.name: each.annotation for each in options}
        group.command(cls=Command)(run)
        return work

    return add


def script_command() -> str:
    """The command line of a script, for its results; a shell takes it as it is."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error until the block ends; gives what moves it: how much is done, of how
    much, and what is at work.
    """
    console = Console(stderr=True)
    # Where it is no terminal, a bar that vanishes would leave an empty line.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)

        def show(done: int, total: int | None, label: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield show


def _say(message: str) -> None:
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    _say(f"error: {message}")
    sys.exit(2)


@app.callback()
def _group() -> None:
    """Lossless speculative decoding for vision-language models."""


@command(app, "lower --rows, --gamma or --max-new-tokens")
def ask(
    question: Annotated[str, typer.Argument(help="What to ask about the recording.")],
    events: Annotated[Path, typer.Option(help="Event stream of the recording (.npy, .npz).")],
    video: Annotated[
        Path | None, typer.Option(help="Video file; without one the events stand in as frames.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of a verify: the root and its drafts.")] = 16,
    gamma: Annotated[int, typer.Option(help="Tokens the event model drafts a round.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    overlap: Annotated[
        str,
        typer.Option(
            help="The draft works while the video is prepared (window), beside the target's "
            "prefill too (concurrent), or neither (off). Default: window; concurrent on two "
            "devices."
        ),
    ] = "",
    target_device: Annotated[
        str, typer.Option(help="Where the target runs: cpu, cuda, cuda:0, ...")
    ] = "cpu",
    draft_device: Annotated[
        str, typer.Option(help="Where the event model runs, if elsewhere.")
    ] = "",
) -> None:
    """Answer a question about a recording with the embedded pair; it streams."""
    from .e2e import Options, set_threads
    from .inputs import (
        blank_video,
        check_lengths,
        check_questions,
        read_events,
        read_recording,
        read_video,
    )
    from .overlap import Overlap, check_mode
    from .workloads import MiniPair

    options = Options(
        "xspec ask", gamma, rows, max_new_tokens=max_new_tokens, target_device=target_device,
        draft_device=draft_device or target_device,
    )  # fmt: skip
    settings = options.settings()
    if overlap:
        check_mode(overlap, "--overlap")
    check_questions([question])
    set_threads(options)
    if video is None:
        frames, image = read_recording(events, None)
    else:
        frames, image = blank_video(video), read_events(events)
    pair = MiniPair(settings)
    # The frames that are not here yet change neither the prompt's length nor the draft's request.
    task = pair.task("ask", question, frames, image)
    check_lengths(pair, [task])
    decoder = pair.decoder("tree")
    shown: list[int] = []

    def stream(tokens: list[int]) -> None:
        before = len(pair.tokenizer.decode(shown, skip_special_tokens=True))
        shown.extend(tokens)
        text = pair.tokenizer.decode(shown, skip_special_tokens=True)
        sys.stdout.write(text[before:].lstrip() if before == 0 else text[before:])
        sys.stdout.flush()

    def prepare(stop: Event) -> Mapping[str, Tensor]:
        if video is None:
            return task.inputs
        return pair.task("ask", question, read_video(video, stop), image).inputs

    work = Overlap(decoder, overlap or None)
    result = work.generate(prepare, task.request, stream, len(frames))
    sys.stdout.write("\n")
    seconds = work.stages.total_ms / 1e3
    console = Console(stderr=True)
    console.print(
        f"{len(result.tokens)} tokens in {1e3 * seconds:.0f} ms "
        f"({len(result.tokens) / seconds:.0f} tokens/s), "
        f"{result.tokens_per_verify:.2f} tokens per verify",
        highlight=False,
    )
    console.print(f"{work.stages}", markup=False, highlight=False, soft_wrap=True)


@command(app)
def doctor() -> None:
    """Say what is installed, which backend `auto` picks and why, and where caches are."""
    from .doctor import doctor as examine

    if not examine(Console(soft_wrap=True)):
        sys.exit(1)


def main() -> None:
    """Entry point of the `xspec` script."""
    from .commands import app as whole

    whole()
