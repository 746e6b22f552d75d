"""From the ranks' shards of a model to the bytes of a published snapshot.

`learner.publication` publishes them beside training; their transport is `buffer.wire.snapshots`.
"""
