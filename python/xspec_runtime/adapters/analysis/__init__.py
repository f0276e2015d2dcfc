"""What states that look alike are worth in tokens: `xspec analyze`."""
