"""Actor pools: vLLM engines that generate, stream, obey cancels and swap weights with requests in
flight.
"""
