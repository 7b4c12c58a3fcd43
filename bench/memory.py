"""Peak memory of `lillama compress` above that of a tiny model, on made-up Llamas of equal blocks but unequal depth.

    python bench/memory.py            # writes bench/results/memory.{json,md}

The yardstick is what one block needs: teacher block + student block + fp32 masters and two moments + what autograd keeps of one
micro-batch (measured). Gradients and Grams are not in it, though both are needed. Activations between blocks lie on disk.
Compression takes more where more is free (moments, blocks and graphs of the recovery tail stay in memory), so that it is told
of a machine that has just `ROOM` times the yardstick. Anonymous memory is counted, sampled every few milliseconds: pages of
mapped files (activations on disk, checkpoints) are resident too, but the system takes them back when it needs them.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DEPTHS = (4, 8)
HIDDEN, FFN, HEADS, VOCABULARY, SEQ_LEN, ROWS = 1024, 4096, 8, 512, 256, 9
KEEP, MICRO_BATCH, ROOM = 0.7, 8, 1.3


def make_model(folder: Path, depth: int, hidden: int = HIDDEN, ffn: int = FFN, heads: int = HEADS) -> None:
    """Write a random fp32 Llama, block by block, with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from lillama.model.checkpoint import CheckpointWriter
    from lillama.model.skeleton import skeleton

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=VOCABULARY, max_position_embeddings=SEQ_LEN, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(folder, 1_000_000_000) as writer:
        for name, parameter in skeleton(config).named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            writer.write(name, torch.ones(parameter.shape) if parameter.dim() == 1 else noise)
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def compress(folder: Path, room: int) -> dict[str, int]:
    """Compress in this process, as if the machine had so many bytes; return the peak above what a tiny model leaves."""
    import torch

    import lillama
    import lillama.pipeline.api
    from lillama.recipes.options import Machine
    from lillama.recipes.recipe import load_recipe
    from lillama.system.resources import trim_memory

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe = load_recipe("default", {"distill": {"epochs": 1, "batch_size": MICRO_BATCH}})

    def run(name: str) -> None:
        lillama.compress(
            folder / name, folder / f"{name}-out", keep=KEEP, recipe=recipe, calibration=[str(folder / "text.txt")],
            tokens=ROWS * SEQ_LEN, seq_len=SEQ_LEN,
            machine=Machine("cpu", micro_batch=MICRO_BATCH, activation_memory=0, shard_bytes=100_000_000),
        )  # fmt: skip

    run("tiny")  # all code is loaded then
    trim_memory()
    before, peak = anonymous(), Peak()
    free = patch("lillama.system.memory.free_memory", lambda device: room)
    unchecked = patch(
        "lillama.pipeline.compress.check_resources"
    )  # it counts what autograd keeps by the most that there may be
    with free, unchecked, peak:
        run("model")
    return {"peak_bytes": peak.bytes - before, "before_bytes": before}


def anonymous() -> int:
    """Return the bytes of this process that lie in no file."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Peak(threading.Thread):
    """Samples `anonymous` while the context lasts; its largest value is `bytes`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._over = 0, threading.Event()

    def run(self) -> None:
        """Sample until the context ends."""
        while not self._over.wait(0.003):
            self.bytes = max(self.bytes, anonymous())

    def __enter__(self) -> "Peak":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self.join()


def yardstick(folder: Path) -> dict[str, int]:
    """Return the bytes that one block needs, by part."""
    import torch

    import lillama
    from lillama.lowrank.install import install
    from lillama.stream.activations import ActivationPlacement, StoreFactory
    from lillama.stream.batch import Batch
    from lillama.stream.capture import begin
    from lillama.stream.model import open_streamed

    model = open_streamed(folder / "model", torch.device("cpu"))
    plan = lillama.plan(folder / "model", keep=KEEP).plan
    spec = plan.spec.blocks[0]
    ranks = plan.ranks_within(spec)
    placement = ActivationPlacement(torch.device("cpu"), folder, 0, 1 << 40)
    batch = Batch.of_tokens(torch.zeros(MICRO_BATCH, SEQ_LEN, dtype=torch.long))
    calls, hidden = begin(model, batch, StoreFactory(placement, torch.float32, "hidden"), MICRO_BATCH)
    call = calls.select(0, slice(0, MICRO_BATCH), torch.device("cpu"))
    student = model.block(0)
    install(student, ranks)
    student.requires_grad_(True)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or keep(t), lambda t: t):
        call(student, hidden.read(slice(0, MICRO_BATCH))).sum()
    params = sum(parameter.numel() for parameter in student.parameters())
    return {
        "teacher": 4 * spec.params,
        "student": 4 * params,
        "masters, moments": 12 * params,
        "micro-batch": sum(kept.values()),
    }


def asked(*arguments: str) -> dict[str, Any]:
    """Run this file in a process of its own and return what it says."""
    command, environment = [sys.executable, __file__, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run each depth in a process of its own."""
    if len(sys.argv) > 1:
        folder, *room = sys.argv[1:]
        print(json.dumps(compress(Path(folder), int(room[0])) if room else yardstick(Path(folder))))
        return
    found = {}
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "model").mkdir()
            make_model(Path(folder) / "model", depth)
            (Path(folder) / "tiny").mkdir()
            make_model(Path(folder) / "tiny", 2, 64, 128, 2)
            (Path(folder) / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
            weights = sum(file.stat().st_size for file in (Path(folder) / "model").rglob("*.safetensors"))
            needed = asked(folder)
            measured = asked(folder, str(round(ROOM * sum(needed.values()))))
            ratio = measured["peak_bytes"] / sum(needed.values())
            found[depth] = measured | {"yardstick": needed, "weight_bytes": weights, "ratio": ratio}
            print(depth, found[depth], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps({"version": 1, "depths": found}, indent=2) + "\n")
    (RESULTS / "memory.md").write_text(table(found))
    print(table(found))


def table(found: dict[int, dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    parts = next(iter(found.values()))["yardstick"]
    text = (
        "# Peak memory of a compression\n\n"
        f"Random fp32 Llamas of hidden size {HIDDEN}, FFN {FFN}; keep {KEEP}; micro-batch {MICRO_BATCH} x {SEQ_LEN} tokens; "
        f"activations on disk; told of a machine of {ROOM} times what one block needs. Peak anonymous memory above what "
        "a tiny model leaves. Written by `python bench/memory.py`.\n\n"
        f"One block needs {sum(parts.values()) / 1e6:,.0f} MB: "
        + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items())
        + ".\n\n| blocks | weights, MB | peak, MB | peak / one block's need |\n|---:|---:|---:|---:|\n"
    )
    for depth, row in found.items():
        text += (
            f"| {depth} | {row['weight_bytes'] / 1e6:,.0f} | {row['peak_bytes'] / 1e6:,.0f} | {row['ratio']:.2f} |\n"
        )
    return text


if __name__ == "__main__":
    main()
