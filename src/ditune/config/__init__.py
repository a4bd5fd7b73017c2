"""What stands in a config: which values every key takes, and what a wrong override should have been."""
