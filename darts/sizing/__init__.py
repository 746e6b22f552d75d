"""How many rollouts a prompt gets.

Holds the redundancy rules, and the estimates of response lengths and decoding latency that they
use.
"""
