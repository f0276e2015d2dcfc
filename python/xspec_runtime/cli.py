"""The `xspec` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def run_cli(work: Callable[[], object], debug: bool = False) -> None:
    """Run `work`; a foreseen error becomes one line and exit status 2, Ctrl-C exit status 130."""
    try:
        work()
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        Console(stderr=True).print(f"error: {message}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


@app.callback()
def _group() -> None:
    """Lossless speculative decoding for vision-language models."""


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask about the recording.")],
    events: Annotated[Path, typer.Option(help="Event stream (.npy, .npz).")],
    video: Annotated[
        Path | None, typer.Option(help="Video file; without one the events stand in as frames.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of a verify.")] = 16,
    gamma: Annotated[int, typer.Option(help="Draft tokens of the event model.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Answer a question about an event recording and its video with the embedded pair, as it
    decodes.
    """
    run_cli(lambda: _ask(question, events, video, rows, gamma, max_new_tokens), debug)


def _ask(
    question: str, events: Path, video: Path | None, rows: int, gamma: int, max_new_tokens: int
) -> None:
    from .e2e import Options, read_recording, set_threads
    from .workloads import MiniPair

    options = Options("xspec ask", gamma, rows, max_new_tokens=max_new_tokens)
    settings = options.settings()
    set_threads(options)
    frames, image = read_recording(events, video)
    pair = MiniPair(settings)
    task = pair.task("ask", question, frames, image)
    decoder = pair.decoder("tree")
    shown: list[int] = []

    def stream(tokens: list[int]) -> None:
        before = len(pair.tokenizer.decode(shown, skip_special_tokens=True))
        shown.extend(tokens)
        text = pair.tokenizer.decode(shown, skip_special_tokens=True)
        sys.stdout.write(text[before:].lstrip() if before == 0 else text[before:])
        sys.stdout.flush()

    result = decoder.generate(task.inputs, task.request, on_tokens=stream)
    sys.stdout.write("\n")
    seconds = result.total_ms / 1e3
    Console(stderr=True).print(
        f"{len(result.tokens)} tokens in {result.total_ms:.0f} ms "
        f"({len(result.tokens) / seconds:.0f} tokens/s, first after {result.prefill_ms:.0f} ms), "
        f"{result.tokens_per_verify:.2f} tokens per verify",
        highlight=False,
    )


@app.command()
def doctor() -> None:
    """Say what is installed, which backend `auto` picks and why, and where caches are."""
    from .doctor import doctor as examine

    if not examine(Console()):
        sys.exit(1)


def main() -> None:
    """Entry point of the `xspec` script."""
    app()
