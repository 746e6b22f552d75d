"""Where prompts come from, and which of them are outstanding."""
