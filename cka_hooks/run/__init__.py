"""Bring models, batches and an accumulator together: in one pass, on several ranks, interrupted and resumed."""
