"""What a configuration costs, from shapes alone."""
