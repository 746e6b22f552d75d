"""`python -m tools.doctor [key=value ...]`: can this machine run this configuration?

Prints one line per check, with a remedy if it is not ok: packages, GPUs, bfloat16, attention,
ports, keys, disk, shared memory and clock, then the memory of every process from the sizes of the
model alone. Loads no weight and starts no process of a run. With `gpus` it plans for another
machine: only memory is checked, and keys are suggested. Exits with status 1 if anything is wrong.
Run by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from configs.command import run_command
from configs.errors import ExitStatus
from configs.memory.shape import GIB
from configs.schema import Config, key
from tools.checking.findings import Finding


@dataclass
class DoctorConfig(Config):
    gpus: int = key(
        0, "Number of GPUs of a machine to plan for. 0: check this machine as it is.", ge=0
    )
    gpu_gib: float = key(24.0, "Memory of each GPU to plan for, in GiB. Applies to gpus.", gt=0)
    ram_gib: float = key(
        0.0, "Memory of the machine to plan for, in GiB; 0: unknown. Applies to gpus.", ge=0
    )


def run(config: DoctorConfig) -> int:
    findings = plan(config) if config.gpus else examine(config)
    wrong = [finding for finding in _shown(findings) if finding.verdict == "error"]
    return ExitStatus.FAILED if wrong else ExitStatus.OK


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """This machine, part by part. Imports come late, because torch and transformers take seconds
    and may be what is broken.
    """
    from tools.doctoring.software import check_software

    yield from check_software()

    from tools.doctoring.hardware import check_hardware, check_vllm, gpus_of_machine, place_of
    from tools.doctoring.machine import check_machine
    from tools.doctoring.model import size_model
    from tools.doctoring.sizing import check_memory

    gpus = gpus_of_machine()
    yield from check_hardware(config, gpus)
    yield check_vllm(config)
    model, shape = size_model(config.model.path)
    yield from check_machine(config, shape)
    yield model
    if shape is not None:
        yield from check_memory(config, shape, place_of(config, gpus))


def plan(config: DoctorConfig) -> Iterator[Finding]:
    """Another machine: the keys as they are, then those that fit."""
    from tools.doctoring.model import size_model
    from tools.doctoring.sizing import Place, check_memory
    from tools.doctoring.suggestion import suggest

    place = Place(config.gpus, config.gpu_gib * GIB, config.ram_gib * GIB)
    model, shape = size_model(config.model.path)
    yield model
    if shape is None:
        return
    print("\nWith the keys as they are:")
    as_given = list(check_memory(config, shape, place))
    yield from as_given
    machine = f"{config.gpus} GPUs of {config.gpu_gib:g} GiB"
    suggestion = suggest(config, shape, place)
    if suggestion is None:
        if all(finding.verdict in ("ok", "note") for finding in as_given):
            print(f"\nNo other division of {machine} leaves more room than these keys, which fit.")
            return
        adapters = "" if config.model.lora.rank else ", or train adapters (model.lora.rank=32)"
        print(
            f"\nNo division of {machine} fits this model with room to spare; use more GPUs, or "
            f"larger ones{adapters}."
        )
        return
    print(f"\nA configuration that fits {machine} (computed, and never run on a GPU by us):")
    print(suggestion)
    print("\nWith this configuration:")
    yield from check_memory(suggestion.config, shape, place)


def _shown(findings: Iterable[Finding]) -> Iterator[Finding]:
    for finding in findings:
        print(finding, flush=True)
        yield finding


def main() -> NoReturn:
    run_command(
        "Check that this machine can run a configuration: packages, GPUs, ports, keys, disk, and "
        "the memory of every process, computed from the model's sizes. With gpus=N gpu_gib=G, plan "
        "for another machine and suggest the keys with which the model fits.",
        run,
        schema=DoctorConfig,
    )


if __name__ == "__main__":
    main()
