"""Encoder-decoders stream as well, and what cannot be streamed is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lillama.errors import ModelError
from lillama.model.kind import kind_of
from lillama.stream.activations import ActivationPlacement, StoreFactory
from lillama.stream.batch import Batch, batch_of
from lillama.stream.capture import finish
from lillama.stream.forward import through
from lillama.stream.model import open_streamed

CPU = torch.device("cpu")
WIDE = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "vocab_size": 60,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=32, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4, d_kv=8)
    ),
    "BART": lambda: BartForConditionalGeneration(BartConfig(**WIDE, max_position_embeddings=32)),
    "Whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(**WIDE, max_source_positions=20, max_target_positions=16, num_mel_bins=8)
    ),
}


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (5, 7), generator=generator)
    if kind == "Whisper":
        return {"input_features": torch.randn(5, 8, 40, generator=generator), "decoder_input_ids": ids}
    return {"input_ids": torch.randint(3, 60, (5, 9), generator=generator), "decoder_input_ids": ids}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("micro_batch", [2, 5])
@pytest.mark.parametrize("disk", [False, True])
def test_both_stacks_stream_to_the_models_own_logits(kind: str, micro_batch: int, disk: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = MODELS[kind]().eval().requires_grad_(False)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    whole.save_pretrained(tmp_path / "model")
    model, given = open_streamed(tmp_path / "model", CPU), inputs(kind)
    batch = Batch(given, given["decoder_input_ids"])
    new = StoreFactory(
        ActivationPlacement(CPU, tmp_path / "stores", 0, 0 if disk else 1 << 30), torch.float32, "hidden"
    )
    calls, outputs = through(model, batch, new, micro_batch)
    assert [store.shape[:2] for store in outputs] == [(5, 20 if kind == "Whisper" else 9), (5, 7)]
    last = outputs[-1].read(slice(0, 5))
    found = finish(model, model.outside(head=True), calls[-1], given["decoder_input_ids"], last)
    torch.testing.assert_close(found, whole(**given).logits, rtol=1e-4, atol=1e-4)


def test_an_encoder_decoder_reads_the_first_half_of_a_text_and_writes_the_second() -> None:
    model = MODELS["T5"]()
    model.config.decoder_start_token_id = 7
    ids = torch.arange(20).view(2, 10)
    batch = batch_of(kind_of(model), ids, None, {})
    assert batch.inputs["input_ids"].tolist() == ids[:, :5].tolist()
    assert batch.inputs["decoder_input_ids"].tolist() == [[7, *range(5, 10)], [7, *range(15, 20)]]
    assert batch.ids is not None and torch.equal(batch.ids, batch.inputs["decoder_input_ids"])
    assert len(batch[torch.tensor([1])]) == 1


def test_blocks_that_share_their_weights_are_refused(tmp_path: Path) -> None:
    config = AlbertConfig(
        vocab_size=60, hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=3
    )
    AlbertForMaskedLM(config).save_pretrained(tmp_path / "model")
    model = open_streamed(tmp_path / "model", CPU)
    new = StoreFactory(ActivationPlacement(CPU, tmp_path, 0, 1 << 30), torch.float32, "hidden")
    with pytest.raises(ModelError, match="AlbertForMaskedLM: blocks run more than once, or in another order"):
        through(model, Batch.of_tokens(torch.randint(3, 60, (2, 7))), new, 2)


def test_blocks_of_several_widths_are_refused(tmp_path: Path) -> None:
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    SwinModel(config).save_pretrained(tmp_path / "model")
    model = open_streamed(tmp_path / "model", CPU)
    new = StoreFactory(ActivationPlacement(CPU, tmp_path, 0, 1 << 30), torch.float32, "hidden")
    with pytest.raises(
        ModelError, match=r"SwinModel: .* only models whose blocks run one after the other, all of one width"
    ):
        through(model, Batch({"pixel_values": torch.randn(2, 3, 16, 16)}), new, 2)


def test_an_image_model_streams_to_its_own_last_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
                       patch_size=4)  # fmt: skip
    whole = ViTModel(config).eval().requires_grad_(False)
    whole.save_pretrained(tmp_path / "model")
    pixels = torch.randn(3, 3, 16, 16)
    new = StoreFactory(ActivationPlacement(CPU, tmp_path, 0, 1 << 30), torch.float32, "hidden")
    _, outputs = through(open_streamed(tmp_path / "model", CPU), Batch({"pixel_values": pixels}), new, 2)
    found = whole.layernorm(outputs[-1].read(slice(0, 3)))
    torch.testing.assert_close(found, whole(pixel_values=pixels).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_features_enter_in_the_type_that_the_model_computes_in(tmp_path: Path) -> None:
    MODELS["Whisper"]().save_pretrained(tmp_path / "model")
    model, given = open_streamed(tmp_path / "model", CPU, torch.bfloat16), inputs("Whisper")
    new = StoreFactory(ActivationPlacement(CPU, tmp_path, 0, 1 << 30), torch.bfloat16, "hidden")
    _, outputs = through(model, Batch(given, given["decoder_input_ids"]), new, 2)
    assert outputs[-1].read(slice(0, 5)).dtype == torch.bfloat16


def test_a_model_that_does_not_run_on_these_inputs_is_refused_with_the_reason(tmp_path: Path) -> None:
    MODELS["Whisper"]().save_pretrained(tmp_path / "model")
    new = StoreFactory(ActivationPlacement(CPU, tmp_path, 0, 1 << 30), torch.float32, "hidden")
    with pytest.raises(ModelError, match=r"model\.encoder\.layers\.0 is not reached \("):
        through(
            open_streamed(tmp_path / "model", CPU), Batch({"input_ids": torch.zeros(2, 5, dtype=torch.long)}), new, 2
        )


def test_nothing_is_left_on_disk(tmp_path: Path) -> None:
    MODELS["T5"]().save_pretrained(tmp_path / "model")
    given = inputs("T5")
    new = StoreFactory(ActivationPlacement(CPU, tmp_path / "stores", 0, 0), torch.float32, "hidden")
    calls, _ = through(open_streamed(tmp_path / "model", CPU), Batch(given, given["decoder_input_ids"]), new, 2)
    assert list((tmp_path / "stores").iterdir())
    new.remove()
    for table in calls:
        table.remove()
    assert not list((tmp_path / "stores").iterdir())
