"""The drop-in for transformers measured against `generate` and its prompt lookup."""
