"""Endurance: random requests with planned faults, identical answers and flat memory."""
