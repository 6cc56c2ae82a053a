"""What a comparison found, as a file, as tables, in words, and how two results differ."""
