"""Comparisons of sequence models: arms x methods x budgets x seeds, with tables of their own for the attention."""
