"""Plans: features and a byte budget become each feature's method, its numbers and the exact bytes."""

from __future__ import annotations

from embtab.planning.planner import Plan, plan

__all__ = ["Plan", "plan"]
