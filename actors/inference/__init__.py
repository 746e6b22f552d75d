"""One vLLM engine: start, launch, abort, score, swap weights.

It knows neither the buffer nor the run; `actors.worker` connects it with both.
"""

from __future__ import annotations

import logging
import os

# Before vLLM has configured its logging, and in vLLM's own processes too, which import the module
# of their parent's command as they start. A user sees vLLM's errors, not its progress.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
