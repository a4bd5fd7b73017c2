"""What each `python src/<command>.py` does: a config comes in, files go out."""
