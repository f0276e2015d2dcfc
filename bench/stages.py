"""Five stages of both models over a dataset in the DSEC layout; the same as `xspec stages`."""

from xspec_runtime.commands.stages import main

if __name__ == "__main__":
    main()
