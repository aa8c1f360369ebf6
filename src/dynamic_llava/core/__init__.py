"""The sparse pass: decisions, cache, report, and what attaches them to a stock decoder."""
