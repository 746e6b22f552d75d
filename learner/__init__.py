"""The FSDP learner: pulls shards of bounded staleness, trains, publishes versioned weights."""


class RunStopped(Exception):
    """The buffer ended the run with an error; the message is its reason. Here, so that catching it needs no torch."""
