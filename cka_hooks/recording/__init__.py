"""From a model to labelled activations: hooks, layers by name, and which axis, which call, which part."""
