"""One vLLM engine: start, launch, abort, score, swap weights. Knows neither the buffer nor the run;
`actors.worker` connects it with both.
"""
