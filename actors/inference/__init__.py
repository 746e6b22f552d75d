"""One vLLM engine: start, launch, abort, score, swap weights.

It knows neither the buffer nor the run; `actors.worker` connects it with both.
"""
