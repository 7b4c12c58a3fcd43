from collections.abc import Callable

from transformers import LlamaConfig, PretrainedConfig

from lillama.model.skeleton import skeleton


def test_a_skeleton_keeps_real_buffers_and_leaves_the_configuration_alone(
    config: Callable[..., PretrainedConfig],
) -> None:
    made = config(LlamaConfig)
    before = made.to_dict()
    built = skeleton(made)
    assert built.config is not made and made.to_dict() == before
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in built.parameters())
    assert all(not buffer.is_meta for buffer in built.buffers()) and not built.training
