"""vLLM's workers, one file a platform, with the two things that ours do more."""
