"""`python -m xspec_runtime`: the `xspec` command."""

from .cli import main

if __name__ == "__main__":
    main()
