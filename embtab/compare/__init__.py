"""Comparing methods at equal bytes: a sweep of runs, each done once, and the report made of them."""
