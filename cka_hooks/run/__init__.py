"""Models, batches and an accumulator brought together: one pass, several ranks, interrupted and resumed."""
