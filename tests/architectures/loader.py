"""Load models in fresh processes: one child has everything imported and forks for every request.

Run with `import` it has imported lillama; with `remote` lillama cannot be imported, and models load by trust_remote_code.
"""

import json
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class NoLillama(MetaPathFinder):
    """Lets nobody import lillama."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Refuse lillama, know nothing of the rest."""
        if fullname.partition(".")[0] == "lillama":
            raise ImportError("lillama is not to be had here")


def answer(request: dict[str, Any]) -> None:
    """Load a model, run it, and write what it gives, and what it gives after it was saved again."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    auto = getattr(transformers, request["auto"])
    inputs = load_file(request["inputs"])
    found: dict[str, torch.Tensor] = {}

    def run(name: str, folder: str) -> Any:
        model = auto.from_pretrained(folder, trust_remote_code=request["remote"]).eval()
        with torch.no_grad():
            output = model(**inputs)
        found[name] = output.logits if "logits" in output else output.last_hidden_state
        return model

    model = run("loaded", request["folder"])
    if request["write"] and model.can_generate():
        prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
        found["written"] = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    if request["again"]:
        model.save_pretrained(request["again"])
        run("again", request["again"])
    save_file({key: value.contiguous() for key, value in found.items()}, request["answer"])


def main() -> None:
    """Serve requests, a JSON object on each line, until there are no more; answer `ok` or the error."""
    if sys.argv[1] == "remote":
        sys.meta_path.insert(0, NoLillama())
    import torch
    from transformers.generation import utils  # noqa: F401  (imported once, before the forks, for they take long)
    from transformers.models.auto import modeling_auto  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    if sys.argv[1] == "import":
        import lillama  # noqa: F401
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            try:
                answer(request)
                os._exit(0)
            except BaseException as error:  # noqa: BLE001  (told to whoever asked)
                Path(request["answer"]).with_suffix(".error").write_text(
                    f"{type(error).__name__}: {error}", encoding="utf-8"
                )
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print("ok" if status == 0 else "failed", flush=True)


if __name__ == "__main__":
    main()
