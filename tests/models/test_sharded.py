"""Models whose weights are split over processes: two of them, on the CPU."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import spanned_prompts, tiny, tiny_tokenizer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from spade_lens import Keep, Model, Prompt, Spade, capture, load, read
from spade_lens.exits.answer_head import AnswerHead
from spade_lens.models.identity import identity_of

# Python 3.12 warns of a fork beside threads, of which these processes have none that matters.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
PROMPTS = spanned_prompts(3)
DECISIONS = [Prompt(prompt.tokens, candidates=(5, 6, 40)) for prompt in PROMPTS]


def numbers(model: Model) -> dict[str, Any]:
    stack = capture(model, PROMPTS).stack
    head = AnswerHead(model)
    finals = capture(model, PROMPTS, layers=4, positions="last").stack[0]
    return {
        "residuals": stack,
        "kl": read(PROMPTS, Spade(model, keep=Keep(spans=("labels",)))).kl,
        "of candidates": head.option_logprobs(finals, DECISIONS, 3),
        "narrow": torch.tensor(head.narrow),
        "written": torch.tensor(model.generate(PROMPTS[:2], 3).to_frame()["token_id"].tolist()),
        "identity": str(identity_of(model)),
    }


def split_by_plan(folder: Path) -> Model:
    return load(folder, name="m", tp_plan="auto")


def wrapped_by_fsdp(folder: Path) -> Model:
    hf_model = load(folder).original
    for block in hf_model.model.layers:
        fully_shard(block)
    fully_shard(hf_model)
    return load(hf_model, name="m")


def process(rank: int, port: int, make: Callable[[Path], Model], folder: Path) -> None:
    """Run as one of two processes, and leave the numbers in the folder."""
    about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in about.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    path = folder / f"{make.__name__}-{rank}.pt"
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        model = make(folder)
        split = sum(isinstance(weight, DTensor) for weight in model.original.state_dict().values())
        torch.save([split, numbers(model), model.original.lm_head.weight.shape], path)
        torch.distributed.destroy_process_group()
    except BaseException:
        torch.save(traceback.format_exc(), path)


@pytest.mark.parametrize("make", [split_by_plan, wrapped_by_fsdp])
def test_two_processes_read_the_same_model(tmp_path: Path, make: Callable[[Path], Model]) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    expected = numbers(load(tmp_path, name="m"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Forked, since a new Python takes ten seconds to import all this.
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=process, args=(r, port, make, tmp_path)) for r in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(600)
        one.kill()
    for rank in range(2):
        told = torch.load(tmp_path / f"{make.__name__}-{rank}.pt", weights_only=False)
        assert isinstance(told, list), told
        split, own, _ = told
        assert split > 20
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(own[key], value, atol=1e-5, rtol=1e-5, msg=key)
            else:
                assert own[key] == value, key
