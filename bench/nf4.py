"""Products with NF4 matrices beside bitsandbytes, dequantizing first and other 4-bit kernels.

    python bench/nf4.py              # on a GPU: Llama-7B and 3-8B, M = 1..64; v(M) of a model
    python bench/nf4.py --dry-run    # tiny shapes on the CPU

It is phase `nf4` of bench/gpu_suite.py by itself. results.json (schema xspec.gpu/1) and log.txt in
--out are rewritten as results come. bitsandbytes is taken from gpu_bundle/ (`make gpu-bundle`) or
where it is installed, gemlite where it is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from xspec_runtime.errors import explain
from xspec_runtime.files import check_output, replace_file
from xspec_runtime.gpu.parts import Options
from xspec_runtime.gpu.suite import run_suite

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the phase; 1 if a part failed, 2 for a bad request, 130 if stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dry-run", action="store_true", help="tiny shapes on the CPU")
    add("--out", type=Path, default=Path("results/nf4"), help="folder (default: %(default)s)")
    add("--bundle", type=Path, default=ROOT / "gpu_bundle", help="what `make gpu-bundle` filled")
    add("--budget", type=float, default=300.0, help="seconds (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    add("--json", type=Path, help="copy of results.json")
    given = vars(parser.parse_args())
    copy = given.pop("json")
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    try:
        if copy:
            check_output(copy)
        status = run_suite(
            Options(phases=("nf4",), **given), command, lambda line: print(line, flush=True)
        )
        if copy:
            replace_file(copy, lambda path: shutil.copyfile(given["out"] / "results.json", path))
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {given['out']}/results.json holds what was done", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
