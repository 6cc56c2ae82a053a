"""Pictures of a result, the page to look around in, and what a notebook shows."""
