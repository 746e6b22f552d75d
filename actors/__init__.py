"""Actor pools: vLLM engines that generate, stream, cancel, and swap weights during generation."""
