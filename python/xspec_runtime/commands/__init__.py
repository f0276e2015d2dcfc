"""The commands of `xspec`: importing this package adds them to `app`, one file each."""

from ..cli import app
from . import convert, dataset, tokens, vocab

__all__ = ["app", "convert", "dataset", "tokens", "vocab"]
