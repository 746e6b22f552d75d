"""Actor pools: vLLM engines that generate, stream, handle cancels and swap weights with requests in
flight.
"""
