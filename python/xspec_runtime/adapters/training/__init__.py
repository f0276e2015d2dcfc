"""Training of adapters and of draft models: data, losses, the loop, folders of runs."""
