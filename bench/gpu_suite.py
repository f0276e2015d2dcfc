"""Checks everything, then times everything, on one GPU, in one command.

    pip install --no-build-isolation --no-deps .
    python bench/gpu_suite.py

The first takes less than 90 s with XSPEC_CUDA_ARCHS=90a, that is, for an H100 or H200 alone.

Needs torch and triton, no network, and nothing beyond this tree; a tree that is not installed
works too, without the CUDA C++ kernels. results.json (schema xspec.gpu/1) and log.txt in --out are
rewritten as results come, so a run that is killed leaves what it had. `make gpu-bundle`, on a
machine with a package index, fills gpu_bundle/ with the peers and recordings that the phases use
where they find them. Where the tree has no .git, --commit says what is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def options(phases: str) -> argparse.Namespace:
    """Parse the command line; `phases` are all there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--phases", default=phases, help="comma-separated (default: %(default)s)")
    add("--dry-run", action="store_true", help="tiny shapes on the CPU, to test the suite itself")
    add("--out", type=Path, default=Path("results/gpu"), help="folder (default: %(default)s)")
    add("--bundle", type=Path, default=ROOT / "gpu_bundle", help="what `make gpu-bundle` filled")
    add("--budget", type=float, default=520.0, help="seconds (default: %(default)s)")
    add("--seed", type=int, default=0, help="of cases and weights (default: %(default)s)")
    add("--commit", help="for the result file, where the tree has no .git")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args()


def main() -> int:
    """Run the suite; 1 if a part failed, 2 for a bad request, 130 if stopped."""
    # An installed package comes first: it has the native module, which the bare tree lacks.
    if importlib.util.find_spec("xspec_runtime") is None:
        sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    from xspec_runtime.errors import explain
    from xspec_runtime.gpu import PHASES

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = vars(options(",".join(PHASES)))
    given["phases"] = tuple(name.strip() for name in given["phases"].split(",") if name.strip())
    debug = given.pop("debug")
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    try:
        from xspec_runtime.gpu.parts import Options
        from xspec_runtime.gpu.suite import run_suite

        return run_suite(Options(**given), command, lambda line: print(line, flush=True))
    except Exception as error:
        if debug:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {given['out']}/results.json holds what was done", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
