"""Builds `xspec_kernels._C` with CMake. Metadata lives in pyproject.toml; torch is never imported.

Environment: XSPEC_NATIVE=OFF skips the native module, XSPEC_CUDA=AUTO|ON|OFF, XSPEC_CUDA_ARCHS
(CMake architectures, separated by commas or semicolons), MAX_JOBS.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def option(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default).upper()
    if value not in allowed:
        raise SystemExit(f"xspec-kernels: {name}={value}, expected one of {', '.join(allowed)}")
    return value


def require_tools() -> str:
    """The CMake directory of pybind11, once every build tool is known to be there."""
    compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    missing = [] if any(shutil.which(c) for c in compilers if c) else ["a C++17 compiler"]
    if not shutil.which("cmake"):
        missing.append("cmake")
    try:
        import pybind11
    except ImportError:
        missing.append("pybind11")
    if missing:
        raise SystemExit(
            f"xspec-kernels: the native module needs {', '.join(missing)}; install what is "
            "missing, or set XSPEC_NATIVE=OFF to install without it"
        )
    return pybind11.get_cmake_dir()


class CMakeBuild(build_ext):
    """Runs CMake in a directory keyed by its configuration.

    pip builds inside the source tree, and a CMake cache outlives the environment that made it;
    the key keeps one tree per Python, compiler and option set, so none is reused wrongly.
    """

    def build_extension(self, ext: Extension) -> None:
        # Tools that were installed as wheels lie beside the interpreter, which need not be on PATH.
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
        arguments = [
            f"-Dpybind11_DIR={require_tools()}",
            f"-DPython_EXECUTABLE={os.path.abspath(sys.executable)}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DXSPEC_CUDA={option('XSPEC_CUDA', 'AUTO', ('AUTO', 'ON', 'OFF'))}",
        ]
        archs = os.environ.get("XSPEC_CUDA_ARCHS", "").replace(",", ";")
        if archs:
            arguments.append(f"-DXSPEC_CUDA_ARCHS={archs}")
        if shutil.which("ninja"):
            arguments += ["-G", "Ninja"]
        tools = [shutil.which(tool) for tool in ("cmake", "ninja", "nvcc", "c++")]
        chosen = [os.environ.get(name) for name in ("CC", "CXX", "CUDACXX", "CUDA_HOME")]
        key = hashlib.sha256(repr((arguments, tools, chosen)).encode()).hexdigest()[:12]
        tree = ROOT / "build" / f"cmake-{key}"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(tree), *arguments], check=True)
        subprocess.run(["cmake", "--build", str(tree), "--target", "_C", "-j", jobs], check=True)
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tree / "lib" / module.name, module)


native = option("XSPEC_NATIVE", "ON", ("ON", "OFF")) == "ON"
setup(
    ext_modules=[Extension("xspec_kernels._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
