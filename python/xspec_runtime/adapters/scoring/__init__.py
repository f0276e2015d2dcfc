"""What trained adapters are worth on answers kept for a test."""
