"""The files of a run, and the live state that monitors draw."""
