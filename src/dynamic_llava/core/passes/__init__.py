"""The four ways to run the decoder: prefill, decode, recompute and masked.

Each is one class with the same three methods: ``select`` decides at layer l, and is the only place where
tokens are dropped; ``arguments`` gives every later layer its own view of the stock arguments; ``close`` ends
the pass.
"""
