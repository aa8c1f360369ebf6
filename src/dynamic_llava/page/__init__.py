"""A server to look with: OpenAI's API from plain ``generate``, one request at a time, and the page at ``/``.

For production there is vLLM with the plugin in ``dynamic_llava.vllm``; the page goes with that as well.
"""
