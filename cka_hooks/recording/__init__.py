"""From a model to labelled activations: hooks, layers by name, which axis, which call, which part."""
