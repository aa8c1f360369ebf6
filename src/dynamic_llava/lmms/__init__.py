"""The plugin for lmms-eval."""
