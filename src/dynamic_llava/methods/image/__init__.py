"""Methods that rank image tokens, one file each: ``image_policy`` names the file."""
