"""Methods that decide on output tokens, one file each: ``text_policy`` names the file."""
