"""The training recipe: a vision stage and a dense stage that make a small model, the Dynamic stage that makes it sparse."""
