"""What a run leaves on disk, and the live picture that monitors draw."""
