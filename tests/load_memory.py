"""`python -m tests.load_memory FOLDER RANKS [whole]`: the memory of loading the model in FOLDER by
RANKS processes with gloo, in MiB per rank, beyond that of the imports.

Owns one measurement: "own", memory of a rank that no other process shares (its peak while it loads,
and after), and "mapped", pages of the checkpoint's files, which all ranks share. `whole` casts the
whole model in each rank before it is sharded. Writes a random model of 270 million bfloat16
parameters to FOLDER if there is none.
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.multiprocessing as multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from configs import cli
from learner import fsdp

MIB = 2**20


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=32000,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def resident() -> list[int]:
    """Bytes of anonymous memory, and of mapped files, of this process."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]


def rank(number: int, folder: str, num_ranks: int, whole: bool, port: int) -> None:
    config = cli.load([f"model.path={folder}", "learner.device=cpu"])
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=number, world_size=num_ranks
    )
    before, peak, ended = resident(), [0, 0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.002):
            peak[:] = [max(a, b) for a, b in zip(peak, resident(), strict=True)]

    sampler = threading.Thread(target=sample)
    sampler.start()
    with patch.object(fsdp, "uncast", lambda: nullcontext([])) if whole else nullcontext():
        model = fsdp.load_sharded(config, torch.device("cpu"))
    ended.set()
    sampler.join()
    own, mapped, held = peak[0] - before[0], peak[1] - before[1], resident()[0] - before[0]
    del model
    print(
        f"rank {number} of {num_ranks}: own {own // MIB} MiB at its peak, {held // MIB} after; "
        f"mapped {mapped // MIB}",
        flush=True,
    )
    torch.distributed.destroy_process_group()


def main(folder: str, num_ranks: str, *kind: str) -> None:
    if not Path(folder).exists():
        write_model(Path(folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (folder, int(num_ranks), kind == ("whole",), port)
    multiprocessing.spawn(rank, arguments, nprocs=int(num_ranks))


if __name__ == "__main__":
    main(*sys.argv[1:])
