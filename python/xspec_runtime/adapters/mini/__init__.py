"""Adapters of the embedded pair: material, training, drafters, arms."""
