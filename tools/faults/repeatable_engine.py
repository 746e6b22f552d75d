"""`python -m tools.faults.repeatable_engine INDEX CONFIG_FILE`: a fake engine that repeats itself.

Each token is a function of its rollout's seed, of its place in the response, and of the weights
that sample it, so that any engine continues a response exactly as another one would have. Two runs
with equal seeds and weights therefore have equal responses, wherever these were interrupted. Real
engines do this only until a response is continued: see `actors.inference.engine.Engine.launch`.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from pathlib import Path

from actors.inference.generation import Generation
from tools.faults import fake_engine
from tools.faults.sampled import FIRST, NUM_IDS


class RepeatableEngine(fake_engine.FakeEngine):
    """Samples from the weights themselves, as their version is another one after a restart."""

    _weights = ""

    def launch(
        self,
        request_id: str,
        prompt_ids: list[int],
        max_tokens: int,
        *,
        seed: int,
        num_continued: int,
    ) -> Generation:
        def sample(place: int) -> int:
            drawn = f"{seed} {num_continued + place} {self._weights}"
            return FIRST + zlib.crc32(drawn.encode()) % NUM_IDS

        length = max(1, fake_engine.draw_length(str(seed)))
        assert length > num_continued, "a response that has ended is not continued"
        return self._start(Generation(request_id), sample, length - num_continued, max_tokens)

    async def swap(self, path: str, version: int) -> float:
        seconds = await super().swap(path, version)
        self._weights = digest(Path(path))
        return seconds


def digest(path: Path) -> str:
    """A digest of the tensors in a safetensors file, without its header."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


if __name__ == "__main__":
    sys.exit(fake_engine.main(sys.argv[1:], RepeatableEngine))
