"""Recorded answers through drafters and the accept op."""
