"""docs/api.md and docs/commands.md, written from docstrings and from the commands' own help."""
