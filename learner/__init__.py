"""The FSDP learner: pulls shards of bounded staleness, trains, publishes versioned weights.

Its exceptions are defined here, so that catching them needs no torch.
"""

from buffer.wire.transport import TransportError


class RunStopped(Exception):
    """The buffer ended the run with an error, or the learner was asked to stop."""


class AskedToStop(RunStopped):
    """This rank or another one of its learner was asked to stop."""


class BufferLost(TransportError):
    """The buffer did not come back within `buffer.rejoin_timeout_s`.

    A resumed run continues from a checkpoint.
    """
