"""Dynamic-LLaVA in vLLM: a plugin that drops tokens inside the decoder and gives their K/V blocks back.

Nothing here is imported but by vLLM itself, through the entry point in ``plugin.py``.
"""
