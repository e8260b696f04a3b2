"""The policy and the task that a configuration names, and the device they are on."""

import os
import random
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, logging

ROOT = Path(__file__).resolve().parent.parent
# Parameters. On a CPU such a policy gains little from a second thread (a tenth of the time), and loses much where the
# cores are busy: 20 steps of gp then took 41 s with one thread and 190 s with two. On a GPU a pass costs its launches,
# not its tokens, of which many fit: more than --micro-tokens, where that was not given.
SMALL = 10 ** 7
SMALL_PASS = 2 ** 15


def load_policy(config: Any, task: Any, core: Any, learns: bool = True) -> tuple:
    """(model, tokenizer): the policy that is shipped for the task, or a checkpoint, which is then checked for it.

    core: the module amft as it runs, whose functions the checks use."""
    logging.disable_progress_bar()
    config.device = device_of(config.device)
    sees = task.sample("train", random.Random(0)).image is not None
    name = "base-vl" if sees and config.model == "base" else config.model
    source, near = source_of(name)
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        model, info = kind.from_pretrained(source, dtype=torch.bfloat16 if config.bf16 else torch.float32,
                                           output_loading_info=True, local_files_only=near)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=near)
        if sees:  # a response may not hold the token that a picture stands for: no picture would come with it
            banned = torch.tensor([model.config.image_token_id], device=config.device)
            head = model.get_output_embeddings()
            head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, banned, -1e9))
        model.to(config.device).eval()
        if not is_shipped(config, task):
            from recipes.checkpoints import check_checkpoint, template_words
            if config.chat_template_kwargs:
                template_words(tokenizer, config.chat_template_kwargs)
            check_checkpoint(core, model, tokenizer, info, task, config, learns)
    except Exception as error:  # missing, corrupt, of an unknown kind, unreachable: each library has its own
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if text.startswith("--"):  # it says which flag is wrong
            raise ValueError(text)
        if config.model == "base" and (config.data or config.data_test):
            raise ValueError(f"--model base: knows the words of its own tasks alone ({text}); for a file's problems "
                             "pass --model, a checkpoint")
        eyes = "vision-language " if sees else ""
        raise ValueError(f"--model {config.model}: not a {eyes}checkpoint for {config.task} ({text})")
    if model.num_parameters() < SMALL:
        if not config.device.startswith("cpu"):
            if config.micro_tokens == type(config).micro_tokens:
                config.micro_tokens = SMALL_PASS
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
    return model, tokenizer


def source_of(name: str) -> tuple:
    """(a folder or a hub name, whether to look on this machine alone). ValueError for a folder that is not there."""
    for folder in (ROOT / name, Path(name)):
        if (folder / "config.json").exists():
            return folder, True
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists():
        raise ValueError(f"--model {name}: there is no checkpoint in such a folder, one with a config.json")
    return name, not hub_answers()


def hub_answers() -> bool:
    """Can the hub be reached? Asked once, for at most three seconds: the library itself tries for half a minute."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    host = urlparse(constants.ENDPOINT).hostname
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


def is_shipped(config: Any, task: Any) -> bool:
    """Is it a policy of this repository, with its task's settings? Those are known to work."""
    room = task.defaults.get("max_new_tokens", type(config).max_new_tokens)
    unusual = (config.data, config.data_test, config.bf16, config.gradient_checkpointing,
               config.chat_template_kwargs)
    return config.model in ("base", task.defaults.get("model")) and config.max_new_tokens == room and not any(unusual)


def make_task(config: Any, tasks: dict) -> Any:
    """The task that is named, or one of a reader's own problems."""
    if not config.data and not config.data_test:
        return tasks[config.task]()
    if config.task != "math":
        name = "--data" if config.data else "--data-test"
        raise ValueError(f"{name} {config.data or config.data_test}: only --task math takes a file")
    from recipes.problems import OwnProblems
    return OwnProblems(data=config.data, data_test=config.data_test)


def device_of(name: str) -> str:
    """A device that is here; of auto the first of cuda, mps, cpu. ValueError where it is not."""
    if name == "auto":
        name = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: is not here ({str(error).splitlines()[0][:80]})")
    if not name.startswith("cpu"):
        torch.set_float32_matmul_precision("high")
    return name
