"""Lookup backends: they hold the physical tables, sum their rows over bags, and know nothing of methods."""
