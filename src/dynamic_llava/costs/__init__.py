"""What a context costs: FLOPs and bytes, by count."""
