"""Questions about pictures: the prompt, the answer, and what was kept of them."""
