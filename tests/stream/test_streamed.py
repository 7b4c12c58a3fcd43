"""A model that is run block by block computes what it computes as a whole.

To the last bit when all sequences go together; in micro-batches matrix products of other shapes may round otherwise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lillama.errors import ModelError
from lillama.lowrank.install import install, low_rank_linears
from lillama.modeling.quantizer import LowRankConfig, declare
from lillama.stream.activations import ActivationPlacement, ActivationStore
from lillama.stream.batch import Batch
from lillama.stream.capture import advance, begin, finish, row_slices
from lillama.stream.model import StreamedModel, open_streamed

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama": lambda: LlamaConfig(**GATED),
    "Llama, tied": lambda: LlamaConfig(**GATED, tie_word_embeddings=True),
    "Mistral, sliding": lambda: MistralConfig(**GATED, sliding_window=4),
    "Qwen2": lambda: Qwen2Config(**GATED),
    "Gemma2, sliding and full": lambda: Gemma2Config(**GATED, head_dim=8, sliding_window=4),
    "Phi": lambda: PhiConfig(**GATED),
    "OPT": lambda: OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=32),
    "GPT-NeoX": lambda: GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "Falcon": lambda: FalconConfig(**SHAPE),
    "Falcon, alibi": lambda: FalconConfig(**SHAPE, alibi=True),
    "Bloom": lambda: BloomConfig(**SHAPE),
}
every_model = pytest.mark.parametrize("kind", CONFIGS)
MASK = torch.ones(5, 10, dtype=torch.bool)
MASK[2, :4] = False
MASK[4, :2] = False
MASKS = {"no mask": None, "left padding": MASK, "nothing padded": torch.ones_like(MASK)}
MakePlacement = Callable[[str], ActivationPlacement]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (5, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PreTrainedModel, Path]]:
    """Give every kind of model, and the folder that it is saved in, once."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def make(kind: str) -> tuple[PreTrainedModel, Path]:
        if kind not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            made[kind] = model, tmp_path_factory.mktemp("model")
            model.save_pretrained(made[kind][1], max_shard_size="30KB")
        return made[kind]

    return make


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    return model(input_ids=ids, attention_mask=None if mask is None else mask.long(), use_cache=False).logits


def streamed(
    model: StreamedModel, ids: Tensor, mask: Tensor | None, placement: ActivationPlacement, place: Any, micro_batch: int
) -> Tensor:
    shape = (*ids.shape, model.skeleton.config.hidden_size)
    store = ActivationStore(shape, model.dtype, placement, place, "hidden")
    calls, hidden = begin(model, Batch.of_tokens(ids, mask), lambda found: store, micro_batch)
    for index in range(len(model.names)):
        advance(model.block(index), index, calls, hidden, hidden, micro_batch)
    return finish(model, model.outside(head=True), calls, ids, hidden.read(slice(0, len(ids))))


@every_model
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("micro_batch", "place"), [(1, "host"), (2, "disk"), (3, "host"), (5, "disk")])
def test_streaming_gives_the_models_own_logits(
    kind: str, mask: str, micro_batch: int, place: str, ids: Tensor, placement: MakePlacement, folders: Any
) -> None:
    model, folder = folders(kind)
    found = streamed(open_streamed(folder, CPU), ids, MASKS[mask], placement(place), place, micro_batch)
    wanted = whole(model, ids, MASKS[mask])
    real = torch.ones_like(MASK) if MASKS[mask] is None else MASKS[mask]
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2, sliding and full", "Bloom"])
@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_numbers_that_happen_to_agree_are_not_taken_for_sequences(
    kind: str, length: int, count: int, ids: Tensor, placement: MakePlacement, folders: Any
) -> None:
    model, folder = folders(kind)
    ids = ids[:count, :length]
    found = streamed(open_streamed(folder, CPU), ids, None, placement("host"), "host", 2)
    torch.testing.assert_close(found, whole(model, ids, None), rtol=1e-5, atol=1e-5)


