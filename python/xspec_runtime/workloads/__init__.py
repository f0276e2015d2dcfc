"""What an end-to-end comparison runs on: a pair of models, its tasks and the arms that fit them."""

from .base import ENGINES, PLAIN, WEIGHTS, Settings, Workload
from .pair import OURS, MiniPair

__all__ = ["ENGINES", "OURS", "PLAIN", "WEIGHTS", "MiniPair", "Settings", "Workload"]
