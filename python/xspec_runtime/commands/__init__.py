"""The commands of `xspec`: importing this package adds them to `app`, one file each."""

from ..cli import app
from . import convert, dataset, evaluate, stages, tokens, vocab

__all__ = ["app", "convert", "dataset", "evaluate", "stages", "tokens", "vocab"]
