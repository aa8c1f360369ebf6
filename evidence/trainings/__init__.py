"""What docs/results.md shows: variants of training, and methods of dropping tokens at many budgets."""
