"""Put a compressed model folder together: finished blocks, everything else from the original, one tensor at a time."""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from lillama.files import write_json
from lillama.hub.export import carry_along
from lillama.hub.quantizer import LowRankConfig
from lillama.model.checkpoint import CheckpointReader, CheckpointWriter
from lillama.model.spec import BlockSpec, ModelSpec


def assemble(
    folder: Path,
    reader: CheckpointReader,
    names: Mapping[str, str],
    spec: ModelSpec,
    ranks: Mapping[str, int],
    compressed: Callable[[BlockSpec], Mapping[str, Tensor] | None],
    recipe_hash: str,
    shard_bytes: int,
) -> None:
    """Write config, weights and companions of a compressed model into an empty folder.

    Args:
        folder: to be filled.
        reader: of the original.
        names: name in the model -> name in the original's checkpoint.
        spec: of the original.
        ranks: full name -> rank of the factorised linears.
        compressed: returns the state of a block (name within it -> tensor), or None if it stays as it is.
        recipe_hash: goes into config.json.
        shard_bytes: largest size of a weight file.
    """
    carry_along(reader.folder, folder)
    config = json.loads((reader.folder / "config.json").read_text(encoding="utf-8"))
    low_rank = LowRankConfig(ranks=dict(ranks), lillama_version=version("lillama"), recipe_hash=recipe_hash)
    write_json(folder / "config.json", config | ({"quantization_config": low_rank.to_dict()} if ranks else {}))
    outside = [name for name in names if not any(name.startswith(f"{block.name}.") for block in spec)]
    with CheckpointWriter(folder, shard_bytes) as writer:
        for name in outside:
            writer.write(name, reader.read(names[name]))
        for block in spec:
            state = compressed(block)
            if state is None:
                inside = (name for name in names if name.startswith(f"{block.name}."))
                state = {name.removeprefix(f"{block.name}."): reader.read(names[name]) for name in inside}
            for name, tensor in state.items():
                writer.write(f"{block.name}.{name}", tensor)
