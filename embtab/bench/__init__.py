"""Measurements of speed, behind `embtab bench`."""
