"""A simulated world around the core: a virtual clock, engines, a learner and prompts."""
