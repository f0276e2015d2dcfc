"""PEP 517 backend: setuptools', asking pip only for the build tools this machine lacks.

An isolated build hides site-packages and downloads every entry of `build-system.requires`, which
fails offline. That list is therefore empty: each hook looks for the tools in the environment being
installed into, and only what is missing there is asked for. Torch never is.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.metadata import distributions
from types import ModuleType

_MINIMUM = {"setuptools": (77,), "pybind11": (2, 12)}


def _host_paths() -> list[str]:
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return [path for path in sorted(paths) if os.path.isdir(path) and path not in sys.path]


def _installed(name: str) -> bool:
    """Whether the first copy on the path, the one an import would take, is recent enough."""
    for found in distributions(name=name, path=[*sys.path, *_host_paths()]):
        return _recent(name, found.version)
    return False


def _missing() -> list[str]:
    wanted = [
        f"{name}>={'.'.join(map(str, least))}"
        for name, least in _MINIMUM.items()
        if not _installed(name)
    ]
    search = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    if not shutil.which("cmake", path=search):
        wanted.append("cmake>=3.22")
    if not any(shutil.which(tool, path=search) for tool in ("ninja", "make")):
        wanted.append("ninja")
    return wanted


def _recent(name: str, version: str) -> bool:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return numbers >= _MINIMUM[name]


def _setuptools() -> ModuleType:
    """Raises `SystemExit` where an older one is there: it would reject the metadata, at length."""
    sys.path.extend(_host_paths())
    import setuptools.build_meta

    if not _recent("setuptools", setuptools.__version__):
        raise SystemExit(
            f"xspec-kernels: the build needs setuptools>={_MINIMUM['setuptools'][0]}, "
            f"{setuptools.__version__} is installed; upgrade it, or let pip fetch one by leaving "
            "out --no-build-isolation"
        )
    return setuptools.build_meta


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return _missing()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return _missing()


def get_requires_for_build_sdist(config_settings: dict | None = None) -> list[str]:
    return [tool for tool in _missing() if tool.startswith("setuptools")]


def prepare_metadata_for_build_wheel(*args, **kwargs) -> str:
    return _setuptools().prepare_metadata_for_build_wheel(*args, **kwargs)


def prepare_metadata_for_build_editable(*args, **kwargs) -> str:
    return _setuptools().prepare_metadata_for_build_editable(*args, **kwargs)


def build_wheel(*args, **kwargs) -> str:
    return _setuptools().build_wheel(*args, **kwargs)


def build_editable(*args, **kwargs) -> str:
    return _setuptools().build_editable(*args, **kwargs)


def build_sdist(*args, **kwargs) -> str:
    return _setuptools().build_sdist(*args, **kwargs)
