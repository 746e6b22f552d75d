"""How many rollouts a prompt gets: the redundancy rules, and the estimates of response lengths and
decoding latency that they read.
"""
