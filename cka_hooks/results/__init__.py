"""What was found: labels, values, errors, what was left out; as a file, as tables, in words, and how two differ."""
