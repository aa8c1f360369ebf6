"""Commands of ``dynamic-llava`` that bring their own tables, one file each; ``cli.py`` registers them."""
