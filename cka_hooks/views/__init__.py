"""Pictures of a result, a page to explore, and a table for notebooks."""