def test_calls_of_chosen_rows_are_those_of_their_sequences(ids: Tensor, placement: MakePlacement, folders: Any) -> None:
    _, folder = folders("Llama")
    model = open_streamed(folder, CPU)
    hidden, after = (ActivationStore((5, 10, 32), torch.float32, placement("host"), "host", name) for name in "ab")
    calls, _ = begin(model, Batch.of_tokens(ids, MASK), lambda shape: hidden, 2)
    block = model.block(0)
    advance(block, 0, calls, hidden, after, 5)
    for rows in (torch.tensor([4, 2]), torch.tensor([2]), torch.tensor([0, 4, 1])):
        found = calls.select(0, rows, CPU)(block, hidden.read(rows))
        torch.testing.assert_close(found[MASK[rows]], after.read(rows)[MASK[rows]])


@pytest.mark.parametrize("kind", ["Llama", "Falcon", "Qwen2"])
def test_a_compressed_model_streams_as_from_pretrained_loads_it(
    kind: str, ids: Tensor, placement: MakePlacement, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    ranks = {name: 3 + index for index, name in enumerate(names[::2])}
    install(model, ranks)
    for _, layer in low_rank_linears(model):
        nn.init.normal_(layer.left.weight, std=0.3)
        nn.init.normal_(layer.right.weight, std=0.3)
    declare(model, LowRankConfig(ranks=ranks))
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    opened = open_streamed(tmp_path / "model", CPU)
    assert {name: layer.rank for name, layer in low_rank_linears(opened.skeleton)} == ranks
    torch.testing.assert_close(
        streamed(opened, ids, MASK, placement("host"), "host", 5)[MASK], whole(loaded, ids, MASK)[MASK]
    )


def test_only_the_block_asked_for_has_weights(folders: Any) -> None:
    _, folder = folders("Llama")
    model = open_streamed(folder, CPU)
    block, outside = model.block(1), model.outside(head=False)
    assert not any(parameter.is_meta for parameter in block.parameters())
    assert all(parameter.is_meta for index in range(3) for parameter in model.template(index).parameters())
    real = {name for name, parameter in outside.named_parameters() if not parameter.is_meta}
    assert real == {"model.embed_tokens.weight", "model.norm.weight"}
    whole_outside = model.outside(head=True)
    assert {name for name, parameter in whole_outside.named_parameters() if not parameter.is_meta} == real | {
        "lm_head.weight"
    }


def test_tied_embeddings_are_read_once_and_shared(folders: Any) -> None:
    _, folder = folders("Llama, tied")
    model = open_streamed(folder, CPU)
    for head in (False, True):
        outside = model.outside(head)
        assert outside.get_output_embeddings().weight is outside.get_input_embeddings().weight
        assert not outside.get_input_embeddings().weight.is_meta


def test_weights_are_fp32_on_the_cpu_unless_another_type_is_wanted(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**GATED)).bfloat16().save_pretrained(tmp_path)
    assert open_streamed(tmp_path, CPU).dtype == torch.float32
    model = open_streamed(tmp_path, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in model.block(0).parameters()} == {torch.bfloat16}


def test_a_model_without_a_head_has_no_logits(ids: Tensor, placement: MakePlacement, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**GATED)).model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="LlamaModel has no language-modelling head"):
        streamed(open_streamed(tmp_path, CPU), ids, None, placement("host"), "host", 5)


def test_a_model_that_others_quantised_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**GATED)
    config.architectures = ["LlamaForCausalLM"]
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"already quantised \(gptq\)"):
        open_streamed(tmp_path, CPU)


def test_row_slices_cover_every_row_once() -> None:
    for total in range(8):
        for size in (1, 2, 3, 10):
            slices = list(row_slices(total, size))
            assert [row for part in slices for row in range(part.start, part.stop)] == list(range(total))
            assert all(0 < part.stop - part.start <= size for part in slices)
