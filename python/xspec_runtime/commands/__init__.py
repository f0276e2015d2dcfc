"""The commands of `xspec`: importing this package adds them to `app`, one file each."""

from importlib import import_module
from pkgutil import iter_modules

from ..cli import app

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f".{_module}", __name__)

__all__ = ["app"]
